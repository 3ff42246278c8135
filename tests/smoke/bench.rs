//! `husk bench`, natively: what is measured of a payload kernel, what it comes to, and what is refused.

use crate::common::{Ended, Vm, husk, husk_binary, temp_dir, text};
use crate::{LIMIT, file, payload};
use husk_bench::{Phase, Report};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `husk bench boot` of a payload that says "go".
fn bench(define: &str, arguments: &[&str]) -> Command {
    assert!(
        Path::new("/dev/kvm").exists(),
        "the smoke tests need /dev/kvm, and this machine has none"
    );
    let mut command = husk();
    command
        .args(["bench", "boot", "--kernel", &payload("end", define)])
        .args(["--memory", "32M", "--mark", "go", "--warm-ups", "1"])
        .args(arguments);
    command
}

#[track_caller]
fn finish(mut command: Command) -> Ended {
    Vm::start(&mut command, LIMIT).finish()
}

fn read(path: &Path) -> Report {
    Report::read(path).unwrap_or_else(|e| panic!("{e}"))
}

/// Husk refuses, in one line, with exit status 2.
#[track_caller]
fn refused(command: Command, words: &[&str]) {
    let ended = finish(command);
    ended.expect_status(2);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
    }
}

/// A report of eight runs, measured here.
fn measured(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    let arguments = ["--runs", "8", "--quiet", "--json", text(&path)];
    finish(bench("POWER_OFF", &arguments)).expect_status(0);
    path
}

/// The same report with all times multiplied.
fn scaled(report: &Path, factor: f64) -> PathBuf {
    let mut value: serde_json::Value =
        serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    for run in value["subjects"][0]["runs"].as_array_mut().unwrap() {
        for (_, ns) in run["phases"].as_object_mut().unwrap() {
            *ns = ((ns.as_u64().unwrap() as f64 * factor) as u64).into();
        }
    }
    let path = report.with_extension(format!("{factor}.json"));
    std::fs::write(&path, value.to_string()).unwrap();
    path
}

#[test]
fn boots_are_measured_and_reported() {
    let dir = temp_dir();
    let (json, html) = (dir.path().join("a.json"), dir.path().join("a.html"));
    let arguments = ["--runs", "5", "--json", text(&json), "--html", text(&html)];
    let ended = finish(bench("POWER_OFF", &arguments));
    ended.expect_status(0);
    let report = read(&json);
    let subject = &report.subjects[0];
    assert_eq!((subject.name.as_str(), subject.runs.len()), ("husk", 5));
    for run in &subject.runs {
        let times: Vec<u64> = run.phases.values().copied().collect();
        assert!(times.is_sorted(), "{run:?}");
        for phase in Phase::ALL {
            // The payload is no init to hand over to.
            let is_there = run.phases.contains_key(&phase);
            assert_eq!(is_there, phase != Phase::HandsOver, "{phase:?} {run:?}");
        }
    }
    let counts = &subject.counts.as_ref().unwrap().by_phase;
    assert!(counts.iter().any(|phase| phase.pages_touched > 0));
    assert!(counts.iter().any(|phase| !phase.exits.is_empty()));
    // The command that anybody can run: what is only in this process is not in it.
    let command = subject.command.join(" ");
    assert!(command.contains(" run --kernel "), "{command}");
    assert!(
        !command.contains("--runs") && !command.contains("/proc/"),
        "{command}"
    );
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    for line in ["husk: 5 runs", "exec", "first console byte", "> mark"] {
        assert!(ended.console().contains(line), "{}", ended.console());
    }
    // Plain lines where there is no terminal.
    let told: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(told.len(), 7, "{}", ended.stderr);
    assert!(
        told[0].starts_with("1/7 warming up husk: mark after "),
        "{}",
        told[0]
    );
    assert!(told[1].starts_with("2/7 counting husk: "), "{}", told[1]);
    assert!(told[6].starts_with("7/7 measuring husk: "), "{}", told[6]);
}

/// They are the measurement's own, or in the way of one of its runs.
#[test]
fn options_of_the_monitor_that_a_measurement_gives_itself_may_be_given() {
    for options in [
        &["--no-seccomp", "--exits", "--timeline", "--stop-at-mark"][..],
        &["--timeline-file", "/dev/null", "--pci", "-c", "2"],
    ] {
        let mut command = bench("POWER_OFF", &["--runs", "1", "--quiet", "--profile"]);
        command.args(options);
        let ended = finish(command);
        ended.expect_status(0);
        assert_eq!(ended.stderr, "");
    }
}

#[test]
fn a_baseline_tells_slower_from_not() {
    let dir = temp_dir();
    let now = measured(&dir, "now.json");
    for (factor, status) in [(0.02, 1), (50.0, 0)] {
        let before = scaled(&now, factor);
        let arguments = ["--runs", "8", "--quiet", "--baseline", text(&before)];
        let ended = finish(bench("POWER_OFF", &arguments));
        ended.expect_status(status);
        assert_eq!(ended.stderr, "", "--quiet");
        let word = if status == 1 {
            "slower by"
        } else {
            "faster by"
        };
        assert!(ended.console().contains(word), "{}", ended.console());
        assert!(
            ended.console().contains("steps that moved"),
            "{}",
            ended.console()
        );
    }
}

#[test]
fn other_monitors_take_turns() {
    let dir = temp_dir();
    let json = dir.path().join("a.json");
    let own = husk_binary();
    let kernel = payload("end", "POWER_OFF");
    let other = format!("'{}' run --memory 32M --kernel '{kernel}'", text(&own));
    // Each second run fails; what is measured of the others counts.
    let flag = dir.path().join("flag");
    let moody = format!(
        "sh -c 'if rm {0} 2>/dev/null; then echo oops; exit 9; fi; touch {0}; echo go'",
        text(&flag)
    );
    let mut command = bench("POWER_OFF", &["--runs", "4", "--json", text(&json)]);
    let ended = finish({
        command.args(["--vs", &other, "--vs", &moody]);
        command
    });
    ended.expect_status(3);
    let report = read(&json);
    let names: Vec<&str> = report.subjects.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["husk", "husk 2", "sh"]);
    assert_eq!(report.subjects[1].failed(), 0);
    assert_eq!(
        (report.subjects[2].runs.len(), report.subjects[2].failed()),
        (4, 2)
    );
    let failed = report.subjects[2]
        .runs
        .iter()
        .find_map(|run| run.failed.as_ref());
    let failed = failed.unwrap();
    assert!(failed.reason.contains("exit status 9"), "{failed:?}");
    assert_eq!(failed.console, ["oops"]);
    for line in ["husk 2 against husk: ", "sh against husk: ", "| oops"] {
        assert!(ended.console().contains(line), "{}", ended.console());
    }
    assert!(
        ended.stderr.ends_with("husk: 2 of 12 runs failed\n"),
        "{}",
        ended.stderr
    );
}

#[test]
fn runs_that_fail_say_how_and_show_their_console() {
    for (define, arguments, reason) in [
        ("PANIC", &["--until", "exit"][..], "exit status 3"),
        ("TRIPLE_FAULT", &["--until", "exit"], "exit status 4"),
        (
            "SPIN",
            &["--until", "exit", "--timeout", "1"],
            "it did not end within 1 s",
        ),
    ] {
        let dir = temp_dir();
        let json = dir.path().join("a.json");
        let mut command = bench(define, &["--runs", "2", "--json", text(&json)]);
        command.args(arguments);
        let ended = finish(command);
        ended.expect_status(3);
        let report = read(&json);
        assert_eq!(
            (report.subjects[0].runs.len(), report.subjects[0].failed()),
            (2, 2)
        );
        let failed = report.subjects[0].runs[0].failed.as_ref().unwrap();
        assert!(failed.reason.contains(reason), "{define}: {failed:?}");
        assert_eq!(failed.console, ["go"], "{define}");
        assert!(ended.console().contains("| go"), "{}", ended.console());
    }
}

#[test]
fn a_guest_that_never_marks_has_failed() {
    let mut command = husk();
    command
        .args(["bench", "boot", "--kernel", &payload("end", "POWER_OFF")])
        .args(["--memory", "32M", "--runs", "1", "--warm-ups", "0"]);
    let ended = finish(command);
    ended.expect_status(3);
    let text = ended.console();
    assert!(text.contains("it ended before its mark"), "{text}");
}

#[test]
fn an_interrupt_writes_what_was_measured() {
    let dir = temp_dir();
    let json = dir.path().join("a.json");
    let mut command = bench("POWER_OFF", &["--runs", "10000", "--json", text(&json)]);
    let mut vm = Vm::start(&mut command, LIMIT);
    vm.expect_stderr("5/10002 measuring husk: ");
    vm.signal(Signal::INT);
    let ended = vm.finish();
    ended.expect_status(130);
    let report = read(&json);
    let runs = report.subjects[0].runs.len();
    assert!(report.interrupted && (3..10_000).contains(&runs), "{runs}");
    assert!(
        ended.console().contains("Interrupted: "),
        "{}",
        ended.console()
    );
}

#[test]
fn bad_baselines_are_refused_and_left_alone() {
    let dir = temp_dir();
    let good = measured(&dir, "good.json");
    let with = |name: &str, field: &str, value: serde_json::Value| {
        let bytes = std::fs::read(&good).unwrap();
        let mut report: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        *report.pointer_mut(field).unwrap() = value;
        file(&dir, name, report.to_string().as_bytes())
    };
    let whole = std::fs::read(&good).unwrap();
    for (path, words) in [
        (dir.path().join("missing"), "cannot read"),
        (dir.path().to_owned(), "cannot read"),
        (file(&dir, "torn", &whole[..whole.len() / 2]), "damaged"),
        (file(&dir, "noise", &[0xff; 100]), "cannot read"),
        (
            file(&dir, "foreign", b"{\"schema\": \"other\"}"),
            "no report of husk bench boot",
        ),
        (with("newer", "/version", 99.into()), "version 99"),
        (with("virtual", "/clock", "virtual".into()), "virtual clock"),
        (
            with("other", "/subjects/0/name", "qemu".into()),
            "no measurement of husk",
        ),
    ] {
        let before = std::fs::read(&path).ok();
        // What would be written is the baseline itself: it stays as it is.
        let json = if path.is_dir() {
            dir.path().join("new")
        } else {
            path.clone()
        };
        let arguments = ["--baseline", text(&path), "--json", text(&json)];
        refused(bench("POWER_OFF", &arguments), &[text(&path), words]);
        assert_eq!(std::fs::read(&path).ok(), before, "{}", path.display());
    }
}

#[test]
fn bad_options_are_refused_before_anything_is_measured() {
    let dir = temp_dir();
    let in_no_folder = dir.path().join("no/a.json");
    for (arguments, word) in [
        (&["--runs", "0"][..], "--runs"),
        (&["--runs", "many"], "--runs"),
        (&["--timeout", "0"], "--timeout"),
        (&["--mark", "("], "--mark"),
        (&["--vs", ""], "--vs"),
        (&["--vs", "qemu 'x"], "--vs"),
        (&["--vs", "/no/such/monitor"], "/no/such/monitor"),
        (&["--max-regression", "-5"], "--max-regression"),
        (&["--max-regression", "few"], "--max-regression"),
        (&["--json", text(&in_no_folder)], "no directory"),
        (&["--html", text(dir.path())], "is a directory"),
        (
            &["--cpus", "0"],
            "husk refuses to start: 0 vCPUs cannot be had",
        ),
        (&["--config", "/no/such/file"], "/no/such/file"),
    ] {
        let mut command = bench("POWER_OFF", &["--quiet"]);
        // `--mark` is given once already.
        if arguments[0] == "--mark" {
            command = husk();
            command.args(["bench", "boot", "--kernel", &payload("end", "POWER_OFF")]);
        }
        command.args(arguments);
        refused(command, &[word]);
    }
    let mut command = husk();
    command.args(["bench", "boot", "--kernel", "/no/such/kernel"]);
    refused(command, &["/no/such/kernel", "does not exist"]);
}

#[test]
fn reports_are_shown_and_compared() {
    let dir = temp_dir();
    let now = measured(&dir, "now.json");
    let before = scaled(&now, 0.02);
    let report = |arguments: &[&str]| {
        let mut command = husk();
        command.args(["bench", "report"]).args(arguments);
        command
    };
    let ended = finish(report(&[text(&now)]));
    assert!(ended.expect_status(0).console().contains("husk: 8 runs"));
    let html = dir.path().join("compare.html");
    let both = [text(&before), text(&now), "--html", text(&html)];
    let ended = finish(report(&both));
    let said = ended.expect_status(0).console();
    assert!(said.starts_with("husk: slower by "), "{said}");
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("before") && page.contains("after"));
    // Who names a limit wants to know by the exit status.
    finish(report(&[&both[..2], &["--max-regression", "5%"]].concat())).expect_status(1);
    let limited = [text(&now), text(&before), "--max-regression=5"];
    finish(report(&limited)).expect_status(0);
    refused(report(&["/no/such/report"]), &["/no/such/report"]);
    refused(
        report(&[text(&now), text(&html)]),
        &[text(&html), "damaged"],
    );
    refused(
        report(&[text(&now), text(&now), text(&now)]),
        &["unexpected"],
    );
    finish(report(&[])).expect_status(2);
}
