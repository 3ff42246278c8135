//! A guest's console as it comes: marks in its lines, and its last ones.

use regex_lite::Regex;
use std::collections::VecDeque;

/// Longer lines are looked at in pieces. The guest is hostile.
const MOST_LINE: usize = 4096;
/// Lines that are told of a run that failed.
const LAST_LINES: usize = 20;
/// Bytes that are kept of a console that is to be parsed: a profile has thousands of lines.
const MOST_KEPT: usize = 8 << 20;

/// What the console line of an init is that can write to no port.
pub const INIT_SAYS: &str = "husk: init marks";
/// What Firecracker logs when its boot timer is written to.
const BOOT_TIMER: &str = "Guest-boot-time =";

/// What to look for.
pub struct Marks(Option<Regex>);

impl Marks {
    /// Lines that match `mark`, or those that are known.
    pub fn new(mark: Option<Regex>) -> Self {
        Self(mark)
    }

    /// The user has chosen.
    pub fn is_chosen(&self) -> bool {
        self.0.is_some()
    }

    fn is_mark(&self, line: &str) -> bool {
        match &self.0 {
            Some(mark) => mark.is_match(line),
            None => line.contains(INIT_SAYS) || line.contains(BOOT_TIMER),
        }
    }
}

/// Linux's `Run /init as init process`, which it says before each attempt.
fn hands_over(line: &str) -> bool {
    line.find("Run ")
        .is_some_and(|at| line[at..].contains(" as init process"))
}

/// What a piece of console showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// The mark.
    pub mark: bool,
    /// The kernel hands over to init.
    pub hands_over: bool,
}

/// The console of one run.
#[derive(Default)]
pub struct Console {
    line: Vec<u8>,
    last: VecDeque<String>,
    kept: Vec<u8>,
}

impl Console {
    /// Take `bytes`.
    pub fn take(&mut self, bytes: &[u8], marks: &Marks) -> Shown {
        let room = MOST_KEPT.saturating_sub(self.kept.len());
        self.kept.extend(bytes.iter().take(room));
        let mut shown = Shown::default();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= MOST_LINE {
                self.look(marks, &mut shown);
                self.end_line();
            }
        }
        // A prompt ends in no newline.
        self.look(marks, &mut shown);
        shown
    }

    fn look(&self, marks: &Marks, shown: &mut Shown) {
        if !self.line.is_empty() {
            let line = String::from_utf8_lossy(&self.line);
            shown.mark |= marks.is_mark(&line);
            shown.hands_over |= hands_over(&line);
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        let line = line.trim_end_matches('\r');
        if !line.is_empty() {
            if self.last.len() >= LAST_LINES {
                self.last.pop_front();
            }
            self.last.push_back(line.to_owned());
        }
        self.line.clear();
    }

    /// The last lines.
    pub fn last_lines(mut self) -> Vec<String> {
        self.end_line();
        self.last.into()
    }

    /// The last line that is not empty.
    pub fn last_line(&self) -> Option<&str> {
        self.last.back().map(String::as_str)
    }

    /// All of it, as far as it is kept.
    pub fn kept(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_in_lines_that_come_in_pieces() {
        let marks = Marks::new(Some(Regex::new("login: $").unwrap()));
        let mut console = Console::default();
        assert_eq!(console.take(b"debian lo", &marks), Shown::default());
        assert!(console.take(b"gin: ", &marks).mark);
        let mut console = Console::default();
        let shown = console.take(b"[    0.1] Run /init as init process\r\nx", &marks);
        assert!(shown.hands_over && !shown.mark);
    }

    #[test]
    fn without_a_choice_the_known_ones_count() {
        let marks = Marks::new(None);
        let mut console = Console::default();
        assert!(!console.take(b"login: ", &marks).mark);
        let log = b"2026 [anonymous-instance:main] Guest-boot-time =  12345 us 12 ms\n";
        assert!(console.take(log, &marks).mark);
    }

    #[test]
    fn a_flood_is_bounded_and_its_end_is_kept() {
        let marks = Marks::new(None);
        let mut console = Console::default();
        for _ in 0..3000 {
            console.take(&[0xff; 4000], &marks);
        }
        for number in 0..100 {
            console.take(format!("line {number}\r\n").as_bytes(), &marks);
        }
        assert!(console.kept().len() <= MOST_KEPT);
        let last = console.last_lines();
        assert_eq!(last.len(), LAST_LINES);
        assert_eq!(last.last().unwrap(), "line 99");
    }
}
