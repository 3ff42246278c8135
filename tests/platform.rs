//! End to end: what may be asked of a machine, and what it may be made of, with real Linux guests. The VMs are in the test's own
//! process, as in a program that embeds the monitor. Run by `cargo xtask test`, as root.

mod common;

use common::guest::{Guest, Kernel, LIMIT, md5};
use common::machine::Machine;
use common::{husk, pattern, temp_dir, text};
use husk_config::{
    CpuTemplate, Drive, HugePages, NetworkInterface, NewDevice, VmConfig, VmmRequest,
};
use husk_vmm::{Outcome, Phase};
use std::io::Write;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A guest that does what is typed, a line at a time.
const SHELL: &str = "
dmesg -n 1
stty raw -echo
echo ready
while read -r line; do eval \"$line\"; done
";

/// What a kernel says when something is wrong.
const TROUBLE: &str = "dmesg | grep -iE 'BUG:|Oops|stall|lockup|unable to|tsc.*unstable|spurious|i8042.*(fail|error|can)' \
     | grep -viE 'command line|stall warnings suppressed'";

fn guest<'a>(kernel: &'a Kernel, script: &str, modules: &[&str]) -> Guest<'a> {
    let mut guest = Guest::new(kernel, Some(script));
    let modules = modules.iter().map(|module| (*module).to_owned());
    guest.builder.modules.extend(modules);
    guest
}

fn config(kernel: &Kernel, guest: &Guest, cmdline: &str) -> VmConfig {
    let mut config = VmConfig::default();
    config.boot_source.kernel_image_path = kernel.image.clone();
    config.boot_source.initrd_path = Some(guest.initrd());
    config.boot_source.boot_args = Some(format!(
        "{} {cmdline}",
        VmConfig::default().default_boot_args()
    ));
    config
}

/// Run a script to its end; the console.
fn run(kernel: &Kernel, script: &str, change: impl FnOnce(&mut VmConfig)) -> String {
    let guest = guest(kernel, &format!("dmesg -n 1\n{script}"), &[]);
    let mut config = config(kernel, &guest, "quiet");
    change(&mut config);
    let mut machine = Machine::boot(config, LIMIT);
    assert_eq!(
        machine.wait_for_end(),
        Outcome::PowerOff,
        "{}",
        machine.report()
    );
    machine.console.text()
}

fn value(console: &str, key: &str) -> String {
    let lines = console.lines().filter_map(|line| line.strip_prefix(key));
    lines.collect::<Vec<_>>().join(",")
}

// ---- What it is made of ----

#[test]
fn a_core_has_two_threads_with_smt() {
    let script = r#"
cd /sys/devices/system/cpu
for cpu in cpu[0-9]*; do
    echo "core=$(cat $cpu/topology/core_id)"
    echo "threads=$(cat $cpu/topology/thread_siblings_list)"
    echo "package=$(cat $cpu/topology/physical_package_id)"
done
sed -n 's/^siblings.*: /siblings=/p; s/^cpu cores.*: /cores=/p' /proc/cpuinfo
dmesg | grep -iE 'Firmware Bug|smpboot.*(fail|error)'
"#;
    for kernel in [Kernel::debian(), Kernel::minimal()] {
        let console = run(&kernel, script, |config| {
            config.machine_config.vcpu_count = 4;
            config.machine_config.smt = true;
            config.machine_config.track_dirty_pages = true;
        });
        assert_eq!(value(&console, "core="), "0,0,1,1", "{console}");
        assert_eq!(value(&console, "threads="), "0-1,0-1,2-3,2-3", "{console}");
        assert_eq!(value(&console, "package="), "0,0,0,0", "{console}");
        assert_eq!(value(&console, "siblings="), "4,4,4,4", "{console}");
        assert_eq!(value(&console, "cores="), "2,2,2,2", "{console}");
        assert!(!console.contains("Bug"), "{console}");
    }
}

#[test]
fn memory_of_huge_pages_comes_from_the_hosts_pool() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let free = || {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = meminfo
            .lines()
            .find_map(|l| l.strip_prefix("HugePages_Free:"));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    let before = std::fs::read_to_string(POOL).unwrap();
    std::fs::write(POOL, "140").unwrap();
    assert_eq!(free(), 140, "the host has too little memory for this test");
    let kernel = Kernel::minimal();
    let mut guest = guest(
        &kernel,
        "dmesg -n 1; md5sum /large; echo up; read -r go",
        &[],
    );
    let large = pattern(20_000_000);
    let sum = md5(&large);
    guest.builder.files.push(("large".into(), large, 0o644));
    let mut config = config(&kernel, &guest, "quiet");
    config.machine_config.huge_pages = HugePages::TwoMiB;
    let mut machine = Machine::boot(config.clone(), LIMIT);
    machine.expect(&format!("{sum}  /large"));
    machine.expect("up");
    let used = 140 - free();
    assert!((20..=128).contains(&used), "{used} huge pages are in use");
    // There is no room for another one, and it is told what to do.
    let mut other = config;
    other.machine_config.mem_size_mib = 512;
    let said = Machine::refused_boot(other);
    assert!(
        said.contains("256 huge pages") && said.contains("> /proc/sys/vm/nr_hugepages"),
        "{said}"
    );
    machine.send("\n");
    assert_eq!(machine.wait_for_end(), Outcome::PowerOff);
    drop(machine);
    assert_eq!(free(), 140);
    std::fs::write(POOL, before).unwrap();
}

#[test]
fn processors_are_what_the_template_or_cpu_config_says() {
    let script = "sed -n 's/^model\t.*: /model=/p; s/^flags.*: /flags=/p' /proc/cpuinfo";
    let kernel = Kernel::minimal();
    let host = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let amd = host.contains("AuthenticAMD");
    let plain = run(&kernel, script, |_| ());
    assert!(value(&plain, "flags=").contains(" aes "), "{plain}");
    let (own, other) = match amd {
        true => (CpuTemplate::T2A, CpuTemplate::T2),
        false => (CpuTemplate::T2, CpuTemplate::T2A),
    };
    let console = run(&kernel, script, |config| {
        config.machine_config.cpu_template = own
    });
    // Haswell's, with what it has of features.
    assert_eq!(value(&console, "model="), "63", "{console}");
    assert!(value(&console, "flags=").contains(" aes "), "{console}");
    assert!(!value(&console, "flags=").contains(" rdseed "), "{console}");
    let console = run(&kernel, script, |config| {
        let bits = "{\"cpuid_modifiers\": [{\"leaf\": \"0x1\", \"subleaf\": \"0x0\", \"flags\": 0,
            \"modifiers\": [{\"register\": \"ecx\", \"bitmap\": \"0b0xxxxxxxxxxxxxxxxxxxxxxxxx\"}]}]}";
        config.cpu_config = Some(serde_json::from_str(bits).unwrap());
    });
    assert!(!value(&console, "flags=").contains(" aes "), "{console}");
    let guest = guest(&kernel, "", &[]);
    let mut config = config(&kernel, &guest, "quiet");
    config.machine_config.cpu_template = other;
    let said = Machine::refused_boot(config);
    assert!(said.contains("cpu-config"), "{said}");
}

// ---- What is asked of it ----

#[test]
fn a_pause_of_seconds_leaves_clock_and_network_sound() {
    let kernel = Kernel::debian();
    let tap = Tap::new("huskpause");
    let guest = guest(&kernel, SHELL, &["virtio_mmio", "virtio_net"]);
    let mut config = config(&kernel, &guest, "quiet");
    config.machine_config.vcpu_count = 2;
    let mut interface = NetworkInterface::new("eth0");
    interface.host_dev_name = tap.name.into();
    config.network_interfaces.push(interface);
    let mut machine = Machine::boot(config, LIMIT);
    machine.expect("ready\n");
    let bytes = pattern(4 << 20);
    let sum = md5(&bytes);
    let listener = TcpListener::bind(("10.117.3.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for part in bytes.chunks(64 << 10) {
            stream.write_all(part).unwrap();
            std::thread::sleep(Duration::from_millis(30));
        }
    });
    machine.send("ip addr add 10.117.3.2/24 dev eth0; ip link set eth0 up\n");
    machine.send(&format!(
        "echo begins; nc 10.117.3.1 {port} </dev/null | md5sum; echo done; date +now=%s; {TROUBLE}; echo end\n"
    ));
    machine.expect("begins\n");
    std::thread::sleep(Duration::from_millis(300));
    machine.request(VmmRequest::Pause);
    std::thread::sleep(Duration::from_secs(6));
    assert!(
        !serving.is_finished(),
        "the download was over before the pause was"
    );
    machine.request(VmmRequest::Resume);
    machine.expect("done\n");
    machine.expect("end\n");
    serving.join().unwrap();
    let console = machine.console.text();
    assert!(console.contains(&format!("{sum}  -\n")), "{console}");
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let guests: u64 = value(&console, "now=").parse().unwrap();
    assert!(now.abs_diff(guests) < 5, "{guests} at {now}");
    let (_, behind) = console.split_once("now=").unwrap();
    assert_eq!(behind.lines().nth(1), Some("end"), "{console}");
    // Timers go on.
    let start = Instant::now();
    machine.send("sleep 1; echo slept\n");
    machine.expect("slept\n");
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn ctrl_alt_del_interrupts_init() {
    let init = "#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t devtmpfs devtmpfs /dev
busybox --install -s /bin
while read -r module; do insmod /lib/modules/husk/$module.ko; done </etc/modules
dmesg -n 1
trap 'echo interrupted; poweroff -f' INT
echo 0 >/proc/sys/kernel/ctrl-alt-del
until grep 'AT Translated Set 2' /proc/bus/input/devices; do sleep 0.1; done
dmesg | grep -iE 'i8042|atkbd'
echo listens
while :; do sleep 1; done
";
    let kernel = Kernel::debian();
    let guest = guest(&kernel, "", &["i8042", "atkbd"]).with_file("init", init);
    let mut config = config(&kernel, &guest, "");
    config.keyboard = true;
    config.boot_source.boot_args = Some(format!("{} quiet", config.default_boot_args()));
    let mut machine = Machine::boot(config, LIMIT);
    machine.expect("listens");
    let console = machine.console.text();
    for wrong in ["Keylock", "Can't", "Failed", "timeout", "No controller"] {
        assert!(!console.contains(wrong), "{console}");
    }
    machine.request(VmmRequest::SendCtrlAltDel);
    assert!(
        !machine.vmm.is_press_pending(),
        "the power button was pressed"
    );
    machine.expect("interrupted");
    assert_eq!(machine.wait_for_end(), Outcome::PowerOff);
}

#[test]
fn the_boot_timer_is_firecrackers() {
    let kernel = Kernel::debian();
    let guest = guest(&kernel, SHELL, &[]);
    let mut config = config(&kernel, &guest, "quiet iomem=relaxed");
    config.boot_timer = true;
    let mut machine = Machine::boot(config, LIMIT);
    machine.expect("ready\n");
    let marks = |machine: &Machine| {
        let reached = machine.timeline.reached();
        let marks = reached
            .iter()
            .filter(|reached| reached.phase == Phase::Mark(1));
        marks.count()
    };
    let before = marks(&machine);
    // As Firecracker's own test guests do, by /dev/mem.
    machine.send("devmem 0xc0000000 8 123 && echo told\n");
    machine.expect("told\n");
    assert_eq!(marks(&machine), before + 1, "{}", machine.report());
}

// ---- Devices that come and go ----

#[test]
fn disks_come_and_go_while_the_guest_runs() {
    let kernel = Kernel::debian();
    let dir = temp_dir();
    let image = |name: &str, fill: u8| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![fill; 1 << 20]).unwrap();
        path
    };
    let (first, second, cold) = (
        image("first", b'1'),
        image("second", b'2'),
        image("cold", b'0'),
    );
    let guest = guest(&kernel, SHELL, &["virtio_pci", "virtio_blk"]);
    let mut config = config(&kernel, &guest, "quiet");
    config.boot_source.boot_args = Some(format!("{} quiet", husk_config::default_boot_args(true)));
    config.pci = true;
    config.drives.push(Drive::new("cold", &cold));
    let mut machine = Machine::boot(config, LIMIT);
    machine.expect("ready\n");
    for round in 0..2 {
        let (id, path) = match round {
            0 => ("first", &first),
            _ => ("second", &second),
        };
        attach(&mut machine, NewDevice::Drive(Drive::new(id, path)));
        machine.send("until [ -b /dev/vdb ]; do sleep 0.1; done; cat /sys/block/vdb/serial; echo; head -c 3 /dev/vdb; echo\n");
        machine.expect(&format!("{id}\n{0}{0}{0}\n", round + 1));
        machine.send("echo written | dd of=/dev/vdb bs=512 seek=5 conv=sync 2>/dev/null; sync; echo synced\n");
        machine.expect("synced\n");
        assert_eq!(&std::fs::read(path).unwrap()[5 * 512..][..8], b"written\n");
        machine.request(VmmRequest::Detach(id.into()));
        wait_until_gone(&mut machine, id);
        machine.send("[ -e /sys/block/vdb ] || echo no vdb\n");
        machine.expect("no vdb\n");
    }
    // The first file is free again: closed, and not locked.
    attach(&mut machine, NewDevice::Drive(Drive::new("again", &first)));
    machine.send("until [ -b /dev/vdb ]; do sleep 0.1; done; dd if=/dev/vdb bs=512 skip=5 count=1 2>/dev/null | head -n 1\n");
    machine.expect("written\n");
    // So can a disk that was there from the start.
    machine.request(VmmRequest::Detach("cold".into()));
    wait_until_gone(&mut machine, "cold");
    // A guest that takes a disk out of use by itself keeps it in the machine.
    machine.send("for slot in /sys/bus/pci/slots/*; do echo 0 >$slot/power; done 2>/dev/null; [ -e /sys/block/vdb ] || echo no vdb\n");
    machine.expect("no vdb\n");
    assert_eq!(machine.vmm.collect_ejected(), [""; 0]);
    assert_eq!(machine.vmm.config().drives.len(), 1);
    machine.send("for slot in /sys/bus/pci/slots/*; do echo 1 >$slot/power; done 2>/dev/null; head -c 3 /dev/vd[a-z]; echo\n");
    machine.expect("111\n");
    machine.send(&format!("{TROUBLE}; echo end of trouble\n"));
    machine.expect("end of trouble\n");
    let console = machine.console.text();
    assert!(console.ends_with("111\nend of trouble\n"), "{console}");
}

#[test]
fn network_interfaces_come_and_go_while_the_guest_runs() {
    let kernel = Kernel::debian();
    let tap = Tap::new("huskplug");
    let guest = guest(&kernel, SHELL, &["virtio_pci", "virtio_net"]);
    let mut config = config(&kernel, &guest, "quiet");
    config.boot_source.boot_args = Some(format!("{} quiet", husk_config::default_boot_args(true)));
    config.pci = true;
    let mut machine = Machine::boot(config, LIMIT);
    machine.expect("ready\n");
    for id in ["net1", "net2"] {
        let mut interface = NetworkInterface::new(id);
        interface.host_dev_name = tap.name.into();
        attach(&mut machine, NewDevice::Network(interface));
        machine.send("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; ip addr add 10.117.3.2/24 dev eth0; ip link set eth0 up; ping -c 2 -W 5 10.117.3.1\n");
        machine.expect(" 0% packet loss");
        machine.request(VmmRequest::Detach(id.into()));
        wait_until_gone(&mut machine, id);
        machine.send("[ -e /sys/class/net/eth0 ] || echo no eth0\n");
        machine.expect("no eth0\n");
    }
}

#[test]
fn the_real_binary_does_it_all_over_its_socket_and_under_its_filters() {
    let kernel = Kernel::debian();
    let dir = temp_dir();
    let (socket, image) = (dir.path().join("api"), dir.path().join("image"));
    std::fs::write(&image, vec![b'1'; 1 << 20]).unwrap();
    let tap = Tap::new("huskapi");
    let guest = guest(
        &kernel,
        SHELL,
        &["virtio_pci", "virtio_blk", "virtio_net", "button"],
    );
    let socket = text(&socket);
    let mut vm = guest.start(&["--pci", "--api-sock", socket, "--cmdline", "quiet"]);
    vm.expect("ready\n");
    let ask = |method: &str, path: &str, body: String| {
        let words = ["api", "--api-sock", socket, method, path];
        let body = (!body.is_empty()).then_some(body);
        let output = husk().args(words).args(body).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{method} {path}: {said}{error}\n");
        said
    };
    let until_gone = |path: &str| {
        let until = Instant::now() + Duration::from_secs(60);
        while ask("GET", "/vm/config", String::new()).contains(path) {
            assert!(Instant::now() < until, "{path} stays");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let path = text(&image);
    for limiter in [
        "",
        r#", "rate_limiter": {"ops": {"size": 1000, "refill_time": 100}}"#,
    ] {
        let drive = format!(
            r#"{{"drive_id": "d", "path_on_host": "{path}", "is_root_device": false, "is_read_only": false{limiter}}}"#
        );
        ask("PUT", "/drives/d", drive);
        vm.send(b"until [ -b /dev/vda ]; do sleep 0.1; done; head -c 3 /dev/vda; echo; echo x | dd of=/dev/vda seek=9 2>/dev/null; sync; echo synced\n");
        vm.expect("111\n");
        vm.expect("synced\n");
        ask("PATCH", "/vm", r#"{"state": "Paused"}"#.into());
        ask("PATCH", "/vm", r#"{"state": "Resumed"}"#.into());
        ask("DELETE", "/drives/d", String::new());
        until_gone(path);
    }
    let name = tap.name;
    let interface = format!(r#"{{"iface_id": "n", "host_dev_name": "{name}"}}"#);
    ask("PUT", "/network-interfaces/n", interface);
    vm.send(b"until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; ip addr add 10.117.3.2/24 dev eth0; ip link set eth0 up; ping -c 2 -W 5 10.117.3.1\n");
    vm.expect(" 0% packet loss");
    ask("DELETE", "/network-interfaces/n", String::new());
    until_gone(name);
    // There is no keyboard: the power button.
    ask(
        "PUT",
        "/actions",
        r#"{"action_type": "SendCtrlAltDel"}"#.into(),
    );
    vm.expect("Power down");
    vm.wait().expect_status(0);
}

fn attach(machine: &mut Machine, device: NewDevice) {
    machine.request(VmmRequest::Attach(Box::new(device)));
}

/// The guest lets it go, and it leaves the configuration.
fn wait_until_gone(machine: &mut Machine, id: &str) {
    let mut gone = Vec::new();
    let until = Instant::now() + Duration::from_secs(60);
    while gone.is_empty() {
        assert!(Instant::now() < until, "{id} stays\n{}", machine.report());
        std::thread::sleep(Duration::from_millis(20));
        gone = machine.vmm.collect_ejected();
    }
    assert_eq!(gone, [id]);
    let config = machine.vmm.config();
    assert!(config.drives.iter().all(|drive| drive.drive_id != id));
    assert!(
        config
            .network_interfaces
            .iter()
            .all(|own| own.iface_id != id)
    );
}

/// A tap of the host's at 10.117.3.1.
struct Tap {
    name: &'static str,
}

impl Tap {
    fn new(name: &'static str) -> Self {
        let tap = Self { name };
        for words in [
            &["tuntap", "add", name, "mode", "tap"][..],
            &["addr", "add", "10.117.3.1/24", "dev", name],
            &["link", "set", name, "up"],
        ] {
            let status = Command::new("ip").args(words).status().unwrap();
            assert!(status.success(), "ip {words:?}");
        }
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", self.name]).status();
    }
}
