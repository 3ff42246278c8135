//! End to end: `husk bench boot` of real Linux kernels, where KVM runs Linux: `cargo xtask test` finds or emulates such a
//! host. That a kernel which has become slower is caught is `cargo xtask boot-time`'s to show, where time does not depend
//! on what else runs.

mod common;

use common::guest::{Guest, Kernel, LIMIT, busybox};
use common::{Ended, Vm, husk, temp_dir, text};
use husk_bench::{Phase, Report, Subject};

/// `husk bench boot` of two runs, and the report that it wrote.
#[track_caller]
fn bench(kernel: &Kernel, arguments: &[&str]) -> (Ended, Report) {
    let dir = temp_dir();
    let json = dir.path().join("report.json");
    let mut command = husk();
    command
        .args(["bench", "boot", "--kernel", text(&kernel.image)])
        .args(["--memory", "256M", "--runs", "2", "--warm-ups", "0"])
        .args(["--json", text(&json)])
        .args(arguments)
        .env("HUSK_BUSYBOX", busybox());
    let ended = Vm::start(&mut command, LIMIT).finish();
    let report = Report::read(&json).unwrap_or_else(|e| panic!("{e}: {}", ended.report()));
    (ended, report)
}

/// Every run passed every phase but `missing`, in their order.
#[track_caller]
fn assert_phases(subject: &Subject, missing: &[Phase]) {
    assert_eq!((subject.runs.len(), subject.failed()), (2, 0));
    for run in &subject.runs {
        for phase in Phase::ALL {
            let is_there = run.phases.contains_key(&phase);
            assert_eq!(is_there, !missing.contains(&phase), "{phase:?} {run:?}");
        }
        let times: Vec<u64> = run.phases.values().copied().collect();
        assert!(times.is_sorted(), "{run:?}");
    }
}

/// Nothing but a kernel: Husk's own init marks and powers off, and all phases are told, with what they cost.
fn a_kernel_alone_is_measured(kernel: &Kernel) {
    let (ended, report) = bench(kernel, &["--profile"]);
    ended.expect_status(0);
    let subject = &report.subjects[0];
    assert_phases(subject, &[]);
    let counts = &subject.counts.as_ref().unwrap().by_phase;
    let of = |phase| counts.iter().find(|count| count.phase == phase).unwrap();
    assert!(of(Phase::HandsOver).exits.values().sum::<u64>() > 100);
    assert!(of(Phase::FirstConsoleByte).pages_touched > 100);
    assert!(of(Phase::Mark).exits.contains_key("out to port 0x604"));
    // A kernel without KALLSYMS has them from its symbol table.
    let named = |name: &str| subject.initcalls.iter().any(|call| call.name == name);
    assert!(
        named("inet_init") && named("acpi_init"),
        "{:?}",
        subject.initcalls
    );
    assert!(
        subject
            .initcalls
            .is_sorted_by_key(|call| std::cmp::Reverse(call.us))
    );
}

#[test]
fn a_minimal_kernel_alone_is_measured() {
    a_kernel_alone_is_measured(&Kernel::minimal());
}

#[test]
fn debians_kernel_alone_is_measured() {
    a_kernel_alone_is_measured(&Kernel::debian());
}

/// With modules, an initramfs that knows nothing of marks, and a line of the console that counts.
#[test]
fn a_line_of_the_console_is_a_mark() {
    let kernel = Kernel::debian();
    let guest = Guest::new(
        &kernel,
        Some("echo \"up: $(cat /proc/modules | wc -l)\"; sleep 1000"),
    );
    let initrd = guest.initrd();
    let arguments = [
        "--initrd",
        text(&initrd),
        "--mark",
        "up: [1-9]",
        "--profile",
    ];
    let (ended, report) = bench(&kernel, &arguments);
    ended.expect_status(0);
    // The monitor is ended at the mark.
    assert_phases(&report.subjects[0], &[Phase::Exit]);
    let of_modules = |call: &&husk_bench::Initcall| call.name.ends_with(']');
    assert!(
        report.subjects[0]
            .initcalls
            .iter()
            .find(of_modules)
            .is_some()
    );
}

#[test]
fn a_kernel_that_panics_shows_its_last_lines() {
    let kernel = Kernel::minimal();
    let (ended, report) = bench(&kernel, &["--cmdline", "rdinit=/none root=/dev/none"]);
    ended.expect_status(3);
    let failed = report.subjects[0].runs[1].failed.as_ref().unwrap();
    assert!(
        failed.reason.starts_with("it ended before its mark: "),
        "{failed:?}"
    );
    assert!(
        failed
            .console
            .iter()
            .any(|line| line.contains("Kernel panic")),
        "{failed:?}"
    );
}

#[test]
fn an_init_that_hangs_is_ended_when_its_time_is_over() {
    let kernel = Kernel::minimal();
    let guest = Guest::new(&kernel, None).with_file(
        "init",
        "#!/bin/sh\necho waiting\nwhile :; do /bin/busybox sleep 9; done\n",
    );
    let initrd = guest.initrd();
    let (ended, report) = bench(&kernel, &["--initrd", text(&initrd), "--timeout", "10"]);
    ended.expect_status(3);
    let failed = report.subjects[0].runs[0].failed.as_ref().unwrap();
    assert_eq!(failed.reason, "it set no mark within 10 s");
    assert!(
        failed.console.iter().any(|line| line == "waiting"),
        "{failed:?}"
    );
}
