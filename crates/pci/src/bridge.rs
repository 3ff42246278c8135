//! The host bridge: bus 0 with its functions, their configuration spaces (ECAM), and the window in which BARs answer.

use crate::{ConfigSpace, Error, Identity};
use husk_bus::BusDevice;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Functions on the bus, the host bridge among them: function 0 of each device number.
pub const MAX_FUNCTIONS: usize = 32;

/// One function of a device. As a [`BusDevice`] it is its BAR, with offsets from the BAR's start.
///
/// Configuration accesses come one at a time for the whole bus, from vCPU threads.
pub trait Function: BusDevice {
    /// Its configuration space. Never locked while the function calls the bridge.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// Fill `data` from configuration space at `offset`, below 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        lock(self.config()).read(offset, data);
    }

    /// The guest wrote to configuration space at `offset`, below 4096.
    fn write_config(&self, offset: u16, data: &[u8]) {
        lock(self.config()).write(offset, data);
    }
}

/// Whoever has registered addresses in a function's BAR elsewhere: doorbells with KVM.
pub trait Relocate: Send + Sync {
    /// The BAR was at `from` (None: nothing is registered) and is at `to` (None: take back what is registered). Turning
    /// memory decoding off alone is not told: doorbells may ring until something else takes the place. Called on a vCPU
    /// thread, or in [`HostBridge::add`], with the bus locked: do not call the bridge.
    fn relocate(&self, from: Option<u64>, to: Option<u64>);
}

/// A host bridge with one bus. Put its [`Ecam`] and its [`Window`] on the memory bus.
pub struct HostBridge {
    window: Range<u64>,
    /// By device number.
    slots: Mutex<Vec<Option<Slot>>>,
    placed: RwLock<Vec<Placed>>,
}

/// A function.
struct Slot {
    function: Arc<dyn Function>,
    size: u64,
    doorbells: Option<u64>,
    relocate: Option<Box<dyn Relocate>>,
}

/// A BAR that answers. They never overlap.
#[derive(Clone)]
struct Placed {
    device: usize,
    range: Range<u64>,
    function: Arc<dyn Function>,
}

/// Configuration space of the whole bus, 1 MiB (PCI Express 5.0, 7.2.2).
pub struct Ecam(Arc<HostBridge>);

/// The memory window of the bridge, all of it: BARs answer where the guest has put them.
pub struct Window(Arc<HostBridge>);

impl HostBridge {
    /// Size of ECAM for the one bus, in bytes.
    pub const ECAM_SIZE: u64 = 1 << 20;

    /// With nothing on the bus but itself, at device 0. BARs lie in `window`, below 4 GiB; the part behind is not used.
    pub fn new(window: Range<u64>) -> Arc<Self> {
        let root = Slot {
            function: Arc::new(Root::default()),
            size: 0,
            doorbells: None,
            relocate: None,
        };
        let end = window.end.min(1 << 32);
        Arc::new(Self {
            window: window.start..end,
            slots: Mutex::new(vec![Some(root)]),
            placed: RwLock::new(Vec::new()),
        })
    }

    /// Put a function on the bus, its BAR at a free place of the window, decoding on; its device number. `relocate` hears
    /// where the BAR is, now and whenever it moves.
    pub fn add(
        &self,
        function: Arc<dyn Function>,
        relocate: Option<Box<dyn Relocate>>,
    ) -> Result<u8, Error> {
        let mut slots = lock(&self.slots);
        let free = slots.iter().position(Option::is_none);
        let device = free.unwrap_or(slots.len());
        if device >= MAX_FUNCTIONS {
            return Err(Error::Full);
        }
        let size = lock(function.config()).bar_size();
        if size != 0 {
            let address = self.find_place(&slots, size).ok_or(Error::Window(size))?;
            lock(function.config()).assign_bar(address);
        }
        let slot = Some(Slot {
            function,
            size: size.into(),
            doorbells: None,
            relocate,
        });
        match slots.get_mut(device) {
            Some(place) => *place = slot,
            None => slots.push(slot),
        }
        self.settle(&mut slots);
        Ok(device as u8)
    }

    /// Put a function on the bus that was there before, with this device number: its BAR answers where its configuration space
    /// says, if that is a place for one.
    pub fn add_at(
        &self,
        device: u8,
        function: Arc<dyn Function>,
        relocate: Option<Box<dyn Relocate>>,
    ) -> Result<(), Error> {
        let mut slots = lock(&self.slots);
        let number = usize::from(device);
        if number >= MAX_FUNCTIONS {
            return Err(Error::Number(device));
        }
        if slots.len() <= number {
            slots.resize_with(number + 1, || None);
        }
        let place = slots.get_mut(number).filter(|place| place.is_none());
        let place = place.ok_or(Error::Number(device))?;
        let size = lock(function.config()).bar_size().into();
        *place = Some(Slot {
            function,
            size,
            doorbells: None,
            relocate,
        });
        self.settle(&mut slots);
        Ok(())
    }

    /// The bridge's own configuration space.
    pub fn own_config(&self) -> Vec<u8> {
        let slots = lock(&self.slots);
        let root = slots.first().and_then(Option::as_ref);
        root.map_or(Vec::new(), |root| {
            lock(root.function.config()).contents().to_vec()
        })
    }

    /// Take over what a driver may write of what [`HostBridge::own_config`] told.
    pub fn restore_own_config(&self, contents: &[u8]) {
        let slots = lock(&self.slots);
        if let Some(root) = slots.first().and_then(Option::as_ref) {
            lock(root.function.config()).write(0, contents);
        }
    }

    /// Take the function with this device number off the bus: `relocate` hears that nothing of it is to be registered any
    /// more. Accesses that are under way may still reach it. The bridge itself stays.
    pub fn remove(&self, device: u8) {
        let mut slots = lock(&self.slots);
        let place = slots
            .iter_mut()
            .skip(1)
            .nth(usize::from(device).wrapping_sub(1));
        let Some(mut slot) = place.and_then(Option::take) else {
            return;
        };
        self.settle(&mut slots);
        if slot.doorbells.is_some() {
            slot.relocate(None);
        }
    }

    /// The configuration spaces, for the memory bus.
    pub fn ecam(self: &Arc<Self>) -> Arc<Ecam> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// The BARs, for the memory bus.
    pub fn window(self: &Arc<Self>) -> Arc<Window> {
        Arc::new(Window(Arc::clone(self)))
    }

    /// A multiple of `size` in the window where no BAR is, nor doorbells that were left behind.
    fn find_place(&self, slots: &[Option<Slot>], size: u32) -> Option<u32> {
        let length = u64::from(size);
        let placed = self.placed.read().unwrap_or_else(PoisonError::into_inner);
        let bars = placed.iter().map(|placed| placed.range.clone());
        let doorbells = slots
            .iter()
            .flatten()
            .filter_map(|slot| Some(slot.doorbells?..slot.doorbells? + slot.size));
        let taken: Vec<Range<u64>> = bars.chain(doorbells).collect();
        let mut start = self.window.start.checked_next_multiple_of(length)?;
        loop {
            let range = start..start.checked_add(length)?;
            if range.end > self.window.end {
                return None;
            }
            let Some(other) = taken.iter().find(|other| overlap(other, &range)) else {
                return u32::try_from(start).ok();
            };
            start = other.end.checked_next_multiple_of(length)?;
        }
    }

    /// After any change of a BAR or of decoding: BARs that have moved away stop answering, those that have a place now
    /// answer there, and doorbells follow. A BAR over another, or outside the window, answers nowhere.
    fn settle(&self, slots: &mut [Option<Slot>]) {
        let wanted: Vec<Option<u64>> = slots
            .iter()
            .map(|slot| lock(slot.as_ref()?.function.config()).bar())
            .collect();
        let mut table = self.placed.write().unwrap_or_else(PoisonError::into_inner);
        table.retain(|placed| wanted.get(placed.device) == Some(&Some(placed.range.start)));
        for ((device, slot), start) in slots.iter().enumerate().zip(wanted) {
            let range = |slot: &Slot| Some(start?..start?.checked_add(slot.size)?);
            let Some((slot, range)) = slot.as_ref().and_then(|slot| Some((slot, range(slot)?)))
            else {
                continue;
            };
            let inside = range.start >= self.window.start && range.end <= self.window.end;
            let mine = |placed: &Placed| placed.device == device;
            let taken = |placed: &Placed| mine(placed) || overlap(&placed.range, &range);
            if inside && !table.iter().any(taken) {
                table.push(Placed {
                    device,
                    range,
                    function: Arc::clone(&slot.function),
                });
            }
        }
        let placed = table.clone();
        drop(table);
        move_doorbells(slots, &placed);
    }

    fn find(&self, offset: u64) -> Option<(Arc<dyn Function>, u64)> {
        let address = self.window.start.checked_add(offset)?;
        let table = self.placed.read().unwrap_or_else(PoisonError::into_inner);
        let placed = table
            .iter()
            .find(|placed| placed.range.contains(&address))?;
        Some((Arc::clone(&placed.function), address - placed.range.start))
    }
}

/// Only where something changes hands: a guest that sizes its BARs at boot, with decoding off, costs nothing here.
fn move_doorbells(slots: &mut [Option<Slot>], placed: &[Placed]) {
    for bar in placed {
        let filled = slots.iter_mut().enumerate();
        for (device, slot) in filled.filter_map(|(device, slot)| Some((device, slot.as_mut()?))) {
            let Some(old) = slot.doorbells else { continue };
            let moved = device == bar.device && old != bar.range.start;
            let in_the_way = device != bar.device && overlap(&(old..old + slot.size), &bar.range);
            if moved || in_the_way {
                slot.relocate(None);
            }
        }
    }
    for bar in placed {
        if let Some(Some(slot)) = slots.get_mut(bar.device)
            && slot.doorbells.is_none()
        {
            slot.relocate(Some(bar.range.start));
        }
    }
}

impl Slot {
    fn relocate(&mut self, to: Option<u64>) {
        let from = std::mem::replace(&mut self.doorbells, to);
        if let Some(relocate) = &self.relocate {
            relocate.relocate(from, to);
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of configuration space of one function.
const FUNCTION_SIZE: u64 = 0x1000;

impl Ecam {
    /// The function at `offset`, the register in it, and how many of `length` bytes are its.
    fn decode(slots: &[Option<Slot>], offset: u64, length: usize) -> Option<(&Slot, u16, usize)> {
        let (number, register) = (offset / FUNCTION_SIZE, offset % FUNCTION_SIZE);
        // Function 0 of each device; the others are absent.
        let device = number.is_multiple_of(8).then_some(number / 8)?;
        let slot = slots.get(usize::try_from(device).ok()?)?.as_ref()?;
        let within = length.min((FUNCTION_SIZE - register) as usize);
        Some((slot, register as u16, within))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let slots = lock(&self.0.slots);
        if let Some((slot, register, length)) = Self::decode(&slots, offset, data.len()) {
            let own = data.get_mut(..length).unwrap_or_default();
            slot.function.read_config(register, own);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut slots = lock(&self.0.slots);
        if let Some((slot, register, length)) = Self::decode(&slots, offset, data.len()) {
            let own = data.get(..length).unwrap_or_default();
            slot.function.write_config(register, own);
            // Command and BARs are in the header.
            if register < 0x40 {
                self.0.settle(&mut slots);
            }
        }
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.find(offset) {
            Some((function, offset)) => function.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.0.find(offset) {
            function.write(offset, data);
        }
    }
}

/// The bridge's own function, at 00:00.0.
struct Root(Mutex<ConfigSpace>);

impl Default for Root {
    fn default() -> Self {
        // The generic PCI Express host bridge that Red Hat has numbered; drivers need nothing of it.
        Self(Mutex::new(ConfigSpace::new(&Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        })))
    }
}

impl Function for Root {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.0
    }
}

impl BusDevice for Root {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests;
