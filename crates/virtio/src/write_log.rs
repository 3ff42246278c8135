//! Which pages of guest memory the monitor has written: KVM notes the guest's writes, and nobody else's.

use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: u64 = 4096;

/// A bit for each page of guest memory. Devices set them, on whatever thread they are; who makes snapshots adds what KVM has noted,
/// and takes all of them while nobody writes.
#[derive(Debug)]
pub struct WriteLog {
    regions: Vec<Region>,
}

#[derive(Debug)]
struct Region {
    start: u64,
    pages: u64,
    /// The page with the lowest address is bit 0 of the first.
    words: Vec<AtomicU64>,
}

impl WriteLog {
    /// For memory that consists of these regions: guest-physical address and bytes, multiples of 4 KiB.
    pub fn new(regions: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let region = |(start, size): (u64, u64)| Region {
            start,
            pages: size / PAGE,
            words: (0..(size / PAGE).div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
        };
        Self {
            regions: regions.into_iter().map(region).collect(),
        }
    }

    /// `length` bytes at guest-physical `address` have been, or are about to be, written. What is not memory is left out.
    pub fn note(&self, address: u64, length: u64) {
        let end = address.saturating_add(length);
        for region in &self.regions {
            let first = address.max(region.start).saturating_sub(region.start) / PAGE;
            let behind = end
                .saturating_sub(region.start)
                .div_ceil(PAGE)
                .min(region.pages);
            for page in first..behind {
                if let Some(word) = region.words.get((page / 64) as usize) {
                    let bit = 1 << (page % 64);
                    // Mostly it is set already, and then no other processor loses its copy of the line.
                    if word.load(Ordering::Relaxed) & bit == 0 {
                        word.fetch_or(bit, Ordering::Relaxed);
                    }
                }
            }
        }
    }

    /// Set bits of a region, by its number, as KVM's log has them.
    pub fn add(&self, region: usize, bits: &[u64]) {
        if let Some(region) = self.regions.get(region) {
            for (word, bits) in region.words.iter().zip(bits) {
                word.fetch_or(*bits, Ordering::Relaxed);
            }
        }
    }

    /// The bits of all regions.
    pub fn bits(&self) -> Vec<Vec<u64>> {
        self.each(|word| word.load(Ordering::Relaxed))
    }

    /// The same, and none of them is set any more.
    pub fn take(&self) -> Vec<Vec<u64>> {
        self.each(|word| word.swap(0, Ordering::Relaxed))
    }

    fn each(&self, value: impl Fn(&AtomicU64) -> u64) -> Vec<Vec<u64>> {
        let words = |region: &Region| region.words.iter().map(&value).collect();
        self.regions.iter().map(words).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 70 pages at 0, and three at 4 GiB.
    fn log() -> WriteLog {
        WriteLog::new([(0, 70 * PAGE), (1 << 32, 3 * PAGE)])
    }

    #[test]
    fn pages_that_are_touched_are_noted() {
        let log = log();
        log.note(PAGE - 1, 2);
        log.note(63 * PAGE, PAGE + 1);
        log.note((1 << 32) + PAGE, 1);
        let noted = [vec![0b11 | 1 << 63, 1], vec![0b10]];
        assert_eq!(log.bits(), noted);
        assert_eq!(log.take(), noted);
        assert_eq!(log.bits(), [vec![0, 0], vec![0]]);
        log.add(1, &[0b100, 7]);
        log.add(2, &[1]);
        assert_eq!(log.bits(), [vec![0, 0], vec![0b100]]);
    }

    #[test]
    fn what_is_no_memory_is_left_out() {
        let log = log();
        log.note(70 * PAGE, PAGE);
        log.note(u64::MAX, u64::MAX);
        log.note((1 << 32) - 1, 1);
        log.note(PAGE, 0);
        log.note((1 << 32) + 3 * PAGE, 5 * PAGE);
        assert_eq!(log.bits(), [vec![0, 0], vec![0]]);
        // What begins outside and ends inside, and the other way round.
        log.note((1 << 32) - 1, 2);
        log.note(69 * PAGE, 1 << 20);
        assert_eq!(log.bits(), [vec![0, 1 << 5], vec![1]]);
    }
}
