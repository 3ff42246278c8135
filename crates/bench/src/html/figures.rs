//! Drawings. Positions along the width are percentages, so that a drawing fits a phone without its text shrinking.

use super::Page;
use crate::Clock;
use crate::compare::Comparison;
use crate::show::{ms, percent, threshold};
use crate::stats::Summary;
use crate::tables::Series;

/// More dots than this tell the eye nothing more.
const DOTS: usize = 400;

/// A linear scale from values to percentages of the width.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    low: f64,
    high: f64,
}

/// A percentage of the width.
pub(super) fn place(percent: f64) -> String {
    format!("{percent:.2}%")
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
    fn grid(self, page: &mut Page) {
        for tick in self.ticks().0 {
            line(page, "grid", self.at(tick), "0", "100%");
        }
    }

    /// The numbers below, in milliseconds.
    pub(super) fn axis(self, page: &mut Page) {
        page.put(&["<svg height=18 aria-hidden=true>"]);
        let (ticks, decimals) = self.ticks();
        for tick in ticks {
            label(
                page,
                self.at(tick),
                "13",
                &format!("{:.decimals$}", tick / 1e6),
            );
        }
        page.put(&["</svg>"]);
    }
}

fn line(page: &mut Page, class: &str, x: f64, from: &str, to: &str) {
    let x = place(x);
    page.put(&[
        "<line class=",
        class,
        " x1=",
        &x,
        " x2=",
        &x,
        " y1=",
        from,
        " y2=",
        to,
        "></line>",
    ]);
}

fn label(page: &mut Page, x: f64, y: &str, text: &str) {
    let anchor = match x {
        x if x < 8.0 => "start",
        x if x > 92.0 => "end",
        _ => "middle",
    };
    page.put(&[
        "<text x=",
        &place(x),
        " y=",
        y,
        " text-anchor=",
        anchor,
        ">",
        text,
        "</text>",
    ]);
}

/// A rectangle, closed, with what it shows as a tip.
fn rect(page: &mut Page, [from, to]: [f64; 2], attributes: &str, tip: &str) {
    page.put(&[
        "<rect x=",
        &place(from),
        " width=",
        &place(to - from),
        " ",
        attributes,
        ">",
    ]);
    page.element("title", tip);
    page.put(&["</rect>"]);
}

/// Opens a drawing that a screen reader tells of by `alt`.
fn open(page: &mut Page, height: &str, alt: &str) {
    page.put(&["<svg role=img height=", height, " aria-label=\""]);
    page.esc(alt);
    page.put(&["\">"]);
}

/// Each run a dot, the first at the top; the median and its interval.
pub(super) fn strip(page: &mut Page, scale: Scale, times: &[u64], all: &Summary, clock: Clock) {
    let unit = clock.unit();
    let (min, max, median) = (ms(all.min), ms(all.max), ms(all.median));
    let alt = format!(
        "{} runs from {min} to {max} {unit}, median {median} {unit}",
        all.runs
    );
    open(page, "72", &alt);
    scale.grid(page);
    if all.interval.high.is_finite() {
        let ends = [all.interval.low, all.interval.high].map(|end| scale.at(end));
        rect(page, ends, "class=band height=100%", "");
    }
    page.put(&["<g class=dots>"]);
    let every = times.len().div_ceil(DOTS).max(1);
    let room = 60.0 / (times.len().max(2) - 1) as f64;
    for (run, &time) in times.iter().enumerate().step_by(every) {
        let y = format!("{:.1}", 6.0 + run as f64 * room);
        let time = time as f64;
        if time > scale.high {
            page.put(&["<svg x=100% y=", &y, "><path d=\"M0 0l-8-5v10z\">"]);
            page.element("title", &format!("{} {unit}", ms(time)));
            page.put(&["</path></svg>"]);
        } else {
            page.put(&[
                "<circle cx=",
                &place(scale.at(time)),
                " cy=",
                &y,
                " r=3.5></circle>",
            ]);
        }
    }
    page.put(&["</g>"]);
    line(page, "median", scale.at(all.median), "0", "100%");
    page.put(&["</svg>"]);
}

/// The phases' durations one after the other.
pub(super) fn stack(page: &mut Page, scale: Scale, one: &Series) {
    let tips: Vec<String> = one
        .points
        .iter()
        .map(|point| format!("{} {}", point.phase.label(), ms(point.step)))
        .collect();
    open(
        page,
        "30",
        &format!("{} in {}", tips.join(", "), one.clock.unit()),
    );
    scale.grid(page);
    let mut from = 0.0;
    for (point, tip) in one.points.iter().zip(&tips) {
        let ends = [from, from + point.step].map(|end| scale.at(end));
        let attributes = [
            "y=2 height=26 style=\"fill:var(--",
            point.phase.key(),
            ")\"",
        ]
        .concat();
        rect(page, ends, &attributes, tip);
        // The background between two, so that they part without their colours.
        if from > 0.0 {
            line(page, "gap", ends[0], "2", "28");
        }
        from += point.step;
    }
    page.put(&["</svg>"]);
}

/// The ratio and its interval beside no change and the threshold.
pub(super) fn interval(page: &mut Page, comparison: &Comparison) {
    let contrast = &comparison.headline.contrast;
    let (ratio, ends) = (contrast.ratio, contrast.ratio_interval);
    let limit = 1.0 + comparison.threshold;
    if !ends.high.is_finite() {
        return;
    }
    let scale = Scale::around(ends.low.min(1.0), ends.high.max(limit), 1e-9);
    let allowed = format!("limit +{}", threshold(comparison.threshold));
    let (change, low, high) = (percent(ratio), percent(ends.low), percent(ends.high));
    open(
        page,
        "62",
        &format!("a change of {change}, from {low} to {high}, {allowed}"),
    );
    line(page, "one", scale.at(1.0), "18", "46");
    label(page, scale.at(1.0), "60", "no change");
    if comparison.threshold > 0.0 {
        line(page, "limit", scale.at(limit), "18", "46");
        // Above, because both may be close together.
        label(page, scale.at(limit), "12", &allowed);
    }
    rect(
        page,
        [ends.low, ends.high].map(|end| scale.at(end)),
        "class=ci y=29 height=6 rx=3 fill-opacity=.45",
        "",
    );
    page.put(&[
        "<circle class=ci cx=",
        &place(scale.at(ratio)),
        " cy=32 r=6></circle></svg>",
    ]);
}
