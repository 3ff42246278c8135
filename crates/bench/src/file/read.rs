//! From JSON to a report. By hand, because derived code for the same is forty kilobytes of a program that has to be small.
//!
//! Each function's error is the name of the field that is missing or of another kind.

use crate::{
    Clock, Counts, Failed, HostInfo, Initcall, Phase, PhaseCounts, Report, Run, SCHEMA, Subject,
    VERSION,
};
use serde_json::Value;

type Read<T> = Result<T, &'static str>;

pub(super) fn report(value: &Value) -> Read<Report> {
    let host = object(value, "host")?;
    let clock = text(value, "clock")?;
    Ok(Report {
        schema: SCHEMA.into(),
        version: VERSION,
        created: text(value, "created")?,
        clock: match &clock[..] {
            "real" => Clock::Real,
            "virtual" => Clock::Virtual,
            _ => return Err("clock"),
        },
        host: HostInfo {
            cpu: text(host, "cpu")?,
            kernel: text(host, "kernel")?,
            husk: text(host, "husk")?,
            cpus: number(host, "cpus")?.try_into().map_err(|_| "cpus")?,
        },
        subjects: list(value, "subjects", &subject)?,
        interrupted: match value.get("interrupted") {
            None => false,
            Some(value) => value.as_bool().ok_or("interrupted")?,
        },
    })
}

fn subject(value: &Value) -> Read<Subject> {
    Ok(Subject {
        name: text(value, "name")?,
        command: texts(value, "command")?,
        runs: list(value, "runs", &run)?,
        counts: match there(value, "counts") {
            Some(counts) => Some(Counts {
                by_phase: list(counts, "by_phase", &counted)?,
            }),
            None => None,
        },
        initcalls: match value.get("initcalls") {
            Some(_) => list(value, "initcalls", &initcall)?,
            None => Vec::new(),
        },
    })
}

fn run(value: &Value) -> Read<Run> {
    let mut run = Run::default();
    for (name, time) in object(value, "phases")?.as_object().into_iter().flatten() {
        let phase = phase(name).ok_or("phases")?;
        run.phases.insert(phase, time.as_u64().ok_or("phases")?);
    }
    if let Some(failed) = there(value, "failed") {
        run.failed = Some(Failed {
            reason: text(failed, "reason")?,
            console: match failed.get("console") {
                Some(_) => texts(failed, "console")?,
                None => Vec::new(),
            },
        });
    }
    Ok(run)
}

fn counted(value: &Value) -> Read<PhaseCounts> {
    let mut counts = PhaseCounts {
        phase: phase(&text(value, "phase")?).ok_or("phase")?,
        exits: Default::default(),
        pages_touched: number(value, "pages_touched")?,
        bytes_read: number(value, "bytes_read")?,
    };
    for (reason, times) in object(value, "exits")?.as_object().into_iter().flatten() {
        counts
            .exits
            .insert(reason.clone(), times.as_u64().ok_or("exits")?);
    }
    Ok(counts)
}

fn initcall(value: &Value) -> Read<Initcall> {
    Ok(Initcall {
        name: text(value, "name")?,
        us: number(value, "us")?,
        returned: value
            .get("returned")
            .and_then(Value::as_i64)
            .ok_or("returned")?,
    })
}

fn phase(name: &str) -> Option<Phase> {
    Phase::ALL.into_iter().find(|phase| phase.key() == name)
}

/// What may be null or left out.
fn there<'a>(value: &'a Value, field: &str) -> Option<&'a Value> {
    value.get(field).filter(|value| !value.is_null())
}

fn object<'a>(value: &'a Value, field: &'static str) -> Read<&'a Value> {
    value
        .get(field)
        .filter(|value| value.is_object())
        .ok_or(field)
}

fn text(value: &Value, field: &'static str) -> Read<String> {
    let text = value.get(field).and_then(Value::as_str);
    text.map(str::to_owned).ok_or(field)
}

fn number(value: &Value, field: &'static str) -> Read<u64> {
    value.get(field).and_then(Value::as_u64).ok_or(field)
}

fn list<T>(value: &Value, field: &'static str, read: &dyn Fn(&Value) -> Read<T>) -> Read<Vec<T>> {
    let mut list = Vec::new();
    for item in value.get(field).and_then(Value::as_array).ok_or(field)? {
        list.push(read(item)?);
    }
    Ok(list)
}

fn texts(value: &Value, field: &'static str) -> Read<Vec<String>> {
    list(value, field, &|value| {
        value.as_str().map(str::to_owned).ok_or(field)
    })
}
