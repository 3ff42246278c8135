//! The REST socket on any /dev/kvm: what it does before and after boot, and what bad clients get.

use crate::common::{Ended, Vm, husk, temp_dir, text};
use crate::{LIMIT, payload};
use husk_api::client;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest that a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// `husk serve`.
pub struct Served {
    pub vm: Vm,
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    pub fn start(arguments: &[&str]) -> Self {
        let dir = temp_dir();
        let socket = dir.path().join("api");
        let mut command = husk();
        command
            .args(["serve", "--api-sock", text(&socket)])
            .args(arguments);
        let vm = Vm::start(&mut command, LIMIT);
        wait_for(&socket, &vm);
        Self {
            vm,
            socket,
            _dir: dir,
        }
    }

    /// With a payload kernel that counts on its console until it is ended.
    fn booted(arguments: &[&str]) -> Self {
        let mut served = Self::start(arguments);
        let kernel = payload("count", "");
        served.done(
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": kernel }),
        );
        served.done(
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 64 }),
        );
        served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
        served.vm.stdout_reaches(100);
        served
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let response = client::request(&self.socket, method, path, body)
            .unwrap_or_else(|e| panic!("{method} {path}: {e}\n{}", self.vm.report()));
        (response.status, response.body)
    }

    #[track_caller]
    fn done(&self, method: &str, path: &str, body: Value) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let (status, said) = self.ask(method, path, &body);
        assert_eq!((status, said.as_str()), (204, ""), "{method} {path} {body}");
    }

    #[track_caller]
    fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, "");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Why it is refused.
    #[track_caller]
    fn refused(&self, method: &str, path: &str, body: Value) -> String {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let (status, said) = self.ask(method, path, &body);
        assert_eq!(status, 400, "{method} {path} {body}: {said}");
        let fault: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(fault.as_object().unwrap().len(), 1, "{said}");
        fault["fault_message"].as_str().unwrap().to_owned()
    }

    fn stop(mut self) -> Ended {
        self.done("PUT", "/husk/actions", json!({ "action_type": "Stop" }));
        drop(self.vm.take_stdin());
        self.vm.wait()
    }
}

fn wait_for(socket: &Path, vm: &Vm) {
    let until = Instant::now() + PATIENCE;
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < until, "no socket\n{}", vm.report());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// All that comes back to these bytes.
fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // A server that has seen enough may close before it has all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM.";
const TOO_LATE: &str = "The requested operation is not supported after starting the microVM.";

#[test]
fn a_vm_is_configured_booted_paused_resumed_and_stopped() {
    let served = Served::booted(&["--id", "my-vm"]);
    let info = served.get("/");
    assert_eq!(info["id"], "my-vm");
    assert_eq!(info["state"], "Running");
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    assert_eq!(served.get("/")["state"], "Paused");
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    assert_eq!(served.get("/")["state"], "Running");
    let timeline = served.get("/husk/boot-timeline");
    let phases = timeline["phases"].as_array().unwrap();
    for phase in ["boot asked for", "guest entered", "first console byte"] {
        assert!(phases.iter().any(|p| p["phase"] == phase), "{timeline}");
    }
    let socket = served.socket.clone();
    served.stop().expect_status(0);
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn the_configuration_is_what_was_put_and_unset_fields_are_null() {
    let served = Served::start(&[]);
    let config = served.get("/vm/config");
    for field in [
        "balloon",
        "cpu-config",
        "entropy",
        "logger",
        "metrics",
        "mmds-config",
        "serial",
        "vsock",
    ] {
        assert!(config[field].is_null(), "{field}: {config}");
    }
    assert_eq!(config["drives"], json!([]));
    assert_eq!(config["machine-config"]["mem_size_mib"], 128);
    assert_eq!(config["boot-source"]["initrd_path"], Value::Null);

    let dir = temp_dir();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let drive = json!({
        "drive_id": "rootfs", "path_on_host": text(&image), "is_root_device": true,
        "is_read_only": true, "cache_type": "Writeback", "io_engine": "Sync", "partuuid": null,
        "rate_limiter": { "bandwidth": { "size": 1000, "refill_time": 100, "one_time_burst": null }, "ops": null },
        "socket": null,
    });
    served.done("PUT", "/drives/rootfs", drive.clone());
    let vsock = dir.path().join("v");
    served.done(
        "PUT",
        "/vsock",
        json!({ "guest_cid": 7, "uds_path": text(&vsock) }),
    );
    served.done("PUT", "/entropy", json!({}));
    served.done(
        "PUT",
        "/balloon",
        json!({ "amount_mib": 1, "deflate_on_oom": true }),
    );
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 96, "smt": true, "track_dirty_pages": true, "huge_pages": "None" });
    served.done("PUT", "/machine-config", machine.clone());
    served.done("PATCH", "/machine-config", json!({ "mem_size_mib": 100 }));
    let out = dir.path().join("out");
    served.done("PUT", "/serial", json!({ "serial_out_path": text(&out) }));
    let config = served.get("/vm/config");
    assert_eq!(config["drives"], json!([drive]));
    assert_eq!(config["vsock"]["guest_cid"], 7);
    assert_eq!(config["balloon"]["stats_polling_interval_s"], 0);
    assert_eq!(config["machine-config"]["mem_size_mib"], 100);
    assert_eq!(config["machine-config"]["smt"], true);
    assert_eq!(served.get("/machine-config"), config["machine-config"]);
    assert_eq!(served.get("/balloon"), config["balloon"]);
    // It boots like that, and the console goes to its file.
    let kernel = payload("count", "");
    served.done(
        "PUT",
        "/boot-source",
        json!({ "kernel_image_path": kernel }),
    );
    served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    let until = Instant::now() + PATIENCE;
    while std::fs::metadata(&out).unwrap().len() < 100 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = served.stop();
    assert!(ended.expect_status(0).stdout.is_empty());
}

#[test]
fn a_request_at_the_wrong_time_is_refused_in_firecrackers_words() {
    let served = Served::start(&[]);
    for (method, path, body) in [
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        (
            "PUT",
            "/actions",
            json!({ "action_type": "SendCtrlAltDel" }),
        ),
        ("PUT", "/actions", json!({ "action_type": "FlushMetrics" })),
        ("PATCH", "/drives/a", json!({ "drive_id": "a" })),
        ("PATCH", "/network-interfaces/a", json!({ "iface_id": "a" })),
        ("PATCH", "/balloon", json!({ "amount_mib": 1 })),
        ("DELETE", "/drives/a", Value::Null),
    ] {
        assert_eq!(served.refused(method, path, body), TOO_EARLY, "{path}");
    }
    let said = served.refused("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    assert!(said.contains("kernel"), "{said}");
    served.stop().expect_status(0);

    let served = Served::booted(&[]);
    for (method, path, body) in [
        ("PUT", "/actions", json!({ "action_type": "InstanceStart" })),
        ("PUT", "/boot-source", json!({ "kernel_image_path": "/k" })),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 64 }),
        ),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 1 })),
        ("PUT", "/cpu-config", json!({})),
        ("PUT", "/vsock", json!({ "guest_cid": 3, "uds_path": "v" })),
        (
            "PUT",
            "/balloon",
            json!({ "amount_mib": 1, "deflate_on_oom": true }),
        ),
        ("PUT", "/entropy", json!({})),
        ("PUT", "/serial", json!({})),
        ("PUT", "/logger", json!({})),
        ("PUT", "/metrics", json!({ "metrics_path": "/nosuch/m" })),
        (
            "PUT",
            "/mmds/config",
            json!({ "network_interfaces": ["a"] }),
        ),
        ("PUT", "/snapshot/load", json!({})),
    ] {
        assert_eq!(served.refused(method, path, body), TOO_LATE, "{path}");
    }
    let said = served.refused("PATCH", "/drives/a", json!({ "drive_id": "a" }));
    assert!(said.contains("called a"), "{said}");
    // Without PCI nothing can be plugged in.
    let drive = json!({ "drive_id": "a", "path_on_host": "/dev/null", "is_root_device": false });
    let said = served.refused("PUT", "/drives/a", drive);
    assert!(said.to_lowercase().contains("pci"), "{said}");
    served.stop().expect_status(0);
}

#[test]
fn a_request_that_fails_changes_nothing() {
    let served = Served::start(&[]);
    let dir = temp_dir();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let drive = |path: &str, root: bool| json!({ "drive_id": "a", "path_on_host": path, "is_root_device": root });
    served.done("PUT", "/drives/a", drive(text(&image), false));
    served.done(
        "PUT",
        "/machine-config",
        json!({ "vcpu_count": 2, "mem_size_mib": 64 }),
    );
    let before = served.get("/vm/config");
    for (method, path, body) in [
        ("PUT", "/drives/a", drive("/nosuch", true)),
        (
            "PUT",
            "/drives/a",
            json!({ "drive_id": "a", "is_root_device": false, "socket": "/s" }),
        ),
        (
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": "/nosuch" }),
        ),
        (
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": text(&image) }),
        ),
        (
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": payload("count", ""), "initrd_path": "/nosuch" }),
        ),
        (
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": payload("count", ""), "boot_args": "x".repeat(3000) }),
        ),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 0, "mem_size_mib": 64 }),
        ),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 65, "mem_size_mib": 64 }),
        ),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 3, "mem_size_mib": 64, "smt": true }),
        ),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 0 }),
        ),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 1u64 << 40 }),
        ),
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 65, "huge_pages": "2M" }),
        ),
        ("PATCH", "/machine-config", json!({ "mem_size_mib": 1 })),
        (
            "PUT",
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "nosuchtap0" }),
        ),
        (
            "PUT",
            "/network-interfaces/n",
            json!({ "iface_id": "n", "host_dev_name": "t", "guest_mac": "zz" }),
        ),
        ("PUT", "/network-interfaces/n", json!({ "iface_id": "n" })),
        ("PUT", "/vsock", json!({ "guest_cid": 2, "uds_path": "v" })),
        (
            "PUT",
            "/vsock",
            json!({ "guest_cid": 3, "uds_path": "/nosuch/v" }),
        ),
        (
            "PUT",
            "/balloon",
            json!({ "amount_mib": 65, "deflate_on_oom": true }),
        ),
        (
            "PUT",
            "/mmds/config",
            json!({ "network_interfaces": ["nosuch"] }),
        ),
        ("PUT", "/mmds/config", json!({ "network_interfaces": [] })),
        ("PATCH", "/mmds", json!({ "a": 1 })),
        ("PUT", "/metrics", json!({ "metrics_path": "/nosuch/m" })),
        ("PUT", "/logger", json!({ "log_path": "/nosuch/l" })),
        ("PUT", "/pmem/p", json!({ "id": "p", "path_on_host": "/p" })),
        ("PUT", "/hotplug/memory", json!({ "total_size_mib": 1024 })),
        (
            "PUT",
            "/snapshot/create",
            json!({ "snapshot_path": "s", "mem_file_path": "m" }),
        ),
        // It was refused because something was configured, so the process lives on.
        (
            "PUT",
            "/snapshot/load",
            json!({ "snapshot_path": "s", "mem_file_path": "m" }),
        ),
    ] {
        let said = served.refused(method, path, body.clone());
        assert!(said.len() > 10, "{path} {body}: {said}");
        assert_eq!(served.get("/vm/config"), before, "{path} {body}");
    }
    // What was open before is still.
    let other = husk()
        .args(["run", "-k", &payload("count", ""), "--disk", text(&image)])
        .output()
        .unwrap();
    assert_eq!(other.status.code(), Some(2));
    let said = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(said.contains("in use"), "{said}");
    served.stop().expect_status(0);
}

#[test]
fn a_snapshot_that_cannot_be_loaded_ends_a_fresh_process() {
    let mut served = Served::start(&[]);
    let said = served.refused("PUT", "/snapshot/load", json!({ "snapshot_path": "s" }));
    assert!(said.contains("not supported yet"), "{said}");
    drop(served.vm.take_stdin());
    let ended = served.vm.wait();
    ended.expect_status(1);
}

#[test]
fn metadata_are_put_patched_and_kept_within_their_limit() {
    let served = Served::start(&["--mmds-size-limit", "100"]);
    assert_eq!(served.get("/mmds"), json!({}));
    served.done("PUT", "/mmds", json!({ "a": { "b": 1 } }));
    served.done("PATCH", "/mmds", json!({ "a": { "b": null, "c": "x" } }));
    assert_eq!(served.get("/mmds"), json!({ "a": { "c": "x" } }));
    for method in ["PUT", "PATCH"] {
        let (status, said) = served.ask(
            method,
            "/mmds",
            &json!({ "d": "y".repeat(100) }).to_string(),
        );
        assert_eq!(status, 413, "{said}");
        assert!(said.contains("fault_message"), "{said}");
    }
    assert_eq!(served.get("/mmds"), json!({ "a": { "c": "x" } }));
    served.stop().expect_status(0);
}

#[test]
fn deprecated_fields_are_marked() {
    let served = Served::start(&[]);
    let deprecated = |method: &str, path: &str, body: &str| {
        let length = body.len();
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        let answer = raw(&served.socket, text.as_bytes());
        assert!(
            answer.starts_with("HTTP/1.1 204 No Content\r\n"),
            "{answer}"
        );
        answer.to_lowercase().contains("\r\ndeprecation: true\r\n")
    };
    let machine = r#"{"vcpu_count":1,"mem_size_mib":64}"#;
    assert!(!deprecated("PUT", "/machine-config", machine));
    let machine = r#"{"vcpu_count":1,"mem_size_mib":64,"cpu_template":"None"}"#;
    assert!(deprecated("PUT", "/machine-config", machine));
    served.stop().expect_status(0);
}

#[test]
fn watchers_are_told_what_happens_until_the_end() {
    let served = Served::booted(&[]);
    let socket = served.socket.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let watching = std::thread::spawn(move || {
        let mut all = String::new();
        let status = client::stream(&socket, "GET", "/husk/events", "", |piece| {
            all += &String::from_utf8_lossy(piece);
            let _ = tell.send(());
            true
        });
        (status.unwrap(), all)
    });
    // The first piece says that it is listened to.
    told.recv_timeout(PATIENCE).unwrap();
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    served.stop().expect_status(0);
    let (status, all) = watching.join().unwrap();
    assert_eq!(status, 200);
    let events: Vec<Value> = all
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: Vec<_> = events
        .iter()
        .map(|e| e["event"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["paused", "resumed", "exited"], "{all}");
    assert_eq!(events[2]["status"], 0);
}

#[test]
fn the_metrics_and_the_description_can_be_fetched() {
    let served = Served::booted(&[]);
    let (status, metrics) = served.ask("GET", "/husk/metrics", "");
    assert_eq!(status, 200);
    assert!(
        metrics.contains("# TYPE husk_") && !metrics.contains("NaN"),
        "{metrics}"
    );
    let document = served.get("/husk/openapi.json");
    assert_eq!(document["openapi"], "3.1.0");
    assert!(document["paths"]["/drives/{id}"]["patch"].is_object());
    served.stop().expect_status(0);
}

// ---- Bad clients ----

#[test]
fn what_is_no_request_gets_an_error_and_the_vm_does_not_notice() {
    let served = Served::booted(&[]);
    let socket = served.socket.as_path();
    for bytes in [
        &b"\r\n\r\n\r\n"[..],
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PUT /actions HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
        b"PUT /actions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PUT /actions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    ] {
        let answer = raw(socket, bytes);
        let shown = String::from_utf8_lossy(bytes);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{shown}: {answer}"
        );
    }
    // A head without end.
    let mut endless = b"GET / HTTP/1.1\r\n".to_vec();
    endless.extend((0..100_000).flat_map(|n| format!("X-{n}: y\r\n").into_bytes()));
    let answer = raw(socket, &endless);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
        "{answer}"
    );
    // Other methods.
    for method in ["POST", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW"] {
        let answer = raw(
            socket,
            format!("{method} / HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes(),
        );
        assert!(answer.starts_with("HTTP/1.1 400"), "{method}: {answer}");
    }
    assert_eq!(served.get("/")["state"], "Running");
    served.stop().expect_status(0);
}

#[test]
fn bodies_have_a_limit_that_can_be_set() {
    let served = Served::start(&["--max-payload", "1000"]);
    let answer = |length: usize| {
        let body = format!("{{\"a\":\"{}\"}}", "x".repeat(length - 8));
        let text =
            format!("PUT /mmds HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n{body}");
        raw(&served.socket, text.as_bytes())
    };
    assert!(answer(1000).starts_with("HTTP/1.1 204"));
    let said = answer(1001);
    assert!(
        said.starts_with("HTTP/1.1 400") && said.contains("1000 bytes"),
        "{said}"
    );
    // Its length need not be said first.
    let mut chunked =
        b"PUT /mmds HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..100 {
        chunked.extend(b"64\r\n");
        chunked.extend([b' '; 0x64]);
        chunked.extend(b"\r\n");
    }
    let said = raw(&served.socket, &chunked);
    assert!(
        said.starts_with("HTTP/1.1 400") && said.contains("1000 bytes"),
        "{said}"
    );
    served.stop().expect_status(0);
}

#[test]
fn who_waits_for_a_word_before_the_body_gets_it() {
    let served = Served::start(&[]);
    let mut stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(
            b"PUT /mmds HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
        )
        .unwrap();
    let mut line = [0; 25];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"{}").unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 204");
    served.stop().expect_status(0);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let served = Served::start(&[]);
    let mut bytes = Vec::new();
    for path in ["/", "/version", "/nosuch", "/machine-config"] {
        bytes.extend(format!("GET {path} HTTP/1.1\r\nHost: h\r\n\r\n").into_bytes());
    }
    let answer = raw(&served.socket, &bytes);
    let at = |text: &str| {
        answer
            .find(text)
            .unwrap_or_else(|| panic!("no {text}: {answer}"))
    };
    let order = [
        at("app_name"),
        at("firecracker_version"),
        at("fault_message"),
        at("vcpu_count"),
    ];
    assert!(order.is_sorted(), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 4, "{answer}");
    served.stop().expect_status(0);
}

fn rss_kib(vm: &Vm) -> u64 {
    let path = format!("/proc/{}/status", vm.pid().as_raw_nonzero());
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

#[test]
fn a_thousand_silent_clients_and_some_that_never_read_cost_little() {
    let served = Served::booted(&[]);
    let before = rss_kib(&served.vm);
    let mut held = Vec::new();
    for n in 0..1000 {
        let mut stream = UnixStream::connect(&served.socket).unwrap_or_else(|e| {
            panic!("client {n}: {e}: raise the limit on open files (ulimit -n)")
        });
        // Some send half of something.
        if n % 2 == 0 {
            stream
                .write_all(b"PUT /actions HTTP/1.1\r\nContent-Le")
                .unwrap();
        }
        held.push(stream);
    }
    // These ask for more than the socket holds, and take nothing.
    for _ in 0..10 {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let requests = b"GET /husk/openapi.json HTTP/1.1\r\nHost: h\r\n\r\n".repeat(2000);
        let _ = stream.write_all(&requests);
        held.push(stream);
        let mut watcher = UnixStream::connect(&served.socket).unwrap();
        watcher
            .write_all(b"GET /husk/events HTTP/1.1\r\nHost: h\r\n\r\n")
            .unwrap();
        held.push(watcher);
    }
    let start = Instant::now();
    for _ in 0..200 {
        served.done("PATCH", "/vm", json!({ "state": "Paused" }));
        served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    }
    assert_eq!(served.get("/")["state"], "Running");
    assert!(start.elapsed() < PATIENCE, "others are kept waiting");
    let grown = rss_kib(&served.vm).saturating_sub(before);
    assert!(grown < 48 << 10, "{grown} KiB more");
    drop(held);
    served.stop().expect_status(0);
}

/// Any JSON, not very deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-zA-Z0-9/_ .-]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Each path of the API, with the fields that its body may have, by its own description.
fn operations(served: &Served) -> Vec<(String, String, Vec<String>)> {
    let document = served.get("/husk/openapi.json");
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let mut schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            if let Some(reference) = schema["$ref"].as_str() {
                schema = document.pointer(reference.trim_start_matches('#')).unwrap();
            }
            let fields = schema["properties"].as_object();
            let fields = fields.map(|fields| fields.keys().cloned().collect());
            // It never ends.
            if path != "/husk/events" {
                all.push((
                    method.to_uppercase(),
                    path.replace("{id}", "x"),
                    fields.unwrap_or_default(),
                ));
            }
        }
    }
    assert!(all.len() > 40, "{all:?}");
    all
}

#[test]
fn any_json_at_any_path_before_and_after_boot_does_no_harm() {
    for served in [Served::start(&[]), Served::booted(&[])] {
        let operations = operations(&served);
        let state = served.get("/")["state"].clone();
        let mut runner = TestRunner::deterministic();
        let mut sample = || any_json().new_tree(&mut runner).unwrap().current();
        for (method, path, fields) in operations.iter().cycle().take(10 * operations.len()) {
            let before = served.get("/vm/config");
            let body = match fields.as_slice() {
                [] => sample(),
                // Its own fields, with anything in them.
                fields => fields
                    .iter()
                    .map(|field| (field.clone(), sample()))
                    .collect(),
            };
            let body = if method == "GET" {
                String::new()
            } else {
                body.to_string()
            };
            let (status, said) = served.ask(method, path, &body);
            assert!(
                [200, 204, 400, 413].contains(&status),
                "{method} {path} {body}: {status} {said}"
            );
            if status >= 400 {
                assert_eq!(served.get("/vm/config"), before, "{method} {path} {body}");
                let fault: Value = serde_json::from_str(&said).unwrap();
                assert!(fault["fault_message"].is_string(), "{said}");
            }
        }
        assert_eq!(served.get("/")["state"], state);
        served.stop().expect_status(0);
    }
}

// ---- The socket's file and the process ----

#[test]
fn a_path_that_is_taken_is_left_alone() {
    let served = Served::start(&[]);
    let again = husk()
        .args(["serve", "--api-sock", text(&served.socket)])
        .output()
        .unwrap();
    assert_eq!(again.status.code(), Some(1));
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        said.contains(text(&served.socket)) && said.contains("another process"),
        "{said}"
    );
    assert_eq!(served.get("/")["state"], "Not started");
    let socket = served.socket.clone();
    served.vm.signal(Signal::KILL);
    let (ended, dir) = (served.vm.finish(), served._dir);
    ended.expect_killed(9);
    assert!(socket.exists());
    let again = husk()
        .args(["serve", "--api-sock", text(&socket)])
        .output()
        .unwrap();
    assert_eq!(again.status.code(), Some(1));
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(said.contains("rm ") && said.lines().count() == 1, "{said}");
    drop(dir);
}

#[test]
fn a_signal_before_boot_ends_the_process_and_removes_the_socket() {
    let served = Served::start(&[]);
    served.get("/");
    served.vm.signal(Signal::TERM);
    let ended = served.vm.wait();
    ended.expect_status(143);
    assert!(!served.socket.exists());
}

#[test]
fn requests_can_be_made_from_the_shell() {
    let served = Served::booted(&[]);
    let husk_with = |words: &[&str]| {
        let output = husk()
            .args(words)
            .env("HUSK_API_SOCK", &served.socket)
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    assert_eq!(husk_with(&["pause"]), (0, String::new(), String::new()));
    let (status, out, _) = husk_with(&["info"]);
    assert!(
        status == 0 && out.contains("\n  \"state\": \"Paused\""),
        "{out}"
    );
    assert_eq!(husk_with(&["resume"]).0, 0);
    let (status, out, _) = husk_with(&["api", "get", "/vm/config"]);
    assert!(
        status == 0 && out.contains("\"kernel_image_path\""),
        "{out}"
    );
    let (status, out, err) = husk_with(&["api", "PUT", "/boot-source", "{}"]);
    assert_eq!((status, out.as_str()), (1, ""));
    assert!(
        err.starts_with("husk: ") && err.contains("kernel_image_path"),
        "{err}"
    );
    assert_eq!(err.lines().count(), 1, "{err}");
    assert_eq!(husk_with(&["stop"]).0, 0);
    assert!(!served.socket.exists());
    let (status, _, err) = husk_with(&["info"]);
    assert!(status == 1 && err.contains("cannot connect"), "{err}");
    served.vm.finish().expect_status(0);
}

// ---- As Firecracker ----

/// The binary, called firecracker.
struct Firecracker {
    dir: tempfile::TempDir,
}

impl Firecracker {
    fn new() -> Self {
        let dir = temp_dir();
        let binary = crate::common::husk_binary();
        std::os::unix::fs::symlink(binary, dir.path().join("firecracker")).unwrap();
        Self { dir }
    }

    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new("env");
        command
            .arg("--default-signal=HUP,INT,QUIT,TERM,XFSZ")
            .arg(self.dir.path().join("firecracker"))
            .args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        Vm::start(&mut self.command(arguments), LIMIT).finish()
    }

    fn file(&self, name: &str, content: &Value) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content.to_string()).unwrap();
        text(&path).to_owned()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api")
    }
}

#[test]
fn firecrackers_flags_are_understood_and_others_are_not() {
    let firecracker = Firecracker::new();
    let version = firecracker.run(&["--version"]);
    let first = version.expect_status(0).console();
    assert!(first.starts_with("Firecracker v1."), "{first}");
    firecracker.run(&["--snapshot-version"]).expect_status(0);
    firecracker
        .run(&["--describe-snapshot", "/nosuch"])
        .expect_status(1);
    let help = firecracker.run(&["--help"]).console();
    for flag in [
        "api-sock",
        "id",
        "config-file",
        "no-api",
        "metadata",
        "boot-timer",
        "log-path",
        "level",
        "module",
        "show-level",
        "show-log-origin",
        "metrics-path",
        "start-time-us",
        "start-time-cpu-us",
        "parent-cpu-time-us",
        "http-api-max-payload-size",
        "mmds-size-limit",
        "seccomp-filter",
        "no-seccomp",
        "enable-pci",
        "version",
        "snapshot-version",
        "describe-snapshot",
    ] {
        assert!(help.contains(&format!("--{flag}")), "{flag}");
    }
    for wrong in [
        &["--nosuch"][..],
        &["--no-api"],
        &["--id", "a b"],
        &["--no-seccomp", "--seccomp-filter", "f"],
        &["--http-api-max-payload-size", "x"],
    ] {
        let ended = firecracker.run(wrong);
        ended.expect_status(153);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
    firecracker.run(&["--level", "loud"]).expect_status(152);
}

#[test]
fn a_firecracker_file_boots_and_what_is_wrong_with_one_has_its_status() {
    let firecracker = Firecracker::new();
    let kernel = payload("end", "POWER_OFF");
    let file = firecracker.file(
        "vm.json",
        &json!({
            "boot-source": { "kernel_image_path": kernel, "boot_args": "console=ttyS0" },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 64 },
            "nobody-knows-this": { "a": 1 },
            "vsock": null,
        }),
    );
    let log = firecracker.dir.path().join("log");
    let ended = firecracker.run(&[
        "--no-api",
        "--config-file",
        &file,
        "--log-path",
        text(&log),
        "--level",
        "info",
        "--show-level",
    ]);
    ended.expect_status(0);
    let log = std::fs::read_to_string(log).unwrap();
    assert!(
        log.contains("[anonymous-instance:main:INFO] Running Firecracker v1."),
        "{log}"
    );
    for wrong in [
        json!({ "boot-source": { "kernel_image_path": kernel, "nosuch": 1 } }),
        json!({ "boot-source": { "kernel_image_path": "/nosuch" } }),
        json!({ "drives": [] }),
        json!([]),
    ] {
        let file = firecracker.file("wrong.json", &wrong);
        let ended = firecracker.run(&["--no-api", "--config-file", &file]);
        ended.expect_status(152);
    }
}

#[test]
fn firecrackers_socket_is_left_behind_and_a_taken_one_is_an_error() {
    let firecracker = Firecracker::new();
    let socket = firecracker.socket();
    let mut command = firecracker.command(&["--api-sock", text(&socket), "--id", "fc-1"]);
    let vm = Vm::start(&mut command, LIMIT);
    wait_for(&socket, &vm);
    let info = client::request(&socket, "GET", "/", "").unwrap();
    let info: Value = serde_json::from_str(&info.body).unwrap();
    assert_eq!(info["app_name"], "Firecracker");
    assert_eq!(info["id"], "fc-1");
    assert_eq!(info["state"], "Not started");
    firecracker
        .run(&["--api-sock", text(&socket)])
        .expect_status(1);
    let kernel = json!({ "kernel_image_path": payload("end", "POWER_OFF") }).to_string();
    let put = |path: &str, body: &str| client::request(&socket, "PUT", path, body).unwrap().status;
    assert_eq!(put("/boot-source", &kernel), 204);
    assert_eq!(put("/actions", r#"{"action_type":"InstanceStart"}"#), 204);
    vm.finish().expect_status(0);
    assert!(socket.exists());
    firecracker
        .run(&["--api-sock", text(&socket)])
        .expect_status(1);
}

#[test]
fn firecrackers_process_ends_by_signals_as_its_clients_expect() {
    let firecracker = Firecracker::new();
    for (signal, status) in [
        (Signal::HUP, Some(156)),
        (Signal::BUS, Some(149)),
        (Signal::SEGV, Some(150)),
        (Signal::XFSZ, Some(151)),
        (Signal::TERM, None),
        (Signal::INT, None),
    ] {
        let socket = firecracker.socket();
        let _ = std::fs::remove_file(&socket);
        let mut command = firecracker.command(&["--api-sock", text(&socket)]);
        let vm = Vm::start(&mut command, LIMIT);
        wait_for(&socket, &vm);
        client::request(&socket, "GET", "/", "").unwrap();
        vm.signal(Signal::PIPE);
        client::request(&socket, "GET", "/", "").unwrap();
        vm.signal(signal);
        let ended = vm.wait();
        match status {
            Some(status) => drop(ended.expect_status(status)),
            None => drop(ended.expect_killed(signal.as_raw())),
        }
    }
}
