//! End to end: what metrics say of a real guest's traffic agrees with what it did. Run by `cargo xtask test`, as root.

mod common;

use common::guest::{Guest, Kernel, variable};
use common::{temp_dir, text};
use serde_json::Value;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::process::Command;

/// Bytes over vsock, each way.
const SENT: u64 = 100_000;

#[test]
fn counters_agree_with_the_guests_traffic() {
    let dir = temp_dir();
    let (disk, socket) = (dir.path().join("disk"), dir.path().join("v"));
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(16 << 20).unwrap();
    let metrics = dir.path().join("metrics");
    let tap = Tap::new();
    let echo = UnixListener::bind(dir.path().join("v_6001")).unwrap();
    let serving = std::thread::spawn(move || {
        let (stream, _) = echo.accept().unwrap();
        std::io::copy(&mut &stream, &mut &stream).unwrap();
        (&stream).flush().unwrap();
    });
    let script = format!(
        "
dmesg -n 1
stty raw -echo
ip addr add {guest}/24 dev eth0
ip link set eth0 up
dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null && echo has read
dd if=/dev/zero of=/dev/vda bs=64k count=8 oflag=direct 2>/dev/null && echo has written
ping -q -c 3 {host} | grep received
tool send 6001 {SENT}
dd if=/dev/hwrng bs=1k count=64 2>/dev/null | wc -c
sleep 1
",
        host = tap.host,
        guest = tap.guest
    );
    let kernel = Kernel::minimal();
    let mut guest = Guest::new(&kernel, Some(&script));
    let tool = std::fs::read(variable("HUSK_TEST_TOOL")).unwrap();
    guest.builder.files.push(("bin/tool".into(), tool, 0o755));
    let vsock = format!("cid=3,uds={}", text(&socket));
    let net = format!("tap={},id=eth_0", tap.name);
    let disk = format!("{},id=data", text(&disk));
    let ended = guest.run(&[
        "--cmdline",
        "quiet",
        "--disk",
        &disk,
        "--net",
        &net,
        "--vsock",
        &vsock,
        "--entropy",
        "--balloon",
        "8",
        "--metrics-path",
        text(&metrics),
    ]);
    serving.join().unwrap();
    let console = ended.expect_status(0).console();
    for said in [
        "has read",
        "has written",
        "3 packets received",
        "came back",
        "65536",
    ] {
        assert!(console.contains(said), "no {said:?}\n{}", ended.report());
    }
    let told = Told::read(&metrics);

    // Beside what was asked for, the kernel looks for partitions.
    let read = told.sum("block_data", "read_bytes");
    assert!((1 << 20..2 << 20).contains(&read), "{read} bytes read");
    assert_eq!(told.sum("block_data", "write_bytes"), 512 << 10);
    assert!(told.sum("block_data", "write_count") >= 8);
    assert_eq!(told.sum("block", "read_bytes"), read);
    assert_eq!(told.sum("block", "execute_fails"), 0);

    // The host's kernel counts the same packets at the other end.
    assert_eq!(
        (
            told.sum("net_eth_0", "tx_packets_count"),
            told.sum("net_eth_0", "tx_bytes_count")
        ),
        (tap.statistic("rx_packets"), tap.statistic("rx_bytes"))
    );
    let received = told.sum("net_eth_0", "rx_packets_count");
    assert!((4..=tap.statistic("tx_packets")).contains(&received));
    assert_eq!(told.sum("net", "rx_packets_count"), received);

    assert_eq!(told.sum("vsock", "tx_bytes_count"), SENT);
    assert_eq!(told.sum("vsock", "rx_bytes_count"), SENT);
    assert_eq!(told.sum("vsock", "conns_added"), 1);
    assert!(told.sum("entropy", "entropy_bytes") >= 64 << 10);
    // 8 MiB, at most 256 pages in a request.
    assert!(told.sum("balloon", "inflate_count") >= 8);

    assert_eq!(told.sum("uart", "write_count"), ended.stdout.len() as u64);
    assert!(told.sum("vcpu", "exit_io_out") >= told.sum("uart", "write_count"));
    assert!(told.sum("vcpu", "exit_mmio_write") > 0);
    assert_eq!(told.sum("vcpu", "failures"), 0);
    assert!(told.sum("interrupts", "triggers") > 0);
    assert_eq!(told.sum("logger", "missed_metrics_count"), 0);
}

/// All lines of a run.
struct Told(Vec<Value>);

impl Told {
    fn read(path: &std::path::Path) -> Self {
        let lines = std::fs::read_to_string(path).unwrap();
        let lines = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        Self(lines.collect())
    }

    #[track_caller]
    fn sum(&self, section: &str, field: &str) -> u64 {
        let value = |line: &Value| line[section][field].as_u64();
        let all = self
            .0
            .iter()
            .map(|line| value(line).unwrap_or_else(|| panic!("no {section}.{field} in {line}")));
        all.sum()
    }
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
            name: format!("huskm{id}"),
            host: format!("10.{high}.{low}.1"),
            guest: format!("10.{high}.{low}.2"),
        };
        let address = format!("{}/24", tap.host);
        ip(&["tuntap", "add", &tap.name, "mode", "tap"]);
        ip(&["addr", "add", &address, "dev", &tap.name]);
        ip(&["link", "set", &tap.name, "up"]);
        tap
    }

    /// A number of the host's kernel about its end: `rx_` is what the guest has sent.
    fn statistic(&self, name: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "del", &self.name])
            .status();
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status();
    assert!(status.unwrap().success(), "ip {arguments:?}");
}
