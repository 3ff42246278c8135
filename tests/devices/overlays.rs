//! Disks that stay as they are, whatever guests write.

use crate::common::guest::{Kernel, md5};
use crate::common::{temp_dir, text};
use crate::help::{guest, words};
use crate::host::{Mount, command, make_image};

/// Two VMs at once write to a file system on one image, each its own, until the overlay of one finds no room.
pub fn two_guests_write_to_one_image_which_stays_as_it_is(kernel: &Kernel, flags: &[&str]) {
    let (dir, small) = (temp_dir(), Mount::tmpfs(6 << 20));
    let base = dir.path().join("base");
    make_image(&base, 64 << 20);
    command("mkfs.ext4", &["-q", "-F", text(&base)]);
    let before = md5(&std::fs::read(&base).unwrap());
    let script = "
mkdir /m
mount -t ext4 /dev/vda /m
[ -e /m/file ] && echo not mine
dd if=/dev/urandom of=/m/file bs=64k count=24 2>/dev/null
md5sum </m/file
sync
umount /m
echo written; read -r go
mount -t ext4 /dev/vda /m
md5sum </m/file
rm /m/file; fstrim /m; umount /m
dd if=/dev/urandom of=/dev/vda bs=1M seek=32 count=16 oflag=direct 2>/dev/null && echo all of it
dd if=/dev/vda of=/dev/null bs=1M iflag=direct 2>/dev/null && echo can be read
";
    let guest = guest(kernel, script);
    let roomy = format!(
        "{},overlay={},cache=writeback",
        base.display(),
        dir.path().display()
    );
    let tight = format!(
        "{},overlay={},engine=sync",
        base.display(),
        small.path().display()
    );
    let start = |disk| guest.start(&[&words("--cmdline quiet", &["--disk", disk]), flags].concat());
    let mut vms = [start(&roomy), start(&tight)];
    // Both have written when the first looks at what it wrote.
    vms.iter_mut().for_each(|vm| vm.expect("written\n"));
    let [first, second] = vms.map(|mut vm| {
        vm.send(b"\n");
        let ended = vm.finish();
        let console = ended.expect_status(0).console();
        let sums: Vec<&str> = console.lines().filter(|l| l.ends_with("  -")).collect();
        assert!(sums.len() == 2 && sums[0] == sums[1], "{}", ended.report());
        assert!(
            console.contains("can be read") && !console.contains("not mine"),
            "{console}"
        );
        (sums[0].to_owned(), console, ended.stderr)
    });
    assert_ne!(first.0, second.0);
    assert!(
        first.1.contains("all of it") && first.2.is_empty(),
        "{first:?}"
    );
    assert!(!second.1.contains("all of it"), "{second:?}");
    assert!(second.2.contains("No space left on device"), "{second:?}");
    assert_eq!(second.2.lines().count(), 1, "{second:?}");
    // Nothing but the image is there, and it is what it was.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(md5(&std::fs::read(&base).unwrap()) == before);
}
