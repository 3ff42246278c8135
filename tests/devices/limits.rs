//! Limits: measured by the guest's clock and by the host's. The rates are low, so that nothing else is what limits.

use crate::common::guest::Kernel;
use crate::common::{Vm, temp_dir, text};
use crate::help::{Accept, guest, listen, words};
use crate::host::{Tap, make_image};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// What all devices here have in common, but for the disks that are limited in their own way.
const SCRIPT: &str = "
paced() { until tool pace $@; read -r next; [ \"$next\" = on ]; do :; done; }
paced read /dev/vda 65536 8 128
paced write /dev/vda 65536 8 128
paced write /dev/vdb 4096 10 200
paced read /dev/vdb 4096 10 200
tool pace read /dev/vdc 262144 0 32
paced read /dev/vdc 262144 0 16
paced read /dev/hwrng 4096 1 16
";

/// Bytes and operations of disks, a burst, random bytes, packets each way: within 10 % of what was set.
pub fn limits_hold_their_rate(kernel: &Kernel, flags: &[&str]) {
    let (dir, tap) = (temp_dir(), Tap::new());
    let [bytes, ops, burst] = ["bytes", "ops", "burst"].map(|name| {
        let path = dir.path().join(name);
        make_image(&path, 32 << 20);
        path
    });
    // What only a configuration file can say: 8 MiB at once, then 1 MiB in each second, of which the first is there, too.
    let config = dir.path().join("config.json");
    let drive = |name: &str, path: &str, limiter: &str| {
        format!(
            r#"{{"drive_id": "{name}", "path_on_host": "{path}", "is_root_device": false, "rate_limiter": {{{limiter}}}}}"#
        )
    };
    let drives = [
        drive(
            "bytes",
            text(&bytes),
            r#""bandwidth": {"size": 209715, "refill_time": 100}"#,
        ),
        drive(
            "ops",
            text(&ops),
            r#""ops": {"size": 5, "refill_time": 100}"#,
        ),
        drive(
            "burst",
            text(&burst),
            r#""bandwidth": {"size": 1048576, "one_time_burst": 7340032, "refill_time": 1000}"#,
        ),
    ];
    std::fs::write(&config, format!(r#"{{"drives": [{}]}}"#, drives.join(", "))).unwrap();
    let script = format!(
        "{SCRIPT}
ip addr add {}/24 dev eth0
ip link set eth0 up
tool copy tcp:{host}:5001 /dev/null &
taking=$!
tool watch /sys/class/net/eth0/statistics/rx_bytes 4000
wait $taking
tool copy /dev/zero tcp:{host}:5002 &
giving=$!
tool watch /sys/class/net/eth0/statistics/tx_bytes 4000
echo watched; kill $giving
",
        tap.guest,
        host = tap.host
    );
    let (to_guest, from_guest) = (listen(&tap.host, 5001), listen(&tap.host, 5002));
    let guest = guest(kernel, &script);
    let net = format!("tap={},rx-rate=2M,tx-rate=1M", tap.name);
    let config = words(
        "--entropy rate=16K --config",
        &[text(&config), "--net", &net],
    );
    let words = words("--cmdline quiet", &config);
    let mut vm = guest.start(&[&words, flags].concat());

    // 128 times 64 KiB by 2 MiB/s, 200 operations by 50/s: 4 s each.
    for what in [
        "read of /dev/vda",
        "write of /dev/vda",
        "write of /dev/vdb",
        "read of /dev/vdb",
    ] {
        check(&mut vm, what, 4.0);
    }
    // 8 MiB are there at once.
    let (guest_s, host_s) = paced(&mut vm, "read of /dev/vdc");
    assert!(
        guest_s < 2.0 && host_s < 2.5,
        "the burst took {guest_s} s, {host_s} s"
    );
    // Then nothing is.
    check(&mut vm, "read of /dev/vdc", 4.0);
    check(&mut vm, "read of /dev/hwrng", 4.0);

    let mut stream = vm.accept(&to_guest);
    let sending = std::thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(6);
        while Instant::now() < until {
            stream.write_all(&[1; 16 << 10]).unwrap();
        }
    });
    check_net(&mut vm, &tap, true, 2 << 20);
    sending.join().unwrap();

    let mut stream = vm.accept(&from_guest);
    // Until the guest is gone, which says nothing more.
    let silence = Some(Duration::from_secs(3));
    stream.set_read_timeout(silence).unwrap();
    let taking = std::thread::spawn(move || while let Ok(1..) = stream.read(&mut [0; 64 << 10]) {});
    check_net(&mut vm, &tap, false, 1 << 20);
    vm.expect("watched\n");
    vm.finish().expect_status(0);
    drop(tap);
    taking.join().unwrap();
}

/// Seconds that the guest says something took, and that it took here.
#[track_caller]
fn paced(vm: &mut Vm, what: &str) -> (f64, f64) {
    vm.expect("tool: pacing\n");
    let start = Instant::now();
    vm.expect(&format!("tool: paced {what}: "));
    let host = start.elapsed().as_secs_f64();
    (vm.expect_number() as f64 / 1e6, host)
}

/// By either clock. A rate that is exceeded fails at once; one that is not reached is measured anew, twice at most:
/// a host that stood still for more than the bucket holds has lost the guest what would have come.
#[track_caller]
fn check(vm: &mut Vm, what: &str, wanted: f64) {
    for last in [false, false, true] {
        let (guest, host) = paced(vm, what);
        eprintln!("{what}: {guest:.2} s, {host:.2} s by the host, of {wanted} s");
        let ratio = |seconds| seconds / wanted;
        assert!(
            ratio(guest).min(ratio(host)) > 0.9,
            "{what}: {guest} s, {host} s by the host, not {wanted}"
        );
        if ratio(guest).max(ratio(host)) < 1.1 {
            vm.send(b"on\n");
            return;
        }
        assert!(!last, "{what}: slower than {wanted} s three times");
        vm.send(b"again\n");
    }
}

/// The interface's rate in bytes per second, as either side counts it.
#[track_caller]
fn check_net(vm: &mut Vm, tap: &Tap, to_guest: bool, wanted: u64) {
    vm.expect("tool: watching\n");
    let (start, before) = (Instant::now(), tap.bytes(to_guest));
    vm.expect("grew by ");
    let (seconds, bytes) = (start.elapsed().as_secs_f64(), tap.bytes(to_guest) - before);
    let guest_bytes = vm.expect_number() as f64;
    vm.expect(" in ");
    let guest = guest_bytes / (vm.expect_number() as f64 / 1e6);
    let host = bytes as f64 / seconds;
    let wanted = wanted as f64;
    eprintln!("to the guest {to_guest}: {guest:.0}/s, {host:.0}/s by the host, of {wanted}/s");
    for rate in [guest, host] {
        assert!(
            (0.9..1.1).contains(&(rate / wanted)),
            "to the guest {to_guest}: {rate} bytes/s, not {wanted}"
        );
    }
}
