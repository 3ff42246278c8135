//! End to end: real Linux guests that go on in another process. Run by `cargo xtask test`.

mod common;
#[path = "snapshots/devices.rs"]
mod devices;
#[allow(dead_code)]
#[path = "devices/help.rs"]
mod help;
#[allow(dead_code)]
#[path = "devices/host.rs"]
mod host;

#[path = "snapshots/forks.rs"]
mod forks;

use common::guest::{Guest, Kernel, LIMIT};
use common::pages::{self, Answer, Pages};
use common::{Vm, husk, temp_dir, text};
use husk_api::client;
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Counts seconds of the guest's clock, and looks at a file of random bytes each time.
const SCRIPT: &str = "
dmesg -n 1
mount -t tmpfs -o size=64m none /tmp
dd if=/dev/urandom of=/tmp/bytes bs=1M count=24 2>/dev/null
sum=$(md5sum </tmp/bytes)
i=0
while [ $i -lt 100 ]; do
	i=$((i + 1))
	[ \"$(md5sum </tmp/bytes)\" = \"$sum\" ] || { echo changed; poweroff -f; }
	echo \"turn $i at $(cut -d. -f1 /proc/uptime) $(date +%s) end\"
	read -t 1 -r line && [ \"$line\" = end ] && break
done
ls /sys/bus/acpi/devices/ | grep VMGENCTR
echo it was told $(dmesg | grep -c 'crng reseeded due to virtual machine fork') times that it is another VM
echo ends at turn $i with $(nproc) processors
";

/// `husk serve`.
struct Served {
    vm: Vm,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    fn start() -> Self {
        let dir = temp_dir();
        let socket = dir.path().join("api");
        let mut command = husk();
        command.args(["serve", "--api-sock", text(&socket)]);
        let vm = Vm::start(&mut command, LIMIT);
        let until = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < until, "no socket\n{}", vm.report());
            std::thread::sleep(Duration::from_millis(5));
        }
        Self {
            vm,
            socket,
            _dir: dir,
        }
    }

    #[track_caller]
    fn boots(&self, kernel: &Kernel, guest: &Guest, machine: Value) {
        let source = json!({
            "kernel_image_path": kernel.image,
            "initrd_path": guest.initrd(),
            "boot_args": "console=ttyS0 reboot=panic_warm panic=-1 pci=off quiet",
        });
        self.done("PUT", "/boot-source", source);
        self.done("PUT", "/machine-config", machine);
        self.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    }

    #[track_caller]
    fn done(&self, method: &str, path: &str, body: Value) {
        let response = client::request(&self.socket, method, path, &body.to_string());
        let response = response.unwrap_or_else(|e| panic!("{e}\n{}", self.vm.report()));
        assert_eq!(response.status, 204, "{path}: {}", response.body);
    }
}

fn places(dir: &Path) -> Value {
    json!({ "snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory") })
}

/// For how long a guest is kept: more than it counts in a round.
const AWAY: Duration = Duration::from_secs(6);

/// What the guest's monotonic and wall clock said in a turn, in seconds.
fn clocks(served: &Served, turn: u32) -> (u64, u64) {
    let said = served.vm.stdout.bytes();
    let said = String::from_utf8_lossy(&said);
    let line = said.split(&format!("turn {turn} at ")).nth(1).unwrap();
    let mut words = line.split_whitespace();
    let mut number = || words.find_map(|word| word.parse().ok()).unwrap();
    (number(), number())
}

/// `hears`: the kernel has a driver for the VM generation ID.
fn a_guest_goes_on_with_its_memory_clock_and_processors(kernel: &Kernel, hears: bool) {
    let guest = Guest::new(kernel, Some(SCRIPT));
    let dir = temp_dir();
    let mut served = Served::start();
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 256 });
    served.boots(kernel, &guest, machine);
    served.vm.expect("turn 2 at ");
    served.vm.expect(" end");
    let mut turn = 2;
    // Of the guest that booted, and then of one that was a snapshot already, and whose clocks have not stood still.
    for realtime in [false, true] {
        let (uptime, wall_before) = clocks(&served, turn);
        let seen = Instant::now();
        served.done("PATCH", "/vm", json!({ "state": "Paused" }));
        served.done("PUT", "/snapshot/create", places(dir.path()));
        drop(served);
        std::thread::sleep(AWAY);
        served = Served::start();
        let mut load = places(dir.path());
        load["resume_vm"] = true.into();
        load["clock_realtime"] = realtime.into();
        let began = Instant::now();
        served.done("PUT", "/snapshot/load", load);
        turn += 3;
        served.vm.expect(&format!("turn {turn} at "));
        served.vm.expect(" end");
        let (later, wall) = clocks(&served, turn);
        let (ran, away) = (began.elapsed().as_secs() + 2, AWAY.as_secs());
        match realtime {
            false => assert!(
                (uptime..=uptime + ran).contains(&later),
                "{uptime}, {later}"
            ),
            true => {
                assert!(later >= uptime + away, "{uptime}, {later}");
                // By the second, and it was read a little later.
                let (passed, by_guest) = (seen.elapsed().as_secs(), wall - wall_before);
                assert!(passed.abs_diff(by_guest) <= 2, "{passed}, {by_guest}");
            }
        }
    }
    served.vm.send(b"end\n");
    served.vm.expect("VMGENCTR:00");
    let times = if hears { 2 } else { 0 };
    served.vm.expect(&format!("it was told {times} times"));
    served.vm.expect("with 2 processors");
    served.vm.finish().expect_status(0);
}

/// Which tests run with which kernel over which transport.
macro_rules! pairs {
    ($($pair:ident: $kernel:ident $flags:expr => { $($test:ident)* })*) => {
        $(mod $pair { $(#[test] fn $test() { super::devices::$test(&super::Kernel::$kernel(), &$flags); })* })*
    };
}

pairs! {
    debian_mmio: debian [] => { networks_go_on_and_sockets_are_reset }
    debian_pci: debian ["--pci"] => { disks_lose_and_double_nothing disks_come_and_go_across_processes }
    minimal_mmio: minimal [] => { disks_lose_and_double_nothing }
    minimal_pci: minimal ["--pci"] => { networks_go_on_and_sockets_are_reset }
}

#[test]
fn a_minimal_guest_goes_on_with_its_memory_clock_and_processors() {
    a_guest_goes_on_with_its_memory_clock_and_processors(&Kernel::minimal(), true);
}

#[test]
fn debians_guest_goes_on_with_its_memory_clock_and_processors() {
    a_guest_goes_on_with_its_memory_clock_and_processors(&Kernel::debian(), false);
}

/// Small pages from a handler, huge ones copied from a file, huge ones from a handler; each from a snapshot of the one before.
#[test]
fn a_guest_goes_on_with_memory_that_another_process_gives_and_in_huge_pages() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let before = std::fs::read_to_string(POOL).unwrap();
    std::fs::write(POOL, "70").unwrap();
    let kernel = Kernel::minimal();
    let guest = Guest::new(&kernel, Some(SCRIPT));
    let dir = temp_dir();
    let socket = dir.path().join("pages");
    let memory = dir.path().join("memory");
    let listener = UnixListener::bind(&socket).unwrap();
    let file = memory.clone();
    std::thread::spawn(move || {
        for page_size in [4096, 2 << 20] {
            let pages = Pages::accept(&listener);
            assert_eq!(pages.mappings[0]["page_size"], page_size);
            // As it is now: the file is written anew meanwhile.
            let kept = std::fs::File::open(&file).unwrap();
            pages.serve(&kept, |_| Answer::Page);
        }
    });
    let mut served = Served::start();
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 128 });
    served.boots(&kernel, &guest, machine);
    served.vm.expect("turn 2 at ");
    let mut turn = 2;
    let handler = json!({ "backend_type": "Uffd", "backend_path": socket });
    let file = json!({ "backend_type": "File", "backend_path": memory });
    for (backend, huge_pages) in [(&handler, "None"), (&file, "2M"), (&handler, "2M")] {
        served.done("PATCH", "/vm", json!({ "state": "Paused" }));
        served.done("PUT", "/snapshot/create", places(dir.path()));
        drop(served);
        served = Served::start();
        let load = json!({
            "snapshot_path": dir.path().join("state"),
            "mem_backend": backend,
            "huge_pages": huge_pages,
            "resume_vm": true,
        });
        served.done("PUT", "/snapshot/load", load);
        turn += 2;
        served.vm.expect(&format!("turn {turn} at "));
    }
    served.vm.send(b"end\n");
    served.vm.expect("with 2 processors");
    served.vm.finish().expect_status(0);
    std::fs::write(POOL, before).unwrap();
    // And one that dies: no thread of the monitor's, or of the kernel's behalf of KVM, waits for ever.
    let socket = dir.path().join("dying");
    let mut process = pages::process("a_process", &socket, &memory, 300);
    let mut served = Served::start();
    let load = json!({
        "snapshot_path": dir.path().join("state"),
        "mem_backend": { "backend_type": "Uffd", "backend_path": socket },
        "huge_pages": "None",
        "resume_vm": true,
    });
    served.done("PUT", "/snapshot/load", load);
    drop(served.vm.take_stdin());
    let ended = served.vm.wait();
    ended.expect_status(6);
    assert!(ended.stderr.contains("has gone"), "{}", ended.stderr);
    process.wait().unwrap();
}

#[test]
#[ignore = "no test: what others start as a process"]
fn a_process() {
    pages::be_a_process();
}

/// Writes to its memory, and reads all of it, again and again. Half of what it writes is zero.
const WRITES: &str = "
dmesg -n 1
mount -t tmpfs -o size=64m none /tmp
dd if=/dev/urandom of=/tmp/bytes bs=1M count=16 2>/dev/null
i=0
while [ $i -lt 200 ]; do
	i=$((i + 1))
	from=/dev/urandom
	[ $((i % 2)) = 0 ] && from=/dev/zero
	dd if=$from of=/tmp/bytes bs=64k count=8 seek=$((i * 7 % 240)) conv=notrunc 2>/dev/null
	sum=$(md5sum </tmp/bytes)
	echo \"turn $i\"
	read -t 1 -r line && [ \"$line\" = end ] && break
	[ \"$(md5sum </tmp/bytes)\" = \"$sum\" ] || { echo changed; poweroff -f; }
done
echo ends well
";

fn husk_snapshot(arguments: &[&str]) {
    let ended = Vm::start(husk().arg("snapshot").args(arguments), LIMIT).finish();
    ended.expect_status(0);
}

/// A Linux guest goes on from its base under five diffs, which all were made while it wrote.
#[test]
fn a_guest_goes_on_from_a_chain_of_diffs() {
    let kernel = Kernel::minimal();
    let guest = Guest::new(&kernel, Some(WRITES));
    let dir = temp_dir();
    let mut served = Served::start();
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 256, "track_dirty_pages": true });
    served.boots(&kernel, &guest, machine);
    served.vm.expect("turn 1");
    let base = dir.path().join("base");
    let mut turn = 1;
    // Of the guest that booted, then of one that went on, tracked and not.
    for track in [None, Some(true), Some(false)] {
        if let Some(track) = track {
            drop(served);
            served = Served::start();
            let mut load = places(&base);
            load["resume_vm"] = true.into();
            load["track_dirty_pages"] = track.into();
            served.done("PUT", "/snapshot/load", load);
            // The line of the next may be half said.
            turn += 2;
            served.vm.expect(&format!("turn {turn}"));
        } else {
            husk_snapshot(&["-s", text(&served.socket), text(&base)]);
        }
        for number in 0..3 {
            turn += 1;
            served.vm.expect(&format!("turn {turn}"));
            let diff = dir.path().join(format!("diff-{number}"));
            let _ = std::fs::remove_dir_all(&diff);
            husk_snapshot(&["-s", text(&served.socket), "--diff", text(&diff)]);
            husk_snapshot(&["merge", text(&base), text(&diff)]);
        }
        // What it does from now on is not in any of them, and must not have been.
        let whole = dir.path().join("whole");
        let last = dir.path().join("last");
        served.done("PATCH", "/vm", json!({ "state": "Paused" }));
        husk_snapshot(&["-s", text(&served.socket), "--diff", text(&last)]);
        husk_snapshot(&["-s", text(&served.socket), text(&whole)]);
        husk_snapshot(&["merge", text(&base), text(&last)]);
        let memory = |dir: &Path| std::fs::read(dir.join("memory")).unwrap();
        assert!(
            memory(&base) == memory(&whole),
            "{track:?}: a page was missed"
        );
        for dir in [last, whole] {
            std::fs::remove_dir_all(dir).unwrap();
        }
        let said = String::from_utf8_lossy(&served.vm.stdout.bytes()).into_owned();
        let mut turns = said
            .lines()
            .filter_map(|line| line.trim().strip_prefix("turn "));
        turn = turns.next_back().unwrap().parse().unwrap();
    }
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    served.vm.send(b"end\n");
    served.vm.expect("ends well");
    served.vm.finish().expect_status(0);
}
