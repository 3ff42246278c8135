//! Which pages of a memory file a diff has.

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Most runs. More of them are made fewer by taking the pages between in, so that a state stays below its largest size.
const MOST_RUNS: usize = 1 << 21;

/// Runs of pages, in ascending order and never overlapping, whatever they were made of.
///
/// As text: for each run how many pages lie between it and the one before, and, if it is not one page alone, `+` and how many
/// follow the first; in hexadecimal, with commas between the runs. `10+f,1` is pages 16 to 31, and 33.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages(Vec<Run>);

/// Pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page's number.
    pub first: u64,
    /// How many they are, at least one.
    pub count: u64,
}

impl Run {
    /// The number behind the last one's.
    pub fn end(&self) -> u64 {
        self.first + self.count
    }
}

impl Pages {
    /// Those whose bits are set in regions that lie one behind the other: the bits, lowest first, and how many pages there are.
    pub fn of_bits<'a>(regions: impl IntoIterator<Item = (&'a [u64], u64)>) -> Self {
        let mut pages = Self::default();
        let mut before = 0;
        for (words, size) in regions {
            for (&word, start) in words.iter().zip((0..size).step_by(64)) {
                let mut rest = word;
                while rest != 0 {
                    let skip = u64::from(rest.trailing_zeros());
                    let count = u64::from((rest >> skip).trailing_ones());
                    let first = start + skip;
                    pages.push(Run {
                        first: before + first,
                        count: count.min(size.saturating_sub(first)),
                    });
                    // 64 at once would be shifted too far.
                    rest &= u64::MAX.checked_shl((skip + count) as u32).unwrap_or(0);
                }
            }
            before += size;
        }
        pages.limit(MOST_RUNS)
    }

    /// Add a run behind all others, or one that touches or overlaps the last.
    fn push(&mut self, run: Run) {
        match self.0.last_mut().filter(|last| run.first <= last.end()) {
            _ if run.count == 0 => {}
            Some(last) => last.count = run.end().max(last.end()) - last.first,
            None => self.0.push(run),
        }
    }

    /// The first half of them, and the others.
    pub fn halves(&self) -> (Self, Self) {
        let (mut first, mut second) = (Self::default(), Self::default());
        let mut left = self.count() / 2;
        for &Run { first: at, count } in &self.0 {
            let here = count.min(left);
            left -= here;
            first.push(Run {
                first: at,
                count: here,
            });
            second.push(Run {
                first: at + here,
                count: count - here,
            });
        }
        (first, second)
    }

    /// At most so many runs, and more pages where there were more.
    fn limit(mut self, most: usize) -> Self {
        let mut gap = 1;
        while self.0.len() > most {
            let runs = std::mem::take(&mut self.0);
            for run in runs {
                match self
                    .0
                    .last_mut()
                    .filter(|last| run.first - last.end() <= gap)
                {
                    Some(last) => last.count = run.end() - last.first,
                    None => self.0.push(run),
                }
            }
            gap *= 2;
        }
        self
    }

    /// These and others.
    pub fn and(&self, others: &Self) -> Self {
        let mut runs: Vec<Run> = self.0.iter().chain(&others.0).copied().collect();
        runs.sort_unstable_by_key(|run| run.first);
        let mut all = Self::default();
        runs.into_iter().for_each(|run| all.push(run));
        all.limit(MOST_RUNS)
    }

    /// The runs.
    pub fn runs(&self) -> &[Run] {
        &self.0
    }

    /// How many pages they are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|run| run.count).sum()
    }

    /// The number behind the last page's.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, Run::end)
    }

    /// As text.
    pub fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        let mut end = 0;
        for run in &self.0 {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{comma}{:x}", run.first - end);
            if run.count > 1 {
                let _ = write!(text, "+{:x}", run.count - 1);
            }
            end = run.end();
        }
        text
    }

    /// From text; None when it is none of these, or speaks of a page behind 2^52 of them, or has more runs than any that was written:
    /// each takes eight times the memory of its text.
    pub fn of_text(text: &str) -> Option<Self> {
        let number = |digits: &str| {
            // No sign.
            let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            u64::from_str_radix(digits, 16).ok().filter(|_| plain)
        };
        let mut pages = Self::default();
        let mut end = 0u64;
        for run in text.split(',').filter(|_| !text.is_empty()) {
            let (gap, more) = run.split_once('+').unwrap_or((run, "0"));
            let first = end.checked_add(number(gap)?)?;
            let count = number(more)?.checked_add(1)?;
            end = first.checked_add(count).filter(|&end| end <= 1 << 52)?;
            pages.push(Run { first, count });
            if pages.0.len() > MOST_RUNS {
                return None;
            }
        }
        Some(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(runs: &[(u64, u64)]) -> Pages {
        let run = |&(first, count)| Run { first, count };
        Pages(runs.iter().map(run).collect())
    }

    #[test]
    fn bits_become_runs_across_words_and_regions() {
        let all = u64::MAX;
        let low = [all, 0b0110, all << 62];
        let high = [all, 1];
        let found = Pages::of_bits([(&low[..], 192), (&high[..], 65)]);
        assert_eq!(found, pages(&[(0, 64), (65, 2), (190, 67)]));
        assert_eq!((found.count(), found.end()), (133, 257));
        // What is set behind the end is nothing.
        assert_eq!(Pages::of_bits([(&[all][..], 10)]), pages(&[(0, 10)]));
        assert_eq!(Pages::of_bits([(&[all << 10, 1][..], 10)]), pages(&[]));
    }

    #[test]
    fn halves_are_all_of_it_and_nothing_twice() {
        for (all, first, second) in [
            (&[][..], &[][..], &[][..]),
            (&[(7, 1)], &[], &[(7, 1)]),
            (&[(0, 10)], &[(0, 5)], &[(5, 5)]),
            (
                &[(1, 2), (5, 6), (20, 1)],
                &[(1, 2), (5, 2)],
                &[(7, 4), (20, 1)],
            ),
            (&[(1, 3), (9, 3)], &[(1, 3)], &[(9, 3)]),
        ] {
            assert_eq!(pages(all).halves(), (pages(first), pages(second)));
        }
    }

    #[test]
    fn text_goes_there_and_back() {
        for (runs, text) in [
            (&[][..], ""),
            (&[(0, 1)], "0"),
            (&[(16, 16), (33, 1)], "10+f,1"),
            (&[(1, 1), (3, 1), (5, 1 << 40)], "1,1,1+ffffffffff"),
        ] {
            assert_eq!(pages(runs).to_text(), text);
            assert_eq!(Pages::of_text(text), Some(pages(runs)));
        }
        assert_eq!(Pages::of_text("1,0,0+3"), Some(pages(&[(1, 6)])));
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            ",",
            "1,",
            ",1",
            "x",
            "-1",
            "+1",
            "1+",
            "1++1",
            "1+-1",
            " 1",
            "1 ",
            "é",
            "1;2",
            "ffffffffffffffff",
            "1,ffffffffffffffff",
            "0+ffffffffffffffff",
            "10000000000000000",
            "1+10000000000000",
            "8000000000000,8000000000000",
        ] {
            assert_eq!(Pages::of_text(text), None, "{text:?}");
        }
    }

    #[test]
    fn no_more_runs_are_read_than_are_written() {
        let most = "1,".repeat(MOST_RUNS);
        let most = most.trim_end_matches(',');
        assert_eq!(Pages::of_text(most).unwrap().runs().len(), MOST_RUNS);
        assert_eq!(Pages::of_text(&format!("{most},1")), None);
        // Those that touch are one.
        let one = Pages::of_text(&format!("{most},0,0+5")).unwrap();
        assert_eq!(one.runs().len(), MOST_RUNS);
    }

    #[test]
    fn lists_are_joined() {
        let (a, b) = (pages(&[(0, 2), (10, 5)]), pages(&[(1, 4), (8, 2), (30, 1)]));
        let both = pages(&[(0, 5), (8, 7), (30, 1)]);
        assert_eq!(a.and(&b), both);
        assert_eq!(b.and(&a), both);
        assert_eq!(a.and(&pages(&[])), a);
        assert_eq!(a.and(&pages(&[(11, 1)])), a);
    }

    #[test]
    fn too_many_runs_take_in_what_lies_between() {
        let scattered: Vec<(u64, u64)> = (0..100).map(|n| (n * 4, 1)).collect();
        let fewer = pages(&scattered).limit(60);
        assert!(fewer.0.len() <= 60, "{fewer:?}");
        for (page, _) in scattered {
            let has = |run: &Run| run.first <= page && page < run.end();
            assert!(fewer.0.iter().any(has), "{page}");
        }
        let few = pages(&[(0, 1), (9, 1)]);
        assert_eq!(few.clone().limit(2), few);
        assert_eq!(few.limit(1), pages(&[(0, 10)]));
    }
}
