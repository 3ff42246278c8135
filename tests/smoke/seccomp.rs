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
fn without(name: &str, syscall: &str, word: &str) -> Value {
    let mut rules = own();
    let filter = rules[name]["filter"].as_array_mut().unwrap();
    let before = filter.len();
    filter.retain(|rule| rule["syscall"] != syscall || !rule.to_string().contains(word));
    assert!(filter.len() < before, "{name} has no such rule");
    rules
}

/// Husk's own rules, and almost none for the kind called `name`.
fn empty(name: &str) -> Value {
    let mut rules = own();
    rules[name] = json!({ "filter": [{ "syscall": "close" }] });
    rules
}

fn rules_file(dir: &tempfile::TempDir, rules: &Value) -> PathBuf {
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
