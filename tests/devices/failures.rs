//! What fails on the host is an error for the guest, and never the end of the VM.

use crate::common::guest::Kernel;
use crate::common::{Ended, temp_dir};
use crate::help::{guest, words};
use crate::host::{Mount, Removable, Tap, Uplink, command, make_image};
use std::fs::File;

/// Husk ended with the guest's power-off, and said nothing but warnings.
#[track_caller]
fn assert_survived(ended: &Ended) {
    let console = ended.expect_status(0).console();
    for said in ["still here\n", "reboot: Power down"] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    for bad in ["panicked", "internal error"] {
        assert!(!ended.stderr.contains(bad), "{}", ended.report());
    }
}

/// A file system that is smaller than the image on it: writes fail when it is full.
pub fn a_full_host_disk_is_the_guests_trouble_only(kernel: &Kernel, flags: &[&str]) {
    let place = Mount::tmpfs(8 << 20);
    let (uring, sync) = (place.path().join("uring"), place.path().join("sync"));
    for image in [&uring, &sync] {
        make_image(image, 32 << 20);
    }
    let script = "
for disk in vda vdb; do
	dd if=/dev/urandom of=/dev/$disk bs=1M count=16 oflag=direct 2>/dev/null && echo all of $disk written
	dd if=/dev/$disk of=/dev/null bs=1M count=1 iflag=direct 2>/dev/null && echo $disk can be read
done
echo still here
";
    let guest = guest(kernel, script);
    let disks = [
        format!("{},engine=uring", uring.display()),
        format!("{},engine=sync", sync.display()),
    ];
    let words = words(
        "--cmdline quiet",
        &["--disk", &disks[0], "--disk", &disks[1]],
    );
    let ended = guest.run(&[&words, flags].concat());
    assert_survived(&ended);
    let console = ended.console();
    assert!(
        console.contains("vda can be read\nvdb can be read\n") && !console.contains("written"),
        "{}",
        ended.report()
    );
}

/// Files are cut off or deleted, devices fail, while their VM runs.
pub fn disks_that_go_away_are_the_guests_trouble_only(kernel: &Kernel, flags: &[&str]) {
    const SIZE: u64 = 16 << 20;
    let dir = temp_dir();
    let file = |name: &str| {
        let path = dir.path().join(name);
        make_image(&path, SIZE);
        path
    };
    let [cut, cut_sync, deleted] = ["cut", "cut_sync", "deleted"].map(file);
    let devices =
        ["device", "device_sync", "cached"].map(|name| Removable::new(name, &file(name), SIZE));
    let disks = [
        format!("{},engine=uring", cut.display()),
        format!("{},engine=sync", cut_sync.display()),
        format!("{},engine=uring,direct", devices[0].path().display()),
        format!("{},engine=sync,direct", devices[1].path().display()),
        format!("{}", deleted.display()),
        format!("{},cache=writeback", devices[2].path().display()),
    ];
    let script = "
disks='vda vdb vdc vdd vde'
for disk in $disks vdf; do
	dd if=/dev/urandom of=/dev/$disk bs=1M count=4 oflag=direct 2>/dev/null || echo $disk is bad from the start
done
echo ready; read -r go
for disk in $disks; do
	dd if=/dev/$disk of=/dev/null bs=64k count=1 skip=8 iflag=direct 2>/dev/null && echo $disk reads || echo $disk fails to read
done
for disk in $disks vdf; do
	# The last of them goes through the host's page cache: only its flush tells of the loss.
	dd if=/dev/zero of=/dev/$disk bs=64k count=1 seek=8 oflag=direct conv=fsync 2>/dev/null && echo $disk writes || echo $disk fails to write
done
echo still here
";
    let guest = guest(kernel, script);
    let disks: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    let words = [&words("--cmdline quiet", flags)[..], &disks].concat();
    let mut vm = guest.start(&words);
    vm.expect("ready\n");
    for path in [&cut, &cut_sync] {
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(0)
            .unwrap();
    }
    devices.iter().for_each(Removable::fail);
    std::fs::remove_file(&deleted).unwrap();
    vm.send(b"\n");
    let ended = vm.finish();
    assert_survived(&ended);
    let console = ended.console();
    // What was cut off cannot be read, but a write makes it anew. A deleted file is there for those who have it open.
    let wanted = "ready
vda fails to read
vdb fails to read
vdc fails to read
vdd fails to read
vde reads
vda writes
vdb writes
vdc fails to write
vdd fails to write
vde writes
vdf fails to write
still here
";
    assert!(console.contains(wanted), "{}", ended.report());
}

/// A tap is deleted and passt is killed: the guest sees the links go down.
pub fn networks_that_go_away_are_the_guests_trouble_only(kernel: &Kernel, flags: &[&str]) {
    let (tap, _link) = (Tap::new(), Uplink::new());
    let script = format!(
        "
ip addr add {guest}/24 dev eth0
for net in eth0 eth1; do ip link set $net up; done
ping -q -c 2 {host} | grep received
down() {{ until [ $(cat /sys/class/net/$1/carrier) = 0 ]; do sleep 0.1; done; echo $1 is down; }}
echo ready; read -r go
ping -q -c 3 -W 1 {host} | grep received
down eth0
down eth1
device=$(basename $(readlink /sys/class/net/eth0/device))
echo $device >/sys/bus/virtio/drivers/virtio_net/unbind
echo $device >/sys/bus/virtio/drivers/virtio_net/bind
ip link set eth0 up
down eth0
echo still here
",
        host = tap.host,
        guest = tap.guest
    );
    let guest = guest(kernel, &script);
    let net = format!("tap={}", tap.name);
    let words = words("--cmdline quiet", &["--net", &net, "--net", "user"]);
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("2 packets received");
    vm.expect("ready\n");
    command("ip", &["link", "del", &tap.name]);
    command("kill", &[&child(vm.pid().as_raw_nonzero().get(), "passt")]);
    vm.send(b"\n");
    let ended = vm.finish();
    assert_survived(&ended);
    let console = ended.console();
    for said in [
        " 0 packets received",
        "eth0 is down\neth1 is down\neth0 is down\n",
    ] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    assert!(
        ended.stderr.contains("lost its other end"),
        "{}",
        ended.report()
    );
}

/// The process below `parent` that runs `program`.
fn child(parent: i32, program: &str) -> String {
    let parent = parent.to_string();
    let list = command("ps", &["-o", "pid=,comm=", "--ppid", &parent]);
    let line = list.lines().find(|line| line.contains(program));
    let line = line.unwrap_or_else(|| panic!("no {program} below {parent}: {list}"));
    line.split_whitespace().next().unwrap().to_owned()
}
