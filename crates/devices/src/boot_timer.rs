//! Firecracker's boot timer: a register by which guest software says that it is up.

use crate::{GuestEvent, GuestEvents};
use husk_bus::BusDevice;
use rustix::time::{ClockId, clock_gettime};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Size of the registers in bytes.
pub const SIZE: u64 = 0x1000;
/// What the guest writes, as one byte, to the first register when it is up.
const BOOTED: u8 = 123;
/// The mark that init sets when it starts.
const MARK_INIT: u8 = 1;

/// Wall-clock time and processor time of this process.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    wall: Instant,
    cpu: Duration,
}

impl Times {
    /// Now.
    pub fn now() -> Self {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        Self {
            wall: Instant::now(),
            cpu: Duration::try_from(cpu).unwrap_or_default(),
        }
    }
}

/// The register. The first time that the guest writes to it is logged, in Firecracker's words, and is a boot mark.
pub struct BootTimer {
    start: Times,
    events: Arc<dyn GuestEvents>,
    booted: AtomicBool,
}

impl BootTimer {
    /// Times count from `start`; the mark is reported to `events`.
    pub fn new(start: Times, events: Arc<dyn GuestEvents>) -> Self {
        Self {
            start,
            events,
            booted: AtomicBool::new(false),
        }
    }

    fn booted(&self) {
        if self.booted.swap(true, Ordering::AcqRel) {
            return;
        }
        let now = Times::now();
        let wall = now.wall.saturating_duration_since(self.start.wall);
        let cpu = now.cpu.saturating_sub(self.start.cpu);
        log::info!("{}", line(wall, cpu));
        self.events.event(GuestEvent::Mark(MARK_INIT));
    }
}

/// Programs look for this line in the log.
fn line(wall: Duration, cpu: Duration) -> String {
    format!(
        "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
        wall.as_micros(),
        wall.as_millis(),
        cpu.as_micros(),
        cpu.as_millis()
    )
}

impl BusDevice for BootTimer {
    /// Reads tell nothing.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data) == (0, &[BOOTED]) {
            self.booted();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Recorder;

    #[test]
    fn one_byte_says_that_the_guest_is_up_and_only_once() {
        let events = Arc::new(Recorder::default());
        let timer = BootTimer::new(Times::now(), events.clone());
        timer.write(0, &[122]);
        timer.write(1, &[BOOTED]);
        timer.write(0, &[BOOTED, 0]);
        timer.write(0, &[]);
        assert!(events.0.lock().unwrap().is_empty());
        for _ in 0..100 {
            timer.write(0, &[BOOTED]);
        }
        assert_eq!(*events.0.lock().unwrap(), [GuestEvent::Mark(1)]);
    }

    #[test]
    fn the_line_is_firecrackers() {
        let (wall, cpu) = (Duration::from_micros(12_345), Duration::from_micros(6_789));
        let wanted = "Guest-boot-time =  12345 us 12 ms,   6789 CPU us 6 CPU ms";
        assert_eq!(line(wall, cpu), wanted);
    }
}
