//! The real thing with monitors that are shell scripts: what a run shows, and how it fails.

use super::*;
use husk_bench::Phase;

fn script(name: &str, script: &str) -> Program {
    Program {
        name: name.into(),
        command: ["sh", "-c", script].map(OsString::from).to_vec(),
        husk: None,
    }
}

fn plan(programs: Vec<Program>) -> Plan {
    Plan {
        programs,
        runs: 2,
        warm_ups: 1,
        mark: Some(Regex::new("booted").unwrap()),
        until: Until::Exit,
        timeout: Duration::from_secs(30),
        profile: false,
    }
}

fn measure(plan: &Plan) -> Report {
    run(plan, &AtomicBool::new(false), |_| ()).unwrap()
}

fn failure(report: &Report) -> &husk_bench::Failed {
    report.subjects[0].runs[0].failed.as_ref().unwrap()
}

#[test]
fn programs_take_turns_and_their_marks_are_seen() {
    let say = "echo 'Run /init as init process'; echo booted";
    let plan = plan(vec![script("a", say), script("b", say)]);
    let mut turns = Vec::new();
    let report = run(&plan, &AtomicBool::new(false), |p| {
        turns.push((p.kind, p.program.to_owned()));
    });
    let report = report.unwrap();
    let names: Vec<&str> = turns.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["a", "b", "a", "b", "b", "a"]);
    for subject in &report.subjects {
        assert_eq!((subject.runs.len(), subject.failed()), (2, 0));
        for run in &subject.runs {
            let at = |phase| run.phases[&phase];
            assert!(at(Phase::FirstConsoleByte) <= at(Phase::HandsOver));
            assert!(at(Phase::HandsOver) <= at(Phase::Mark));
            assert!(at(Phase::Mark) <= at(Phase::Exit));
        }
    }
}

#[test]
fn who_is_to_be_ended_at_its_mark_is() {
    let mut plan = plan(vec![script("a", "echo booted; exec sleep 1000")]);
    plan.until = Until::Mark;
    let report = measure(&plan);
    let run = &report.subjects[0].runs[0];
    assert!(run.failed.is_none(), "{run:?}");
    assert!(!run.phases.contains_key(&Phase::Exit));
}

#[test]
fn a_run_that_fails_says_how_and_shows_its_console() {
    let mut plan = plan(vec![script("a", "echo oops; echo 'no disk' >&2; exit 7")]);
    let report = measure(&plan);
    let failed = failure(&report);
    assert_eq!(
        failed.reason,
        "it ended before its mark: no disk (exit status 7)"
    );
    assert_eq!(failed.console, ["oops"]);
    plan.programs = vec![script("a", "echo booted; exit 3")];
    assert_eq!(failure(&measure(&plan)).reason, "exit status 3");
}

#[test]
fn a_run_that_hangs_is_killed_and_fails() {
    let hang = "trap '' TERM; echo waiting; while :; do sleep 1000; done";
    let mut plan = plan(vec![script("a", hang)]);
    (plan.runs, plan.warm_ups) = (1, 0);
    plan.timeout = Duration::from_secs(1);
    let report = measure(&plan);
    let failed = failure(&report);
    assert_eq!(failed.reason, "it set no mark within 1 s");
    assert_eq!(failed.console, ["waiting"]);
}

#[test]
fn an_interrupt_keeps_what_there_is() {
    let mut plan = plan(vec![script("a", "echo booted")]);
    plan.runs = 1000;
    let interrupted = AtomicBool::new(false);
    let report = run(&plan, &interrupted, |progress| {
        if progress.done == 5 {
            interrupted.store(true, Ordering::Release);
        }
    });
    let report = report.unwrap();
    assert!(report.interrupted);
    assert_eq!(report.subjects[0].runs.len(), 4);
}

#[test]
fn what_is_not_there_is_named() {
    let mut plan = plan(vec![script("a", "")]);
    plan.programs[0].command = vec!["/no/such/monitor".into()];
    let error = run(&plan, &AtomicBool::new(false), |_| ()).err().unwrap();
    assert_eq!(error.to_string(), "cannot start /no/such/monitor");
}

#[test]
fn time_passes_on_real_hardware() {
    assert_eq!(clock(), Clock::Real);
}
