//! Metrics of payload kernels, and the log in Firecracker's format.

use crate::api::Served;
use crate::common::{Vm, husk, temp_dir, text};
use crate::errors::Refused;
use crate::seccomp::{empty, rules_file, without};
use crate::{LIMIT, file, payload, run, run_bare, start};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn number(line: &Value, section: &str, field: &str) -> u64 {
    let value = &line[section][field];
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{section}.{field} is {value} in {line}"))
}

/// The only line of the metrics file at `path`.
#[track_caller]
pub fn only_line(path: &Path) -> Value {
    let lines = std::fs::read_to_string(path).unwrap();
    assert_eq!(lines.matches('\n').count(), 1, "{lines}");
    assert!(lines.ends_with('\n'), "{lines}");
    serde_json::from_str(&lines).unwrap()
}

/// Signals that are counted, without SIGPIPE.
const SIGNALS: [(&str, Signal); 6] = [
    ("sigbus", Signal::BUS),
    ("sigsegv", Signal::SEGV),
    ("sigxfsz", Signal::XFSZ),
    ("sigxcpu", Signal::XCPU),
    ("sighup", Signal::HUP),
    ("sigill", Signal::ILL),
];

/// `line` tells of `signal`, and of no other one but SIGPIPE.
#[track_caller]
pub fn assert_signal(line: &Value, signal: Signal) {
    for (name, own) in SIGNALS {
        assert_eq!(
            number(line, "signals", name),
            u64::from(own == signal),
            "{name}"
        );
    }
}

#[test]
fn metrics_count_what_the_guest_did() {
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let kernel = payload("end", "POWER_OFF");
    let arguments = [
        "--kernel",
        &kernel,
        "--exits",
        "--metrics-path",
        text(&path),
    ];
    let ended = run(&arguments);
    assert_eq!(ended.expect_status(0).console(), "go\n");
    // What --exits says, by another count.
    let exits = |reason: &str| -> u64 {
        let lines = ended.stderr.lines().filter(|l| l.contains(reason));
        let counts = lines.map(|l| l.split_whitespace().next().unwrap().parse::<u64>());
        counts.map(Result::unwrap).sum()
    };
    let lines = std::fs::read_to_string(&path).unwrap();
    assert_eq!(lines.lines().count(), 1, "{lines}");
    let line: Value = serde_json::from_str(&lines).unwrap();
    assert_eq!(number(&line, "uart", "write_count"), 3);
    assert!(exits(" out to port ") > 0);
    assert_eq!(number(&line, "vcpu", "exit_io_out"), exits(" out to port "));
    assert_eq!(number(&line, "vcpu", "exit_io_in"), exits(" in from port "));
    assert_eq!(
        number(&line, "vcpu", "exit_mmio_write"),
        exits(" write at ")
    );
    assert_eq!(number(&line, "vcpu", "failures"), 0);
    let latency = &line["vcpu"]["exit_io_out_agg"];
    let (min, max) = (latency["min_us"].as_u64(), latency["max_us"].as_u64());
    assert!(min <= max && max <= latency["sum_us"].as_u64(), "{latency}");

    // A second run adds to it.
    run(&arguments).expect_status(0);
    let both = std::fs::read_to_string(&path).unwrap();
    assert!(
        both.starts_with(&lines) && both.lines().count() == 2,
        "{both}"
    );
}

#[test]
fn a_metrics_fifo_that_nobody_reads_holds_no_vm_up() {
    let dir = temp_dir();
    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let ended = run(&[
        "--kernel",
        &payload("end", "POWER_OFF"),
        "--metrics-path",
        text(&fifo),
    ]);
    assert_eq!(ended.expect_status(0).console(), "go\n");
    assert_eq!(ended.stderr, "");
    let ended = run(&[
        "--kernel",
        &payload("end", "POWER_OFF"),
        "--metrics-path",
        "/dev/full",
    ]);
    assert_eq!(ended.expect_status(0).console(), "go\n");
    assert!(ended.stderr.contains("/dev/full"), "{}", ended.stderr);
}

#[test]
fn a_metrics_file_that_cannot_be_is_said_before_anything_starts() {
    let kernel = payload("end", "POWER_OFF");
    Refused::by(&["--kernel", &kernel, "--metrics-path", "/nowhere/metrics"])
        .with(2, &["/nowhere/metrics"]);
}

#[test]
fn a_configuration_file_says_where_log_and_metrics_go() {
    let dir = temp_dir();
    let (log, metrics) = (dir.path().join("log"), dir.path().join("metrics"));
    let content = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{}"}},
            "logger": {{"log_path": "{}", "level": "debug", "show_level": true, "show_log_origin": true}},
            "metrics": {{"metrics_path": "{}"}}}}"#,
        payload("end", "TRIPLE_FAULT"),
        log.display(),
        metrics.display(),
    );
    let config = file(&dir, "vm.json", content.as_bytes());
    let ended = run_bare(&["--config", text(&config)]);
    assert_eq!(ended.expect_status(4).console(), "go\n");
    assert_eq!(ended.stderr, "");
    let log = std::fs::read_to_string(&log).unwrap();
    let said = log.lines().find(|line| line.contains("triple fault"));
    // 2024-01-31T12:00:00.000000000 [anonymous-instance:main:ERROR:src/session.rs:7] …
    let (time, rest) = said.and_then(|line| line.split_once(' ')).unwrap();
    assert_eq!((time.len(), time.as_bytes()[10]), (29, b'T'), "{time}");
    let said = rest.strip_prefix("[anonymous-instance:main:ERROR:src/");
    let (origin, _) = said.and_then(|said| said.split_once("] ")).unwrap();
    let (file, line) = origin.split_once(':').unwrap();
    assert!(
        file.ends_with(".rs") && line.parse::<u32>().is_ok(),
        "{rest}"
    );
    let metrics = std::fs::read_to_string(&metrics).unwrap();
    let line: Value = serde_json::from_str(&metrics).unwrap();
    assert_eq!(number(&line, "vcpu", "exit_shutdown"), 1);

    // A flag over the file.
    let other = dir.path().join("other");
    let flags = ["--log-file", text(&other), "--log-level", "off"];
    let ended = run_bare(&[&["--config", text(&config)], &flags[..]].concat());
    ended.expect_status(4);
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "");
}

#[test]
fn prometheus_reads_the_same_counters_over_the_socket() {
    let dir = temp_dir();
    let socket = dir.path().join("api");
    let kernel = payload("end", "DEAF");
    let mut vm = start(&["--kernel", &kernel, "--api-sock", text(&socket)]);
    vm.expect("go\n");
    let get = |path: &str| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: husk\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    get("/version");
    let answer = get("/husk/metrics");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    for sample in [
        "\nhusk_uart_write_total 3\n",
        "\nhusk_get_api_requests_vmm_version_total 1\n",
        "\n# TYPE husk_vcpu_exit_io_out_total counter\n",
        "\nhusk_vcpu_exit_io_out_total{vcpu=\"0\"} ",
    ] {
        assert!(body.contains(sample), "no {sample} in {body}");
    }
    vm.signal(Signal::TERM);
    vm.expect("pressed\n");
    vm.signal(Signal::TERM);
    vm.wait().expect_status(143);
}

#[test]
fn devices_that_cannot_start_are_counted() {
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let disk = file(&dir, "disk", &[0; 65536]);
    let vsock = format!("cid=3,uds={}", dir.path().join("vsock").display());
    let ended = run(&[
        "--kernel",
        &payload("virtio", ""),
        "--metrics-path",
        text(&path),
        "--disk",
        &format!("{},id=root", text(&disk)),
        "--vsock",
        &vsock,
        "--entropy",
        "--balloon",
        "0",
    ]);
    let refused = "refused\n".repeat(4) + "end\n";
    assert_eq!(ended.expect_status(0).console(), refused);
    let line = only_line(&path);
    for section in ["block_root", "block", "vsock", "entropy", "balloon"] {
        assert_eq!(number(&line, section, "activate_fails"), 1, "{section}");
    }
    for section in ["block_root", "block", "vsock", "balloon"] {
        assert_eq!(number(&line, section, "cfg_fails"), 1, "{section}");
    }
    assert_eq!(number(&line, "net", "activate_fails"), 0);
}

#[test]
fn accesses_to_what_is_not_there_are_counted() {
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let kernel = payload("end", "WIDE");
    run(&["--kernel", &kernel, "--metrics-path", text(&path)]).expect_status(0);
    let line = only_line(&path);
    assert_eq!(number(&line, "uart", "missed_read_count"), 3 + 1);
    assert_eq!(number(&line, "uart", "missed_write_count"), 3);
    assert_eq!(number(&line, "i8042", "missed_read_count"), 1);
    assert_eq!(number(&line, "i8042", "missed_write_count"), 2);
    assert_eq!(number(&line, "i8042", "read_count"), 0);
    assert_eq!(number(&line, "i8042", "write_count"), 0);
}

#[test]
fn pausing_and_resuming_take_their_time_in_the_api_and_in_the_monitor() {
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let served = Served::start(&[]);
    served.done("PUT", "/metrics", json!({ "metrics_path": path }));
    let kernel = payload("count", "");
    served.done(
        "PUT",
        "/boot-source",
        json!({ "kernel_image_path": kernel }),
    );
    // Nothing was paused, so it took no time.
    served.refused("PATCH", "/vm", json!({ "state": "Paused" }));
    served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    let flush = || {
        served.done("PUT", "/actions", json!({ "action_type": "FlushMetrics" }));
        let lines = std::fs::read_to_string(&path).unwrap();
        serde_json::from_str::<Value>(lines.lines().last().unwrap()).unwrap()
    };
    let latencies = |line: &Value, what: &str| {
        let own = number(line, "latencies_us", what);
        (own, number(line, "latencies_us", &format!("vmm_{what}")))
    };
    let line = flush();
    assert_eq!(latencies(&line, "pause_vm"), (0, 0));
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    let line = flush();
    let (api, vmm) = latencies(&line, "pause_vm");
    assert!(0 < vmm && vmm <= api && api < 60_000_000, "{api} {vmm}");
    assert_eq!(latencies(&line, "resume_vm"), (0, 0));
    assert_eq!(number(&line, "vcpu", "kvmclock_ctrl_fails"), 0);
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    let mut line = flush();
    let (api, vmm) = latencies(&line, "resume_vm");
    assert!(0 < api && vmm <= api && api < 60_000_000, "{api} {vmm}");
    // The guest has no paravirtual clock. Its vCPU finds that when it comes to it.
    let until = Instant::now() + LIMIT;
    while number(&line, "vcpu", "kvmclock_ctrl_fails") == 0 {
        assert!(Instant::now() < until, "{line}");
        std::thread::sleep(Duration::from_millis(5));
        line = flush();
    }
    assert_eq!(number(&line, "vcpu", "kvmclock_ctrl_fails"), 1);
    served.stop().expect_status(0);
}

#[test]
fn a_killing_signal_leaves_a_last_line() {
    let kernel = payload("end", "DEAF");
    let others = [("", Signal::ABORT), ("", Signal::FPE)];
    for (name, signal) in SIGNALS.into_iter().chain(others) {
        // That one presses the power button.
        if signal == Signal::HUP {
            continue;
        }
        let dir = temp_dir();
        let path = dir.path().join("metrics");
        let mut vm = start(&["--kernel", &kernel, "--metrics-path", text(&path)]);
        vm.expect("go\n");
        vm.signal(signal);
        let ended = vm.wait();
        ended.expect_killed(signal.as_raw());
        assert_eq!(ended.stderr.lines().count(), 1, "{name}: {}", ended.stderr);
        let line = only_line(&path);
        assert_signal(&line, signal);
        // What was counted before: a byte that came out a moment ago may be the one that is not.
        let written = number(&line, "uart", "write_count");
        assert!((2..=3).contains(&written), "{name}: {written}");
        assert!(number(&line, "vcpu", "exit_io_out") >= written, "{name}");
        assert_eq!(number(&line, "vmm", "panic_count"), 0);
    }
}

#[test]
fn signals_that_kill_nobody_are_counted() {
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let kernel = payload("end", "DEAF");
    let mut vm = start(&["--kernel", &kernel, "--metrics-path", text(&path)]);
    vm.expect("go\n");
    vm.signal(Signal::PIPE);
    vm.signal(Signal::HUP);
    vm.expect("pressed\n");
    vm.signal(Signal::TERM);
    vm.wait().expect_status(143);
    let line = only_line(&path);
    assert_signal(&line, Signal::HUP);
    assert_eq!(number(&line, "signals", "sigpipe"), 1);
    assert_eq!(number(&line, "uart", "error_count"), 0);
}

#[test]
fn output_that_nobody_takes_is_counted() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let full = std::fs::File::options().write(true).open("/dev/full");
    for (output, pipes) in [(Stdio::from(writer), 1), (full.unwrap().into(), 0)] {
        let dir = temp_dir();
        let path = dir.path().join("metrics");
        let mut command = husk();
        command
            .args(["run", "--kernel", &payload("end", "POWER_OFF")])
            .args(["--memory", "64M", "--metrics-path", text(&path)])
            .stdin(Stdio::null())
            .stdout(output);
        Vm::start_with(&mut command, LIMIT).wait().expect_status(0);
        let line = only_line(&path);
        assert!(number(&line, "uart", "error_count") >= 1);
        assert_eq!(number(&line, "signals", "sigpipe").min(1), pipes);
    }
    // And where a file takes it instead.
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let config = json!({
        "boot-source": { "kernel_image_path": payload("end", "POWER_OFF") },
        "serial": { "serial_out_path": "/dev/full" },
        "metrics": { "metrics_path": path },
    });
    let config = file(&dir, "vm.json", config.to_string().as_bytes());
    run_bare(&["--config", text(&config)]).expect_status(0);
    assert!(number(&only_line(&path), "uart", "error_count") >= 1);
}

#[test]
fn a_violation_of_a_filter_leaves_a_last_line() {
    let kernel = payload("end", "DEAF");
    // The last one has nothing but what the end of the process needs.
    for rules in [
        without("vcpu", "ioctl", "KVM_RUN"),
        without("io", "epoll_wait", ""),
        empty("main"),
    ] {
        let dir = temp_dir();
        let path = dir.path().join("metrics");
        let filter = rules_file(&dir, &rules);
        let ended = start(&[
            "--kernel",
            &kernel,
            "--seccomp-filter",
            text(&filter),
            "--metrics-path",
            text(&path),
            "--entropy",
        ])
        .wait();
        ended.expect_status(148);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        let line = only_line(&path);
        assert_eq!(number(&line, "seccomp", "num_faults"), 1);
        assert_signal(&line, Signal::SYS);
    }
    let dir = temp_dir();
    let path = dir.path().join("metrics");
    let kernel = payload("end", "POWER_OFF");
    run(&["--kernel", &kernel, "--metrics-path", text(&path)]).expect_status(0);
    assert_eq!(number(&only_line(&path), "seccomp", "num_faults"), 0);
}
