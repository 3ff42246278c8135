//! Addresses to devices: the I/O-port and MMIO buses, and what a device implements to sit on one.
//!
//! **Architecture Invariant:** a leaf. It knows no KVM, no virtio, no configuration.
#![forbid(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::{Arc, PoisonError, RwLock};

/// A device that answers reads and writes at an address range.
///
/// Several vCPUs call at once; an implementation brings its own locks. `data` is 1 to 8 bytes long and is
/// the guest's: a device must accept every offset below its size and every length. An access may reach
/// past the range's end.
pub trait BusDevice: Send + Sync {
    /// Fill `data` from `offset` (relative to the range's start). `data` comes filled with 0xff, what
    /// absent hardware answers.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Take `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
    /// Take each `size` bytes of `data` at `offset`, one after the other (`rep outs`). `size` is not 0.
    fn write_repeated(&self, offset: u64, data: &[u8], size: usize) {
        for element in data.chunks(size.max(1)) {
            self.write(offset, element);
        }
    }
}

/// How a virtio transport interrupts its driver.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The configuration space changed.
    fn config(&self);
    /// The device cannot go on: the status says DEVICE_NEEDS_RESET from now on, until the driver resets the device.
    fn needs_reset(&self);
    /// An eventfd, open as long as this: a write to it is [`Interrupt::queue`], without this process. For devices that say that
    /// another process serves their queues; none for others.
    fn remote(&self, _index: u16) -> Option<RawFd> {
        None
    }
}

struct Range {
    start: u64,
    end: u64, // exclusive
    device: Arc<dyn BusDevice>,
}

/// An address space with devices at disjoint ranges.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Vec<Range>>, // sorted by start
}

/// Why a device could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is empty or runs past the end of the address space.
    #[error("a device range of {size:#x} bytes at {start:#x} is empty or wraps")]
    BadRange {
        /// First address.
        start: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Another device is there.
    #[error("a device range of {size:#x} bytes at {start:#x} overlaps another device's")]
    Overlap {
        /// First address.
        start: u64,
        /// Length in bytes.
        size: u64,
    },
}

impl Bus {
    /// Put `device` at `start..start + size`.
    pub fn insert(&self, start: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let end = start
            .checked_add(size)
            .filter(|_| size > 0)
            .ok_or(Error::BadRange { start, size })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let at = ranges.partition_point(|r| r.start < start);
        let before = at.checked_sub(1).and_then(|i| ranges.get(i));
        if before.is_some_and(|r| r.end > start) || ranges.get(at).is_some_and(|r| r.start < end) {
            return Err(Error::Overlap { start, size });
        }
        ranges.insert(at, Range { start, end, device });
        Ok(())
    }

    /// Fill `data` from the device at `address`, or with 0xff where there is none. False when there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        self.find(address)
            .map(|(device, offset)| device.read(offset, data))
            .is_some()
    }

    /// Hand `data` to the device at `address`; it is dropped where there is none. False when there is none.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.find(address)
            .map(|(device, offset)| device.write(offset, data))
            .is_some()
    }

    /// As [`Bus::write`], for each `size` bytes of `data`.
    pub fn write_repeated(&self, address: u64, data: &[u8], size: usize) -> bool {
        self.find(address)
            .map(|(device, offset)| device.write_repeated(offset, data, size))
            .is_some()
    }

    /// The lock is dropped before the device is called, so a device may change the bus.
    fn find(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let at = ranges
            .partition_point(|r| r.start <= address)
            .checked_sub(1)?;
        let range = ranges.get(at).filter(|r| address < r.end)?;
        Some((Arc::clone(&range.device), address - range.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_at_its_address_and_no_other() {
        let bus = Bus::default();
        let (low, high) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        bus.insert(0x100, 8, low.clone()).unwrap();
        bus.insert(0x108, 8, high.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x10f, &mut data));
        assert_eq!(data, [7, 7]);
        assert!(bus.write(0x107, &[1]));
        assert_eq!(*low.0.lock().unwrap(), [(7, vec![1])]);
        assert!(high.0.lock().unwrap().is_empty());
    }

    #[test]
    fn absent_hardware_reads_as_ones() {
        let bus = Bus::default();
        bus.insert(0x100, 8, Arc::new(Recorder::default())).unwrap();
        for address in [0, 0xff, 0x108, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data));
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &[0]));
        }
    }

    #[test]
    fn ranges_never_overlap_or_wrap() {
        let bus = Bus::default();
        let device = || Arc::new(Recorder::default());
        bus.insert(0x100, 8, device()).unwrap();
        for (start, size) in [(0x100, 8), (0xff, 2), (0x107, 1), (0, 0x1000)] {
            assert_eq!(
                bus.insert(start, size, device()),
                Err(Error::Overlap { start, size })
            );
        }
        for (start, size) in [(0x200, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(start, size, device()),
                Err(Error::BadRange { start, size })
            );
        }
        bus.insert(0xf8, 8, device()).unwrap();
    }
}
