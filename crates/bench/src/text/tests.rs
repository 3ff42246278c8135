use super::*;
use crate::compare::{compare, reports};
use crate::sample::{self, STEPS, steps_with};
use crate::show::{count, ms, percent, threshold};
use crate::{Clock, Phase};

#[test]
fn a_summary_has_all_there_is_and_nothing_that_a_terminal_obeys() {
    let mut report = sample::report(1, &STEPS);
    report.subjects[0].name = "husk\u{1b}[2J".into();
    let text = summary(&report);
    println!("{text}");
    for part in [
        "AMD EPYC",
        "4 CPUs",
        "husk·[2J: 30 runs, 1 failed",
        "> mark",
        "first console byte",
        "io 1555, mmio 60, hlt 5",
        "acpi_init",
        "returned -19",
        "run 2 failed: no mark within 10 s (reached: first console byte)",
        "unknown-block(0,0)",
    ] {
        assert!(text.contains(part), "{part}");
    }
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains('\u{202e}'));
    assert!(!text.contains("virtual"));
}

#[test]
fn virtual_time_is_called_so() {
    let mut report = sample::report(1, &STEPS);
    report.clock = Clock::Virtual;
    report.interrupted = true;
    let text = summary(&report);
    assert!(
        text.contains("virtual ms  ") && text.contains("Interrupted"),
        "{text}"
    );
    let comparisons = reports(&report, &report, 0.05).unwrap();
    assert!(
        comparison(&comparisons[0]).contains(" virtual ms"),
        "{}",
        comparison(&comparisons[0])
    );
}

#[test]
fn a_comparison_says_what_moved() {
    let before = sample::report(1, &STEPS);
    let after = sample::report(5, &steps_with(Phase::HandsOver, 1.5));
    let text = comparison(&reports(&before, &after, 0.05).unwrap()[0]);
    println!("{text}");
    for part in [
        "husk: slower by 2",
        "more than the 5 % allowed",
        "first console byte → hands over",
        "(95 % interval +",
        "acpi_init",
    ] {
        assert!(text.contains(part), "{part}");
    }
    let (a, b) = (
        sample::subject("a", 1, 6, &STEPS),
        sample::subject("b", 2, 6, &STEPS),
    );
    let text = comparison(&compare(&a, &b, 0.001).unwrap());
    println!("{text}");
    assert!(text.contains("b against a: too noisy to tell a change of 0.1 %"));
    let text = comparison(&compare(&a, &b, 0.2).unwrap());
    assert!(text.contains("no change beyond 20 %"), "{text}");
}

#[test]
fn numbers_are_short_and_exact() {
    let cases = [
        (0.0, "0.000"),
        (1234.0, "0.001"),
        (9_999_400.0, "9.999"),
        (9_999_600.0, "10.00"),
        (99_996_000.0, "100.0"),
        (-1.5e6, "-1.500"),
    ];
    for (ns, shown) in cases {
        assert_eq!(ms(ns), shown);
    }
    assert_eq!(
        (ms(f64::INFINITY), percent(f64::INFINITY)),
        ("∞".into(), "∞".into())
    );
    assert_eq!(
        (percent(1.031), percent(0.97), percent(1.0), percent(3.5)),
        (
            "+3.1 %".into(),
            "-3.0 %".into(),
            "+0.0 %".into(),
            "+250 %".into()
        )
    );
    assert_eq!(percent(1.00001), "+0.001 %");
    assert_eq!(
        (threshold(0.05), threshold(0.005), threshold(0.0)),
        ("5 %".into(), "0.5 %".into(), "0 %".into())
    );
    assert_eq!(
        (count(0), count(999), count(1_048_576)),
        ("0".into(), "999".into(), "1\u{202f}048\u{202f}576".into())
    );
    assert_eq!(plain(&"x".repeat(3000)).chars().count(), 2001);
}
