//! What bad clients of the REST socket get, and that the VM does not notice.

use crate::any_json::any_json;
use crate::api::{PATIENCE, Served, raw};
use crate::common::Vm;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

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
        let json = any_json("[a-zA-Z0-9/_ .-]{0,12}", (3, 16, 4));
        let mut sample = || json.new_tree(&mut runner).unwrap().current();
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
