//! Numbers and foreign text as a person reads them, in a terminal and in HTML alike.

use crate::stats::Interval;
use crate::{Clock, Phase, Report};

impl Clock {
    /// As in the file.
    pub fn label(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Virtual => "virtual",
        }
    }

    /// A line for who may not know; of the real clock none.
    pub(crate) fn note(self) -> &'static str {
        match self {
            Self::Real => "",
            Self::Virtual => {
                "The clock is virtual: it counts instructions, and a million are a virtual ms.\n"
            }
        }
    }

    /// The unit of what [`ms`] writes. Virtual milliseconds are never passed off as real ones.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Real => "ms",
            Self::Virtual => "virtual ms",
        }
    }
}

impl Report {
    /// A line for who takes it for whole; of one that is whole none.
    pub(crate) fn note(&self) -> &'static str {
        match self.interrupted {
            true => "Interrupted: there are fewer runs than were asked for.\n",
            false => "",
        }
    }
}

/// Nanoseconds in milliseconds, without the unit.
pub(crate) fn ms(ns: f64) -> String {
    let ms = ns / 1e6;
    let decimals = match ms.abs() {
        to if !to.is_finite() => return "∞".into(),
        to if to < 9.9995 => 3,
        to if to < 99.995 => 2,
        _ => 1,
    };
    format!("{ms:.decimals$}")
}

/// A ratio as a change: `+3.1 %`.
pub(crate) fn percent(ratio: f64) -> String {
    let change = (ratio - 1.0) * 100.0;
    let decimals = match change.abs() {
        to if !to.is_finite() => return "∞".into(),
        // The virtual clock resolves what this shows.
        to if to > 0.0 && to < 0.0995 => 3,
        to if to < 99.5 => 1,
        _ => 0,
    };
    format!("{change:+.decimals$} %")
}

/// A threshold: `5 %`, `0.5 %`.
pub(crate) fn threshold(threshold: f64) -> String {
    let percent = threshold * 100.0;
    format!("{} %", (percent * 1000.0).round() / 1000.0)
}

/// A count with its thousands apart.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// `spawn → mark`.
pub(crate) fn step(from: Option<Phase>, to: Phase) -> String {
    format!("{} → {}", from.map_or("spawn", Phase::label), to.label())
}

/// One line of foreign text, with nothing in it that a terminal or a browser acts upon: control characters, and those that
/// turn the direction of writing, become `·`. Bounded.
pub fn plain(text: &str) -> String {
    const MAX: usize = 2000;
    let acts = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let shown = text
        .chars()
        .take(MAX)
        .map(|c| if acts(c) { '·' } else { c });
    let mut plain: String = shown.collect();
    if text.chars().nth(MAX).is_some() {
        plain.push('…');
    }
    plain
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
