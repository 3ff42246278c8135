//! Sleep, reset and event registers of a hardware-reduced ACPI platform, and the boot mark.

use crate::{GuestEvent, GuestEvents, ports_of, pulse};
use husk_bus::BusDevice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// Number of I/O ports.
pub const PORTS: u64 = 5;
/// SLEEP_CONTROL_REG (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u64 = 0;
/// SLEEP_STATUS_REG (ACPI 6.5, 4.8.3.7).
pub const SLEEP_STATUS: u64 = 1;
/// RESET_REG (ACPI 6.5, 4.8.3.6): [`RESET_VALUE`] resets.
pub const RESET: u64 = 2;
/// Pending events: reading returns and clears them.
pub const EVENTS: u64 = 3;
/// Boot mark.
pub const MARK: u64 = 4;
/// Value for [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Bit of [`EVENTS`]: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;

/// Bit of [`EVENTS`]: a device came to the PCI bus, or shall go.
pub const EVENT_PCI: u8 = 2;
/// Bit of [`EVENTS`]: the VM generation ID is a new one.
pub const EVENT_GENERATION: u8 = 4;

const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The five registers.
pub struct PowerPorts {
    events: Arc<dyn GuestEvents>,
    irq: EventFd,
    pending: AtomicU8,
}

impl PowerPorts {
    /// Registers that report to `events`; `irq` is the Generic Event Device's line (edge).
    pub fn new(irq: EventFd, events: Arc<dyn GuestEvents>) -> Self {
        Self {
            events,
            irq,
            pending: AtomicU8::new(0),
        }
    }

    /// Press the ACPI power button. A guest that has not taken an earlier press sees one.
    pub fn press_power_button(&self) {
        self.pending.fetch_or(EVENT_POWER_BUTTON, Ordering::AcqRel);
        pulse(&self.irq);
    }

    /// Have the guest look at the PCI bus's slots ([`crate::pci_hotplug`]).
    pub fn notify_pci(&self) {
        self.pending.fetch_or(EVENT_PCI, Ordering::AcqRel);
        pulse(&self.irq);
    }

    /// Have the guest look at the VM generation ID.
    pub fn notify_generation(&self) {
        self.pending.fetch_or(EVENT_GENERATION, Ordering::AcqRel);
        pulse(&self.irq);
    }

    /// Interrupt again for events that the guest has not taken: an edge that came before its driver was there is lost. For
    /// whoever can wait.
    pub fn remind(&self) {
        if self.pending.load(Ordering::Acquire) != 0 {
            pulse(&self.irq);
        }
    }

    /// The guest has not taken the last press. An edge that came before its driver was there is lost: press again until
    /// this is false.
    pub fn is_press_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire) & EVENT_POWER_BUTTON != 0
    }

    /// Events that the guest has not taken, for a snapshot.
    pub fn pending(&self) -> u8 {
        self.pending.load(Ordering::Acquire)
    }

    /// Put back what [`PowerPorts::pending`] told. Its interrupt is in the state of the interrupt controllers.
    pub fn restore(&self, pending: u8) {
        let known = EVENT_POWER_BUTTON | EVENT_PCI | EVENT_GENERATION;
        self.pending.store(pending & known, Ordering::Release);
    }

    fn sleep(&self, value: u8) {
        if value & SLEEP_ENABLE == 0 {
            return;
        }
        match (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK {
            SLEEP_TYPE_S5 => self.events.event(GuestEvent::PowerOff),
            // Not louder: the guest may ask as often as it likes.
            other => log::debug!("the guest asks for sleep type {other}, which there is not"),
        }
    }
}

impl BusDevice for PowerPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            if let Some(byte) = data.get_mut(at) {
                *byte = match port {
                    EVENTS => self.pending.swap(0, Ordering::AcqRel),
                    _ => 0,
                };
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            let value = data.get(at).copied().unwrap_or_default();
            match port {
                SLEEP_CONTROL => self.sleep(value),
                RESET if value == RESET_VALUE => self.events.event(GuestEvent::Reset),
                MARK => self.events.event(GuestEvent::Mark(value)),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{Recorder, irq};

    fn ports() -> (PowerPorts, Arc<Recorder>, EventFd) {
        let events = Arc::new(Recorder::default());
        let (device_end, line) = irq();
        (PowerPorts::new(device_end, events.clone()), events, line)
    }

    fn read(ports: &PowerPorts, offset: u64) -> u8 {
        let mut data = [0xff];
        ports.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let (ports, events, _) = ports();
        for value in 0..=u8::MAX {
            let s5 = value & 0b11_1100 == 0b11_0100;
            ports.write(SLEEP_CONTROL, &[value]);
            assert_eq!(
                events.0.lock().unwrap().pop(),
                s5.then_some(GuestEvent::PowerOff)
            );
        }
    }

    #[test]
    fn a_press_waits_until_the_guest_has_taken_it() {
        let (ports, _, line) = ports();
        assert!(!ports.is_press_pending());
        ports.press_power_button();
        ports.press_power_button();
        assert!(ports.is_press_pending());
        assert_eq!(line.read().unwrap(), 2);
        assert_eq!(read(&ports, EVENTS), EVENT_POWER_BUTTON);
        assert!(!ports.is_press_pending());
        assert_eq!(read(&ports, EVENTS), 0);
    }

    #[test]
    fn the_guest_is_reminded_of_what_it_has_not_taken() {
        let (ports, _, line) = ports();
        ports.remind();
        assert!(line.read().is_err());
        ports.notify_pci();
        assert!(!ports.is_press_pending());
        ports.press_power_button();
        ports.remind();
        assert_eq!(line.read().unwrap(), 3);
        assert_eq!(read(&ports, EVENTS), EVENT_POWER_BUTTON | EVENT_PCI);
        ports.notify_generation();
        assert!(!ports.is_press_pending());
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&ports, EVENTS), EVENT_GENERATION);
        ports.remind();
        assert!(line.read().is_err());
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (ports, events, _) = ports();
        for value in [0, 2, 0xff] {
            ports.write(RESET, &[value]);
        }
        ports.write(SLEEP_STATUS, &[0x80]);
        ports.write(EVENTS, &[1]);
        ports.write(5, &[1]);
        assert!(events.0.lock().unwrap().is_empty());
        ports.write(RESET, &[RESET_VALUE]);
        assert_eq!(*events.0.lock().unwrap(), [GuestEvent::Reset]);
    }

    #[test]
    fn a_press_interrupts_and_is_read_once() {
        let (ports, _, line) = ports();
        assert_eq!(read(&ports, EVENTS), 0);
        ports.press_power_button();
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(read(&ports, SLEEP_STATUS), 0);
        assert_eq!(read(&ports, EVENTS), EVENT_POWER_BUTTON);
        assert_eq!(read(&ports, EVENTS), 0);
    }

    #[test]
    fn a_mark_is_passed_on() {
        let (ports, events, _) = ports();
        ports.write(MARK, &[123]);
        assert_eq!(*events.0.lock().unwrap(), [GuestEvent::Mark(123)]);
    }
}
