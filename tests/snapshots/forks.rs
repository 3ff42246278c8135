//! Clones of Linux guests: each proves that it is somebody, and that nobody else writes where it does.

use crate::common::guest::{Kernel, LIMIT};
use crate::common::{Vm, temp_dir, text};
use crate::help::{guest, words};
use crate::host::{command, make_image};
use husk_api::client;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::process::Command;
use std::time::Instant;

/// Waits until it is another VM than it was. Then it says its random number, context ID and what it finds on its disk and in its memory,
/// and writes its number there; a while later, it says what is there then.
const SCRIPT: &str = "
mount -t tmpfs none /tmp
echo nobody >/tmp/mine
echo nobody | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
SETUP
more() { MORE; }
echo waits
while ! dmesg | grep -q 'virtual machine fork'; do
	read -t 1 -r line && [ \"$line\" = end ] && break
done
who=$(head -c 16 /dev/urandom | md5sum | cut -c1-32)
disk() { dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | head -n 1; }
found=\"$(cat /tmp/mine) $(disk)\"
echo $who >/tmp/mine
echo $who | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
sleep 2
echo \"I am $who $(tool cid) found $found have $(cat /tmp/mine) $(disk)$(more)\"
poweroff -f
";

struct Clones {
    vm: Vm,
    dir: tempfile::TempDir,
    answer: Value,
}

impl Drop for Clones {
    fn drop(&mut self) {
        for clone in self.answer["clones"].as_array().into_iter().flatten() {
            let pid = clone["pid"]
                .as_i64()
                .and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
            pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL));
        }
    }
}

/// What a guest does besides, and how it is started and cloned.
struct Plan<'a> {
    setup: &'a str,
    /// What a clone has to say more, each word behind a space.
    more: &'a str,
    flags: &'a [&'a str],
    order: Value,
}

/// A guest that runs, and clones of it.
fn forked(kernel: &Kernel, plan: Plan) -> Clones {
    let dir = temp_dir();
    let (image, socket) = (dir.path().join("image"), dir.path().join("api"));
    make_image(&image, 16 << 20);
    let script = SCRIPT.replace("SETUP", plan.setup);
    let guest = guest(kernel, &script.replace("MORE", plan.more.trim()));
    let vsock = format!("cid=10,uds={}", dir.path().join("vsock").display());
    let memory = format!("{}M", kernel.least_mib);
    let own = [
        "--disk",
        text(&image),
        "--vsock",
        &vsock,
        "--memory",
        &memory,
        "--api-sock",
        text(&socket),
    ];
    let mut vm = guest.start(&words(
        "--cmdline quiet --entropy",
        &[&own, plan.flags].concat(),
    ));
    vm.expect("waits\n");
    let mut order = plan.order;
    order["console"] = json!(dir.path().join("console-{n}"));
    order["log"] = json!(dir.path().join("log-{n}"));
    let response = client::request(&socket, "PUT", "/husk/fork", &order.to_string());
    let response = response.unwrap_or_else(|e| panic!("{e}\n{}", vm.report()));
    assert_eq!(response.status, 200, "{}\n{}", response.body, vm.report());
    let answer = serde_json::from_str(&response.body).unwrap();
    Clones { vm, dir, answer }
}

/// What clone `n` said: `I am` and all behind it.
fn said(clones: &Clones, n: usize) -> Vec<String> {
    let until = Instant::now() + LIMIT;
    let read = |name: &str| {
        let path = clones.dir.path().join(format!("{name}-{n}"));
        std::fs::read_to_string(path).unwrap_or_default()
    };
    loop {
        let console = read("console");
        let line = console.lines().find(|line| line.starts_with("I am "));
        if let Some(line) = line.filter(|_| console.ends_with('\n')) {
            return line.split(' ').map(str::to_owned).collect();
        }
        assert!(
            Instant::now() < until,
            "clone {n}: {console}\n{}\n{}",
            read("log"),
            clones.vm.report()
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Whether all of them are somebody, and the VM is still who it was; `each` has what a clone said more.
fn check(mut clones: Clones, count: usize, each: impl Fn(usize, &[String])) {
    assert_eq!(clones.answer["clones"].as_array().unwrap().len(), count);
    let mut all = BTreeSet::new();
    for n in 1..=count {
        let words = said(&clones, n);
        let [
            _,
            _,
            who,
            _,
            _,
            cid,
            _,
            memory,
            disk,
            _,
            my_memory,
            my_disk,
            more @ ..,
        ] = &words[..]
        else {
            panic!("{words:?}");
        };
        assert_eq!(*cid, (10 + n).to_string(), "{words:?}");
        let found = (memory.as_str(), disk.as_str());
        assert_eq!(found, ("nobody", "nobody"), "{words:?}");
        let console = std::fs::read_to_string(clones.dir.path().join(format!("console-{n}")));
        assert_eq!((my_memory, my_disk), (who, who), "{words:?} {console:?}");
        each(n, more);
        let is_new = all.insert(who.clone());
        assert!(is_new, "two clones have the same random numbers: {words:?}");
    }
    // The VM was not forked, as far as its guest knows.
    let Clones { vm, dir, .. } = &mut clones;
    vm.send(b"end\n");
    vm.expect(" tool: cid 10 found nobody nobody have ");
    let console = vm.stdout.bytes();
    let console = String::from_utf8_lossy(&console);
    let own = console.split("I am ").nth(1).unwrap();
    let own = own.split(' ').next().unwrap();
    let image = std::fs::read(dir.path().join("image")).unwrap();
    assert!(image.starts_with(own.as_bytes()), "the VM's own disk");
}

#[test]
fn a_hundred_clones_are_somebody_each() {
    let plan = Plan {
        setup: "",
        more: ":",
        flags: &[],
        order: json!({ "count": 100 }),
    };
    check(forked(&Kernel::minimal(), plan), 100, |_, _| ());
}

/// Taps for a VM and its clones, each with a network of its own; they are removed at the end.
struct Taps;

impl Taps {
    fn new() -> Self {
        for n in 0..4 {
            let name = format!("clone{n}");
            command("ip", &["tuntap", "add", &name, "mode", "tap"]);
            command(
                "ip",
                &["addr", "add", &format!("10.77.{n}.1/24"), "dev", &name],
            );
            command("ip", &["link", "set", &name, "up"]);
        }
        Self
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        for n in 0..4 {
            let name = format!("clone{n}");
            let _ = Command::new("ip").args(["link", "del", &name]).output();
        }
    }
}

/// On PCI, with the metadata by which a guest learns who it is: what a hook would do with it.
#[test]
fn clones_learn_who_they_are_and_are_on_networks_of_their_own() {
    let _taps = Taps::new();
    let dir = temp_dir();
    let metadata = dir.path().join("metadata");
    std::fs::write(&metadata, r#"{"of":"all"}"#).unwrap();
    let plan = Plan {
        setup: "
ip addr add 10.77.0.2/24 dev eth0
ip link set eth0 up
ip route add 169.254.169.254 dev eth0
fetch() { printf \"GET /$1 HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n\" | timeout 20 nc 169.254.169.254 80 | tail -n 1; }",
        more: "
hostname $(fetch husk/id)
n=$(fetch husk/clone)
all=$(fetch of)
ip addr flush dev eth0
ip addr add 10.77.$n.2/24 dev eth0
echo \" $(hostname) $all $(ping -c 1 -W 20 10.77.$n.1 >/dev/null && echo reaches) $n\"
",
        flags: &[
            "--pci",
            "--net",
            "tap=clone0",
            "--metadata",
            text(&metadata),
        ],
        order: json!({
            "count": 3,
            "id": "web-{n}",
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "clone{n}" }],
        }),
    };
    check(forked(&Kernel::minimal(), plan), 3, |n, more| {
        let wanted = [
            format!("web-{n}"),
            "all".into(),
            "reaches".into(),
            n.to_string(),
        ];
        assert_eq!(more, wanted, "clone {n}");
        let received = format!("/sys/class/net/clone{n}/statistics/rx_bytes");
        let received = std::fs::read_to_string(received).unwrap();
        assert_ne!(received.trim(), "0", "clone {n} is not on its own network");
    });
}
