//! The controller of the PCI bus's slots: which devices came, which shall go, and which the guest has let go.
//!
//! The guest's side is AML (`husk-arch`'s DSDT): a Generic Event Device's event has it read the first two registers, and a slot's
//! `_EJ0` writes the third.

use crate::ports_of;
use husk_bus::BusDevice;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Number of I/O ports: three registers of 32 bits, a bit for each slot.
pub const PORTS: u64 = 12;
/// Slots with a device that came; reading clears them.
pub const CAME: u64 = 0;
/// Slots with a device that shall go; reading clears them.
pub const SHALL_GO: u64 = 4;
/// Slots that the guest lets go.
pub const EJECT: u64 = 8;

/// The registers.
pub struct PciHotplug {
    came: AtomicU32,
    shall_go: AtomicU32,
    /// Asked to go and not let go yet.
    going: AtomicU32,
    /// Let go, and not taken yet.
    gone: AtomicU32,
    wake: Arc<dyn Fn() + Send + Sync>,
}

/// What a snapshot holds of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    came: u32,
    shall_go: u32,
    going: u32,
    gone: u32,
}

impl PciHotplug {
    /// What a snapshot must hold. No vCPU may run meanwhile.
    pub fn state(&self) -> State {
        State {
            came: self.came.load(Ordering::Acquire),
            shall_go: self.shall_go.load(Ordering::Acquire),
            going: self.going.load(Ordering::Acquire),
            gone: self.gone.load(Ordering::Acquire),
        }
    }

    /// Take over what [`PciHotplug::state`] told.
    pub fn restore(&self, state: State) {
        self.came.store(state.came, Ordering::Release);
        self.shall_go.store(state.shall_go, Ordering::Release);
        self.going.store(state.going, Ordering::Release);
        self.gone.store(state.gone, Ordering::Release);
        if state.gone != 0 {
            (self.wake)();
        }
    }

    /// `wake` is called on a vCPU thread when the guest has let a device go; it must not block.
    pub fn new(wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self {
            came: AtomicU32::new(0),
            shall_go: AtomicU32::new(0),
            going: AtomicU32::new(0),
            gone: AtomicU32::new(0),
            wake,
        }
    }

    /// There is a new device in `slot`. The event has to follow.
    pub fn came(&self, slot: u8) {
        self.came.fetch_or(bit(slot), Ordering::AcqRel);
    }

    /// The guest is to let the device in `slot` go. The event has to follow; asked again, the guest is told again.
    pub fn ask_to_go(&self, slot: u8) {
        self.going.fetch_or(bit(slot), Ordering::AcqRel);
        self.shall_go.fetch_or(bit(slot), Ordering::AcqRel);
    }

    /// The guest has been asked and has not let go.
    pub fn is_going(&self, slot: u8) -> bool {
        self.going.load(Ordering::Acquire) & bit(slot) != 0
    }

    /// The slots that the guest has let go since the last call.
    pub fn take_gone(&self) -> impl Iterator<Item = u8> {
        let gone = self.gone.swap(0, Ordering::AcqRel);
        (0..32).filter(move |&slot| gone & bit(slot) != 0)
    }

    /// A guest can take a device out of its own use at any time, but not out of the machine: only one that shall go goes.
    fn eject(&self, slots: u32) {
        let asked = self.going.fetch_and(!slots, Ordering::AcqRel) & slots;
        if asked != 0 {
            self.shall_go.fetch_and(!asked, Ordering::AcqRel);
            self.came.fetch_and(!asked, Ordering::AcqRel);
            self.gone.fetch_or(asked, Ordering::AcqRel);
            (self.wake)();
        }
    }
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

impl BusDevice for PciHotplug {
    /// The first two registers clear when they are read as a whole; parts of a register read as 0.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let register = match offset {
            CAME => &self.came,
            SHALL_GO => &self.shall_go,
            _ => return,
        };
        if let Some(value) = data.first_chunk_mut::<4>() {
            *value = register.swap(0, Ordering::AcqRel).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut slots = [0; 4];
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            let byte = port
                .checked_sub(EJECT)
                .and_then(|byte| slots.get_mut(byte as usize));
            if let (Some(byte), Some(value)) = (byte, data.get(at)) {
                *byte = *value;
            }
        }
        self.eject(u32::from_le_bytes(slots));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (PciHotplug, Arc<AtomicU32>) {
        let wakes = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&wakes);
        let wake = move || {
            counted.fetch_add(1, Ordering::SeqCst);
        };
        (PciHotplug::new(Arc::new(wake)), wakes)
    }

    fn read(controller: &PciHotplug, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        controller.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn gone(controller: &PciHotplug) -> Vec<u8> {
        controller.take_gone().collect()
    }

    #[test]
    fn the_guest_reads_each_change_once() {
        let (controller, _) = controller();
        controller.came(3);
        controller.came(31);
        controller.ask_to_go(1);
        assert_eq!(read(&controller, CAME), 1 << 3 | 1 << 31);
        assert_eq!(read(&controller, CAME), 0);
        assert_eq!(read(&controller, SHALL_GO), 1 << 1);
        assert_eq!(read(&controller, SHALL_GO), 0);
        controller.ask_to_go(1);
        assert_eq!(read(&controller, SHALL_GO), 1 << 1, "asked again");
        assert!(controller.is_going(1));
    }

    #[test]
    fn a_device_goes_when_the_guest_lets_it_go_and_only_one_that_shall() {
        let (controller, wakes) = controller();
        controller.write(EJECT, &(1u32 << 2).to_le_bytes());
        assert_eq!(
            (gone(&controller), wakes.load(Ordering::SeqCst)),
            (vec![], 0)
        );
        controller.ask_to_go(2);
        controller.write(EJECT, &u32::MAX.to_le_bytes());
        assert_eq!(
            (gone(&controller), wakes.load(Ordering::SeqCst)),
            (vec![2], 1)
        );
        assert!(!controller.is_going(2));
        controller.write(EJECT, &u32::MAX.to_le_bytes());
        assert_eq!(
            (gone(&controller), wakes.load(Ordering::SeqCst)),
            (vec![], 1)
        );
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let (controller, _) = controller();
        controller.came(1);
        controller.ask_to_go(9);
        for offset in [1, 5, 9, 11, 12, u64::MAX] {
            controller.read(offset, &mut [0; 8]);
            controller.write(offset, &[]);
        }
        for offset in [CAME, SHALL_GO] {
            controller.read(offset, &mut [0; 2]);
            controller.write(offset, &[0xff; 4]);
        }
        assert_eq!(read(&controller, CAME), 2);
        assert!(controller.is_going(9));
        // Byte by byte.
        controller.write(EJECT + 1, &[2]);
        assert_eq!(gone(&controller), [9]);
    }
}
