//! The i8042 keyboard controller, as far as it resets the machine.

use crate::{GuestEvent, GuestEvents, ports_of};
use husk_bus::BusDevice;
use husk_metrics::{I8042Metrics, METRICS};
use std::sync::Arc;

/// Number of I/O ports, from 0x60.
pub const PORTS: u64 = 5;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4; // write; read: status

/// Pulse the output lines given by bits 0..3, active low: with bit 0 clear, the CPU's reset line.
const PULSE_OUTPUTS: u8 = 0xf0;
const RESET_LINE: u8 = 1;

/// Output buffer full, input buffer empty, for ever. A driver that waits before it writes a command (Linux's
/// `kb_wait` before a reset) goes on at once, and one that drains the output buffer to look for a
/// controller (Linux's `i8042_flush`) gives up after 16 bytes, where an empty buffer would make it wait half
/// a second for an answer.
const STATUS: u8 = 1;

/// System control port B with the timer's output high and no memory or bus error. Where KVM's timer answers
/// at this port the access never gets here; where there is none, a guest that waits for the timer's output
/// (Linux's TSC calibration has no other end) must not wait for ever.
const PORT_B_VALUE: u8 = 0x20;

/// A keyboard controller without a keyboard: `0xfe` to its command port resets the machine.
pub struct I8042 {
    events: Arc<dyn GuestEvents>,
    metrics: &'static I8042Metrics,
}

impl I8042 {
    /// A controller that reports [`GuestEvent::Reset`] to `events`.
    pub fn new(events: Arc<dyn GuestEvents>) -> Self {
        Self {
            events,
            metrics: &METRICS.i8042,
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            let value = match port {
                DATA => 0,
                PORT_B => PORT_B_VALUE,
                COMMAND => STATUS,
                _ => {
                    self.metrics.missed_read_count.inc();
                    continue;
                }
            };
            self.metrics.read_count.inc();
            if let Some(byte) = data.get_mut(at) {
                *byte = value;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            let command = data.get(at).copied().unwrap_or_default();
            match port {
                DATA | PORT_B => {}
                COMMAND if command & PULSE_OUTPUTS == PULSE_OUTPUTS => {
                    if command & RESET_LINE == 0 {
                        self.metrics.reset_count.inc();
                        self.events.event(GuestEvent::Reset);
                    }
                }
                _ => {
                    self.metrics.missed_write_count.inc();
                    continue;
                }
            }
            self.metrics.write_count.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Recorder;

    fn read(device: &I8042, offset: u64) -> u8 {
        let mut data = [0xff];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn the_reset_command_resets_and_nothing_else_does() {
        let events = Arc::new(Recorder::default());
        let device = I8042::new(events.clone());
        for value in [0x20, 0x60, 0xd1, 0xff, 0xf1] {
            device.write(COMMAND, &[value]);
        }
        device.write(DATA, &[0xfe]);
        device.write(PORT_B, &[0xfe]);
        device.write(5, &[0xfe]);
        device.write(u64::MAX, &[0xfe; 8]);
        assert!(events.0.lock().unwrap().is_empty());
        device.write(COMMAND, &[0xfe]);
        assert_eq!(*events.0.lock().unwrap(), [GuestEvent::Reset]);
    }

    #[test]
    fn linux_may_send_a_command_at_once_and_soon_finds_no_controller() {
        let device = I8042::new(Arc::new(Recorder::default()));
        assert_eq!(
            read(&device, COMMAND) & 2,
            0,
            "kb_wait: the input buffer is empty"
        );
        let drained = (0..17)
            .take_while(|_| read(&device, COMMAND) & 1 != 0)
            .count();
        assert_eq!(
            drained, 17,
            "i8042_flush: more than 16 bytes is no controller"
        );
    }

    #[test]
    fn a_guest_that_waits_for_the_timer_output_does_not_hang() {
        let device = I8042::new(Arc::new(Recorder::default()));
        assert_ne!(read(&device, PORT_B) & 0x20, 0);
    }

    #[test]
    fn what_is_not_there_is_counted() {
        let m: &I8042Metrics = Box::leak(Box::default());
        let counts = || {
            [
                m.missed_read_count.total(),
                m.missed_write_count.total(),
                m.write_count.total(),
                m.reset_count.total(),
            ]
        };
        let device = I8042 {
            metrics: m,
            ..I8042::new(Arc::new(Recorder::default()))
        };
        read(&device, 2);
        for (port, byte) in [(2, 0), (COMMAND, 0xd1), (DATA, 0), (COMMAND, 0xfe)] {
            device.write(port, &[byte]);
        }
        assert_eq!(counts(), [1, 2, 2, 1]);
    }
}
