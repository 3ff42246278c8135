//! Disks keep what is written, whatever lies behind them.

use crate::common::guest::Kernel;
use crate::common::{temp_dir, text};
use crate::help::{guest, words};
use crate::host::{Loop, Mount, blocks, command, make_image, tool};
use std::path::PathBuf;

/// File systems, discards, read-only disks; and no disk has two writers.
pub fn disks_keep_what_is_written(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let ext4 = dir.path().join("ext4");
    make_image(&ext4, 64 << 20);
    command("mkfs.ext4", &["-q", "-F", text(&ext4)]);
    let content = dir.path().join("content");
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("hello"), "from erofs\n").unwrap();
    let erofs = dir.path().join("erofs");
    command("mkfs.erofs", &[text(&erofs), text(&content)]);
    let script = "
mkdir /m /e
mount -t ext4 /dev/vda /m
dd if=/dev/urandom of=/m/file bs=1M count=20 2>/dev/null
md5sum </m/file
sync
umount /m
mount -t ext4 /dev/vda /m
md5sum </m/file
echo full; read -r go
rm /m/file
sync
fstrim /m
umount /m
echo trimmed; read -r go
mount -t erofs -o ro /dev/vdb /e && cat /e/hello
touch /e/new 2>/dev/null || echo read-only
dd if=/dev/hwrng bs=1k count=64 2>/dev/null | wc -c
";
    let guest = guest(kernel, script);
    let (first, second) = (
        format!("{},cache=writeback", ext4.display()),
        format!("{},ro", erofs.display()),
    );
    let words = words(
        "--cmdline quiet --entropy",
        &["--disk", &first, "--disk", &second],
    );
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("full\n");
    let full = blocks(&ext4);
    // Another VM that wants to write the same image is refused, and is told why.
    let other = guest.run(&["--disk", text(&ext4)]);
    other.expect_status(2);
    assert!(other.stderr.contains(text(&ext4)), "{}", other.stderr);
    assert!(other.stderr.contains("in use"), "{}", other.stderr);
    vm.send(b"\n");
    vm.expect("trimmed\n");
    let trimmed = blocks(&ext4);
    assert!(
        trimmed + (15 << 11) < full,
        "discard left {trimmed} of {full} blocks"
    );
    vm.send(b"\n");
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    let sums: Vec<&str> = console.lines().filter(|l| l.ends_with("  -")).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{}", ended.report());
    for said in ["from erofs\nread-only\n", "65536\n"] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    assert_eq!(ended.stderr, "");
    command("e2fsck", &["-f", "-n", text(&ext4)]);
}

/// All of a disk is written in random order, in requests of mixed sizes, and read back: by either engine, through the host's
/// page cache and around it. Each pair of kernel and transport does that with 256 MB of one combination, and less of the others.
pub fn random_writes_come_back_from_each_engine(kernel: &Kernel, flags: &[&str]) {
    const LARGE: u64 = 256;
    const SMALL: u64 = 8;
    let own = usize::from(kernel.modules.is_some()) * 2 + usize::from(flags.contains(&"--pci"));
    let dir = temp_dir();
    let direct = Mount::ext4((LARGE + 96) << 20);
    let image = |index: usize, folder: &std::path::Path| {
        let mib = if index == own { LARGE } else { SMALL };
        let path = folder.join(format!("image{index}"));
        make_image(&path, mib << 20);
        (path, mib)
    };
    let images: [(PathBuf, u64); 4] = [
        image(0, dir.path()),
        image(1, dir.path()),
        image(2, direct.path()),
        image(3, dir.path()),
    ];
    let device = Loop::new(&images[3].0, 512);
    let disks = [
        format!("{},engine=uring", images[0].0.display()),
        format!("{},engine=sync,cache=writeback", images[1].0.display()),
        format!("{},engine=uring,direct,queues=2", images[2].0.display()),
        format!("{},engine=sync,direct,cache=writeback", device.0.display()),
    ];
    let mut script = String::new();
    for (index, (_, mib)) in images.iter().enumerate() {
        // The long one as it is; the others through the guest's cache, which makes requests of its own.
        let how = if index == own { "direct 4" } else { "cached 1" };
        let letter = char::from(b'a' + index as u8);
        script += &format!("tool verify /dev/vd{letter} {mib} {how}\n");
    }
    let mut guest = guest(kernel, &script);
    guest.limit *= 4;
    let disks: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let words = [&words("--cmdline quiet --cpus 2", flags)[..], &disks].concat();
    let ended = guest.run(&words);
    let console = ended.expect_status(0).console();
    assert_eq!(ended.stderr, "");
    for (index, (path, _)) in images.iter().enumerate() {
        let letter = char::from(b'a' + index as u8);
        // What the guest has read is what is in the file, block by block.
        let sum = tool(&["sum", text(path)]);
        let (_, sum) = sum.trim().rsplit_once(' ').unwrap();
        let said = format!("tool: /dev/vd{letter} verified, {sum}\n");
        assert!(console.contains(&said), "no {said:?}\n{}", ended.report());
    }
}
