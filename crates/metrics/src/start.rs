//! How long the process took to start, by what its parent says.

use crate::sections::METRICS;
use rustix::time::{ClockId, clock_gettime};

/// Set `api_server.process_startup_time_us` and `process_startup_time_cpu_us`, now that the process serves requests. All in
/// microseconds: when the process was started, on CLOCK_MONOTONIC; the processor time that it had used before this program
/// was executed, on CLOCK_PROCESS_CPUTIME_ID; the processor time that its parent had spent on it. What is not given is not
/// told of.
pub fn start_times(
    start_time_us: Option<u64>,
    start_time_cpu_us: Option<u64>,
    parent_cpu_time_us: Option<u64>,
) {
    if let Some(start) = start_time_us {
        let took = now_us(ClockId::Monotonic).saturating_sub(start);
        METRICS.api_server.process_startup_time_us.set_us(took);
    }
    if let Some(start) = start_time_cpu_us {
        let own = now_us(ClockId::ProcessCPUTime).saturating_sub(start);
        let took = own.saturating_add(parent_cpu_time_us.unwrap_or(0));
        METRICS.api_server.process_startup_time_cpu_us.set_us(took);
    }
}

fn now_us(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000) + nanos / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_times_are_since_what_the_parent_says() {
        let api = &METRICS.api_server;
        start_times(None, None, Some(7));
        assert_eq!(api.process_startup_time_us.get(), 0);
        let now = now_us(ClockId::Monotonic);
        start_times(Some(now - 5_000_000), Some(0), Some(3_000_000));
        let took = api.process_startup_time_us.get();
        assert!((5_000_000..65_000_000).contains(&took), "{took}");
        assert!(api.process_startup_time_cpu_us.get() >= 3_000_000);
        // A parent that is wrong does no harm.
        start_times(Some(u64::MAX), Some(u64::MAX), Some(u64::MAX));
        assert_eq!(api.process_startup_time_us.get(), 0);
    }
}
