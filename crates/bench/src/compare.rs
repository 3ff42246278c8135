//! Whether one subject boots slower than another, and where.
//!
//! With a ratio of medians r, its 95 % interval from l to h, and the threshold t (0.05 for 5 %), the verdict is
//!
//! - **slower** if r > 1 + t and l > 1: it is slower by more than is allowed, and that it is slower at all is no accident.
//! - **faster** if r < 1 / (1 + t) and h < 1, the same the other way round.
//! - **too noisy** if the runs cannot tell: h > 1 + t, so that too large a regression is not excluded, and the interval reaches
//!   as far from r as the threshold (r ≥ l (1 + t) or h ≥ r (1 + t)), so that one of just that size could not have been called.
//! - **same** otherwise.
//!
//! A stricter rule for slower, l > 1 + t, would pass most regressions of a little more than the threshold, which is what the
//! threshold is there to catch: with 30 runs and 2 % noise, a true 3 % would escape a threshold of 1 % in every seventh case. A
//! laxer one, l > 1 or r > 1 + t alone, would fail for slow-downs that are allowed, or by accident. The price of this rule is
//! that a true regression of just the threshold is called in half of all cases.
//!
//! With t = 0 every significant difference is called, and what is not is too noisy unless h ≤ 1: nothing excludes a regression
//! of any size but runs without noise, as the virtual clock has them. A null is then called slower in 2.5 % of all cases.

use crate::stats::{self, Contrast, Level};
use crate::{Clock, Error, Initcall, Phase, Report, Run, Subject, model};

/// Two subjects against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The first's name.
    pub before: String,
    /// The second's.
    pub after: String,
    /// Of both.
    pub clock: Clock,
    /// What may be lost, as a share: 0.05 is 5 %.
    pub threshold: f64,
    /// How many runs of each are compared.
    pub runs: (usize, usize),
    /// How many of each failed, and are not.
    pub failed: (usize, usize),
    /// The nth run of both took turns, and pairs of them were drawn.
    pub paired: bool,
    /// From spawn to the phase that counts: the mark, or what stands for it.
    pub headline: Change,
    /// From spawn to each phase that all good runs have.
    pub phases: Vec<Change>,
    /// What each of `phases` took, from the one before: one that is slow does not make those after it look slow.
    pub steps: Vec<Change>,
    /// Of `steps`, those that moved, the largest difference first.
    pub moved: Vec<Change>,
    /// The initcalls that moved, the largest difference first. One run of each tells of them: a hint, no statistics.
    pub initcalls: Vec<InitcallChange>,
}

/// One stretch of time in both.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Where it begins; None is the spawn.
    pub from: Option<Phase>,
    /// Where it ends.
    pub to: Phase,
    /// The medians and how sure they are.
    pub contrast: Contrast,
    /// Of a step, whether it moved: its difference is no accident at 99 % and at least a thousandth of the headline.
    pub verdict: Verdict,
}

/// What a comparison comes to; see the module's text for the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A regression.
    Slower,
    /// An improvement.
    Faster,
    /// Within the threshold.
    Same,
    /// More runs are needed to tell.
    TooNoisy,
}

/// An initcall in both; of several with one name, their sum.
#[derive(Debug, Clone, PartialEq)]
pub struct InitcallChange {
    /// The function.
    pub name: String,
    /// Microseconds; None if there was none.
    pub before: Option<u64>,
    /// Likewise.
    pub after: Option<u64>,
}

impl Verdict {
    /// One or two words.
    pub fn label(self) -> &'static str {
        match self {
            Self::Slower => "slower",
            Self::Faster => "faster",
            Self::Same => "same",
            Self::TooNoisy => "too noisy",
        }
    }
}

impl Comparison {
    /// The headline's.
    pub fn verdict(&self) -> Verdict {
        self.headline.verdict
    }

    /// How many runs of each would probably tell, where these are too noisy: an interval shrinks with the root of their number.
    pub fn runs_needed(&self) -> Option<usize> {
        let Contrast {
            ratio,
            ratio_interval: interval,
            ..
        } = self.headline.contrast;
        let have = self.runs.0.min(self.runs.1);
        if self.verdict() != Verdict::TooNoisy || self.threshold <= 0.0 || have < stats::ENOUGH {
            return None;
        }
        let reach = (ratio / interval.low).max(interval.high / ratio) - 1.0;
        let factor = (reach / self.threshold).powi(2);
        // Beyond this, the machine is at fault.
        (factor.is_finite() && factor < 100.0)
            .then(|| ((have as f64 * factor / 10.0) as usize + 1) * 10)
    }
}

impl InitcallChange {
    /// Microseconds, `after - before`.
    pub fn delta(&self) -> i64 {
        let us = |side: Option<u64>| i64::try_from(side.unwrap_or(0)).unwrap_or(i64::MAX);
        us(self.after) - us(self.before)
    }
}

/// Compares each subject of `after` with the one of the same name in `before`.
pub fn reports(before: &Report, after: &Report, threshold: f64) -> Result<Vec<Comparison>, Error> {
    if before.clock != after.clock {
        return Err(Error::Clocks {
            before: before.clock,
            after: after.clock,
        });
    }
    let mut comparisons = Vec::new();
    for now in &after.subjects {
        if let Some(then) = before.subjects.iter().find(|then| then.name == now.name) {
            let comparison = compare(then, now, threshold)?;
            comparisons.push(Comparison {
                clock: after.clock,
                ..comparison
            });
        }
    }
    if comparisons.is_empty() {
        let names = |report: &Report| {
            let names: Vec<_> = report
                .subjects
                .iter()
                .map(|subject| crate::show::plain(&subject.name))
                .collect();
            if names.is_empty() {
                "none".into()
            } else {
                names.join(", ")
            }
        };
        return Err(Error::Subjects {
            before: names(before),
            after: names(after),
        });
    }
    Ok(comparisons)
}

/// Compares each subject of a report with the first, whose runs took turns with theirs (`--vs`).
pub fn pairs(report: &Report, threshold: f64) -> Result<Vec<Comparison>, Error> {
    let mut comparisons = Vec::new();
    for other in report.subjects.iter().skip(1) {
        let comparison = compare_pairs(&report.subjects[0], other, threshold)?;
        comparisons.push(Comparison {
            clock: report.clock,
            ..comparison
        });
    }
    Ok(comparisons)
}

/// Compares two subjects that were measured one after the other, by the same clock. Subjects do not know which; the comparison
/// says the real one. [`reports`] and [`pairs`] know.
pub fn compare(before: &Subject, after: &Subject, threshold: f64) -> Result<Comparison, Error> {
    both(before, after, threshold, false)
}

/// Compares two subjects whose runs took turns: noise that lasts longer than a run meets both, and cancels.
pub fn compare_pairs(
    before: &Subject,
    after: &Subject,
    threshold: f64,
) -> Result<Comparison, Error> {
    both(before, after, threshold, true)
}

fn both(
    before: &Subject,
    after: &Subject,
    threshold: f64,
    paired: bool,
) -> Result<Comparison, Error> {
    for subject in [before, after] {
        if subject.good().next().is_none() {
            return Err(Error::NoRuns {
                subject: crate::show::plain(&subject.name),
            });
        }
    }
    let mut common = before.phases();
    let of_after = after.phases();
    common.retain(|phase| of_after.contains(phase));
    let headline = model::headline(&common).ok_or_else(|| Error::NoPhase {
        before: crate::show::plain(&before.name),
        after: crate::show::plain(&after.name),
    })?;
    let (first, second, paired) = runs(before, after, paired);
    let contrast =
        |first: &[u64], second: &[u64], level| stats::contrast(first, second, paired, level);
    let total = |&to: &Phase| {
        let at = |runs: &[&Run]| model::times(&mut runs.iter().copied(), to);
        let contrast = contrast(&at(&first), &at(&second), Level::P95);
        Change {
            from: None,
            to,
            contrast,
            verdict: verdict(&contrast, threshold),
        }
    };
    let phases: Vec<Change> = common.iter().map(total).collect();
    let headline = *phases
        .iter()
        .find(|change| change.to == headline)
        .unwrap_or(&phases[0]);
    let steps_of =
        |runs: &[&Run]| -> Vec<Vec<u64>> { runs.iter().map(|run| run.steps(&common)).collect() };
    let (steps_before, steps_after) = (steps_of(&first), steps_of(&second));
    let step = |(at, &to): (usize, &Phase)| {
        let column =
            |steps: &[Vec<u64>]| -> Vec<u64> { steps.iter().map(|steps| steps[at]).collect() };
        let contrast = contrast(&column(&steps_before), &column(&steps_after), Level::P99);
        Change {
            from: at.checked_sub(1).map(|before| common[before]),
            to,
            contrast,
            verdict: moved(&contrast, headline.contrast.before),
        }
    };
    let steps: Vec<Change> = common.iter().enumerate().map(step).collect();
    let order = stats::descending(
        &mut steps
            .iter()
            .map(|step| stats::rank(step.contrast.delta().abs())),
    );
    let moved = order.into_iter().map(|index| steps[index as usize]);
    let moved = moved.filter(|step| step.verdict != Verdict::Same).collect();
    Ok(Comparison {
        before: before.name.clone(),
        after: after.name.clone(),
        clock: Clock::Real,
        threshold,
        runs: (first.len(), second.len()),
        failed: (before.failed(), after.failed()),
        paired,
        headline,
        phases,
        steps,
        moved,
        initcalls: initcalls(&before.initcalls, &after.initcalls),
    })
}

/// The good runs of both; of pairs, those of which both are good, if there are any.
fn runs<'a>(
    before: &'a Subject,
    after: &'a Subject,
    paired: bool,
) -> (Vec<&'a Run>, Vec<&'a Run>, bool) {
    if paired {
        let all = before.runs.iter().zip(&after.runs);
        let pairs: (Vec<_>, Vec<_>) = all
            .filter(|(a, b)| a.failed.is_none() && b.failed.is_none())
            .unzip();
        if !pairs.0.is_empty() {
            return (pairs.0, pairs.1, true);
        }
    }
    (before.good().collect(), after.good().collect(), false)
}

fn verdict(contrast: &Contrast, threshold: f64) -> Verdict {
    let (ratio, interval) = (contrast.ratio, contrast.ratio_interval);
    let limit = 1.0 + threshold.max(0.0);
    if ratio > limit && interval.low > 1.0 {
        Verdict::Slower
    } else if ratio * limit < 1.0 && interval.high < 1.0 {
        Verdict::Faster
    } else if interval.high > limit
        && (ratio >= interval.low * limit || interval.high >= ratio * limit)
    {
        Verdict::TooNoisy
    } else {
        Verdict::Same
    }
}

fn moved(contrast: &Contrast, whole: f64) -> Verdict {
    let interval = contrast.delta_interval;
    if contrast.delta().abs() * 1000.0 < whole || interval.contains(0.0) {
        Verdict::Same
    } else if contrast.delta() > 0.0 {
        Verdict::Slower
    } else {
        Verdict::Faster
    }
}

/// Those that differ by a tenth and by 50 µs, if both have any, among the slowest of each.
fn initcalls(before: &[Initcall], after: &[Initcall]) -> Vec<InitcallChange> {
    const SLOWEST: usize = 300;
    if before.is_empty() || after.is_empty() {
        return Vec::new();
    }
    let mut all: Vec<InitcallChange> = Vec::new();
    for call in before
        .iter()
        .take(SLOWEST)
        .chain(after.iter().take(SLOWEST))
    {
        if all.iter().any(|known| known.name == call.name) {
            continue;
        }
        // In full, so that one just among the slowest has its counterpart.
        let sum = |calls: &[Initcall]| {
            let same = calls.iter().filter(|other| other.name == call.name);
            same.fold(None, |sum: Option<u64>, call| {
                Some(sum.unwrap_or(0).saturating_add(call.us))
            })
        };
        all.push(InitcallChange {
            name: call.name.clone(),
            before: sum(before),
            after: sum(after),
        });
    }
    let large = |change: &InitcallChange| {
        let delta = change.delta().unsigned_abs();
        delta >= 50 && delta >= change.before.unwrap_or(0) / 10
    };
    all.retain(large);
    let order = stats::descending(&mut all.iter().map(|change| change.delta().unsigned_abs()));
    order
        .into_iter()
        .map(|index| all[index as usize].clone())
        .collect()
}

#[cfg(test)]
mod tests;
