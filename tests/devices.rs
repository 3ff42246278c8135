//! End to end: virtio devices in real Linux guests, over MMIO and over PCI. Run by `cargo xtask test`, as root: taps and
//! veth pairs belong to the host.

mod common;

use common::guest::{Guest, Kernel, LIMIT, md5, variable};
use common::{Vm, assert_same_bytes, pattern, temp_dir, text};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Each test for each kernel over each transport.
macro_rules! everywhere {
    ($($test:ident)*) => {
        mod debian_mmio { $(#[test] fn $test() { super::$test(&super::Kernel::debian(), &[]); })* }
        mod debian_pci { $(#[test] fn $test() { super::$test(&super::Kernel::debian(), &["--pci"]); })* }
        mod minimal_mmio { $(#[test] fn $test() { super::$test(&super::Kernel::minimal(), &[]); })* }
        mod minimal_pci { $(#[test] fn $test() { super::$test(&super::Kernel::minimal(), &["--pci"]); })* }
    };
}

everywhere! {
    disks_keep_what_is_written
    networks_and_sockets_carry_everything
}

/// The drivers that Debian's kernel has as modules.
const MODULES: [&str; 10] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "ext4",
    "erofs",
    "crc32c_generic",
];

/// A guest with all drivers and the tool of tests/guest, whose script ends in a power-off.
fn guest<'a>(kernel: &'a Kernel, script: &str) -> Guest<'a> {
    let mut guest = Guest::new(
        kernel,
        Some(&format!("dmesg -n 1\nstty raw -echo\n{script}")),
    );
    let modules = MODULES.iter().map(|module| (*module).to_owned());
    guest.builder.modules.extend(modules);
    let tool = std::fs::read(variable("HUSK_TEST_TOOL")).unwrap();
    guest.builder.files.push(("bin/tool".into(), tool, 0o755));
    guest
}

/// How much more a machine with real processors can do in a test than an emulated one.
fn scale() -> u64 {
    match std::env::var_os("HUSK_TEST_EMULATED") {
        Some(_) => 1,
        None => 16,
    }
}

// ---- Disks ----

fn disks_keep_what_is_written(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let ext4 = dir.path().join("ext4");
    make_image(&ext4, 64 << 20);
    command("mkfs.ext4", &["-q", "-F", text(&ext4)]);
    let content = dir.path().join("content");
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("hello"), "from erofs\n").unwrap();
    let erofs = dir.path().join("erofs");
    command("mkfs.erofs", &[text(&erofs), text(&content)]);
    let mib = 16 * scale();
    let (uring, sync) = (dir.path().join("uring"), dir.path().join("sync"));
    for image in [&uring, &sync] {
        make_image(image, mib << 20);
    }
    let script = format!(
        "
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
cat /sys/block/vdb/serial; echo
tool verify /dev/vdc {mib} cached
tool verify /dev/vdc {mib} direct
tool verify /dev/vdd {mib} cached
tool verify /dev/vdd {mib} direct
dd if=/dev/hwrng bs=1k count=64 2>/dev/null | wc -c
"
    );
    let guest = guest(kernel, &script);
    let arguments = [
        "--cmdline".to_owned(),
        "quiet".into(),
        "--entropy".into(),
        "--disk".into(),
        format!("{},cache=writeback", ext4.display()),
        "--disk".into(),
        format!("{},ro,id=erofs_1", erofs.display()),
        "--disk".into(),
        format!("{},engine=uring,queues=2", uring.display()),
        "--disk".into(),
        format!("{},engine=sync,cache=writeback", sync.display()),
    ];
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    words.extend(flags);
    let mut vm = guest.start(&words);
    vm.expect("full\n");
    let full = blocks(&ext4);
    // Another VM that wants to write the same image is refused, and is told why.
    let other = guest.run(&["--disk", text(&ext4)]);
    other.expect_status(2);
    assert!(other.stderr.contains(text(&ext4)), "{}", other.stderr);
    assert!(other.stderr.contains("ro"), "{}", other.stderr);
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
    for said in [
        "from erofs\nread-only\nerofs_1\n",
        "tool: /dev/vdc verified\ntool: /dev/vdc verified\ntool: /dev/vdd verified\ntool: /dev/vdd verified\n",
        "65536\n",
    ] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    assert_eq!(ended.stderr, "");
    command("e2fsck", &["-f", "-n", text(&ext4)]);
    // Both engines have written the same, and all of it.
    let (a, b) = (
        std::fs::read(&uring).unwrap(),
        std::fs::read(&sync).unwrap(),
    );
    assert_same_bytes("the disk of the other engine", &a, &b);
}

#[test]
fn a_root_file_system_is_on_a_disk() {
    let kernel = Kernel::minimal();
    let dir = temp_dir();
    let root = dir.path().join("root");
    for folder in ["bin", "dev", "proc", "sbin", "sys"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    std::fs::copy(common::guest::busybox(), root.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    let init = root.join("sbin/init");
    let script = "#!/bin/sh
b=/bin/busybox
$b mount -t proc proc /proc
$b dmesg -n 1
$b grep ' / ' /proc/mounts
echo written >/written && $b cat /written
$b sync
$b mount -o remount,ro /
$b poweroff -f
";
    std::fs::write(&init, script).unwrap();
    std::fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ext4 = dir.path().join("ext4");
    make_image(&ext4, 32 << 20);
    command("mkfs.ext4", &["-q", "-F", "-d", text(&root), text(&ext4)]);
    let erofs = dir.path().join("erofs");
    command("mkfs.erofs", &[text(&erofs), text(&root)]);
    for (disk, said) in [
        (format!("{},root,cache=writeback", text(&ext4)), "written\n"),
        (format!("{},root,ro", text(&erofs)), "/dev/root / erofs ro"),
    ] {
        let mut husk = common::husk();
        husk.args(["run", "--kernel", text(&kernel.image), "--disk", &disk])
            .args(["--cmdline", "quiet"]);
        let ended = Vm::start(&mut husk, LIMIT).finish();
        let console = ended.expect_status(0).console();
        assert!(console.contains(said), "{disk}: no {said:?}\n{console}");
    }
    command("e2fsck", &["-f", "-n", text(&ext4)]);
}

#[test]
fn a_disk_that_fails_is_the_guests_trouble_only() {
    // A file system that is smaller than the image on it: writes fail when it is full.
    let dir = temp_dir();
    command(
        "mount",
        &["-t", "tmpfs", "-o", "size=4M", "none", text(dir.path())],
    );
    let _unmount = Unmount(dir.path().to_owned());
    let image = dir.path().join("image");
    make_image(&image, 32 << 20);
    let script = "
dd if=/dev/urandom of=/dev/vda bs=1M count=16 oflag=direct && echo all written
echo still here
";
    let kernel = Kernel::minimal();
    let guest = guest(&kernel, script);
    let mut vm = guest.start(&["--cmdline", "quiet", "--disk", text(&image)]);
    vm.expect("still here");
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    assert!(!console.contains("all written"), "{}", ended.report());
}

// ---- Networks and sockets ----

fn networks_and_sockets_carry_everything(kernel: &Kernel, flags: &[&str]) {
    let tap = Tap::new();
    let dir = temp_dir();
    let socket = dir.path().join("v");
    let bytes = ((4 << 20) * scale()) as usize;
    let sent = pattern(bytes);
    let script = format!(
        "
ip addr add {guest}/24 dev eth0
ip link set eth0 up
ping -q -c 3 {host} | grep received
nc {host} 5001 </dev/null >/tmp/in
md5sum </tmp/in
nc {host} 5002 </tmp/in && echo sent back
tool send 6001 {bytes}
tool echo 6000 201
",
        host = tap.host,
        guest = tap.guest
    );
    let to_guest = listen(&tap.host, 5001);
    let from_guest = listen(&tap.host, 5002);
    let echo = UnixListener::bind(dir.path().join("v_6001")).unwrap();
    let guest = guest(kernel, &script);
    let net = format!("tap={}", tap.name);
    let vsock = format!("cid=3,uds={}", socket.display());
    let words = ["--cmdline", "quiet", "--net", &net, "--vsock", &vsock];
    let mut vm = guest.start(&[&words[..], flags].concat());

    let mut stream = vm.accept(&to_guest);
    stream.write_all(&sent).unwrap();
    drop(stream);
    let mut stream = vm.accept(&from_guest);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    drop(stream);
    assert_same_bytes("what came back over the tap", &received, &sent);
    vm.expect("sent back\n");

    let stream = vm.accept(&echo);
    let mut reader = stream.try_clone().unwrap();
    std::io::copy(&mut reader, &mut &stream).unwrap();
    drop((reader, stream));
    vm.expect(&format!("tool: {bytes} bytes came back\n"));

    vm.expect("tool: listening\n");
    let mut large = connect(&socket, 6000);
    let mut many: Vec<UnixStream> = (0..200).map(|_| connect(&socket, 6000)).collect();
    for (index, stream) in many.iter_mut().enumerate() {
        stream
            .write_all(format!("connection {index}").as_bytes())
            .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    for (index, stream) in many.iter_mut().enumerate() {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("connection {index}"));
    }
    let mut writer = large.try_clone().unwrap();
    let paste = sent.clone();
    let sending = std::thread::spawn(move || {
        writer.write_all(&paste).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut answer = Vec::new();
    large.read_to_end(&mut answer).unwrap();
    sending.join().unwrap();
    drop(large);

    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    print!("{}", ended.report());
    assert_same_bytes("what came back over vsock", &answer, &sent);
    for said in [
        "3 packets received",
        &format!("{}  -\n", md5(&sent)),
        "tool: echoed 201 connections",
    ] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn the_user_network_needs_no_tap_and_forwards_ports() {
    // passt takes addresses and routes of the host's interface with the default route.
    let link = Uplink::new();
    let to_host = listen("127.0.0.1", 0);
    let port = to_host.local_addr().unwrap().port();
    let forwarded = listen("127.0.0.1", 0);
    let free = forwarded.local_addr().unwrap().port();
    drop(forwarded);
    let script = format!(
        "
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {gateway}
# Debian 12's passt drops what comes for a guest that has ended its half.
mkfifo /open
sleep 1000 >/open &
for n in 1 2 3 4 5 6 7 8 9; do nc {gateway} {port} </open >/tmp/in && break; sleep 1; done
md5sum </tmp/in
echo serving
nc -l -p 80 >/tmp/got
md5sum </tmp/got
",
        address = link.address,
        gateway = link.gateway
    );
    let sent = pattern(((1 << 20) * scale()) as usize);
    let kernel = Kernel::minimal();
    let guest = guest(&kernel, &script);
    let publish = format!("{free}:80");
    let words = ["--cmdline", "quiet", "--net", "user", "-p", &publish];
    let mut vm = guest.start(&words);
    let mut stream = vm.accept(&to_host);
    stream.write_all(&sent).unwrap();
    drop(stream);
    vm.expect("serving\n");
    // passt takes a connection before the guest has: one that comes too early is reset.
    let until = Instant::now() + LIMIT;
    let pass = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", free))?;
        stream.write_all(&sent)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new()).map(drop)
    };
    while let Err(e) = pass() {
        assert!(Instant::now() < until, "{e}\n{}", vm.report());
        std::thread::sleep(Duration::from_millis(500));
    }
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    let sum = format!("{}  -", md5(&sent));
    let right = console.lines().filter(|line| *line == sum).count();
    assert_eq!(right, 2, "{}", ended.report());
}

#[test]
fn memory_goes_back_to_the_host() {
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
    let kernel = Kernel::minimal();
    let guest = guest(&kernel, script);
    let words = ["--cmdline", "quiet", "--balloon", "0,reporting"];
    let mut vm = guest.start(&words);
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

// ---- Help ----

#[track_caller]
fn command(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    // As an ordinary user's path has it, mkfs and ip are not found.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let output = command.args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A file of zeroes that takes no room.
fn make_image(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Blocks of 512 bytes that a file takes.
fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

fn resident_mib(pid: rustix::process::Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() / 1024
}

/// What a guest connects to.
trait Listener {
    type Stream;
    fn accept_now(&self) -> std::io::Result<Self::Stream>;
}

impl Listener for TcpListener {
    type Stream = TcpStream;
    fn accept_now(&self) -> std::io::Result<TcpStream> {
        self.set_nonblocking(true)?;
        let (stream, _) = self.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;
    fn accept_now(&self) -> std::io::Result<UnixStream> {
        self.set_nonblocking(true)?;
        let (stream, _) = self.accept()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}

trait Accept {
    fn accept<L: Listener>(&self, listener: &L) -> L::Stream;
}

impl Accept for Vm {
    /// Wait until the guest connects.
    #[track_caller]
    fn accept<L: Listener>(&self, listener: &L) -> L::Stream {
        let until = Instant::now() + LIMIT;
        loop {
            match listener.accept_now() {
                Ok(stream) => return stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
            assert!(Instant::now() < until, "no connection\n{}", self.report());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn listen(address: &str, port: u16) -> TcpListener {
    TcpListener::bind((address, port)).unwrap()
}

/// A connection from the host to a port of the guest.
fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the guest refuses");
        answer.push(byte[0]);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    stream
}

/// A tap device with an address; it is removed at the end.
struct Tap {
    name: String,
    host: String,
    guest: String,
}

impl Tap {
    fn new() -> Self {
        let id = std::process::id();
        let (high, low) = (id >> 8 & 0xff, id & 0xff);
        let tap = Self {
            name: format!("husk{id}"),
            host: format!("10.{high}.{low}.1"),
            guest: format!("10.{high}.{low}.2"),
        };
        command("ip", &["tuntap", "add", &tap.name, "mode", "tap"]);
        let address = format!("{}/24", tap.host);
        command("ip", &["addr", "add", &address, "dev", &tap.name]);
        command("ip", &["link", "set", &tap.name, "up"]);
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "del", &self.name])
            .status();
    }
}

/// An interface with the default route, where the host has none.
struct Uplink {
    own: bool,
    address: String,
    gateway: String,
}

impl Uplink {
    fn new() -> Self {
        let route = command("ip", &["-4", "route", "show", "default"]);
        if let Some(gateway) = route.split_whitespace().nth(2) {
            let words: Vec<&str> = route.split_whitespace().collect();
            let device = words[4];
            let addresses = command("ip", &["-4", "-o", "addr", "show", "dev", device]);
            let address = addresses.split_whitespace().nth(3).unwrap();
            return Self {
                own: false,
                address: address.split('/').next().unwrap().to_owned(),
                gateway: gateway.to_owned(),
            };
        }
        command(
            "ip",
            &[
                "link", "add", "huskup", "type", "veth", "peer", "name", "huskup1",
            ],
        );
        let own = Self {
            own: true,
            address: "192.0.2.1".into(),
            gateway: "192.0.2.254".into(),
        };
        command("ip", &["addr", "add", "192.0.2.1/24", "dev", "huskup"]);
        for device in ["huskup", "huskup1"] {
            command("ip", &["link", "set", device, "up"]);
        }
        command("ip", &["route", "add", "default", "via", "192.0.2.254"]);
        own
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        if self.own {
            let _ = Command::new("ip").args(["link", "del", "huskup"]).status();
        }
    }
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", text(&self.0)]).status();
    }
}
