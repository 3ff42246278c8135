//! The schema in docs/ is that of the files that are written and read.

mod common;

use common::STEPS;
use husk_bench::{Clock, Phase, Report};
use jsonschema::Validator;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

fn schema() -> Value {
    serde_json::from_str(include_str!("../../../docs/bench-boot.schema.json")).unwrap()
}

fn validator() -> Validator {
    jsonschema::draft202012::options().build(&schema()).unwrap()
}

/// A report as JSON that has every field there is.
fn whole() -> Value {
    serde_json::to_value(common::report(1, &STEPS)).unwrap()
}

fn reads(value: &Value) -> bool {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), value.to_string()).unwrap();
    Report::read(Path::new(file.path())).is_ok()
}

#[test]
fn what_is_written_is_valid() {
    jsonschema::draft202012::meta::validate(&schema()).unwrap();
    let validator = validator();
    for steps in [&STEPS[..], &STEPS[..1], &[]] {
        let mut report = common::report(1, steps);
        for clock in [Clock::Real, Clock::Virtual] {
            report.clock = clock;
            validator
                .validate(&serde_json::to_value(&report).unwrap())
                .unwrap();
        }
        report.subjects[0].counts = None;
        report.subjects[0].initcalls.clear();
        validator
            .validate(&serde_json::to_value(&report).unwrap())
            .unwrap();
    }
    let new = Report::new(Clock::Real, common::host());
    validator
        .validate(&serde_json::to_value(&new).unwrap())
        .unwrap();
}

#[test]
fn the_schema_knows_every_field_and_no_other() {
    let (schema, whole) = (schema(), whole());
    let named = fields(&schema);
    let mut written = BTreeSet::new();
    keys(&whole, &mut written);
    // The names of phases and exits are no fields.
    let phases: BTreeSet<String> = Phase::ALL.iter().map(|phase| name(*phase)).collect();
    written.retain(|key| !phases.contains(key) && !["io", "mmio", "hlt"].contains(&key.as_str()));
    assert_eq!(named, written);
    let all: Vec<String> = Phase::ALL.iter().map(|phase| name(*phase)).collect();
    assert_eq!(schema["$defs"]["phase"]["enum"], json!(all));
}

fn name(phase: Phase) -> String {
    serde_json::to_value(phase)
        .unwrap()
        .as_str()
        .unwrap()
        .into()
}

/// The keys of all `properties`.
fn fields(schema: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    if let Some(properties) = schema["properties"].as_object() {
        found.extend(properties.keys().cloned());
    }
    match schema {
        Value::Object(map) => map.values().for_each(|value| found.extend(fields(value))),
        Value::Array(list) => list.iter().for_each(|value| found.extend(fields(value))),
        _ => {}
    }
    found
}

fn keys(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            found.insert(key.clone());
            keys(value, found);
        }),
        Value::Array(list) => list.iter().for_each(|value| keys(value, found)),
        _ => {}
    }
}

/// Schema and reader refuse the same: each field in turn is missing, or of another kind.
#[test]
fn what_the_schema_refuses_is_not_read_and_the_other_way_round() {
    let validator = validator();
    let whole = whole();
    let mut pointers = Vec::new();
    paths(&whole, String::new(), &mut pointers);
    assert!(pointers.len() > 50, "{}", pointers.len());
    for pointer in pointers {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let mut missing = whole.clone();
        if let Some(Value::Object(map)) = missing.pointer_mut(parent) {
            map.remove(key);
            assert_eq!(
                validator.is_valid(&missing),
                reads(&missing),
                "without {pointer}"
            );
        }
        for other in [
            json!("x"),
            json!(-1),
            json!(1.5),
            json!(null),
            json!(["x"]),
            json!({"x": 1}),
        ] {
            // serde takes a list of a structure's fields for the structure. That is not promised.
            let lax = other.is_array();
            let mut changed = whole.clone();
            let place = changed.pointer_mut(&pointer).unwrap();
            let shown = other.to_string();
            *place = other;
            let (valid, read) = (validator.is_valid(&changed), reads(&changed));
            assert!(
                valid == read || lax && read,
                "{pointer}: {shown}: {valid}, {read}"
            );
        }
    }
}

/// JSON pointers to all there is; of lists, to the first two.
fn paths(value: &Value, at: String, found: &mut Vec<String>) {
    let mut each = |key: &str, value: &Value| {
        let pointer = format!("{at}/{key}");
        found.push(pointer.clone());
        paths(value, pointer, found);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| each(key, value)),
        Value::Array(list) => list
            .iter()
            .take(2)
            .enumerate()
            .for_each(|(at, value)| each(&at.to_string(), value)),
        _ => {}
    }
}
