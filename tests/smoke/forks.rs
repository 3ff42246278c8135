//! Clones of a VM, natively: each goes on from where the VM was, by itself.

use crate::LIMIT;
use crate::api::Served;
use crate::common::{Vm, husk, temp_dir, text};
use crate::snapshots::{assert_counts, paused};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Ends the clones that a test leaves behind.
struct Clones(Vec<i32>);

impl Clones {
    fn of(answer: &Value) -> Self {
        let clones = answer["clones"].as_array().unwrap();
        let pid =
            |clone: &Value| clone["pid"].as_i64().unwrap_or_else(|| panic!("{answer}")) as i32;
        Self(clones.iter().map(pid).collect())
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        for pid in &self.0 {
            let pid = rustix::process::Pid::from_raw(*pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn fork(served: &Served, body: Value) -> (Value, Clones) {
    let answer = served.answer("PUT", "/husk/fork", body);
    let clones = Clones::of(&answer);
    (answer, clones)
}

#[track_caller]
fn wait_for(what: &str, mut test: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !test() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn length(path: &Path) -> usize {
    std::fs::metadata(path).map_or(0, |file| file.len() as usize)
}

#[test]
fn clones_go_on_by_themselves_and_so_does_the_vm() {
    let dir = temp_dir();
    let mut served = paused();
    let before = served.vm.stdout.bytes();
    let console = dir.path().join("console-{n}");
    let (answer, _clones) = fork(&served, json!({ "count": 5, "console": console }));
    let numbers: Vec<_> = answer["clones"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["n"].as_u64())
        .collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5].map(Some));
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    served.vm.stdout_reaches(before.len() + 3000);
    for n in 1..=5 {
        let file = dir.path().join(format!("console-{n}"));
        wait_for("a clone that goes on", || length(&file) > 3000);
        let said = std::fs::read(&file).unwrap();
        assert_counts(&[&before[..], &said].concat());
    }
    // Without the VM, too.
    assert_counts(&served.stop().expect_status(0).stdout);
    let file = dir.path().join("console-1");
    let now = length(&file);
    wait_for("a clone that outlives the VM", || {
        length(&file) > now + 1000
    });
}

#[test]
fn a_template_is_kept_as_long_as_it_is_wanted() {
    let dir = temp_dir();
    let mut served = paused();
    let before = served.vm.stdout.bytes();
    let (answer, _none) = fork(&served, json!({ "count": 0, "keep_template": true }));
    assert_eq!(
        (&answer["clones"], &answer["template"]),
        (&json!([]), &json!("1"))
    );
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    served.vm.stdout_reaches(before.len() + 3000);
    let console = dir.path().join("console-{n}");
    let order = json!({ "template": "1", "count": 2, "console": console });
    let (_, _first) = fork(&served, order.clone());
    let (answer, _second) = fork(&served, order.clone());
    assert_eq!(answer["clones"][1]["n"], 4);
    let file = dir.path().join("console-4");
    wait_for("a clone", || length(&file) > 1000);
    assert_counts(&[&before[..], &std::fs::read(&file).unwrap()].concat());
    served.done("DELETE", "/husk/fork/1", Value::Null);
    let said = served.refused("PUT", "/husk/fork", order);
    assert!(said.contains("no template \"1\""), "{said}");
    served.stop().expect_status(0);
}

#[test]
fn clones_are_steered_on_sockets_of_their_own() {
    let dir = temp_dir();
    let served = paused();
    let socket = dir.path().join("api-{n}");
    let mut command = husk();
    command.args([
        "fork",
        "-s",
        text(&served.socket),
        "-n",
        "2",
        "--paused",
        "--id",
        "web-{n}",
    ]);
    command.args(["--clone-sock", text(&socket)]);
    let ended = Vm::start(&mut command, LIMIT).finish();
    ended.expect_status(0);
    let answer: Value = serde_json::from_str(&ended.console()).unwrap();
    let _clones = Clones::of(&answer);
    let ask = |n: u32, method: &str, path: &str, body: &str| {
        let socket = dir.path().join(format!("api-{n}"));
        let response = husk_api::client::request(&socket, method, path, body).unwrap();
        assert!(response.is_success(), "{}", response.body);
        response.body
    };
    assert!(ask(2, "GET", "/", "").contains("\"web-2\""));
    assert!(ask(2, "GET", "/", "").contains("Paused"));
    ask(2, "PATCH", "/vm", r#"{"state":"Resumed"}"#);
    assert!(ask(2, "GET", "/", "").contains("Running"));
    // A clone can be cloned, and kept.
    let again = ask(2, "PUT", "/husk/fork", "{}");
    let _again = Clones::of(&serde_json::from_str(&again).unwrap());
    for n in [1, 2] {
        ask(n, "PUT", "/husk/actions", r#"{"action_type":"Stop"}"#);
    }
    wait_for("sockets that go", || {
        std::fs::read_dir(dir.path()).unwrap().count() == 0
    });
    served.stop().expect_status(0);
}

#[test]
fn what_cannot_be_forked_is_refused_and_the_vm_goes_on() {
    let dir = temp_dir();
    let served = paused();
    let same = dir.path().join("same");
    let nowhere = dir.path().join("nowhere/console-{n}");
    for (body, word) in [
        (json!({ "count": 20_000 }), "20000"),
        (json!({ "count": 2, "console": same }), "{n}"),
        (json!({ "resume_vm": false }), "api_sock"),
        (json!({ "template": "9" }), "no template \"9\""),
        (
            json!({ "count": 3, "console": nowhere }),
            "nowhere/console-",
        ),
        (json!({ "clones": 3 }), "unknown field"),
    ] {
        let said = served.refused("PUT", "/husk/fork", body);
        assert!(said.contains(word), "{word}: {said}");
    }
    let before = served.vm.stdout.bytes().len();
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    let mut served = served;
    served.vm.stdout_reaches(before + 1000);
    assert_counts(&served.stop().expect_status(0).stdout);
    let fresh = Served::start(&[]);
    let said = fresh.refused("PUT", "/husk/fork", json!({}));
    assert!(said.contains("before starting"), "{said}");
    fresh.stop().expect_status(0);
}
