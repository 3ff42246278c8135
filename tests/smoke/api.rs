//! The REST socket on any /dev/kvm: what it does before and after boot.

use crate::common::{Ended, Vm, husk, temp_dir, text};
use crate::{LIMIT, payload};
use husk_api::client;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest that a client waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(20);

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

    /// What a command starts that serves on `socket`.
    pub fn of(command: &mut std::process::Command, socket: PathBuf) -> Self {
        let vm = Vm::start(command, LIMIT);
        wait_for(&socket, &vm);
        Self {
            vm,
            socket,
            _dir: temp_dir(),
        }
    }

    /// With a payload kernel that counts on its console until it is ended.
    pub fn booted(arguments: &[&str]) -> Self {
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

    pub fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let response = client::request(&self.socket, method, path, body)
            .unwrap_or_else(|e| panic!("{method} {path}: {e}\n{}", self.vm.report()));
        (response.status, response.body)
    }

    #[track_caller]
    pub fn done(&self, method: &str, path: &str, body: Value) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let (status, said) = self.ask(method, path, &body);
        assert_eq!((status, said.as_str()), (204, ""), "{method} {path} {body}");
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, "");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    #[track_caller]
    pub fn answer(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, said) = self.ask(method, path, &body.to_string());
        assert_eq!(status, 200, "{method} {path} {body}: {said}");
        serde_json::from_str(&said).unwrap()
    }

    /// Why it is refused.
    #[track_caller]
    pub fn refused(&self, method: &str, path: &str, body: Value) -> String {
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

    pub fn stop(mut self) -> Ended {
        self.done("PUT", "/husk/actions", json!({ "action_type": "Stop" }));
        drop(self.vm.take_stdin());
        self.vm.wait()
    }
}

pub fn wait_for(socket: &Path, vm: &Vm) {
    let until = Instant::now() + PATIENCE;
    while UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < until, "no socket\n{}", vm.report());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// All that comes back to these bytes.
pub fn raw(socket: &Path, bytes: &[u8]) -> String {
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
        (
            "PUT",
            "/snapshot/load",
            json!({ "snapshot_path": "s", "mem_file_path": "m" }),
        ),
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
    let body = json!({ "snapshot_path": "s", "mem_file_path": "m" });
    let said = served.refused("PUT", "/snapshot/load", body);
    assert!(
        said.contains("Load snapshot error: cannot read s"),
        "{said}"
    );
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
