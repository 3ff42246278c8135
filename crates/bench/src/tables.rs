//! What there is to show, as tables that [`crate::text`] and [`crate::html`] each draw in their way.

use crate::compare::{Comparison, Verdict};
use crate::show::{count, ms, percent, plain, range, signed, step, threshold};
use crate::stats::{self, Summary};
use crate::{Clock, Failed, Phase, Subject};

/// Rows of numbers. All text in it is plain; nothing is escaped yet.
#[derive(Default)]
pub(crate) struct Table {
    pub(crate) caption: String,
    /// Of the names, then of the cells.
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Row>,
    /// The names are a program's.
    pub(crate) code: bool,
}

#[derive(Default)]
pub(crate) struct Row {
    /// Has a colour.
    pub(crate) phase: Option<Phase>,
    pub(crate) name: String,
    pub(crate) cells: Vec<String>,
    /// Less important; of the name, or, where the last cell is a change, of that.
    pub(crate) note: String,
    /// The one to look at.
    pub(crate) key: bool,
    /// The last cell is a change for the worse (positive) or the better.
    pub(crate) change: i64,
    /// Of the largest, for a bar.
    pub(crate) share: f64,
}

/// One subject with its statistics.
pub(crate) struct Series<'a> {
    pub(crate) name: String,
    pub(crate) clock: Clock,
    pub(crate) subject: &'a Subject,
    pub(crate) points: Vec<Point>,
    /// When each good run reached the headline.
    pub(crate) times: Vec<u64>,
    /// Where the headline is among the points.
    pub(crate) headline: Option<usize>,
}

/// A phase of a subject.
pub(crate) struct Point {
    pub(crate) phase: Phase,
    /// What it took, from the one before.
    pub(crate) step: f64,
    /// From spawn.
    pub(crate) all: Summary,
}

impl<'a> Series<'a> {
    pub(crate) fn new(name: String, clock: Clock, subject: &'a Subject) -> Self {
        let phases = subject.phases();
        let steps: Vec<Vec<u64>> = subject.good().map(|run| run.steps(&phases)).collect();
        let mut series = Self {
            name,
            clock,
            subject,
            points: Vec::new(),
            times: Vec::new(),
            headline: None,
        };
        for (at, &phase) in phases.iter().enumerate() {
            let times = crate::model::times(&mut subject.good(), phase);
            let took: Vec<u64> = steps.iter().map(|steps| steps[at]).collect();
            let Some(all) = stats::summarize(&times) else {
                continue;
            };
            if subject.headline() == Some(phase) {
                series.headline = Some(at);
                series.times = times;
            }
            series.points.push(Point {
                phase,
                step: stats::median(&took),
                all,
            });
        }
        series
    }

    pub(crate) fn headline(&self) -> Option<&Point> {
        self.points.get(self.headline?)
    }

    /// `30 runs`, `30 runs, 1 failed`.
    pub(crate) fn runs(&self) -> String {
        let failed = self.subject.failed();
        let good = format!("{} runs", self.subject.runs.len() - failed);
        if failed > 0 {
            format!("{good}, {failed} failed")
        } else {
            good
        }
    }

    /// What a line says of each failed run, and the rest of it.
    pub(crate) fn failures(&self) -> Vec<(String, &'a Failed)> {
        let mut failures = Vec::new();
        for (number, run) in self.subject.runs.iter().enumerate() {
            if let Some(failed) = &run.failed {
                let reached = run
                    .phases
                    .keys()
                    .next_back()
                    .map_or("nothing", |phase| phase.label());
                let reason = plain(&failed.reason);
                failures.push((
                    format!("run {} failed: {reason} (reached: {reached})", number + 1),
                    failed,
                ));
            }
        }
        failures
    }

    /// From spawn to each phase.
    pub(crate) fn phases(&self) -> Table {
        let mut table = table(
            "",
            &[self.clock.unit(), "median", "95 % interval", "p90", "p99"],
        );
        for (at, point) in self.points.iter().enumerate() {
            let all = &point.all;
            table.rows.push(Row {
                cells: vec![
                    ms(all.median),
                    range(all.interval, ms),
                    ms(all.p90),
                    ms(all.p99),
                ],
                key: self.headline == Some(at),
                ..row(point.phase)
            });
        }
        table
    }

    /// What was counted.
    pub(crate) fn counts(&self) -> Table {
        let mut table = table("", &["up to", "exits", "pages touched", "KiB read"]);
        for counts in self
            .subject
            .counts
            .iter()
            .flat_map(|counts| &counts.by_phase)
        {
            let exits: Vec<(&String, &u64)> = counts.exits.iter().collect();
            let all = exits
                .iter()
                .fold(0, |sum: u64, (_, times)| sum.saturating_add(**times));
            let order = stats::descending(&mut exits.iter().map(|(_, times)| **times));
            let mut note = String::new();
            for index in order.into_iter().take(6) {
                let (reason, times) = exits[index as usize];
                let comma = if note.is_empty() { "" } else { ", " };
                note += &format!("{comma}{} {times}", plain(reason));
            }
            let read = counts.bytes_read.div_ceil(1024);
            table.rows.push(Row {
                cells: vec![count(all), count(counts.pages_touched), count(read)],
                note,
                ..row(counts.phase)
            });
        }
        table
    }

    /// Its initcalls from one to another; `slowest` is what a whole bar stands for.
    pub(crate) fn initcalls(&self, from: usize, to: usize, slowest: u64) -> Table {
        let mut table = table("", &["initcall", self.clock.unit()]);
        table.code = true;
        let calls = &self.subject.initcalls;
        for call in &calls[from.min(calls.len())..to.min(calls.len())] {
            table.rows.push(Row {
                name: plain(&call.name),
                cells: vec![ms(call.us as f64 * 1e3)],
                note: if call.returned == 0 {
                    String::new()
                } else {
                    format!("returned {}", call.returned)
                },
                share: call.us as f64 / slowest.max(1) as f64,
                ..Row::default()
            });
        }
        table
    }
}

/// What each phase took, one column for each subject.
pub(crate) fn steps(all: &[Series]) -> Table {
    let mut table = table("", &["step up to"]);
    table.columns.extend(all.iter().map(|one| one.name.clone()));
    for phase in Phase::ALL {
        let of = |one: &Series| {
            one.points
                .iter()
                .find(|point| point.phase == phase)
                .map(|point| ms(point.step))
        };
        let steps: Vec<Option<String>> = all.iter().map(of).collect();
        if steps.iter().any(Option::is_some) {
            let mut row = row(phase);
            row.cells
                .extend(steps.into_iter().map(Option::unwrap_or_default));
            table.rows.push(row);
        }
    }
    table
}

/// The steps that moved.
pub(crate) fn moved(comparison: &Comparison) -> Table {
    let mut table = changes(
        comparison,
        "steps that moved, the largest first",
        "from → to",
    );
    for change in &comparison.moved {
        let contrast = &change.contrast;
        table.rows.push(Row {
            name: step(change.from, change.to),
            cells: vec![
                ms(contrast.before),
                ms(contrast.after),
                signed(contrast.delta()),
            ],
            note: percent(contrast.ratio),
            change: contrast.delta() as i64,
            ..Row::default()
        });
    }
    table
}

/// The initcalls that moved most.
pub(crate) fn moved_initcalls(comparison: &Comparison) -> Table {
    const MOST: usize = 10;
    let mut table = changes(
        comparison,
        "initcalls that moved, by one run of each",
        "initcall",
    );
    table.code = true;
    let side = |us: Option<u64>| us.map(|us| ms(us as f64 * 1e3)).unwrap_or_default();
    for change in comparison.initcalls.iter().take(MOST) {
        table.rows.push(Row {
            name: plain(&change.name),
            cells: vec![
                side(change.before),
                side(change.after),
                signed(change.delta() as f64 * 1e3),
            ],
            change: change.delta(),
            ..Row::default()
        });
    }
    table
}

fn changes(comparison: &Comparison, caption: &str, name: &str) -> Table {
    table(
        caption,
        &[
            name,
            "before",
            "after",
            &format!("change, {}", comparison.clock.unit()),
        ],
    )
}

fn table(caption: &str, columns: &[&str]) -> Table {
    Table {
        caption: caption.into(),
        columns: columns.iter().map(|column| (*column).to_owned()).collect(),
        ..Table::default()
    }
}

fn row(phase: Phase) -> Row {
    Row {
        phase: Some(phase),
        name: phase.label().into(),
        ..Row::default()
    }
}

/// Who is compared with whom, and what it came to.
pub(crate) fn sentence(comparison: &Comparison) -> String {
    let (before, after) = (plain(&comparison.before), plain(&comparison.after));
    let limit = threshold(comparison.threshold);
    let change = percent(comparison.headline.contrast.ratio);
    let names = if before == after {
        after
    } else {
        format!("{after} against {before}")
    };
    let change = change.trim_start_matches(['+', '-']);
    let said = match comparison.verdict() {
        Verdict::Slower => format!("slower by {change}, more than the {limit} allowed"),
        Verdict::Faster => format!("faster by {change}, more than {limit}"),
        Verdict::Same => format!("no change beyond {limit}"),
        Verdict::TooNoisy => match comparison.runs_needed() {
            Some(runs) => {
                format!("too noisy to tell a change of {limit}; about {runs} runs of each would")
            }
            None => format!("too noisy to tell a change of {limit}"),
        },
    };
    format!("{names}: {said}")
}

/// The medians, their ratio, and how many runs they are of.
pub(crate) fn figures(comparison: &Comparison) -> String {
    let contrast = &comparison.headline.contrast;
    let mut text = format!(
        "spawn to {}: {} → {} {}, {} (95 % interval {}; {} and {} runs",
        comparison.headline.to.label(),
        ms(contrast.before),
        ms(contrast.after),
        comparison.clock.unit(),
        percent(contrast.ratio),
        range(contrast.ratio_interval, percent),
        comparison.runs.0,
        comparison.runs.1,
    );
    if comparison.paired {
        text += ", in pairs";
    }
    if comparison.failed != (0, 0) {
        text += &format!(
            "; {} and {} failed",
            comparison.failed.0, comparison.failed.1
        );
    }
    text.push(')');
    text
}
