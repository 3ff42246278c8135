//! Drawings. Positions along the width are percentages, so that a drawing fits a phone without its text shrinking.

use super::{esc, phase_key};
use crate::compare::Comparison;
use crate::show::{ms, percent, threshold};
use crate::stats::Summary;
use crate::{Clock, Phase};
use std::fmt::Write;

/// More dots than this tell the eye nothing more.
const DOTS: usize = 400;

/// A linear scale from values to percentages of the width.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// From 0.
    pub(super) fn to(high: f64) -> Self {
        Self {
            low: 0.0,
            high: high.max(1.0),
        }
    }

    /// With some room on both sides.
    pub(super) fn around(low: f64, high: f64, least: f64) -> Self {
        // Values beyond 2^53 are further apart than 1.
        let room = ((high - low) * 0.04).max(least).max(high * 1e-9);
        Self {
            low: low - room,
            high: high + room,
        }
    }

    fn at(self, value: f64) -> f64 {
        ((value - self.low) / (self.high - self.low) * 100.0).clamp(0.0, 100.0)
    }

    /// Round values and how many decimals they need as milliseconds.
    fn ticks(self) -> (Vec<f64>, usize) {
        let span = self.high - self.low;
        let (mut step, mut factor) = (1.0, 0);
        while step * 6.0 < span {
            step *= [2.0, 2.5, 2.0][factor % 3];
            factor += 1;
        }
        let decimals = match step {
            step if step >= 1e6 => 0,
            step if step >= 1e5 => 1,
            step if step >= 1e4 => 2,
            step if step >= 1e3 => 3,
            _ => 6,
        };
        let first = (self.low / step).ceil().max(0.0);
        let ticks = (0..8).map(|n| (first + f64::from(n)) * step);
        (ticks.filter(|tick| *tick <= self.high).collect(), decimals)
    }

    /// Lines for the ticks, to lie under a drawing.
    fn grid(self, out: &mut String, height: u32) {
        for tick in self.ticks().0 {
            line(out, "grid", self.at(tick), 0, height);
        }
    }

    /// The numbers below, in milliseconds.
    pub(super) fn axis(self, out: &mut String) {
        out.push_str("<svg height=\"18\" aria-hidden=\"true\">");
        let (ticks, decimals) = self.ticks();
        for tick in ticks {
            label(
                out,
                self.at(tick),
                13,
                &format!("{:.decimals$}", tick / 1e6),
            );
        }
        out.push_str("</svg>");
    }
}

fn line(out: &mut String, class: &str, x: f64, from: u32, to: u32) {
    let _ = write!(
        out,
        "<line class=\"{class}\" x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"{from}\" y2=\"{to}\"/>"
    );
}

fn label(out: &mut String, x: f64, y: u32, text: &str) {
    let anchor = match x {
        x if x < 8.0 => "start",
        x if x > 92.0 => "end",
        _ => "middle",
    };
    let _ = write!(
        out,
        "<text x=\"{x:.2}%\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>",
        text
    );
}

/// Opens a drawing that a screen reader tells of by `alt`.
fn open(out: &mut String, height: u32, alt: &str) {
    let _ = write!(out, "<svg height=\"{height}\" role=\"img\" aria-label=\"");
    esc(out, alt);
    out.push_str("\">");
}

/// Each run a dot, the first at the top; the median and its interval.
pub(super) fn strip(out: &mut String, scale: Scale, times: &[u64], all: &Summary, clock: Clock) {
    const HEIGHT: u32 = 72;
    let unit = clock.unit();
    let alt = format!(
        "{} runs from {} to {} {unit}, median {} {unit}",
        all.runs,
        ms(all.min),
        ms(all.max),
        ms(all.median)
    );
    open(out, HEIGHT, &alt);
    scale.grid(out, HEIGHT);
    if all.interval.high.is_finite() {
        let (low, high) = (scale.at(all.interval.low), scale.at(all.interval.high));
        let _ = write!(
            out,
            "<rect class=\"band\" x=\"{low:.2}%\" width=\"{:.2}%\" height=\"{HEIGHT}\"/>",
            high - low
        );
    }
    out.push_str("<g class=\"dots\">");
    let every = times.len().div_ceil(DOTS).max(1);
    let room = f64::from(HEIGHT - 12) / (times.len().max(2) - 1) as f64;
    for (run, &time) in times.iter().enumerate().step_by(every) {
        let y = 6.0 + run as f64 * room;
        let time = time as f64;
        let x = scale.at(time);
        if time > scale.high {
            // An arrowhead: it lies beyond the edge.
            let _ = write!(
                out,
                "<svg x=\"100%\" y=\"{y:.1}\"><path d=\"M0 0l-8-5v10z\"><title>{} {unit}</title></path></svg>",
                ms(time)
            );
        } else {
            let _ = write!(out, "<circle cx=\"{x:.2}%\" cy=\"{y:.1}\" r=\"3.5\"/>");
        }
    }
    out.push_str("</g>");
    line(out, "median", scale.at(all.median), 0, HEIGHT);
    out.push_str("</svg>");
}

/// The phases' durations one after the other.
pub(super) fn stack(out: &mut String, scale: Scale, steps: &[(Phase, f64)], clock: Clock) {
    const HEIGHT: u32 = 30;
    let unit = clock.unit();
    let mut alt = String::new();
    for (phase, step) in steps {
        let _ = write!(alt, "{} {} {unit}, ", phase.label(), ms(*step));
    }
    open(out, HEIGHT, alt.trim_end_matches(", "));
    scale.grid(out, HEIGHT);
    let mut from = 0.0;
    for &(phase, step) in steps {
        let (x, to) = (scale.at(from), scale.at(from + step));
        let _ = write!(
            out,
            "<rect x=\"{x:.3}%\" y=\"2\" width=\"{:.3}%\" height=\"26\" style=\"fill:var(--{})\"><title>{} {} {unit}</title></rect>",
            to - x,
            phase_key(phase),
            phase.label(),
            ms(step)
        );
        // The background between two, so that they part without their colours.
        if from > 0.0 {
            let _ = write!(
                out,
                "<rect x=\"{x:.3}%\" y=\"2\" width=\"1\" height=\"26\" style=\"fill:var(--bg)\"/>"
            );
        }
        from += step;
    }
    out.push_str("</svg>");
}

/// The ratio and its interval beside no change and the threshold.
pub(super) fn interval(out: &mut String, comparison: &Comparison) {
    let contrast = &comparison.headline.contrast;
    let (ratio, ends) = (contrast.ratio, contrast.ratio_interval);
    let limit = 1.0 + comparison.threshold;
    if !ends.high.is_finite() {
        return;
    }
    let scale = Scale::around(ends.low.min(1.0), ends.high.max(limit), 1e-9);
    let alt = format!(
        "The ratio changed by {}, between {} and {} at 95 %; the threshold is {}",
        percent(ratio),
        percent(ends.low),
        percent(ends.high),
        threshold(comparison.threshold)
    );
    open(out, 62, &alt);
    let (one, at_limit) = (scale.at(1.0), scale.at(limit));
    line(out, "one", one, 18, 46);
    label(out, one, 60, "no change");
    if comparison.threshold > 0.0 {
        line(out, "limit", at_limit, 18, 46);
        // Above, because both may be close together.
        label(
            out,
            at_limit,
            12,
            &format!("limit +{}", threshold(comparison.threshold)),
        );
    }
    let (low, at, high) = (scale.at(ends.low), scale.at(ratio), scale.at(ends.high));
    let _ = write!(
        out,
        "<rect class=\"ci\" x=\"{low:.2}%\" y=\"29\" width=\"{:.2}%\" height=\"6\" rx=\"3\" fill-opacity=\".45\"/><circle class=\"ci\" cx=\"{at:.2}%\" cy=\"32\" r=\"6\"/></svg>",
        high - low
    );
}
