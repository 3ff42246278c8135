//! Configuration space of a type 0 function (PCI Local Bus 3.0, 6.1, 6.2).

use crate::Error;

/// Bytes of conventional configuration space. What ECAM shows behind it reads as 0: no extended capabilities.
const SIZE: usize = 256;

/// Offsets (6.1).
mod at {
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x09;
    pub const BAR: usize = 0x10;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM: usize = 0x2e;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    /// End of the header.
    pub const END: usize = 0x40;
}

/// Command: memory accesses are answered.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory.
const COMMAND_MASTER: u16 = 1 << 2;
/// Command: INTx is off.
const COMMAND_NO_INTX: u16 = 1 << 10;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, in 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The registers of one function, and which of their bits a guest may write. One 32-bit, not prefetchable memory BAR at most,
/// and no INTx (the interrupt pin is 0).
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar_size: u32,
    /// Where the offset of the next capability goes.
    link: usize,
    /// First byte that no capability has.
    end: usize,
}

impl ConfigSpace {
    /// With a header and nothing else.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            link: at::CAPABILITIES,
            end: at::END,
        };
        let [c0, c1, c2, _] = identity.class.to_le_bytes();
        space.put(at::VENDOR, &identity.vendor.to_le_bytes());
        space.put(at::DEVICE, &identity.device.to_le_bytes());
        space.put(at::REVISION, &[identity.revision]);
        space.put(at::CLASS, &[c0, c1, c2]);
        space.put(
            at::SUBSYSTEM_VENDOR,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        space.put(at::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        space.allow(at::COMMAND, &command.to_le_bytes());
        // Scratch for the guest (6.2.4).
        space.allow(at::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// With BAR 0 of `size` bytes, a power of two from 0x1000 up. It has no address before [`ConfigSpace::assign_bar`].
    pub fn with_bar(mut self, size: u32) -> Result<Self, Error> {
        if !size.is_power_of_two() || size < 0x1000 {
            return Err(Error::BarSize(size));
        }
        self.bar_size = size;
        // Memory, 32 bits, not prefetchable: the low bits are 0. A guest that writes ones reads the size (6.2.5.1).
        self.allow(at::BAR, &(!(size - 1)).to_le_bytes());
        Ok(self)
    }

    /// Append capability `id` with the bytes `body` behind its header of two bytes; the guest may write the bits of
    /// `writable`, which counts from the body's start and may be shorter. The offset of its header (a multiple of 4).
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, Error> {
        let offset = self.end.next_multiple_of(4);
        let end = offset + 2 + body.len();
        let short = u8::try_from(offset).map_err(|_| Error::CapabilitySpace(id))?;
        if end > SIZE {
            return Err(Error::CapabilitySpace(id));
        }
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        let within = writable.get(..body.len()).unwrap_or(writable);
        self.allow(offset + 2, within);
        self.put(self.link, &[short]);
        self.put(at::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        (self.link, self.end) = (offset + 1, end);
        Ok(short)
    }

    /// Fill `data` from `offset`; what lies behind the 256 bytes reads as 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let source = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(source) {
            *to = *from;
        }
    }

    /// The guest writes: only writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let cells = self.bytes.iter_mut().zip(&self.writable);
        for ((to, mask), from) in cells.skip(offset.into()).zip(data) {
            *to = *to & !mask | from & mask;
        }
    }

    /// All of it.
    pub fn contents(&self) -> &[u8] {
        &self.bytes
    }

    /// Two bytes at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes at `offset`.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Change bytes as the function itself, whoever may write them.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        self.put(offset.into(), data);
    }

    /// Size of the BAR in bytes; 0 when there is none.
    pub fn bar_size(&self) -> u32 {
        self.bar_size
    }

    /// Give the BAR an address, a multiple of its size, and turn memory decoding on, as firmware would.
    pub fn assign_bar(&mut self, address: u32) {
        self.put(at::BAR, &address.to_le_bytes());
        self.put(at::COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }

    /// Where the BAR answers; None without one, or while memory decoding is off.
    pub fn bar(&self) -> Option<u64> {
        let decodes = self.word(at::COMMAND as u16) & COMMAND_MEMORY != 0;
        (decodes && self.bar_size != 0).then(|| self.dword(at::BAR as u16).into())
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(offset).zip(mask) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_02,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1042,
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(&IDENTITY).with_bar(0x4000).unwrap()
    }

    #[test]
    fn the_header_is_that_of_a_function_without_intx_and_cannot_be_overwritten() {
        let mut space = space();
        let mut before = [0; 64];
        space.read(0, &mut before);
        assert_eq!(before[..4], [0xf4, 0x1a, 0x42, 0x10]);
        assert_eq!(before[8..12], [1, 2, 0x80, 1]);
        assert_eq!(before[14], 0, "one function, header type 0");
        assert_eq!(before[0x3d], 0, "interrupt pin");
        for offset in 0..SIZE as u16 {
            space.write(offset, &[0xff]);
        }
        let mut after = [0; 64];
        space.read(0, &mut after);
        for (offset, (before, after)) in before.iter().zip(after).enumerate() {
            let changed = before ^ after;
            let may = match offset {
                4 => 0b110,
                5 => 0b100,
                0x11 => 0xc0,
                0x12 | 0x13 | 0x3c => 0xff,
                _ => 0,
            };
            assert_eq!(changed, may, "offset {offset:#x}");
        }
    }

    #[test]
    fn a_guest_that_sizes_the_bar_reads_its_size_and_nothing_else() {
        let mut space = space();
        space.assign_bar(0xd000_4000);
        assert_eq!(space.bar(), Some(0xd000_4000));
        // As Linux: decoding off, all ones, read, write back.
        space.write(4, &[0, 0]);
        assert_eq!(space.bar(), None);
        for (bar, wanted) in [(0x10, 0xffff_c000), (0x14, 0), (0x24, 0), (0x30, 0)] {
            let old = space.dword(bar).to_le_bytes();
            space.write(bar, &[0xff; 4]);
            assert_eq!(space.dword(bar), wanted, "BAR at {bar:#x}");
            space.write(bar, &old);
        }
        space.write(4, &[2, 0]);
        assert_eq!(space.bar(), Some(0xd000_4000));
        // A byte at a time, to an address that is not a multiple of the size.
        for (offset, byte) in (0x10..).zip([0x34, 0x92, 0x01, 0xe0]) {
            space.write(offset, &[byte]);
        }
        assert_eq!(space.bar(), Some(0xe001_8000));
    }

    #[test]
    fn only_sizes_that_a_bar_can_have_are_taken() {
        for size in [0, 0x800, 0x3000, u32::MAX] {
            let result = ConfigSpace::new(&IDENTITY).with_bar(size);
            assert_eq!(result.err(), Some(Error::BarSize(size)));
        }
        let none = ConfigSpace::new(&IDENTITY);
        assert_eq!((none.bar_size(), none.bar()), (0, None));
    }

    #[test]
    fn capabilities_are_linked_aligned_and_writable_where_they_say() {
        let mut space = space();
        assert_eq!(space.word(6) & STATUS_CAPABILITIES, 0);
        let first = space.add_capability(9, &[1, 2, 3], &[]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        assert_ne!(space.word(6) & STATUS_CAPABILITIES, 0);
        // The walk of a driver: id, next.
        let mut found = Vec::new();
        let mut next = space.word(0x34) as u8;
        while next != 0 {
            assert!(next >= 0x40 && next.is_multiple_of(4));
            let [id, after] = space.word(next.into()).to_le_bytes();
            found.push((id, next));
            next = after;
        }
        assert_eq!(found, [(9, first), (0x11, second)]);
        space.write(second.into(), &[0xff; 4]);
        assert_eq!(space.dword(second.into()), 0xc000_0011);
    }

    #[test]
    fn capabilities_never_leave_the_256_bytes() {
        let mut space = space();
        space.add_capability(9, &[0; 180], &[]).unwrap();
        let last = space.add_capability(9, &[0; 6], &[0xff; 100]).unwrap();
        assert_eq!(last, 0xf8);
        let full = space.add_capability(5, &[], &[]);
        assert_eq!(full, Err(Error::CapabilitySpace(5)));
        assert_eq!(space.word(0xf8), 9, "the last one is the last");
    }

    #[test]
    fn accesses_across_the_end_are_cut_off() {
        let mut space = space();
        for offset in [0xfd, 0xff, 0x100, 0xffc, 0xfff, u16::MAX] {
            space.write(offset, &[0xff; 8]);
            let mut data = [0xff; 8];
            space.read(offset, &mut data);
            assert_eq!(data, [0; 8], "{offset:#x}");
        }
    }
}
