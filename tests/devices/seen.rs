//! What a user sets is what the guest sees.

use crate::common::guest::Kernel;
use crate::common::{temp_dir, text};
use crate::help::{Accept, guest, listen, words};
use crate::host::{Loop, Tap, blocks, make_image};
use std::io::Write;

/// Where the guest reports, one `name=value` a line.
const FACTS: &str = r#"
say() { for file; do echo "$file=$(cat $file)"; done; }
cd /sys/block
say vda/serial vdb/serial vdb/ro vda/ro vda/size
say vda/queue/logical_block_size vda/queue/physical_block_size vdc/queue/logical_block_size vdc/queue/minimum_io_size
for disk in vda vdd; do echo "$disk/mq=$(ls $disk/mq | wc -l)"; done
cd /sys/class/net
say eth0/address eth0/mtu eth1/address
echo "queues=$(ls eth0/queues | wc -l) $(ls eth1/queues | wc -l)"
cd /sys/bus/virtio/devices
echo "devices=$(ls | wc -l)"
echo "drivers=$(ls -d */driver | wc -l)"
say /sys/class/misc/hw_random/rng_current
grep -c virtio /proc/interrupts
tool cid
tool zeroes /dev/vde
dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct 2>/dev/null || echo vdb cannot be written
"#;

/// Twelve devices at once, two vCPUs: names, sizes, blocks, queues, addresses. Then all queues are used.
pub fn whatever_is_set_is_seen_in_the_guest(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let image = |name: &str, mib: u64| {
        let path = dir.path().join(name);
        make_image(&path, mib << 20);
        path
    };
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let images = names.map(|name| image(name, 16));
    // A disk that takes nothing smaller than 4096 bytes.
    let large_blocks = Loop::new(&images[2], 4096);
    let plain = |index: usize| text(&images[index]).to_owned();
    let disks = [
        format!("{},id=first_disk", plain(0)),
        format!("{},ro,id=read_only", plain(1)),
        format!("{},direct", large_blocks.0.display()),
        format!("{},queues=2,engine=uring", plain(3)),
        plain(4),
        plain(5),
        plain(6),
    ];
    let (many, one) = (Tap::with(&["multi_queue"]), Tap::new());
    let nets = [
        format!("tap={},mac=02:00:00:00:00:17,mtu=1400,queues=2", many.name),
        format!("tap={}", one.name),
    ];
    let vsock = format!("cid=77,uds={}", dir.path().join("v").display());
    let listeners = [listen(&many.host, 5001), listen(&many.host, 5002)];
    let script = format!(
        "{FACTS}
tool verify /dev/vdd 16 direct 2
ip addr add {}/24 dev eth0
ip link set eth0 up
for n in 1 2; do taskset $n tool copy tcp:{}:500$n /tmp/$n >/tmp/said & done
wait
for n in 1 2; do cmp /tmp/1 /tmp/$n && echo same; done
wc -c </tmp/1
grep -E 'virtio.*(put|req)' /proc/interrupts
",
        many.guest, many.host
    );
    let guest = guest(kernel, &script);
    let disks = disks.iter().flat_map(|disk| ["--disk", disk]);
    let nets = nets.iter().flat_map(|net| ["--net", net]);
    let more: Vec<&str> = disks.chain(nets).chain(["--vsock", &vsock]).collect();
    let words = words("--cmdline quiet --cpus 2 --entropy --balloon 8", &more);
    let mut vm = guest.start(&[&words, flags].concat());
    let sent = crate::common::pattern(1 << 20);
    let mut streams = listeners.map(|listener| vm.accept(&listener));
    for part in sent.chunks(64 << 10) {
        for stream in &mut streams {
            stream.write_all(part).unwrap();
        }
    }
    drop(streams);
    vm.expect("same\nsame\n");
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    let direct_sector = "vdc/queue/logical_block_size=4096";
    for said in [
        "vda/serial=first_disk",
        "vdb/serial=read_only",
        "vdb/ro=1",
        "vda/ro=0",
        "vda/size=32768",
        "vda/queue/logical_block_size=512",
        "vda/queue/physical_block_size=4096",
        direct_sector,
        "vdc/queue/minimum_io_size=4096",
        "vda/mq=1",
        "vdd/mq=2",
        "eth0/address=02:00:00:00:00:17",
        "eth0/mtu=1400",
        "queues=4 2",
        "devices=12",
        "drivers=12",
        "tool: cid 77",
        "tool: /dev/vde has its zeroes",
        "vdb cannot be written",
        "1048576",
    ] {
        let there = console.lines().any(|line| line == said);
        assert!(there, "no {said:?}\n{}", ended.report());
    }
    assert!(
        console.contains("tool: /dev/vdd verified"),
        "{}",
        ended.report()
    );
    // Of 8 MiB the guest gave two back.
    let kept = blocks(&images[4]) >> 11;
    assert!((5..=6).contains(&kept), "{kept} MiB are left of the zeroes");
    if flags.contains(&"--pci") {
        // Each queue has its interrupt there, and each was used.
        for queue in [
            "input.0", "input.1", "output.0", "output.1", "req.0", "req.1",
        ] {
            let used = console.lines().any(|line| is_used(line, queue));
            assert!(used, "{queue} is not used\n{}", ended.report());
        }
    }
    assert_eq!(ended.stderr, "");
}

/// A line of /proc/interrupts: a number, a counter for each processor, the rest.
fn is_used(line: &str, queue: &str) -> bool {
    let counters = line.split_whitespace().skip(1).take(2);
    line.contains(queue) && counters.filter_map(|n| n.parse::<u64>().ok()).sum::<u64>() > 0
}
