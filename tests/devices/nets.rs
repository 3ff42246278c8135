//! Networks, over a tap and without one.

use crate::common::guest::{Guest, Kernel, LIMIT, md5};
use crate::common::{assert_same_bytes, pattern, temp_dir, text};
use crate::help::{Accept, connect, guest, listen, scale, words};
use crate::host::{Mount, Tap, Uplink, make_image, program, tool};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub fn networks_and_sockets_carry_everything(kernel: &Kernel, flags: &[&str]) {
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

pub fn the_user_network_needs_no_tap_and_forwards_ports(kernel: &Kernel, flags: &[&str]) {
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
    let guest = guest(kernel, &script);
    let publish = format!("{free}:80");
    let words = words("--cmdline quiet --net user", &["-p", &publish]);
    let mut vm = guest.start(&[&words, flags].concat());
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

/// Bytes of the large file.
const LARGE: u64 = 500_000_000;

/// What a guest does with a large file: takes it, says what it is, and sends it back. Then iperf3 has its turn.
fn large_file_script(address: &str, setup: &str, ports: [u16; 3]) -> String {
    let [down, up, iperf] = ports;
    format!(
        "
{setup}
ip link set eth0 up
mount -o remount,size=90% /tmp
tool copy tcp:{address}:{down} /tmp/file
tool sum /tmp/file
tool copy /tmp/file tcp:{address}:{up}
for way in '' -R; do
	for try in 1 2 3 4 5 6 7 8 9; do iperf3 -c {address} -p {iperf} -t 3 $way && echo iperf3 is done && break; sleep 1; done
done
"
    )
}

/// iperf3's server, for one test after the other.
struct Iperf(Child);

impl Iperf {
    fn start(address: &str, port: u16) -> Self {
        let port = port.to_string();
        let mut iperf = Command::new("iperf3");
        iperf.args(["-s", "-B", address, "-p", &port]);
        Self(iperf.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The host's side of [`large_file_script`], from the guest's start to its end.
fn pass_large_file(guest: &Guest, words: &[&str], listeners: &[TcpListener; 2]) {
    let place = Mount::tmpfs(2 * LARGE + (16 << 20));
    let (file, back) = (place.path().join("file"), place.path().join("back"));
    let start = Instant::now();
    fill(&file);
    let sum = tool(&["sum", text(&file)]);
    let (_, sum) = sum.trim().rsplit_once(' ').unwrap();
    let made = start.elapsed();
    let vm = guest.start(words);
    let mut stream = vm.accept(&listeners[0]);
    let start = Instant::now();
    std::io::copy(&mut File::open(&file).unwrap(), &mut stream).unwrap();
    drop(stream);
    let mut stream = vm.accept(&listeners[1]);
    // Debian 12's passt gives a connection up, 8 s later, over which the host has never said anything.
    stream.write_all(b"\n").unwrap();
    let down = start.elapsed();
    let start = Instant::now();
    // Nobody closes before all of it is there.
    std::io::copy(
        &mut (&mut stream).take(LARGE),
        &mut File::create(&back).unwrap(),
    )
    .unwrap();
    drop(stream);
    eprintln!(
        "made in {made:.1?}, sent in {down:.1?}, came back in {:.1?}",
        start.elapsed()
    );
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    let copied = format!("tool: copied {LARGE} bytes");
    assert_eq!(console.matches(&copied).count(), 2, "{}", ended.report());
    let said = format!("tool: sum of /tmp/file {sum}\n");
    assert!(console.contains(&said), "no {said:?}\n{}", ended.report());
    assert!(
        tool(&["sum", text(&back)]).ends_with(&format!(" {sum}\n")),
        "what came back is another file"
    );
    let done = console.matches("iperf3 is done").count();
    assert_eq!(done, 2, "{}", ended.report());
    for line in console.lines().filter(|line| line.ends_with("receiver")) {
        eprintln!("iperf3: {line}");
    }
    assert_eq!(ended.stderr, "");
}

/// [`LARGE`] bytes that are not the same anywhere.
fn fill(path: &Path) {
    make_image(path, LARGE);
    let mib = (LARGE >> 20).to_string();
    tool(&["verify", text(path), &mib, "cached", "1"]);
}

/// With iperf3, and time enough for [`LARGE`].
fn with_iperf(mut guest: Guest) -> Guest {
    guest.builder.files.extend(program("/usr/bin/iperf3"));
    guest.limit *= 4;
    guest
}

pub fn a_large_file_goes_both_ways_over_a_tap(kernel: &Kernel, flags: &[&str]) {
    let tap = Tap::new();
    let listeners = [listen(&tap.host, 5001), listen(&tap.host, 5002)];
    let _iperf = Iperf::start(&tap.host, 5201);
    let setup = format!("ip addr add {}/24 dev eth0", tap.guest);
    let script = large_file_script(&tap.host, &setup, [5001, 5002, 5201]);
    let guest = with_iperf(guest(kernel, &script));
    let net = format!("tap={}", tap.name);
    let words = words("--cmdline quiet --memory 800M", &["--net", &net]);
    pass_large_file(&guest, &[&words, flags].concat(), &listeners);
}

pub fn a_large_file_goes_both_ways_over_the_user_network(kernel: &Kernel, flags: &[&str]) {
    let link = Uplink::new();
    let listeners = [listen("127.0.0.1", 0), listen("127.0.0.1", 0)];
    let [down, up] = [0, 1].map(|index: usize| listeners[index].local_addr().unwrap().port());
    let iperf = listen("127.0.0.1", 0).local_addr().unwrap().port();
    let _iperf = Iperf::start("127.0.0.1", iperf);
    let setup = format!(
        "ip addr add {}/24 dev eth0\nip link set eth0 up\nip route add default via {}",
        link.address, link.gateway
    );
    let script = large_file_script(&link.gateway, &setup, [down, up, iperf]);
    let guest = with_iperf(guest(kernel, &script));
    let words = words("--cmdline quiet --memory 800M --net user", flags);
    pass_large_file(&guest, &words, &listeners);
}
