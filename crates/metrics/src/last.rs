//! The line of a process that dies in a signal's handler: what [`crate::json`] makes, without an allocation, and without
//! waiting for a lock. Not core::fmt either: a handler's stack is small.

use crate::family::{Family, Naming};
use crate::section::{Metric, Section};
use crate::sections::Metrics;
use crate::snapshot::Reading;

/// Append a line to `bytes`, as far as they have room without growing; false when that was not enough.
pub(crate) fn line(utc_timestamp_ms: u64, metrics: &'static Metrics, bytes: &mut Vec<u8>) -> bool {
    let mut out = Out {
        bytes,
        first: true,
        is_full: false,
    };
    out.open();
    out.key("utc_timestamp_ms", None);
    out.number(utc_timestamp_ms);
    metrics.each(&mut |name, section| section.tell(name, &mut out));
    out.close();
    out.text("\n");
    !out.is_full
}

/// What can be told in such a line: a section of [`Metrics`].
pub(crate) trait Last {
    fn tell(&self, name: &str, out: &mut Out<'_>);
}

impl<T: Section> Last for T {
    fn tell(&self, name: &str, out: &mut Out<'_>) {
        out.key(name, None);
        out.section(self);
    }
}

impl<T: Section + Default + 'static> Last for Family<T> {
    fn tell(&self, name: &str, out: &mut Out<'_>) {
        self.with_all_at_once(|members| {
            if let Naming::Listed(_) = self.naming() {
                for (id, own) in members {
                    out.key(name, Some(id));
                    out.section(own.as_ref());
                }
            }
            out.key(name, None);
            out.open();
            let mut index = 0;
            T::default().visit(&mut |field, _, metric| {
                let mut sum = Reading::of(metric);
                // There is no room for all sums at a time, and time enough to look for each one's parts.
                for (_, own) in members {
                    if let Some(part) = reading_at(own.as_ref(), index) {
                        sum.add(&part);
                    }
                }
                index += 1;
                out.key(field, None);
                out.reading(&sum);
            });
            out.close();
        });
    }
}

fn reading_at(section: &dyn Section, index: usize) -> Option<Reading> {
    let (mut left, mut found) = (index, None);
    section.visit(&mut |_, _, metric| {
        if left == 0 && found.is_none() {
            found = Some(Reading::of(metric));
        }
        left = left.saturating_sub(1);
    });
    found
}

/// A line that is being made.
pub(crate) struct Out<'a> {
    bytes: &'a mut Vec<u8>,
    /// Nothing is in the innermost object yet.
    first: bool,
    /// Something had no room.
    is_full: bool,
}

impl Out<'_> {
    fn text(&mut self, text: &str) {
        let room = self.bytes.capacity() - self.bytes.len();
        if self.is_full || text.len() > room {
            self.is_full = true;
        } else {
            self.bytes.extend_from_slice(text.as_bytes());
        }
    }

    fn number(&mut self, number: u64) {
        let (mut digits, mut rest) = ([b'0'; 20], number);
        let mut start = digits.len();
        for (at, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
            start = at;
            if rest == 0 {
                break;
            }
        }
        let digits = digits.get(start..).unwrap_or_default();
        self.text(std::str::from_utf8(digits).unwrap_or_default());
    }

    fn open(&mut self) {
        self.text("{");
        self.first = true;
    }

    fn close(&mut self) {
        self.text("}");
        self.first = false;
    }

    /// The next one's name, with a device's where it is one.
    fn key(&mut self, name: &str, id: Option<&str>) {
        if !std::mem::take(&mut self.first) {
            self.text(",");
        }
        self.text("\"");
        self.text(name);
        if let Some(id) = id {
            self.text("_");
            for part in id.split_inclusive(needs_escape) {
                let plain = part.trim_end_matches(needs_escape);
                self.text(plain);
                for byte in part.bytes().skip(plain.len()) {
                    let digit = |four: u8| char::from_digit(four.into(), 16).unwrap_or('0');
                    let mut place = [0; 4];
                    self.text("\\u00");
                    self.text(digit(byte >> 4).encode_utf8(&mut place));
                    self.text(digit(byte & 15).encode_utf8(&mut place));
                }
            }
        }
        self.text("\":");
    }

    fn section(&mut self, section: &dyn Section) {
        self.open();
        section.visit(&mut |name, _, metric: Metric<'_>| {
            self.key(name, None);
            self.reading(&Reading::of(metric));
        });
        self.close();
    }

    fn reading(&mut self, reading: &Reading) {
        match reading {
            Reading::Counter { untold, .. } => self.number(*untold),
            Reading::Gauge(value) | Reading::Micros(value) => self.number(*value),
            Reading::Latency(all) => {
                self.open();
                for (name, us) in [
                    ("min_us", all.shortest_ns() / 1000),
                    ("max_us", all.max_ns / 1000),
                    ("sum_us", all.untold_us()),
                ] {
                    self.key(name, None);
                    self.number(us);
                }
                self.close();
            }
        }
    }
}

/// Characters that JSON has no place for in a string; all are one byte.
fn needs_escape(character: char) -> bool {
    character < ' ' || matches!(character, '"' | '\\')
}
