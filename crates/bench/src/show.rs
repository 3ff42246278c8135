//! Numbers and foreign text as a person reads them, in a terminal and in HTML alike.

use crate::{Clock, Phase};

impl Clock {
    /// As in the file.
    pub fn label(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Virtual => "virtual",
        }
    }

    /// The unit of what [`ms`] writes. Virtual milliseconds are never passed off as real ones.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Real => "ms",
            Self::Virtual => "virtual ms",
        }
    }
}

/// Nanoseconds in milliseconds, without the unit.
pub(crate) fn ms(ns: f64) -> String {
    let ms = ns / 1e6;
    match ms.abs() {
        to if !to.is_finite() => "∞".into(),
        to if to < 9.9995 => format!("{ms:.3}"),
        to if to < 99.995 => format!("{ms:.2}"),
        _ => format!("{ms:.1}"),
    }
}

/// A ratio as a change: `+3.1 %`.
pub(crate) fn percent(ratio: f64) -> String {
    let change = (ratio - 1.0) * 100.0;
    match change.abs() {
        to if !to.is_finite() => "∞".into(),
        // The virtual clock resolves what this shows.
        to if to > 0.0 && to < 0.0995 => format!("{change:+.3} %"),
        to if to >= 99.5 => format!("{change:+.0} %"),
        _ => format!("{change:+.1} %"),
    }
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
pub(crate) fn plain(text: &str) -> String {
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
