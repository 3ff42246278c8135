//! Token buckets: how many bytes and operations a device may do in a time.
//!
//! A device asks before each operation ([`RateLimiter::consume`]) and waits, when refused, for a timer that it watches as one of
//! its sources. A bucket holds its rate in the long run; an operation that costs more than the bucket holds goes ahead when
//! the bucket is full, and the rest is a debt that later operations wait for.

use husk_config::TokenBucket;
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

const NANOSECONDS_PER_MILLISECOND: u64 = 1_000_000;
/// Shorter waits than this would be more timer than work. A tenth of the shortest refill time, so that no bucket runs over
/// meanwhile.
const SHORTEST_WAIT: Duration = Duration::from_micros(100);
/// A wait that no one sees the end of; the timer does not take any number.
const LONGEST_WAIT: Duration = Duration::from_secs(1 << 30);

/// Why a limiter cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// timerfd_create.
    #[error(
        "a timer for a rate limiter cannot be made; more file descriptors may have to be allowed"
    )]
    Timer(#[source] std::io::Error),
}

/// Limits on bytes and on operations, each of which may be absent.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: Buckets,
    timer: OwnedFd,
    /// Tokens ran out, and the timer is set for when there are enough.
    waiting: bool,
}

impl RateLimiter {
    /// With full buckets; `None` limits nothing, until [`RateLimiter::update`]. Fails when the host has no more descriptors.
    pub fn new(limits: Option<husk_config::RateLimiter>) -> Result<Self, Error> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        );
        let mut buckets = Buckets::default();
        buckets.update(limits.unwrap_or_default(), now());
        Ok(Self {
            buckets,
            timer: timer.map_err(|e| Error::Timer(e.into()))?,
            waiting: false,
        })
    }

    /// Take the tokens for `ops` operations with `bytes` bytes together, if there are enough of both kinds. If not, nothing is
    /// taken, the answer is false, and [`RateLimiter::source`] becomes readable when it is worth asking again. Until then the
    /// answer stays false, whatever is asked for, so that what costs little does not overtake for ever what costs much.
    pub fn consume(&mut self, ops: u64, bytes: u64) -> bool {
        if self.buckets.are_unlimited() {
            return true;
        }
        if self.waiting {
            return false;
        }
        match self.buckets.consume(ops, bytes, now()) {
            Ok(()) => true,
            Err(wait) => {
                self.waiting = self.set_timer(wait.clamp(SHORTEST_WAIT, LONGEST_WAIT));
                // Without a timer nobody would ask again: better too fast than never.
                !self.waiting
            }
        }
    }

    /// What to watch for input; see [`RateLimiter::timer_fired`]. The same from first to last.
    pub fn source(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// The source was reported readable. True when tokens have come in and the device should go on with what it put off.
    pub fn timer_fired(&mut self) -> bool {
        let mut expirations = [0; 8];
        if rustix::io::read(&self.timer, &mut expirations).is_err() {
            return false; // not readable: an old event
        }
        self.waiting = false;
        true
    }

    /// Change the limits that `limits` has; one of size or time 0 is lifted. A changed bucket is full. A device that waits is
    /// woken through the source.
    pub fn update(&mut self, limits: husk_config::RateLimiter) {
        self.buckets.update(limits, now());
        if self.waiting {
            self.waiting = self.set_timer(Duration::from_nanos(1));
        }
    }

    /// Whether the timer was set.
    fn set_timer(&self, wait: Duration) -> bool {
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let time = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: wait.as_secs() as i64,
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time)
            .inspect_err(|e| log::debug!("a rate limiter's timer cannot be set: {e}"))
            .is_ok()
    }
}

/// A token bucket for which nobody waits: what it does not allow is not done.
#[derive(Debug, Default)]
pub struct Allowance(Buckets);

impl Allowance {
    /// With this limit; None: all is allowed.
    pub fn new(limit: Option<TokenBucket>) -> Self {
        let mut buckets = Buckets::default();
        let bandwidth = limit;
        let ops = None;
        buckets.update(husk_config::RateLimiter { bandwidth, ops }, now());
        Self(buckets)
    }

    /// Take `tokens`, or none of them: false.
    pub fn take(&mut self, tokens: u64) -> bool {
        self.0.are_unlimited() || self.0.consume(0, tokens, now()).is_ok()
    }
}

/// Nanoseconds of the monotonic clock.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    (time.tv_sec as u64)
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec as u64)
}

/// The limiter without clock and timer.
#[derive(Debug, Default)]
struct Buckets {
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

impl Buckets {
    fn are_unlimited(&self) -> bool {
        self.bytes.is_none() && self.ops.is_none()
    }

    fn update(&mut self, limits: husk_config::RateLimiter, now: u64) {
        if let Some(limit) = limits.bandwidth {
            self.bytes = Bucket::new(limit, now);
        }
        if let Some(limit) = limits.ops {
            self.ops = Bucket::new(limit, now);
        }
    }

    /// Take from both buckets or from none; then the time until there is enough in both.
    fn consume(&mut self, ops: u64, bytes: u64, now: u64) -> Result<(), Duration> {
        let mut wait = None;
        for (bucket, cost) in [(&mut self.ops, ops), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait_for(cost));
            }
        }
        if let Some(wait) = wait {
            return Err(wait);
        }
        for (bucket, cost) in [(&mut self.ops, ops), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
        Ok(())
    }
}

/// One bucket. It counts in parts of a token, of which `size` flow in each nanosecond, so that nothing is lost to rounding.
#[derive(Debug)]
struct Bucket {
    /// Parts that flow in each nanosecond: tokens of the whole bucket.
    size: u64,
    /// Parts of one token: nanoseconds in which the bucket fills.
    parts: u64,
    /// Parts that are there; negative for a debt.
    level: i128,
    /// Tokens that are there once, in addition, taken first.
    burst: u64,
    /// When `level` was right.
    at: u64,
}

impl Bucket {
    /// A full bucket; `None` when it limits nothing.
    fn new(limit: TokenBucket, now: u64) -> Option<Self> {
        if limit.size == 0 || limit.refill_time == 0 {
            return None;
        }
        let mut bucket = Self {
            size: limit.size,
            parts: limit
                .refill_time
                .saturating_mul(NANOSECONDS_PER_MILLISECOND),
            level: 0,
            burst: limit.one_time_burst.unwrap_or(0),
            at: now,
        };
        bucket.level = bucket.full();
        Some(bucket)
    }

    fn full(&self) -> i128 {
        i128::from(self.size).saturating_mul(self.parts.into())
    }

    fn refill(&mut self, now: u64) {
        let gone = now.saturating_sub(self.at);
        let flown = i128::from(gone).saturating_mul(self.size.into());
        self.level = self.level.saturating_add(flown).min(self.full());
        self.at = now;
    }

    /// How long until `cost` tokens may be taken; `None`: now.
    fn wait_for(&self, cost: u64) -> Option<Duration> {
        let cost = self.parts_of(cost.saturating_sub(self.burst));
        let missing = cost.min(self.full()).saturating_sub(self.level);
        if cost == 0 || missing <= 0 {
            return None;
        }
        let size = i128::from(self.size);
        let nanoseconds = missing / size + i128::from(missing % size != 0);
        let nanoseconds = u64::try_from(nanoseconds).unwrap_or(u64::MAX);
        Some(Duration::from_nanos(nanoseconds))
    }

    fn take(&mut self, cost: u64) {
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        let cost = self.parts_of(cost - from_burst);
        self.level = self.level.saturating_sub(cost);
    }

    fn parts_of(&self, tokens: u64) -> i128 {
        i128::from(tokens).saturating_mul(self.parts.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = NANOSECONDS_PER_MILLISECOND;

    fn bucket(size: u64, refill_time: u64, burst: Option<u64>) -> Option<TokenBucket> {
        Some(TokenBucket {
            size,
            refill_time,
            one_time_burst: burst,
        })
    }

    fn buckets(bandwidth: Option<TokenBucket>, ops: Option<TokenBucket>) -> Buckets {
        let mut buckets = Buckets::default();
        buckets.update(husk_config::RateLimiter { bandwidth, ops }, 0);
        buckets
    }

    /// A device that always wants more: how much of `cost` each it gets in `end` ns when it sleeps as it is told, and `late` ns
    /// longer.
    fn hungry(buckets: &mut Buckets, cost: u64, end: u64, late: u64) -> u64 {
        let (mut now, mut taken) = (0, 0);
        while now < end {
            match buckets.consume(1, cost, now) {
                Ok(()) => taken += cost,
                Err(wait) => now += wait.max(SHORTEST_WAIT).as_nanos() as u64 + late,
            }
        }
        taken
    }

    #[test]
    fn a_rate_is_held_whatever_the_size_of_requests_and_however_late_the_timer() {
        let second = 1000 * MS;
        for (size, refill) in [(1 << 20, 100), (10 << 20, 1000), (3_333, 7), (1 << 40, 50)] {
            for parts in [1, 3, 10, 100] {
                for late in [0, 50_000] {
                    let mut buckets = buckets(bucket(size, refill, None), None);
                    let cost = (size / parts).max(1);
                    let taken = hungry(&mut buckets, cost, 20 * second, late);
                    let wanted = u128::from(size) * 20_000 / u128::from(refill);
                    // What is in the bucket at first, and the last request, come on top.
                    let most = wanted * 101 / 100 + 2 * u128::from(size);
                    let least = wanted * 9 / 10;
                    assert!(
                        (least..=most).contains(&taken.into()),
                        "{taken} of {size} each {refill} ms by {cost}, {late} ns late"
                    );
                }
            }
        }
    }

    #[test]
    fn operations_are_limited_too_and_the_scarcer_of_both_decides() {
        let mut both = buckets(bucket(1 << 30, 100, None), bucket(10, 1000, None));
        let taken = hungry(&mut both, 4096, 10_000 * MS, 0);
        assert!((100..=111).contains(&(taken / 4096)), "{taken}");
    }

    #[test]
    fn nothing_is_taken_from_one_bucket_when_the_other_is_empty() {
        let mut both = buckets(bucket(1000, 1000, None), bucket(1, 1000, None));
        assert!(both.consume(1, 500, 0).is_ok());
        assert!(both.consume(1, 500, 0).is_err());
        assert!(both.consume(0, 500, 0).is_ok());
        assert!(both.consume(0, 1, 0).is_err());
    }

    #[test]
    fn a_request_larger_than_the_bucket_waits_until_it_is_full_and_leaves_a_debt() {
        let mut bytes = buckets(bucket(1000, 100, None), None);
        assert!(bytes.consume(1, 1, 0).is_ok());
        let wait = bytes.consume(1, 5000, 0).unwrap_err();
        assert_eq!(wait, Duration::from_nanos(MS / 10));
        assert!(bytes.consume(1, 5000, MS / 10).is_ok());
        // 4000 tokens of debt, and one more, at 10 tokens a millisecond.
        let wait = bytes.consume(1, 1, MS / 10).unwrap_err();
        assert_eq!(wait, Duration::from_nanos(400 * MS + MS / 10));
    }

    #[test]
    fn a_burst_is_there_once() {
        let mut bytes = buckets(bucket(1000, 100, Some(5000)), None);
        assert!(bytes.consume(1, 5500, 0).is_ok());
        assert!(bytes.consume(1, 500, 0).is_ok());
        assert!(bytes.consume(1, 1, 0).is_err());
        assert!(bytes.consume(1, 1000, 1_000_000 * MS).is_ok());
        assert!(bytes.consume(1, 1, 1_000_000 * MS).is_err());
    }

    #[test]
    fn a_bucket_never_holds_more_than_its_size_and_time_never_runs_backwards() {
        let mut bytes = buckets(bucket(1000, 100, None), None);
        assert!(bytes.consume(1, 1000, u64::MAX).is_ok());
        assert!(bytes.consume(1, 1, 5).is_err());
    }

    #[test]
    fn an_allowance_refuses_what_is_too_much() {
        let mut allowance = Allowance::new(bucket(10, 3_600_000, Some(5)));
        assert!(allowance.take(12));
        assert!(!allowance.take(10));
        assert!(allowance.take(3));
        assert!(!allowance.take(1));
        let mut all = Allowance::new(None);
        assert!(all.take(u64::MAX) && all.take(u64::MAX));
    }

    #[test]
    fn any_number_is_taken() {
        for size in [1, u64::MAX] {
            for refill in [1, u64::MAX] {
                let mut all = buckets(bucket(size, refill, Some(7)), bucket(size, refill, None));
                let mut now = 0;
                for cost in [0, 1, u64::MAX, 1, u64::MAX] {
                    let _ = all.consume(cost, cost, now);
                    now = now.wrapping_add(u64::MAX / 3);
                }
            }
        }
    }

    #[test]
    fn zero_lifts_a_limit_and_what_is_absent_stays() {
        let limits = husk_config::RateLimiter {
            bandwidth: bucket(10, 10, None),
            ops: bucket(10, 10, None),
        };
        let mut all = buckets(limits.bandwidth, limits.ops);
        let mut lift = husk_config::RateLimiter {
            bandwidth: bucket(0, 10, None),
            ops: None,
        };
        all.update(lift, 0);
        assert!(all.bytes.is_none() && all.ops.is_some());
        lift.ops = bucket(10, 0, None);
        all.update(lift, 0);
        assert!(all.are_unlimited());
    }

    #[test]
    fn the_timer_wakes_who_waits_and_an_update_does_at_once() {
        let limits = husk_config::RateLimiter {
            bandwidth: bucket(100, 5, None),
            ops: None,
        };
        let mut limiter = RateLimiter::new(Some(limits)).unwrap();
        let readable = |limiter: &RateLimiter| {
            let mut fds = [rustix::event::PollFd::new(
                &limiter.timer,
                rustix::event::PollFlags::IN,
            )];
            let limit = Timespec {
                tv_sec: 30,
                tv_nsec: 0,
            };
            rustix::event::poll(&mut fds, Some(&limit)).unwrap() == 1
        };
        assert!(!limiter.timer_fired(), "nobody waits");
        assert!(limiter.consume(1, 100));
        assert!(!limiter.consume(1, 100));
        assert!(!limiter.consume(1, 0), "what costs nothing overtakes");
        assert!(readable(&limiter));
        assert!(limiter.timer_fired());
        assert!(limiter.consume(1, 90));

        let slow = husk_config::RateLimiter {
            bandwidth: bucket(1, 1_000_000_000, None),
            ops: None,
        };
        limiter.update(slow);
        assert!(limiter.consume(1, 1));
        assert!(!limiter.consume(1, 1));
        limiter.update(limits);
        assert!(readable(&limiter));
        assert!(limiter.timer_fired());
        assert!(limiter.consume(1, 1));
    }
}
