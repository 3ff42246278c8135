//! Memory that a guest gives back to the host.

use crate::common::guest::Kernel;
use crate::help::{guest, words};
use crate::host::resident_mib;

/// Pages that become free go back by themselves.
pub fn memory_goes_back_to_the_host(kernel: &Kernel, flags: &[&str]) {
    let script = "
echo booted; read -r go
dd if=/dev/zero of=/tmp/large bs=1M count=120 2>/dev/null
echo used; read -r go
rm /tmp/large
sync
echo 3 >/proc/sys/vm/drop_caches
sleep 15
echo freed; read -r go
";
    let guest = guest(kernel, script);
    let mut vm = guest.start(&words("--cmdline quiet --balloon 0,reporting", flags));
    let mut at = |what: &str| {
        vm.expect(what);
        let mib = resident_mib(vm.pid());
        vm.send(b"\n");
        mib
    };
    let (booted, used, freed) = (at("booted\n"), at("used\n"), at("freed\n"));
    vm.finish().expect_status(0);
    assert!(used > booted + 110, "{booted} {used} {freed} MiB");
    assert!(freed < booted + 30, "{booted} {used} {freed} MiB");
}

/// A balloon of 96 MiB, by an idle guest at first, then by one that has used all its memory.
pub fn a_balloon_takes_and_gives_memory(kernel: &Kernel, flags: &[&str]) {
    let script = "
total() { sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
d=/sys/bus/virtio/drivers/virtio_balloon
b=$(basename $d/virtio*)
until [ $(total) -lt 170000 ]; do sleep 0.1; done
until [ \"$(total)\" = \"$least\" ]; do least=$(total); sleep 2; done
echo inflated $(total) kB
echo $b >$d/unbind
echo deflated $(total) kB
mount -o remount,size=100% /tmp
# Nearly all: what was never used is not the host's to get back.
free=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
dd if=/dev/zero of=/tmp/large bs=1M count=$((free / 1024 - 12)) 2>/dev/null
echo used; read -r go
rm /tmp/large
echo $b >$d/bind
until [ $(total) -le $least ]; do sleep 0.1; done
sleep 1
echo again $(total) kB; read -r go
";
    let guest = guest(kernel, script);
    let mut vm = guest.start(&words("--cmdline quiet --balloon 96,stats=1", flags));
    vm.expect("used\n");
    let used = resident_mib(vm.pid());
    vm.send(b"\n");
    vm.expect("again ");
    vm.expect("\n");
    let again = resident_mib(vm.pid());
    vm.send(b"\n");
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    assert_eq!(ended.stderr, "");
    // Of 256 MiB the balloon leaves 160; 12 are for the monitor itself.
    assert!(
        used > 256 - 40 && again < 256 - 96 + 12,
        "{used} MiB were resident, then {again}\n{}",
        ended.report()
    );
    let total = |state: &str| -> u64 {
        let line = console.lines().find_map(|line| line.strip_prefix(state));
        let words = line.unwrap_or_else(|| panic!("{}", ended.report()));
        words.trim_end_matches(" kB").trim().parse().unwrap()
    };
    let (inflated, deflated) = (total("inflated"), total("deflated"));
    assert_eq!((deflated - inflated) >> 10, 96, "{}", ended.report());
    assert_eq!(inflated, total("again"), "{}", ended.report());
}

pub fn a_balloon_gives_way_before_the_guest_kills(kernel: &Kernel, flags: &[&str]) {
    // Of 256 MiB the balloon leaves some 60.
    let script = "
free() { sed -n 's/^MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
until [ $(free) -lt 80000 ]; do sleep 0.1; done
sleep 1
tool eat 120 || echo killed
";
    for (balloon, said) in [
        ("--balloon 160,oom", "tool: ate 120 MiB\n"),
        ("--balloon 160", "killed\n"),
    ] {
        let guest = guest(kernel, script);
        let words = [&words("--cmdline quiet", flags)[..], &words(balloon, &[])].concat();
        let ended = guest.run(&words);
        let console = ended.expect_status(0).console();
        assert!(console.contains(said), "{balloon}\n{}", ended.report());
    }
}
