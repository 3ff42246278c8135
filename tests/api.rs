//! End to end: a VM's whole life by requests to `husk serve`, with real Linux guests, under the filters. Run by
//! `cargo xtask test`, as root: taps belong to the host.

mod common;
#[path = "devices/help.rs"]
#[allow(dead_code)]
mod help;
#[path = "devices/host.rs"]
#[allow(dead_code)]
mod host;

use common::guest::{Guest, Kernel, LIMIT, md5};
use common::{Vm, husk, pattern, temp_dir, text};
use help::Accept;
use husk_api::client;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A guest that does what is typed, a line at a time.
const SHELL: &str = "
export LD_LIBRARY_PATH=/lib
echo ready
while read -r line; do eval \"$line\"; done
";

/// Most bytes of metadata.
const STORE: usize = 2000;

const NOT_INITIALIZED: &str = "The MMDS data store is not initialized.";

/// `husk serve` with a guest to be booted.
struct Served {
    vm: Vm,
    socket: PathBuf,
    tap: host::Tap,
    dir: tempfile::TempDir,
}

impl Served {
    fn start(flags: &[&str]) -> Self {
        let dir = temp_dir();
        let socket = dir.path().join("api");
        let mut husk = husk();
        husk.args(["serve", "--api-sock", text(&socket)])
            .args(["--mmds-size-limit", &STORE.to_string()])
            .args(flags);
        let vm = Vm::start(&mut husk, LIMIT);
        let until = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < until, "no socket\n{}", vm.report());
            std::thread::sleep(Duration::from_millis(5));
        }
        Self {
            vm,
            socket,
            tap: host::Tap::new(),
            dir,
        }
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: Value) -> (u16, String) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let response = client::request(&self.socket, method, path, &body)
            .unwrap_or_else(|e| panic!("{method} {path}: {e}\n{}", self.vm.report()));
        let fault = response.fault();
        (response.status, fault.unwrap_or(response.body))
    }

    #[track_caller]
    fn done(&self, method: &str, path: &str, body: Value) {
        let answer = self.ask(method, path, body);
        assert_eq!(answer, (204, String::new()), "{method} {path}");
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, Value::Null);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Type a line.
    fn type_line(&mut self, line: &str) {
        self.vm.send(format!("{line}\n").as_bytes());
    }

    /// An image in which each sector is of this letter.
    fn image(&self, letter: u8) -> PathBuf {
        let path = self.dir.path().join(char::from(letter).to_string());
        std::fs::write(&path, vec![letter; 8 << 20]).unwrap();
        path
    }

    /// From nothing to a guest that listens. The metadata is put before, in this version of its protocol.
    fn boot(&mut self, kernel: &Kernel, guest: &Guest, version: &str) {
        assert_eq!(self.get("/")["state"], "Not started");
        self.done(
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 128}),
        );
        self.done(
            "PUT",
            "/boot-source",
            json!({
                "kernel_image_path": kernel.image, "initrd_path": guest.initrd(),
                "boot_args": "console=ttyS0 reboot=k panic=1 quiet",
            }),
        );
        self.done(
            "PUT",
            "/drives/data",
            json!({
                "drive_id": "data", "path_on_host": self.image(b'a'), "is_root_device": false,
                "rate_limiter": {"ops": {"size": 10_000, "refill_time": 100}},
            }),
        );
        self.done(
            "PUT",
            "/network-interfaces/lan",
            json!({"iface_id": "lan", "host_dev_name": self.tap.name}),
        );
        self.metadata(version);
        self.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
        self.vm.expect("ready\n");
        assert_eq!(self.get("/")["state"], "Running");
        let address = &self.tap.guest;
        let line = format!(
            "ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add 169.254.169.254 dev eth0; echo up"
        );
        self.type_line(&line);
        self.vm.expect("up\n");
    }

    fn metadata(&self, version: &str) {
        let patch = self.ask("PATCH", "/mmds", json!({"a": 1}));
        assert_eq!(patch, (400, NOT_INITIALIZED.into()));
        self.done(
            "PUT",
            "/mmds/config",
            json!({"network_interfaces": ["lan"], "version": version}),
        );
        let data = json!({"latest": {"meta-data": {"ami-id": "ami-1", "gone": "soon"}}});
        self.done("PUT", "/mmds", data.clone());
        let (status, said) = self.ask("PUT", "/mmds", json!({"large": "x".repeat(STORE)}));
        assert_eq!(status, 413, "{said}");
        let (status, said) = self.ask("PATCH", "/mmds", json!({"large": "x".repeat(STORE)}));
        assert_eq!(status, 413, "{said}");
        // Neither changed anything.
        assert_eq!(self.get("/mmds"), data);
    }

    /// The drive's file is swapped, then it is limited, then it is not.
    fn change_drive(&mut self) {
        let read =
            "dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; echo read";
        self.type_line("head -c 3 /dev/vda; echo");
        self.vm.expect("aaa\n");
        let path = self.image(b'b');
        self.done(
            "PATCH",
            "/drives/data",
            json!({"drive_id": "data", "path_on_host": path}),
        );
        self.type_line("blockdev --flushbufs /dev/vda; head -c 3 /dev/vda; echo");
        self.vm.expect("bbb\n");
        let mut times = Vec::new();
        for (size, refill_time) in [(104_857, 100), (0, 0)] {
            let limiter = json!({"bandwidth": {"size": size, "refill_time": refill_time}});
            self.done(
                "PATCH",
                "/drives/data",
                json!({"drive_id": "data", "rate_limiter": limiter}),
            );
            let start = Instant::now();
            self.type_line(read);
            self.vm.expect("read\n");
            times.push(start.elapsed().as_secs_f64());
        }
        let (limited, free) = (times[0], times[1]);
        assert!(
            limited > 3.5 && free < limited / 2.0,
            "4 MiB took {limited} s by 1 MiB/s, and {free} s without a limit"
        );
    }

    /// A download goes on after a pause, and the clock is right.
    fn pause(&mut self) {
        let bytes = pattern(4 << 20);
        let sum = md5(&bytes);
        let listener = help::listen(&self.tap.host, 5001);
        let address = self.tap.host.clone();
        self.type_line(&format!(
            "nc {address} 5001 </dev/null | md5sum; date +now=%s; echo ."
        ));
        let mut stream = self.vm.accept(&listener);
        let serving = std::thread::spawn(move || {
            for part in bytes.chunks(64 << 10) {
                stream.write_all(part).unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        std::thread::sleep(Duration::from_millis(300));
        self.done("PATCH", "/vm", json!({"state": "Paused"}));
        assert_eq!(self.get("/")["state"], "Paused");
        std::thread::sleep(Duration::from_secs(6));
        assert!(!serving.is_finished(), "over before the pause was");
        self.done("PATCH", "/vm", json!({"state": "Resumed"}));
        assert_eq!(self.get("/")["state"], "Running");
        self.vm.expect(&format!("{sum}  -\n"));
        self.vm.expect("now=");
        let guests = self.vm.expect_number();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(now.as_secs().abs_diff(guests) < 5, "{guests} at {now:?}");
        serving.join().unwrap();
    }

    /// What the guest's curl gets is what was put last.
    fn change_metadata(&mut self, curl: &str) {
        let ami = format!("{curl}/latest/meta-data/ami-id; echo .");
        self.type_line(&ami);
        self.vm.expect("ami-1.\n");
        let merge = json!({"latest": {"meta-data": {"ami-id": "ami-2", "gone": null}}});
        self.done("PATCH", "/mmds", merge);
        self.type_line(&format!("{curl}/latest/meta-data/; echo ,; {ami}"));
        self.vm.expect("ami-id,\nami-2.\n");
        let (status, _) = self.ask("PATCH", "/mmds", json!({"large": "x".repeat(STORE)}));
        assert_eq!(status, 413);
        self.done("PUT", "/mmds", json!({"latest": {"new": "ami-3"}}));
        self.type_line(&format!("{curl}/latest/new; echo ."));
        self.vm.expect("ami-3.\n");
        // Where it is served is settled.
        let late = json!({"network_interfaces": ["lan"], "version": "V2"});
        assert_eq!(self.ask("PUT", "/mmds/config", late).0, 400);
    }
}

/// A guest with the host's curl and all drivers.
fn guest<'a>(kernel: &'a Kernel, modules: &[&str]) -> Guest<'a> {
    let mut guest = help::guest(kernel, SHELL);
    let modules = modules.iter().map(|module| (*module).to_owned());
    guest.builder.modules.extend(modules);
    let curl = Path::new("/usr/bin/curl");
    guest.builder.files.extend(host::program(text(curl)));
    guest
}

#[test]
fn the_minimal_kernels_life_with_metadata_version_1() {
    let kernel = Kernel::minimal();
    let guest = guest(&kernel, &[]);
    let mut served = Served::start(&[]);
    served.boot(&kernel, &guest, "V1");
    served.change_drive();
    served.change_metadata("/usr/bin/curl -s http://169.254.169.254");
    served.pause();
    let stop = ["stop", "--api-sock", text(&served.socket)];
    let output = husk().args(stop).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let ended = served.vm.wait();
    ended.expect_status(0);
    let warning = "husk: warn: PUT /mmds/config: V1 is deprecated.\n";
    assert_eq!(ended.stderr, warning);
    assert!(!served.socket.exists());
}

#[test]
fn debians_life_over_pci_with_metadata_version_2() {
    let kernel = Kernel::debian();
    let guest = guest(&kernel, &["i8042", "atkbd"]);
    let mut served = Served::start(&["--pci"]);
    served.boot(&kernel, &guest, "V2");
    let curl = "/usr/bin/curl -s";
    let service = "http://169.254.169.254/latest";
    served.type_line(&format!(
        "{curl} -o /dev/null -w '%{{http_code}}.\\n' {service}; \
         T=$({curl} -X PUT -H 'X-metadata-token-ttl-seconds: 600' {service}/api/token); echo ${{#T}} digits"
    ));
    served.vm.expect("401.\n");
    served.vm.expect("72 digits\n");
    served.change_metadata(&format!(
        "{curl} -H \"X-metadata-token: $T\" http://169.254.169.254"
    ));
    served.change_drive();
    // Init asks for no signal of its own, so the kernel restarts the machine.
    served.done("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"}));
    let ended = served.vm.wait();
    ended.expect_status(0);
    assert_eq!(ended.stderr, "");
}
