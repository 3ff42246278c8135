//! Reports and comparisons for a terminal and the log of a CI job.

use crate::compare::{Comparison, Verdict};
use crate::show::{count, ms, percent, plain, step, threshold};
use crate::stats::{Interval, summarize};
use crate::{Clock, Phase, Report, Subject};
use std::fmt::Write;

/// How many initcalls are listed.
const INITCALLS: usize = 10;

/// A table of phases for each subject, what was counted, its slowest initcalls, and why runs failed.
pub fn summary(report: &Report) -> String {
    let host = &report.host;
    let mut text = format!(
        "{}, {} CPUs, Linux {}, husk {}\n",
        plain(&host.cpu),
        host.cpus,
        plain(&host.kernel),
        plain(&host.husk)
    );
    if report.clock == Clock::Virtual {
        text += "the clock is virtual: it counts instructions, 1000000 are a virtual ms\n";
    }
    if report.interrupted {
        text += "interrupted: there are fewer runs than were asked for\n";
    }
    for subject in &report.subjects {
        text.push('\n');
        subject_text(&mut text, subject, report.clock);
    }
    text
}

fn subject_text(text: &mut String, subject: &Subject, clock: Clock) {
    let good = subject.good().count();
    let _ = write!(text, "{}: {good} runs", plain(&subject.name));
    if subject.failed() > 0 {
        let _ = write!(text, ", {} failed", subject.failed());
    }
    text.push('\n');
    let phases = subject.phases();
    if !phases.is_empty() {
        let columns = ["median", "95 % interval", "p90", "p99", "step"];
        let [a, b, c, d, e] = columns;
        let _ = writeln!(
            text,
            "  {:<18} {a:>9} {b:>19} {c:>9} {d:>9} {e:>9}",
            clock.unit()
        );
        let headline = subject.headline();
        let steps: Vec<Vec<u64>> = subject.good().map(|run| run.steps(&phases)).collect();
        for (at, &phase) in phases.iter().enumerate() {
            let times: Vec<u64> = subject
                .good()
                .filter_map(|run| run.phases.get(&phase).copied())
                .collect();
            let took: Vec<u64> = steps.iter().map(|steps| steps[at]).collect();
            let Some(all) = summarize(&times) else {
                continue;
            };
            let _ = writeln!(
                text,
                "{} {:<18} {:>9} {:>19} {:>9} {:>9} {:>9}",
                if headline == Some(phase) { '>' } else { ' ' },
                phase.label(),
                ms(all.median),
                range(all.interval, ms),
                ms(all.p90),
                ms(all.p99),
                ms(crate::stats::median(&took))
            );
        }
    }
    if let Some(counts) = &subject.counts {
        let _ = writeln!(
            text,
            "  {:<18} {:>9} {:>12} {:>12}  exits by reason",
            "counted until", "exits", "pages", "KiB read"
        );
        for row in &counts.by_phase {
            let mut reasons: Vec<(&String, &u64)> = row.exits.iter().collect();
            reasons.sort_by_key(|(_, times)| std::cmp::Reverse(**times));
            let shown: Vec<String> = reasons
                .iter()
                .take(5)
                .map(|(name, times)| format!("{} {times}", plain(name)))
                .collect();
            let exits = row
                .exits
                .values()
                .fold(0, |sum: u64, times| sum.saturating_add(*times));
            let _ = writeln!(
                text,
                "  {:<18} {exits:>9} {:>12} {:>12}  {}",
                row.phase.label(),
                count(row.pages_touched),
                count(row.bytes_read.div_ceil(1024)),
                shown.join(", ")
            );
        }
    }
    if !subject.initcalls.is_empty() {
        let shown = subject.initcalls.len().min(INITCALLS);
        let _ = writeln!(
            text,
            "  the slowest {shown} of {} initcalls, in {}",
            subject.initcalls.len(),
            clock.unit()
        );
        for call in &subject.initcalls[..shown] {
            let _ = write!(
                text,
                "  {:>9}  {}",
                ms(call.us as f64 * 1e3),
                plain(&call.name)
            );
            if call.returned != 0 {
                let _ = write!(text, " (returned {})", call.returned);
            }
            text.push('\n');
        }
    }
    for (number, run) in subject.runs.iter().enumerate() {
        let Some(failed) = &run.failed else { continue };
        let reached = run
            .phases
            .keys()
            .next_back()
            .map_or("nothing", |phase| Phase::label(*phase));
        let _ = writeln!(
            text,
            "  run {} failed: {} (reached: {reached})",
            number + 1,
            plain(&failed.reason)
        );
        for line in &failed.console {
            let _ = writeln!(text, "  | {}", plain(line));
        }
    }
}

/// What a comparison comes to, the steps that moved, and the initcalls.
pub fn comparison(comparison: &Comparison) -> String {
    let unit = comparison.clock.unit();
    let contrast = &comparison.headline.contrast;
    let mut text = format!(
        "{}: {}\n  spawn to {}: {} → {} {unit}, {} (95 % interval {})\n",
        names(comparison),
        sentence(comparison),
        comparison.headline.to.label(),
        ms(contrast.before),
        ms(contrast.after),
        percent(contrast.ratio),
        range(contrast.ratio_interval, percent)
    );
    let _ = write!(
        text,
        "  {} and {} runs",
        comparison.runs.0, comparison.runs.1
    );
    if comparison.paired {
        text += ", in pairs";
    }
    if comparison.failed != (0, 0) {
        let _ = write!(
            text,
            "; {} and {} failed and do not count",
            comparison.failed.0, comparison.failed.1
        );
    }
    text.push('\n');
    for change in &comparison.moved {
        let contrast = &change.contrast;
        let _ = writeln!(
            text,
            "  {:<40} {:>9} → {:>9} {unit}  {} ({})",
            step(change.from, change.to),
            ms(contrast.before),
            ms(contrast.after),
            signed(contrast.delta()),
            percent(contrast.ratio)
        );
    }
    if comparison.moved.is_empty() {
        text += "  no step between phases moved for sure\n";
    }
    for change in comparison.initcalls.iter().take(INITCALLS) {
        let side = |us: Option<u64>| us.map_or("none".into(), |us| ms(us as f64 * 1e3));
        let _ = writeln!(
            text,
            "  initcall {:<31} {:>9} → {:>9} {unit}  {} (one run each)",
            plain(&change.name),
            side(change.before),
            side(change.after),
            signed(change.delta() as f64 * 1e3)
        );
    }
    text
}

/// Who is compared with whom.
pub(crate) fn names(comparison: &Comparison) -> String {
    let (before, after) = (plain(&comparison.before), plain(&comparison.after));
    if before == after {
        after
    } else {
        format!("{after} against {before}")
    }
}

/// The verdict as a person says it.
pub(crate) fn sentence(comparison: &Comparison) -> String {
    let limit = threshold(comparison.threshold);
    let change = percent(comparison.headline.contrast.ratio);
    match comparison.verdict() {
        Verdict::Slower => format!(
            "slower by {}, more than the {limit} allowed",
            change.trim_start_matches('+')
        ),
        Verdict::Faster => format!(
            "faster by {}, more than {limit}",
            change.trim_start_matches('-')
        ),
        Verdict::Same => format!("no change beyond {limit}"),
        Verdict::TooNoisy => match comparison.runs_needed() {
            Some(runs) => {
                format!("too noisy to tell a change of {limit}; about {runs} runs of each would")
            }
            None => format!("too noisy to tell a change of {limit}"),
        },
    }
}

/// A difference in nanoseconds with its sign.
pub(crate) fn signed(ns: f64) -> String {
    format!("{}{}", if ns > 0.0 { "+" } else { "" }, ms(ns))
}

/// Both ends; `unknown` where there is no telling.
pub(crate) fn range(interval: Interval, show: fn(f64) -> String) -> String {
    match interval.high.is_finite() {
        true => format!("{} … {}", show(interval.low), show(interval.high)),
        false => "unknown".into(),
    }
}

#[cfg(test)]
mod tests;
