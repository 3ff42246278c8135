//! Starts monitors again and again, and sees when each passes the phases of its boot.
//!
//! A [`Plan`] says what is to be run and how often; [`run`] makes a [`Report`] of it. One thread does it all, so that nothing
//! runs beside a measured start but the start: it waits for the child's console and its end in one poll(2).
//!
//! Husk's own processes tell their phases themselves (`husk run --timeline-file`); of others is known what their consoles show.
#![forbid(unsafe_code)]

mod child;
mod clock;
mod console;
mod symbols;
mod timeline;

pub use child::STOPPED_AFTER;
pub use clock::{clock, host};

use child::{Ended, Seen};
use console::Marks;
use husk_bench::{Clock, Counts, Report, Run, Subject};
use regex_lite::Regex;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What is to be measured.
pub struct Plan {
    /// In this order, and then in the other, and so on.
    pub programs: Vec<Program>,
    /// Measured runs of each.
    pub runs: u32,
    /// Runs of each before those.
    pub warm_ups: u32,
    /// A console line that is the mark; else it is what the guest's init says.
    pub mark: Option<Regex>,
    /// Whether a run goes on behind its mark.
    pub until: Until,
    /// How long a run may take.
    pub timeout: Duration,
    /// Have Husk's kernels tell of their initcalls, in a run of its own.
    pub profile: bool,
}

/// Where a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// At the mark: the monitor is ended then.
    Mark,
    /// When the guest ends by itself.
    Exit,
}

/// A monitor with all of its arguments.
pub struct Program {
    /// What it is called in the report.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// When it is Husk's own `run`.
    pub husk: Option<Husk>,
}

/// What a run of Husk's own can do.
pub struct Husk {
    /// Arguments that mean something in this process alone; the report does not show them.
    pub more: Vec<OsString>,
    /// The command of a run that counts, without seccomp options.
    pub counted: Vec<OsString>,
    /// The command of a run whose kernel tells of its initcalls.
    pub profiled: Vec<OsString>,
    /// The kernel.
    pub kernel: PathBuf,
}

/// How far a measurement is.
pub struct Progress<'a> {
    /// Runs that are over, and all there are to be.
    pub done: u32,
    /// All.
    pub of: u32,
    /// What ran.
    pub program: &'a str,
    /// What it was for.
    pub kind: Kind,
    /// How it went; None: it did not count.
    pub run: &'a Run,
}

/// What a run is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: what comes first is slower.
    WarmUp,
    /// What each phase costs.
    Counting,
    /// The kernel's initcalls.
    Profile,
    /// Its times.
    Measured,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is not there, or none.
    #[error("cannot start {0}")]
    Spawn(String, #[source] std::io::Error),
    /// The monitor does not take what it was given.
    #[error("{program} refuses to start: {said}")]
    Refused {
        /// What it is called.
        program: String,
        /// What it said.
        said: String,
    },
    /// The host fails.
    #[error("cannot watch a run")]
    Watch(#[source] std::io::Error),
}

/// Measure. `interrupted` ends it early, with what there is.
pub fn run(
    plan: &Plan,
    interrupted: &AtomicBool,
    mut progress: impl FnMut(&Progress<'_>),
) -> Result<Report, Error> {
    let mut report = Report::new(clock(), host());
    // An emulated host's clock leaps while its only processor waits: there the limit is for what never ends.
    let timeout = match report.clock {
        Clock::Virtual => plan.timeout.saturating_mul(100),
        Clock::Real => plan.timeout,
    };
    let marks = Marks::new(plan.mark.clone());
    let subject = |program: &Program| Subject {
        name: program.name.clone(),
        command: program
            .command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
        ..Subject::default()
    };
    report.subjects = plan.programs.iter().map(subject).collect();
    let order = order(plan);
    let of = order.len() as u32;
    for (done, (kind, index)) in (1u32..).zip(order) {
        let (Some(program), Some(subject)) =
            (plan.programs.get(index), report.subjects.get_mut(index))
        else {
            continue;
        };
        let ended = child::watch(program, kind, plan, &marks, timeout, interrupted)?;
        let seen = match ended {
            Ended::Interrupted => break,
            Ended::Refused(said) => {
                let program = program.name.clone();
                return Err(Error::Refused { program, said });
            }
            Ended::Seen(seen) => *seen,
        };
        let Seen {
            run,
            costs,
            console,
        } = seen;
        progress(&Progress {
            done,
            of,
            program: &program.name,
            kind,
            run: &run,
        });
        match kind {
            Kind::WarmUp => {}
            Kind::Counting => subject.counts = Some(Counts { by_phase: costs }),
            Kind::Profile => {
                let mut calls = husk_bench::initcalls::parse(&String::from_utf8_lossy(&console));
                if let Some(husk) = &program.husk {
                    symbols::name(&mut calls, &husk.kernel);
                }
                subject.initcalls = calls;
            }
            Kind::Measured => subject.runs.push(run),
        }
    }
    report.interrupted = interrupted.load(Ordering::Acquire);
    Ok(report)
}

/// Which program runs when, and what for.
fn order(plan: &Plan) -> Vec<(Kind, usize)> {
    let all = 0..plan.programs.len();
    let own = all
        .clone()
        .filter(|&index| plan.programs.get(index).is_some_and(|p| p.husk.is_some()));
    let mut order = Vec::new();
    for _ in 0..plan.warm_ups {
        order.extend(all.clone().map(|index| (Kind::WarmUp, index)));
    }
    order.extend(own.clone().map(|index| (Kind::Counting, index)));
    if plan.profile {
        order.extend(own.map(|index| (Kind::Profile, index)));
    }
    for round in 0..plan.runs {
        // Whoever runs behind another pays for what that one left to be done.
        let turn = all.clone().map(|index| (Kind::Measured, index));
        match round % 2 {
            0 => order.extend(turn),
            _ => order.extend(turn.rev()),
        }
    }
    order
}

#[cfg(test)]
mod tests;
