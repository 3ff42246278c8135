//! The text that Prometheus scrapes, version 0.0.4.

use crate::family::Naming;
use crate::sections::METRICS;
use crate::snapshot::{Group, Reading};
use std::fmt::Write;

/// The `Content-Type` of [`prometheus`]'s text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All values, as Prometheus takes them: counters since the process began, which no flush resets; seconds and bytes; devices
/// as labels.
pub fn prometheus() -> String {
    text(&METRICS.groups())
}

pub(crate) fn text(groups: &[Group]) -> String {
    let mut text = String::new();
    for group in groups {
        let section = group.name.strip_suffix("_us").unwrap_or(group.name);
        let label = match group.naming {
            Some(Naming::Label(label) | Naming::Listed(label)) => Some(label),
            Some(Naming::Single) | None => None,
        };
        let members: Vec<(String, _)> = group
            .members
            .iter()
            .map(|member| {
                let labels = label.map(|label| format!("{{{label}=\"{}\"}}", escape(&member.id)));
                (labels.unwrap_or_default(), &member.fields)
            })
            .collect();
        for (at, field) in group.fields.iter().enumerate() {
            let samples = members
                .iter()
                .filter_map(|(labels, fields)| Some((labels.as_str(), fields.get(at)?.reading)));
            let prefix = format!("husk_{section}");
            write_field(&mut text, &prefix, field.name, field.help, samples);
        }
    }
    text
}

/// A field of all members.
fn write_field<'a>(
    text: &mut String,
    prefix: &str,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (&'a str, Reading)>,
) {
    let samples: Vec<_> = samples.collect();
    let Some((_, kind)) = samples.first() else {
        return;
    };
    let stem = |end: &str| name.strip_suffix(end).unwrap_or(name).to_owned();
    let (family, kind) = match kind {
        Reading::Counter { .. } => (format!("{prefix}_{}_total", stem("_count")), "counter"),
        Reading::Gauge(_) => (format!("{prefix}_{name}"), "gauge"),
        Reading::Micros(_) => (format!("{prefix}_{}_seconds", stem("_us")), "gauge"),
        Reading::Latency(_) => return write_latency(text, prefix, &stem("_agg"), help, &samples),
    };
    head(text, &family, kind, help);
    for (labels, reading) in samples {
        // Writing to a string does not fail.
        let _ = match reading {
            Reading::Counter { total, .. } => writeln!(text, "{family}{labels} {total}"),
            Reading::Gauge(value) => writeln!(text, "{family}{labels} {value}"),
            Reading::Micros(us) => {
                let (seconds, rest) = (us / 1_000_000, us % 1_000_000);
                writeln!(text, "{family}{labels} {seconds}.{rest:06}")
            }
            Reading::Latency(_) => Ok(()),
        };
    }
}

/// A summary without quantiles, and two gauges.
fn write_latency(
    text: &mut String,
    prefix: &str,
    name: &str,
    help: &str,
    samples: &[(&str, Reading)],
) {
    let all: Vec<_> = samples
        .iter()
        .filter_map(|(labels, reading)| match reading {
            Reading::Latency(all) => Some((labels, all)),
            _ => None,
        })
        .collect();
    let family = format!("{prefix}_{name}_seconds");
    head(text, &family, "summary", help);
    for (labels, all) in &all {
        let _ = writeln!(text, "{family}_sum{labels} {}", seconds(all.sum_ns));
        let _ = writeln!(text, "{family}_count{labels} {}", all.count);
    }
    let family = format!("{prefix}_{name}_min_seconds");
    head(text, &family, "gauge", &format!("{help} The shortest."));
    for (labels, all) in &all {
        let _ = writeln!(text, "{family}{labels} {}", seconds(all.shortest_ns()));
    }
    let family = format!("{prefix}_{name}_max_seconds");
    head(text, &family, "gauge", &format!("{help} The longest."));
    for (labels, all) in &all {
        let _ = writeln!(text, "{family}{labels} {}", seconds(all.max_ns));
    }
}

fn head(text: &mut String, family: &str, kind: &str, help: &str) {
    let _ = write!(text, "# HELP {family} {help}\n# TYPE {family} {kind}\n");
}

fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

/// A label's value.
fn escape(id: &str) -> String {
    id.replace('\\', r"\\")
        .replace('"', "\\\"")
        .replace('\n', r"\n")
}
