use super::*;
use crate::{Run, sample};
use std::error::Error as _;

/// As the command shows an error.
fn line(error: &Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn parse(text: &str) -> Result<Report, Error> {
    Report::parse(Path::new("base.json"), text)
}

#[test]
fn a_report_comes_back_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let report = sample::report(1, &sample::STEPS);
    report.write(&path).unwrap();
    assert_eq!(Report::read(&path).unwrap(), report);
    // Over one that is there, and nothing is left beside it.
    let other = sample::report(2, &sample::STEPS);
    other.write(&path).unwrap();
    assert_eq!(Report::read(&path).unwrap(), other);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_link_stays_a_link_and_a_device_is_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let (path, link) = (directory.path().join("a"), directory.path().join("b"));
    fs::write(&path, "old").unwrap();
    std::os::unix::fs::symlink("a", &link).unwrap();
    write_whole(&link, "new").unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    write_whole(Path::new("/dev/null"), "x").unwrap();
    let error = write_whole(Path::new("/no/such/place"), "x").unwrap_err();
    assert!(
        line(&error).starts_with("cannot write /no/such/place: No such file"),
        "{}",
        line(&error)
    );
    assert!(write_whole(directory.path(), "x").is_err());
}

#[test]
fn what_is_no_report_is_told_in_one_line() {
    let whole = serde_json::to_string(&sample::report(1, &sample::STEPS)).unwrap();
    let cases = [
        ("", "the report base.json is damaged: EOF"),
        ("{", "the report base.json is damaged: EOF"),
        (
            "\0\u{1b}[2J",
            "the report base.json is damaged: expected value",
        ),
        (
            &whole[..whole.len() / 2],
            "the report base.json is damaged: EOF",
        ),
        ("[1]", "base.json is no report of husk bench boot"),
        ("{}", "base.json is no report of husk bench boot"),
        (
            r#"{"schema":"x","version":1}"#,
            "base.json is no report of husk bench boot",
        ),
        (
            r#"{"schema":["husk.bench.boot"],"version":1}"#,
            "base.json is no report of husk bench boot",
        ),
        (
            r#"{"schema":"husk.bench.boot","version":2,"x":[]}"#,
            "the report base.json has version 2, this husk reads version 1",
        ),
        (
            r#"{"schema":"husk.bench.boot","version":1}"#,
            "the report base.json is damaged: host is missing or not",
        ),
        (
            &whole.replace("\"exec\":", "\"exec\":-"),
            "the report base.json is damaged: phases is missing or not",
        ),
        (
            &whole.replace("first_exit", "last_exit"),
            "the report base.json is damaged: ",
        ),
        (
            &whole.replace("\"real\"", "\"lunar\""),
            "the report base.json is damaged: ",
        ),
        (
            &"[".repeat(100_000),
            "the report base.json is damaged: recursion limit",
        ),
    ];
    for (text, said) in cases {
        let error = line(&parse(text).unwrap_err());
        assert!(error.starts_with(said), "{said}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let error = Report::read(Path::new("/no/such.json")).unwrap_err();
    assert!(line(&error).starts_with("cannot read the report /no/such.json: No such file"));
}

#[test]
fn every_truncation_is_an_error() {
    let whole = serde_json::to_string(&sample::report(1, &sample::STEPS[..2])).unwrap();
    for end in (0..whole.len())
        .filter(|end| whole.is_char_boundary(*end))
        .step_by(7)
    {
        assert!(parse(&whole[..end]).is_err(), "{end}");
    }
}

#[test]
fn later_fields_are_passed_over_and_too_many_runs_are_not() {
    let mut report = sample::report(1, &sample::STEPS[..1]);
    let text = serde_json::to_string(&report).unwrap();
    let later = text.replacen("{\"schema\"", "{\"later\":{\"a\":[1]},\"schema\"", 1);
    assert_eq!(parse(&later).unwrap(), report);
    report.subjects[0].runs = vec![Run::default(); MAX_RUNS + 1];
    let error = parse(&serde_json::to_string(&report).unwrap()).unwrap_err();
    assert!(line(&error).contains("larger than"), "{error}");
}
