//! Disks that a vhost-user server has, over the REST socket and on the command line, with Debian's qemu-storage-daemon.

use crate::api::Served;
use crate::common::{temp_dir, text};
use crate::errors::Refused;
use crate::{LIMIT, payload, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server of an image of 1 MiB. It is killed when this is dropped.
struct Server {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let dir = temp_dir();
        let (image, socket) = (dir.path().join("image"), dir.path().join("disk"));
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let file = format!("driver=file,node-name=disk,filename={}", text(&image));
        let export = format!(
            "type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            text(&socket)
        );
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file, "--export", &export])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon, of the package qemu-system-common");
        let started = Instant::now();
        while !socket.exists() {
            assert!(started.elapsed() < LIMIT, "the server makes no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self {
            child,
            socket,
            _dir: dir,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn drive(socket: &Path) -> Value {
    json!({ "drive_id": "data", "is_root_device": false, "socket": socket })
}

/// `drive` with more fields.
fn with(drive: &Value, more: Value) -> Value {
    let mut drive = drive.clone();
    let fields = drive.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    drive
}

#[test]
fn a_served_disk_is_put_shown_and_looked_at_in_firecrackers_shapes() {
    let server = Server::start();
    let served = Served::start(&[]);
    let own = drive(&server.socket);
    let full = with(
        &own,
        json!({ "cache_type": "Writeback", "partuuid": "1234-01", "path_on_host": null, "is_read_only": null,
                "io_engine": null, "rate_limiter": null }),
    );
    served.done("PUT", "/drives/data", own.clone());
    // Again: the connection before it is closed first.
    served.done("PUT", "/drives/data", full.clone());
    assert_eq!(served.get("/vm/config")["drives"], json!([full]));
    for (more, why) in [
        (json!({ "path_on_host": "/img" }), "path_on_host"),
        (json!({ "is_read_only": false }), "is_read_only"),
        (json!({ "io_engine": "Sync" }), "io_engine"),
        (json!({ "rate_limiter": {} }), "rate_limiter"),
        (json!({ "direct": true }), "direct"),
        (json!({ "socket": "" }), "0 bytes"),
        (
            json!({ "socket": "/nosuch/socket" }),
            "start the vhost-user server",
        ),
        (
            json!({ "socket": text(server._dir.path()) }),
            "start the vhost-user server",
        ),
        (json!({ "queues": 2 }), "1 queues, and 2"),
        (json!({ "socket": 7 }), "invalid type"),
        (json!({ "socket": ["/s"] }), "invalid type"),
        (json!({ "socket": null }), "has no file"),
    ] {
        let said = served.refused("PUT", "/drives/data", with(&own, more));
        assert!(said.contains(why), "{why}: {said}");
    }
    assert_eq!(served.get("/vm/config")["drives"], json!([full]));

    let kernel = payload("count", "");
    served.done(
        "PUT",
        "/boot-source",
        json!({ "kernel_image_path": kernel }),
    );
    served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    let mut served = served;
    served.vm.stdout_reaches(100);
    let update = json!({ "drive_id": "data" });
    served.done("PATCH", "/drives/data", update.clone());
    for (more, why) in [
        (json!({ "path_on_host": "/img" }), "path_on_host"),
        (json!({ "rate_limiter": {} }), "rate_limiter"),
    ] {
        let said = served.refused("PATCH", "/drives/data", with(&update, more));
        assert!(
            said.contains(why) && said.contains("drive_id alone"),
            "{said}"
        );
    }
    let another = with(&own, json!({ "drive_id": "more" }));
    let said = served.refused("PUT", "/drives/more", another);
    assert!(said.to_lowercase().contains("pci"), "{said}");
    let metrics = served.ask("GET", "/husk/metrics", "").1;
    let counter = r#"husk_vhost_user_block_cfg_fails_total{drive_id="data"} 0"#;
    assert!(metrics.contains(counter), "{metrics}");
    // A server that hangs is waited for, but not for long, and the VM ends as any.
    kill_process(Pid::from_child(&server.child), Signal::STOP).unwrap();
    let asked = Instant::now();
    let said = served.refused("PATCH", "/drives/data", update.clone());
    assert!(said.contains("does not answer within"), "{said}");
    assert!(asked.elapsed() < Duration::from_secs(15));
    let said = served.refused("PATCH", "/drives/data", update);
    assert!(said.contains("closed"), "{said}");
    served.stop().expect_status(0);
    kill_process(Pid::from_child(&server.child), Signal::CONT).unwrap();
}

#[test]
fn memory_is_shared_only_by_a_vm_that_needs_it() {
    let server = Server::start();
    let shared = |drive: Option<Value>| {
        let served = Served::start(&[]);
        served.done(
            "PUT",
            "/boot-source",
            json!({ "kernel_image_path": payload("count", "") }),
        );
        served.done(
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 64 }),
        );
        if let Some(drive) = drive {
            served.done("PUT", "/drives/data", drive);
        }
        served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
        let mut served = served;
        served.vm.stdout_reaches(100);
        let pid = served.vm.pid().as_raw_nonzero();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        served.stop().expect_status(0);
        maps.contains("memfd:guest-memory")
    };
    assert!(!shared(None));
    assert!(shared(Some(drive(&server.socket))));
}

#[test]
fn a_served_disk_is_on_the_command_line_and_in_a_file() {
    let server = Server::start();
    let kernel = payload("end", "POWER_OFF");
    let disk = format!("socket={},id=data", server.socket.display());
    for more in [&[][..], &["--pci"], &["--on-reboot", "restart"]] {
        let words = [&["--kernel", &kernel, "--disk", &disk][..], more].concat();
        let ended = run(&words);
        assert_eq!(ended.expect_status(0).stderr, "");
    }
    let dir = temp_dir();
    let config = dir.path().join("config.json");
    let content = json!({ "boot-source": { "kernel_image_path": kernel }, "drives": [drive(&server.socket)] });
    std::fs::write(&config, content.to_string()).unwrap();
    let ended = run(&["--config", text(&config)]);
    assert_eq!(ended.expect_status(0).stderr, "");
}

#[test]
fn what_is_wrong_with_a_server_is_said_at_the_start() {
    let dir = temp_dir();
    let kernel = payload("end", "POWER_OFF");
    let disk = |path: &Path| format!("socket={}", path.display());
    let nothing = dir.path().join("nothing");
    let refused = |words: &[&str]| Refused::by(&[&["--kernel", &kernel][..], words].concat());
    refused(&["--disk", &disk(&nothing)]).with(2, &["disk0", "start the vhost-user server"]);
    refused(&["--disk", &format!("{},ro", disk(&nothing))]).with(2, &["is_read_only"]);
    refused(&["--disk", &format!("{},rate=1M", disk(&nothing))]).with(2, &["rate_limiter"]);
    // One that says nothing.
    let silent = dir.path().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    refused(&["--disk", &disk(&silent)]).with(2, &["disk0", "does not answer within"]);
}
