//! End to end: the metadata service, fetched by real programs in real guests. Run by `cargo xtask test`, as root: taps belong to
//! the host.

mod common;

use common::guest::{Guest, Kernel, LIMIT};
use common::{Vm, temp_dir, text};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The drivers that Debian's kernel has as modules.
const MODULES: [&str; 3] = ["virtio_mmio", "virtio_pci", "virtio_net"];
const SERVICE: &str = "http://169.254.169.254";

/// A tap device, deleted at the end.
struct Tap(String);

impl Tap {
    fn new(number: u32) -> Self {
        let tap = Self(format!("hkm{}n{number}", std::process::id()));
        ip(&["tuntap", "add", &tap.0, "mode", "tap"]);
        ip(&["link", "set", &tap.0, "up"]);
        tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {why}");
}

/// A guest with the host's curl, whose script ends in a power-off. eth0 is 172.16.0.2/24.
fn guest<'a>(kernel: &'a Kernel, script: &str) -> Guest<'a> {
    let start = "dmesg -n 1
stty raw -echo
export LD_LIBRARY_PATH=/lib
ip addr add 172.16.0.2/24 dev eth0
ip link set eth0 up
";
    let mut guest = Guest::new(kernel, Some(&format!("{start}{script}")));
    let modules = MODULES.iter().map(|module| (*module).to_owned());
    guest.builder.modules.extend(modules);
    guest.builder.files.extend(curl());
    guest
}

/// curl and the libraries that it is linked with, as files of an initramfs.
fn curl() -> Vec<(String, Vec<u8>, u32)> {
    let path = "/usr/bin/curl";
    let output = Command::new("ldd").arg(path).output().unwrap();
    let list = String::from_utf8(output.stdout).unwrap();
    let paths = list.lines().filter_map(|line| {
        let place = line.split_once("=> ").map_or(line, |(_, place)| place);
        let place = place.trim().split(' ').next()?;
        place.starts_with('/').then(|| PathBuf::from(place))
    });
    let mut files = vec![("bin/curl".to_owned(), std::fs::read(path).unwrap(), 0o755)];
    for library in paths {
        let name = library.file_name().unwrap().to_str().unwrap();
        // The loader is where the program says; the others are where LD_LIBRARY_PATH says.
        let folder = if name.starts_with("ld-") {
            "lib64"
        } else {
            "lib"
        };
        let content = std::fs::read(&library).unwrap();
        files.push((format!("{folder}/{name}"), content, 0o755));
    }
    assert!(files.len() > 3, "curl has no libraries: {list}");
    files
}

/// A configuration file with these taps as eth0, eth1, ….
fn configuration(dir: &Path, kernel: &Kernel, taps: &[&Tap], mmds: serde_json::Value) -> PathBuf {
    let interfaces: Vec<_> = (0..)
        .zip(taps)
        .map(|(at, tap)| json!({"iface_id": format!("net{at}"), "host_dev_name": tap.0}))
        .collect();
    let config = json!({
        "boot-source": {"kernel_image_path": kernel.image},
        "network-interfaces": interfaces,
        "mmds-config": mmds,
    });
    let path = dir.join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

fn metadata(dir: &Path) -> PathBuf {
    let path = dir.join("metadata.json");
    let content = json!({
        "latest": {"meta-data": {
            "ami-id": "ami-12345678",
            "cores": 4,
            "network": {"macs": {"02:29:96:8f:6a:2d": {"device-number": "13345342"}}},
        }},
        "large": "0123456789abcdef".repeat(3000),
    });
    std::fs::write(&path, content.to_string()).unwrap();
    path
}

/// Run `script` in a guest with one interface and `mmds`; what it said.
fn said(kernel: &Kernel, mmds: serde_json::Value, script: &str, flags: &[&str]) -> String {
    let tap = Tap::new(1);
    let dir = temp_dir();
    let config = configuration(dir.path(), kernel, &[&tap], mmds);
    let metadata = metadata(dir.path());
    let guest = guest(kernel, script);
    let mut husk = guest.command();
    husk.args(["--config", text(&config), "--metadata", text(&metadata)])
        .args(["--cmdline", "quiet"]);
    let ended = Vm::start(husk.args(flags), LIMIT).finish();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "", "{}", ended.report());
    ended.console()
}

#[track_caller]
fn assert_said(console: &str, wanted: &[&str]) {
    let said: Vec<&str> = console.lines().map(str::trim).collect();
    let mut rest = said.iter();
    for line in wanted {
        assert!(
            rest.any(|said| said == line),
            "no {line:?} (in its place) in:\n{console}"
        );
    }
}

fn version_1(kernel: &Kernel, flags: &[&str]) {
    // Its own route, then the default one through a router that is not there.
    let script = format!(
        "
ip route add 169.254.169.254 dev eth0
wget -q -O - {SERVICE}/latest/meta-data/; echo
curl -s {SERVICE}/latest/meta-data/ami-id; echo
curl -s -H 'Accept: application/json' {SERVICE}/latest/meta-data/network; echo
curl -s -o /dev/null -w '%{{http_code}}\\n' {SERVICE}/latest/nothing
curl -s -o /dev/null -w '%{{http_code}}\\n' {SERVICE}/latest/meta-data/cores
curl -s -o /dev/null -w '%{{http_code}}\\n' -X POST {SERVICE}/
curl -s {SERVICE}/large | wc -c
curl -s {SERVICE}/large | md5sum
LONG=$(printf '%03000d' 0)
curl -s -H \"X-Long: $LONG\" {SERVICE}/latest/meta-data/ami-id; echo
ip route del 169.254.169.254 dev eth0
ip neigh add 172.16.0.1 lladdr 02:00:00:00:00:99 dev eth0 2>/dev/null || arp -s 172.16.0.1 02:00:00:00:00:99
ip route add default via 172.16.0.1
curl -s -m 20 {SERVICE}/latest/meta-data/ami-id; echo ' by the router'
"
    );
    let console = said(
        kernel,
        json!({"network_interfaces": ["net0"]}),
        &script,
        flags,
    );
    let sum = common::guest::md5("0123456789abcdef".repeat(3000).as_bytes());
    assert_said(
        &console,
        &[
            "ami-id",
            "cores",
            "network/",
            "ami-12345678",
            r#"{"macs":{"02:29:96:8f:6a:2d":{"device-number":"13345342"}}}"#,
            "404",
            "501",
            "405",
            "48000",
            &format!("{sum}  -"),
            "ami-12345678",
            "ami-12345678 by the router",
        ],
    );
}

fn version_2(kernel: &Kernel, flags: &[&str]) {
    let script = "
ip route add 169.254.170.2 dev eth0
S=http://169.254.170.2
curl -s -o /dev/null -w '%{http_code}\\n' $S/latest
wget -q -O - $S/latest || echo wget was refused
curl -s -X PUT $S/latest/api/token; echo
TOKEN=$(curl -s -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600' $S/latest/api/token)
curl -s -H \"X-aws-ec2-metadata-token: $TOKEN\" $S/latest/meta-data/ami-id; echo
wget -q -O - --header \"X-metadata-token: $TOKEN\" $S/latest/; echo
curl -s -H \"Accept: application/json\" -H \"X-metadata-token: $TOKEN\" $S/latest/meta-data/network; echo
TOKEN=$(printf 'PUT /latest/api/token HTTP/1.0\\r\\nX-metadata-token-ttl-seconds: 1\\r\\n\\r\\n' | nc 169.254.170.2 80 | tail -n 1)
echo ${#TOKEN} digits
sleep 2
curl -s -H \"X-metadata-token: $TOKEN\" $S/latest; echo
";
    let mmds = json!({
        "version": "V2", "network_interfaces": ["net0"], "ipv4_address": "169.254.170.2", "imds_compat": true,
    });
    let console = said(kernel, mmds, script, flags);
    assert_said(
        &console,
        &[
            "401",
            "wget was refused",
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            "ami-12345678",
            "meta-data/",
            "macs/",
            "72 digits",
            "MMDS token not valid.",
        ],
    );
}

#[test]
fn debian_fetches_version_1() {
    version_1(&Kernel::debian(), &[]);
}

#[test]
fn debian_fetches_version_2_over_pci() {
    version_2(&Kernel::debian(), &["--pci"]);
}

#[test]
fn minimal_fetches_version_1_over_pci() {
    version_1(&Kernel::minimal(), &["--pci"]);
}

#[test]
fn minimal_fetches_version_2() {
    version_2(&Kernel::minimal(), &[]);
}

#[test]
fn the_service_needs_no_tap_that_works_and_is_on_its_interfaces_only() {
    let kernel = Kernel::minimal();
    let (first, second) = (Tap::new(1), Tap::new(2));
    let dir = temp_dir();
    let mmds = json!({"network_interfaces": ["net0"]});
    let config = configuration(dir.path(), &kernel, &[&first, &second], mmds);
    let metadata = metadata(dir.path());
    let script = format!(
        "
U={SERVICE}/latest/meta-data/ami-id
ip link set eth1 up
ip route add 169.254.169.254 dev eth1
curl -s -m 3 $U || echo not on eth1
ip route del 169.254.169.254 dev eth1
ip route add 169.254.169.254 dev eth0
curl -s $U; echo ' with the tap'
echo down; read -r go
curl -s $U; echo ' with the tap down'
echo delete; read -r go
ping -c 1 -W 1 172.16.0.1 >/dev/null 2>&1
curl -s $U; echo ' without a tap'
"
    );
    let guest = guest(&kernel, &script);
    let mut husk = guest.command();
    husk.args(["--config", text(&config), "--metadata", text(&metadata)])
        .args(["--cmdline", "quiet"]);
    let mut vm = Vm::start(&mut husk, LIMIT);
    vm.expect("down\n");
    ip(&["link", "set", &first.0, "down"]);
    vm.send(b"\n");
    vm.expect("delete\n");
    drop(first);
    vm.send(b"\n");
    let ended = vm.finish();
    let console = ended.expect_status(0).console();
    assert_said(
        &console,
        &[
            "not on eth1",
            "ami-12345678 with the tap",
            "ami-12345678 with the tap down",
            "ami-12345678 without a tap",
        ],
    );
    assert!(ended.stderr.contains("net0"), "{}", ended.stderr);
}

#[test]
fn metadata_alone_is_reached_through_the_first_interface() {
    let kernel = Kernel::minimal();
    let tap = Tap::new(1);
    let dir = temp_dir();
    let metadata = metadata(dir.path());
    let script = format!(
        "
ip route add 169.254.169.254 dev eth0
curl -s {SERVICE}/latest/; echo
"
    );
    let guest = guest(&kernel, &script);
    let net = format!("tap={}", tap.0);
    let words = ["--cmdline", "quiet", "--metadata", text(&metadata)];
    let ended = guest.run(&[&words[..], &["--net", &net]].concat());
    assert_said(&ended.expect_status(0).console(), &["meta-data/"]);

    let refused = |arguments: &[&str], why: &str| {
        let ended = guest.run(arguments);
        ended.expect_status(2);
        assert!(ended.stderr.contains(why), "{}", ended.stderr);
    };
    refused(&["--metadata", text(&metadata)], "--net");
    refused(&["--metadata", "/nowhere", "--net", &net], "/nowhere");
    let small = ["--metadata", text(&metadata), "--mmds-size-limit", "48000"];
    refused(
        &[&small[..], &["--net", &net]].concat(),
        "--mmds-size-limit",
    );
    let broken = dir.path().join("broken");
    std::fs::write(&broken, "{").unwrap();
    refused(&["--metadata", text(&broken), "--net", &net], "no JSON");
}
