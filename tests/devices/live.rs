//! Devices change while their VM runs, by requests to its socket.

use crate::common::guest::Kernel;
use crate::common::{Vm, temp_dir, text};
use crate::help::{Accept, guest, listen, words};
use crate::host::{Tap, command, resident_mib};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A VM's socket, as programs that steer it use it.
pub struct Api(pub PathBuf);

impl Api {
    /// The body of the answer; it must be one of success.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: &str) -> String {
        let url = format!("http://localhost{path}");
        let words = [
            "-sS",
            "--fail-with-body",
            "--unix-socket",
            text(&self.0),
            "-X",
            method,
            &url,
        ];
        let body: &[&str] = if body.is_empty() { &[] } else { &["-d", body] };
        command("curl", &[&words, body].concat())
    }

    /// Status and body, whatever they are.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let url = format!("http://localhost{path}");
        let words = [
            "-sS",
            "-w",
            "\n%{http_code}",
            "--unix-socket",
            text(&self.0),
        ];
        let said = command(
            "curl",
            &[&words[..], &["-X", method, "-d", body, &url]].concat(),
        );
        let (body, status) = said.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    #[track_caller]
    pub fn patch(&self, path: &str, body: &str) {
        self.request("PATCH", path, body);
    }
}

/// An image of which each block says where it is, and what it is a part of.
fn named_image(path: &Path, mib: u64, name: u8) {
    let sector: Vec<u8> = std::iter::repeat_n(name, 511).chain([b'\n']).collect();
    std::fs::write(path, sector.repeat((mib << 11) as usize)).unwrap();
}

/// A disk grows, its file is swapped under a guest that has it open, its limit is set and lifted.
pub fn a_disk_changes_under_a_running_guest(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    named_image(&first, 8, b'a');
    named_image(&second, 24, b'b');
    let script = "
sectors() { until [ $(cat /sys/block/vda/size) = $1 ]; do sleep 0.1; done; echo $1 sectors; }
# What the guest's own cache has of the disk may be of the old file.
letter() { blockdev --flushbufs /dev/vda; dd if=/dev/vda bs=512 skip=$1 count=1 2>/dev/null | cut -c1; }
exec 3</dev/vda
echo open $(letter 9); read -r go
sectors 32768
dd if=/dev/zero of=/dev/vda bs=512 seek=32767 count=1 oflag=direct 2>/dev/null && echo the new end is written
echo grown; read -r go
sectors 49152
echo swapped $(letter 9) $(letter 49151)
dd if=/dev/vda bs=512 count=1 2>/dev/null | tr a-z A-Z >/tmp/sector
dd if=/tmp/sector of=/dev/vda bs=512 seek=5 conv=notrunc,fsync 2>/dev/null
echo unlimited; read -r go
tool pace read /dev/vda 65536 8 64
echo limited; read -r go
tool pace read /dev/vda 65536 8 64
";
    let api = Api(dir.path().join("api"));
    let disk = format!("{},id=data", first.display());
    let guest = guest(kernel, script);
    let words = words(
        "--cmdline quiet --api-sock",
        &[text(&api.0), "--disk", &disk],
    );
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("open a\n");
    let grow = |mib: u64| {
        std::fs::File::options()
            .write(true)
            .open(&first)
            .unwrap()
            .set_len(mib << 20)
    };
    grow(16).unwrap();
    let to = |path: &Path| {
        format!(
            r#"{{"drive_id": "data", "path_on_host": "{}"}}"#,
            path.display()
        )
    };
    api.patch("/drives/data", &to(&first));
    vm.send(b"\n");
    vm.expect("32768 sectors\n");
    vm.expect("the new end is written\ngrown\n");
    api.patch("/drives/data", &to(&second));
    vm.send(b"\n");
    vm.expect("swapped b b\n");
    vm.expect("unlimited\n");
    let limit = |limiter: &str| {
        let body = format!(r#"{{"drive_id": "data", "rate_limiter": {{"bandwidth": {limiter}}}}}"#);
        api.patch("/drives/data", &body);
    };
    limit(r#"{"size": 104857, "refill_time": 100}"#);
    vm.send(b"\n");
    let limited = paced(&mut vm);
    assert!(
        (3.6..4.4).contains(&limited),
        "4 MiB by 1 MiB/s took {limited} s"
    );
    limit(r#"{"size": 0, "refill_time": 0}"#);
    vm.send(b"\n");
    let free = paced(&mut vm);
    assert!(
        free < limited / 2.0,
        "without a limit it took {free} s, with one {limited} s"
    );
    let ended = vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
    // Each write went to the file that was there at the time.
    let read = |path: &Path, at: usize| std::fs::read(path).unwrap()[at];
    assert_eq!(
        (read(&first, 5 * 512), read(&second, 5 * 512)),
        (b'a', b'B')
    );
    assert_eq!(std::fs::metadata(&first).unwrap().len(), 16 << 20);
}

/// Seconds that the guest's `tool pace` says.
#[track_caller]
fn paced(vm: &mut Vm) -> f64 {
    vm.expect("tool: paced read of /dev/vda: ");
    vm.expect_number() as f64 / 1e6
}

/// An interface's limit is set and lifted, its cable pulled and plugged in.
pub fn a_network_changes_under_a_running_guest(kernel: &Kernel, flags: &[&str]) {
    let (dir, tap) = (temp_dir(), Tap::new());
    let script = format!(
        "
ip addr add {guest}/24 dev eth0
ip link set eth0 up
carrier() {{ until [ $(cat /sys/class/net/eth0/carrier) = $1 ]; do sleep 0.1; done; echo carrier $1; }}
carrier 1
ping -q -c 2 {host} | grep received
echo up; read -r go
carrier 0
ping -q -c 2 -W 1 {host} | grep received
echo down; read -r go
carrier 1
# Linux sends again a while after it has seen the carrier (linkwatch).
until ping -q -c 1 -W 1 {host} >/dev/null; do :; done
ping -q -c 2 {host} | grep received
echo again; read -r go
tool copy tcp:{host}:5001 /dev/null &
tool watch /sys/class/net/eth0/statistics/rx_bytes 3000
wait
tool copy tcp:{host}:5001 /dev/null
",
        host = tap.host,
        guest = tap.guest
    );
    let api = Api(dir.path().join("api"));
    let listener = listen(&tap.host, 5001);
    let guest = guest(kernel, &script);
    let net = format!("tap={},id=lan", tap.name);
    let words = words("--cmdline quiet --api-sock", &[text(&api.0), "--net", &net]);
    let mut vm = guest.start(&[&words, flags].concat());
    let change = |what: &str| {
        let body = format!(r#"{{"iface_id": "lan", {what}}}"#);
        api.patch("/network-interfaces/lan", &body);
    };
    vm.expect("2 packets received");
    vm.expect("up\n");
    change(r#""link_up": false"#);
    vm.send(b"\n");
    vm.expect("carrier 0\n");
    vm.expect(" 0 packets received");
    vm.expect("down\n");
    change(r#""link_up": true"#);
    vm.send(b"\n");
    vm.expect("carrier 1\n");
    vm.expect("2 packets received");
    vm.expect("again\n");
    change(r#""rx_rate_limiter": {"bandwidth": {"size": 104857, "refill_time": 100}}"#);
    vm.send(b"\n");
    let mut stream = vm.accept(&listener);
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        stream.write_all(&[1; 8 << 10]).unwrap();
    }
    drop(stream);
    vm.expect("grew by ");
    let bytes = vm.expect_number() as f64;
    vm.expect(" in ");
    let rate = bytes / (vm.expect_number() as f64 / 1e6);
    let ratio = rate / f64::from(1 << 20);
    assert!((0.9..1.1).contains(&ratio), "{rate} bytes/s, not 1 MiB/s");
    change(r#""rx_rate_limiter": {"bandwidth": {"size": 0, "refill_time": 0}}"#);
    let mut stream = vm.accept(&listener);
    let start = Instant::now();
    // Twelve seconds' worth under the limit.
    stream.write_all(&vec![1; 12 << 20]).unwrap();
    drop(stream);
    vm.expect(&format!("tool: copied {} bytes", 12 << 20));
    let free = start.elapsed();
    assert!(
        free < Duration::from_secs(9),
        "12 MiB took {free:?} without a limit"
    );
    let ended = vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}

/// A balloon is filled and emptied, and says what the guest says of its memory.
pub fn a_balloon_changes_under_a_running_guest(kernel: &Kernel, flags: &[&str]) {
    let dir = temp_dir();
    let script = "
total() { sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }
mount -o remount,size=100% /tmp
free=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
dd if=/dev/zero of=/tmp/large bs=1M count=$((free / 1024 - 16)) 2>/dev/null
rm /tmp/large
all=$(total)
echo used; read -r go
until [ $(total) -le $((all - 98304)) ]; do sleep 0.1; done
sleep 1
echo given $((all - $(total))) kB; read -r go
until [ $(total) = $all ]; do sleep 0.1; done
echo taken; read -r go
";
    let api = Api(dir.path().join("api"));
    let guest = guest(kernel, script);
    let words = words(
        "--cmdline quiet --balloon 0,stats=1 --api-sock",
        &[text(&api.0)],
    );
    let mut vm = guest.start(&[&words, flags].concat());
    vm.expect("used\n");
    let used = resident_mib(vm.pid());
    api.patch("/balloon", r#"{"amount_mib": 96}"#);
    vm.send(b"\n");
    vm.expect("given 98304 kB\n");
    let given = resident_mib(vm.pid());
    assert!(given + 65 < used, "{used} MiB were resident, then {given}");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let said = api.request("GET", "/balloon/statistics", "");
        let full = r#""actual_mib":96"#;
        if said.replace(' ', "").contains(full) && said.contains("total_memory") {
            eprintln!("{said}");
            break;
        }
        assert!(
            Instant::now() < deadline,
            "no statistics of a full balloon: {said}"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
    api.patch("/balloon", r#"{"amount_mib": 0}"#);
    vm.send(b"\n");
    vm.expect("taken\n");
    vm.send(b"\n");
    let ended = vm.finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}
