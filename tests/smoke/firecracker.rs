//! The binary under the name `firecracker`: its flags, files, statuses and signals.

use crate::api::wait_for;
use crate::common::{Ended, Vm, temp_dir, text};
use crate::metrics::{assert_signal, only_line};
use crate::{LIMIT, payload};
use husk_api::client;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::PathBuf;

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
    let version = firecracker.run(&["--snapshot-version"]);
    assert_eq!(version.expect_status(0).console(), "v1.0.0\n");
    let kept = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/resources/snapshots/version-1.state"
    );
    let described = firecracker.run(&["--describe-snapshot", kept]);
    assert_eq!(described.expect_status(0).console(), "v1.0.0\n");
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
        (Signal::XCPU, Some(154)),
        (Signal::ILL, Some(157)),
        (Signal::TERM, None),
        (Signal::INT, None),
    ] {
        let socket = firecracker.socket();
        let _ = std::fs::remove_file(&socket);
        let metrics = firecracker.dir.path().join("metrics");
        let _ = std::fs::remove_file(&metrics);
        let arguments = [
            "--api-sock",
            text(&socket),
            "--metrics-path",
            text(&metrics),
        ];
        let mut command = firecracker.command(&arguments);
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
        let line = only_line(&metrics);
        assert_signal(&line, signal);
        assert_eq!(line["signals"]["sigpipe"], 1);
        assert_eq!(line["get_api_requests"]["instance_info_count"], 2);
    }
}
