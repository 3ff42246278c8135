//! Filters of system calls: in force on every thread, and what happens to one that makes a call it may not.

use crate::common::{Tty, Vm, husk, temp_dir, text};
use crate::errors::Refused;
use crate::{LIMIT, file, payload, start};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

/// Husk's own rules.
fn own() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/seccomp/x86_64.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Husk's own rules but for those of `syscall` in the set called `name` of which `word` is part.
pub fn without(name: &str, syscall: &str, word: &str) -> Value {
    let mut rules = own();
    let filter = rules[name]["filter"].as_array_mut().unwrap();
    let before = filter.len();
    filter.retain(|rule| rule["syscall"] != syscall || !rule.to_string().contains(word));
    assert!(filter.len() < before, "{name} has no such rule");
    rules
}

/// Husk's own rules, and almost none for the kind called `name`.
pub fn empty(name: &str) -> Value {
    let mut rules = own();
    rules[name] = json!({ "filter": [{ "syscall": "close" }] });
    rules
}

pub fn rules_file(dir: &tempfile::TempDir, rules: &Value) -> PathBuf {
    file(dir, "filter.json", rules.to_string().as_bytes())
}

#[test]
fn a_violation_has_exit_status_148_and_names_the_thread_and_the_call() {
    let kernel = payload("end", "DEAF");
    for (rules, thread, syscall, kind) in [
        (
            without("vcpu", "ioctl", "KVM_RUN"),
            "vcpu0",
            "ioctl",
            "vcpu",
        ),
        (without("io", "epoll_wait", ""), "io0", "epoll_wait", "io"),
        (
            without("console", "ppoll", ""),
            "console-in",
            "ppoll",
            "console",
        ),
        (empty("main"), "main", "m", "main"),
        (empty("doorbells"), "doorbells", "futex", "doorbells"),
    ] {
        let dir = temp_dir();
        let filter = rules_file(&dir, &rules);
        let arguments = [
            "--kernel",
            &kernel,
            "--seccomp-filter",
            text(&filter),
            "--entropy",
        ];
        let ended = start(&arguments).wait();
        ended.expect_status(148);
        let line = format!("husk: seccomp: the thread {thread} may not call {syscall}");
        assert!(ended.stderr.starts_with(&line), "{}", ended.stderr);
        let end = format!("; filter {kind}); see docs/seccomp.md\n");
        assert!(ended.stderr.ends_with(&end), "{}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
}

#[test]
fn the_line_has_the_arguments_and_the_terminal_is_restored() {
    let dir = temp_dir();
    let filter = rules_file(&dir, &without("vcpu", "ioctl", "KVM_GET_MP_STATE"));
    let tty = Tty::new();
    let kernel = payload("end", "DEAF");
    let arguments = ["run", "--kernel", &kernel, "--memory", "64M"];
    let filter = ["--seccomp-filter", text(&filter)];
    let mut vm = tty.start(&[&arguments[..], &filter[..]].concat(), LIMIT);
    vm.expect("go\n");
    assert!(tty.is_raw());
    // It is asked after a second whether it has halted for good.
    let ended = vm.wait();
    ended.expect_status(148);
    assert!(ended.stderr.contains(" 0x8004ae98 "), "{}", ended.stderr);
    tty.assert_as_found();
}

/// Name, seccomp mode and no_new_privs of each thread.
fn threads(vm: &Vm) -> Vec<(String, String, String)> {
    let tasks = format!("/proc/{}/task", vm.pid());
    let tasks = std::fs::read_dir(tasks).unwrap();
    let status = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")));
    // One that has ended meanwhile has none.
    let status = status.filter_map(Result::ok);
    let field = |status: &str, name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap()[name.len()..].trim().to_owned()
    };
    status
        .map(|s| {
            (
                field(&s, "Name:"),
                field(&s, "Seccomp:"),
                field(&s, "NoNewPrivs:"),
            )
        })
        .collect()
}

#[track_caller]
fn assert_threads(vm: &Vm, mode: &str, no_new_privs: &str) {
    let started = Instant::now();
    loop {
        let all = threads(vm);
        // The last ones start when the guest runs already.
        let there = |name: &str| all.iter().any(|(own, ..)| own == name);
        let wanted = [
            "vcpu0",
            "vcpu1",
            "io0",
            "doorbells",
            "signals",
            "console-in",
        ];
        let as_wanted =
            |(_, own, privs): &(_, String, String)| own == mode && privs == no_new_privs;
        if wanted.into_iter().all(there) && all.iter().all(as_wanted) {
            return;
        }
        assert!(started.elapsed() < LIMIT, "{all:?}");
        std::thread::yield_now();
    }
}

#[test]
fn every_thread_is_confined_unless_no_filter_is_wanted() {
    let dir = temp_dir();
    let rules = rules_file(&dir, &own());
    let kernel = payload("end", "DEAF");
    let arguments = ["--kernel", &kernel, "--cpus", "2", "--entropy"];
    for (more, mode, no_new_privs) in [
        (&[][..], "2", "1"),
        (&["--on-reboot", "restart"], "2", "1"),
        (&["--seccomp-filter", text(&rules)], "2", "1"),
        (&["--no-seccomp"], "0", "0"),
    ] {
        let mut vm = start(&[&arguments[..], more].concat());
        vm.expect("go\n");
        assert_threads(&vm, mode, no_new_privs);
    }
}

#[test]
fn a_restarted_vm_is_built_and_runs_under_the_filters() {
    let dir = temp_dir();
    let disk = file(&dir, "disk", &[0; 65536]);
    let vsock = format!("cid=3,uds={}", dir.path().join("vsock").display());
    let mut command = husk();
    command
        .args(["run", "--kernel", &payload("boots", ""), "--memory", "64M"])
        .args([
            "--on-reboot",
            "restart",
            "--cpus",
            "2",
            "--entropy",
            "--balloon",
            "0",
        ])
        .args(["--disk", text(&disk), "--vsock", &vsock]);
    for transport in [None, Some("--pci")] {
        command.args(transport);
        let mut vm = Vm::start(&mut command, LIMIT);
        vm.send(b"ab");
        vm.expect("clean a\nclean b\n");
        assert_threads(&vm, "2", "1");
        vm.send(b"q");
        vm.finish().expect_status(0);
    }
}

/// Something called passt that Husk's filters would not let start, let alone run other programs, if it had them. Its folder, a
/// file with a line for each start, and the path on which it is found.
fn fake_passt() -> (tempfile::TempDir, PathBuf, String) {
    use std::os::unix::fs::PermissionsExt;
    let dir = temp_dir();
    let log = dir.path().join("log");
    let script = format!(
        "#!/bin/sh\nls / >/dev/null && echo ok >> {}\ncat >/dev/null\n",
        log.display()
    );
    let passt = file(&dir, "passt", script.as_bytes());
    std::fs::set_permissions(&passt, PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!(
        "{}:{}",
        dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    (dir, log, path)
}

#[test]
fn a_restarted_vm_has_its_user_network_again() {
    let (_dir, log, path) = fake_passt();
    let mut command = husk();
    command
        .args(["run", "--kernel", &payload("boots", ""), "--memory", "64M"])
        .args(["--on-reboot", "restart", "--net", "user"])
        .env("PATH", path);
    let mut vm = Vm::start(&mut command, LIMIT);
    for (boot, key) in [(1, b"a"), (2, b"b"), (3, b"q")] {
        let started = Instant::now();
        while std::fs::read_to_string(&log)
            .unwrap_or_default()
            .lines()
            .count()
            < boot
        {
            assert!(started.elapsed() < LIMIT, "no passt for boot {boot}");
            std::thread::yield_now();
        }
        vm.send(key);
        vm.expect(&format!("clean {}\n", key[0] as char));
    }
    vm.finish().expect_status(0);
}

#[test]
fn a_filter_file_that_is_wrong_is_refused() {
    let dir = temp_dir();
    let kernel = payload("end", "POWER_OFF");
    let refused = |path: &str, words: &[&str]| {
        let refused = Refused::by(&["--kernel", &kernel, "--seccomp-filter", path]);
        refused.with(2, &[&[path], words].concat());
    };
    refused("/nonexistent/filter.json", &[]);
    let mut half = own();
    half.as_object_mut().unwrap().remove("io");
    let mut misspelt = own();
    misspelt["io"]["filter"][0]["syscall"] = "opne".into();
    for (content, word) in [
        (&b"\x03\0\0\0\0\0\0\0\xff"[..], "JSON"),
        (b"{", "docs/seccomp.md"),
        (half.to_string().as_bytes(), "\"io\""),
        (misspelt.to_string().as_bytes(), "\"opne\""),
    ] {
        refused(text(&file(&dir, "filter", content)), &[word]);
    }
    let path = rules_file(&dir, &own());
    let both = [
        "--kernel",
        &kernel,
        "--no-seccomp",
        "--seccomp-filter",
        text(&path),
    ];
    Refused::by(&both).with(2, &["--no-seccomp", "--seccomp-filter"]);
}

/// A VM that is steered over a socket.
struct Served {
    vm: Vm,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    fn start(more: &[&str]) -> Self {
        let dir = temp_dir();
        let socket = dir.path().join("api");
        let mut command = husk();
        command
            .args(["serve", "--api-sock", text(&socket)])
            .args(more);
        let vm = Vm::start(&mut command, LIMIT);
        let started = Instant::now();
        while !socket.exists() {
            assert!(started.elapsed() < LIMIT, "no socket\n{}", vm.report());
            std::thread::yield_now();
        }
        Self {
            vm,
            socket,
            _dir: dir,
        }
    }

    /// The whole answer.
    fn request(&self, method: &str, path: &str, body: &Value) -> String {
        use std::io::{Read, Write};
        let started = Instant::now();
        let mut stream = loop {
            match std::os::unix::net::UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                // The file is there a moment before anybody listens.
                Err(e) => assert!(started.elapsed() < LIMIT, "{e}\n{}", self.vm.report()),
            }
        };
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        read.unwrap_or_else(|e| panic!("{e}\n{}", self.vm.report()));
        answer
    }

    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: Value) {
        let answer = self.request(method, path, &body);
        assert!(
            answer.starts_with("HTTP/1.1 20"),
            "{path}: {answer}\n{}",
            self.vm.report()
        );
    }
}

#[test]
fn a_served_vm_is_configured_steered_and_changed_under_the_filters() {
    let dir = temp_dir();
    let disk = |name: &str, size: usize| file(&dir, name, &vec![0; size]);
    let (first, second, third) = (disk("1", 4096), disk("2", 8192), disk("3", 4096));
    let mut served = Served::start(&["--pci"]);
    let drive = |id: &str, path: &PathBuf| json!({ "drive_id": id, "path_on_host": path, "is_root_device": false });
    let kernel = payload("end", "DEAF");
    for (path, body) in [
        ("/boot-source", json!({ "kernel_image_path": kernel })),
        (
            "/machine-config",
            json!({ "vcpu_count": 2, "mem_size_mib": 64 }),
        ),
        ("/drives/a", drive("a", &first)),
        (
            "/vsock",
            json!({ "guest_cid": 3, "uds_path": dir.path().join("vsock") }),
        ),
        ("/entropy", json!({})),
        (
            "/balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": true }),
        ),
        (
            "/metrics",
            json!({ "metrics_path": dir.path().join("metrics") }),
        ),
        (
            "/logger",
            json!({ "log_path": dir.path().join("log"), "level": "Debug" }),
        ),
        ("/actions", json!({ "action_type": "InstanceStart" })),
    ] {
        served.ask("PUT", path, body);
    }
    served.vm.expect("go\n");
    assert_threads(&served.vm, "2", "1");
    for (method, path, body) in [
        (
            "PATCH",
            "/drives/a",
            json!({ "drive_id": "a", "path_on_host": second }),
        ),
        ("PUT", "/drives/b", drive("b", &third)),
        ("PATCH", "/balloon", json!({ "amount_mib": 8 })),
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PATCH", "/vm", json!({ "state": "Resumed" })),
        ("PUT", "/actions", json!({ "action_type": "FlushMetrics" })),
        ("GET", "/vm/config", Value::Null),
    ] {
        served.ask(method, path, body);
    }
    served.vm.signal(rustix::process::Signal::TERM);
    served.vm.expect("pressed\n");
    served.vm.signal(rustix::process::Signal::TERM);
    served.vm.wait().expect_status(143);
}

#[test]
fn a_user_network_over_the_socket_needs_leave() {
    let network = json!({ "iface_id": "n", "host_dev_name": "", "user": {} });
    let served = Served::start(&[]);
    let answer = served.request("PUT", "/network-interfaces/n", &network);
    assert!(
        answer.contains("--user-networks"),
        "{answer}\n{}",
        served.vm.report()
    );
    // It lives.
    served.ask("GET", "/", Value::Null);
    let (dir, log, path) = fake_passt();
    let mut command = husk();
    let socket = dir.path().join("api");
    command
        .args(["serve", "--user-networks", "--api-sock", text(&socket)])
        .env("PATH", path);
    let vm = Vm::start(&mut command, LIMIT);
    let started = Instant::now();
    while !socket.exists() {
        assert!(started.elapsed() < LIMIT, "no socket\n{}", vm.report());
        std::thread::yield_now();
    }
    let served = Served {
        vm,
        socket,
        _dir: dir,
    };
    served.ask("PUT", "/network-interfaces/n", network);
    let started = Instant::now();
    while !log.exists() {
        assert!(
            started.elapsed() < LIMIT,
            "no passt\n{}",
            served.vm.report()
        );
        std::thread::yield_now();
    }
}
