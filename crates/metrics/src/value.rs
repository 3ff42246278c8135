//! The kinds of values.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How often something happened, or how many bytes. A line of JSON tells the difference to the line before.
#[derive(Debug, Default)]
pub struct Counter {
    total: AtomicU64,
    /// What of it was told in JSON.
    told: AtomicU64,
}

impl Counter {
    /// 0.
    pub const fn new() -> Self {
        Self {
            total: AtomicU64::new(0),
            told: AtomicU64::new(0),
        }
    }

    /// Once more.
    #[inline]
    pub fn inc(&self) {
        self.add(1);
    }

    /// `count` more.
    #[inline]
    pub fn add(&self, count: u64) {
        self.total.fetch_add(count, Relaxed);
    }

    /// All since the process began, told or not.
    pub fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    pub(crate) fn untold(&self, total: u64) -> u64 {
        total.saturating_sub(self.told.load(Relaxed))
    }

    pub(crate) fn tell(&self, total: u64) {
        self.told.store(total, Relaxed);
    }
}

/// A number that is told as it is, each time.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// It is `value` from now on.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How long something took the last time, told in microseconds, each time.
#[derive(Debug, Default)]
pub struct Micros(AtomicU64);

impl Micros {
    /// 0: it did not happen yet.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// It took so long.
    pub fn set(&self, took: Duration) {
        self.set_us(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// It took so many microseconds.
    pub fn set_us(&self, us: u64) {
        self.0.store(us, Relaxed);
    }

    /// In microseconds.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How long something takes that happens often: shortest, longest and all together. Kept in nanoseconds, so that what takes
/// less than a microsecond adds up all the same.
#[derive(Debug)]
pub struct Latency {
    count: AtomicU64,
    sum_ns: Counter,
    min_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self::new()
    }
}

impl Latency {
    /// It did not happen yet.
    pub const fn new() -> Self {
        Self {
            count: AtomicU64::new(0),
            sum_ns: Counter::new(),
            min_ns: AtomicU64::new(u64::MAX),
            max_ns: AtomicU64::new(0),
        }
    }

    /// It took so long this time.
    #[inline]
    pub fn record(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Relaxed);
        self.sum_ns.add(ns);
        // Both are rare after the first few.
        if ns < self.min_ns.load(Relaxed) {
            self.min_ns.fetch_min(ns, Relaxed);
        }
        if ns > self.max_ns.load(Relaxed) {
            self.max_ns.fetch_max(ns, Relaxed);
        }
    }

    /// How often it was recorded.
    pub fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    pub(crate) fn read(&self) -> Latencies {
        let sum_ns = self.sum_ns.total();
        Latencies {
            count: self.count(),
            sum_ns,
            told_ns: sum_ns - self.sum_ns.untold(sum_ns),
            min_ns: self.min_ns.load(Relaxed),
            max_ns: self.max_ns.load(Relaxed),
        }
    }

    pub(crate) fn tell(&self, sum_ns: u64) {
        self.sum_ns.tell(sum_ns);
    }
}

/// What a [`Latency`] was at some time, or several together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latencies {
    pub count: u64,
    pub sum_ns: u64,
    /// What of the sum was told in JSON.
    pub told_ns: u64,
    /// The largest number: none was recorded.
    pub min_ns: u64,
    pub max_ns: u64,
}

impl Latencies {
    pub(crate) fn add(&mut self, other: &Self) {
        self.count = self.count.wrapping_add(other.count);
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.told_ns = self.told_ns.wrapping_add(other.told_ns);
        self.min_ns = self.min_ns.min(other.min_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// What of the sum is new, in whole microseconds of the sums: what is cut off one time is in the next.
    pub(crate) fn untold_us(&self) -> u64 {
        (self.sum_ns / 1000).saturating_sub(self.told_ns / 1000)
    }

    /// 0 where none was recorded.
    pub(crate) fn shortest_ns(&self) -> u64 {
        if self.min_ns == u64::MAX {
            0
        } else {
            self.min_ns
        }
    }
}
