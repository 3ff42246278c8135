//! What is said of a boot at its end: for people on stderr, and for programs in a file.

use crate::Failure;
use crate::session::say;
use husk_vmm::{Cost, ExitCounts, Phase, Timeline};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::time::Duration;

/// On stderr, a line for each phase.
pub fn print(timeline: &Timeline) {
    let mut text = String::from("husk: timeline, in ms since the start of the process\n");
    for reached in timeline.reached() {
        let ms = reached.at.as_secs_f64() * 1e3;
        text += &format!("{ms:>10.3}  {}\n", reached.phase);
    }
    say(&text);
}

/// On stderr, a line for each reason.
pub fn print_exits(exits: &ExitCounts) {
    let total: u64 = exits.values().sum();
    let mut text = format!("husk: {total} exits from the guest to the monitor\n");
    let mut exits: Vec<_> = exits.iter().collect();
    exits.sort_by_key(|&(_, count)| std::cmp::Reverse(*count));
    for ((reason, address), count) in exits {
        text += &format!("{count:>10}  {reason} {address:#x}\n");
    }
    say(&text);
}

/// Into `file`, as JSON: `start_ns`, when the process began on CLOCK_MONOTONIC, and `phases`, each with `ns` from there.
pub fn write(timeline: &Timeline, file: &mut File) -> Result<(), Failure> {
    // An Instant does not tell what it counts from: the process's age does.
    let age = timeline.start().elapsed();
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default();
    let phases = timeline.reached().into_iter().map(|reached| {
        let mut value = json!({ "phase": reached.phase.key(), "ns": ns(reached.at) });
        if let Phase::Mark(mark) = reached.phase {
            value["value"] = mark.into();
        }
        if let Some(cost) = reached.cost {
            value["cost"] = shown(&cost);
        }
        value
    });
    let value = json!({
        "start_ns": ns(now.saturating_sub(age)),
        "phases": phases.collect::<Vec<_>>(),
    });
    writeln!(file, "{value}")
        .map_err(|e| Failure::host(format!("cannot write the timeline's file: {e}")))
}

fn shown(cost: &Cost) -> Value {
    let exits = cost
        .exits
        .iter()
        .map(|((reason, address), count)| (format!("{reason} {address:#x}"), json!(count)));
    json!({
        "exits": exits.collect::<serde_json::Map<_, _>>(),
        "resident_pages": cost.resident_pages,
        "bytes_read": cost.bytes_read,
    })
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
