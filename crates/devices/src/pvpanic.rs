//! pvpanic: how a guest's kernel says that it has panicked (QEMU's `docs/specs/pvpanic`).

use crate::{GuestEvent, GuestEvents};
use husk_bus::BusDevice;
use std::sync::Arc;

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// The one-byte pvpanic device.
pub struct PvPanic {
    events: Arc<dyn GuestEvents>,
}

impl PvPanic {
    /// A device that reports [`GuestEvent::Panicked`] and [`GuestEvent::CrashLoaded`] to `events`.
    pub fn new(events: Arc<dyn GuestEvents>) -> Self {
        Self { events }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Some(byte)) = (offset, data.first_mut()) {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (0, Some(value)) = (offset, data.first()) else {
            return;
        };
        // A crash kernel is news only while the panic has not been reported as final.
        if value & PANICKED != 0 {
            self.events.event(GuestEvent::Panicked);
        } else if value & CRASH_LOADED != 0 {
            self.events.event(GuestEvent::CrashLoaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Recorder;

    #[test]
    fn a_panic_and_a_loaded_crash_kernel_are_told_apart() {
        let events = Arc::new(Recorder::default());
        let device = PvPanic::new(events.clone());
        let mut supported = [0xff];
        device.read(0, &mut supported);
        assert_eq!(supported, [3]);
        for value in [0, 4, 2, 1] {
            device.write(0, &[value]);
        }
        device.write(1, &[1]);
        assert_eq!(
            *events.0.lock().unwrap(),
            [GuestEvent::CrashLoaded, GuestEvent::Panicked]
        );
    }
}
