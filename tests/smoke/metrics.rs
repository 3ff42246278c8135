//! Metrics of payload kernels, and the log in Firecracker's format.

use crate::common::{temp_dir, text};
use crate::errors::Refused;
use crate::{file, payload, run, run_bare, start};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn number(line: &Value, section: &str, field: &str) -> u64 {
    let value = &line[section][field];
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{section}.{field} is {value} in {line}"))
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
