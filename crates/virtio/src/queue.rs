//! Split virtqueues (2.7), the device's side.
//!
//! rust-vmm's virtio-queue ends a chain silently where a descriptor is bad, and publishes used buffers one by one. Here a bad
//! chain is an error, for the device to ask for a reset, and used buffers are published, and the driver is interrupted, once
//! for a batch.

use crate::{GuestMemory, WriteLog};
use husk_bus::Interrupt;
use serde::{Deserialize, Serialize};
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileMemory, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

/// Most buffers that one chain may have. Drivers keep to what the device's configuration says, which is less.
pub const MAX_BUFFERS: usize = 1024;

const DESCRIPTOR_SIZE: u64 = 16;
/// Offset of the index in the available and the used ring, behind flags.
const INDEX: usize = 2;
/// Offset of the ring itself, behind flags and index.
const RING: usize = 4;

/// What a driver did wrong with a queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Not in guest memory.
    #[error("an address outside guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The table or a ring is not in guest memory, or not aligned (2.7), or the size is no power of two or too large.
    #[error("{what} at {address:#x} for {size} descriptors is misaligned or outside guest memory")]
    Layout {
        /// Table or ring.
        what: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// The queue's size.
        size: u16,
    },
    /// More buffers made available than the queue has descriptors.
    #[error("the available index is {0} ahead, more than the queue's size")]
    AvailableIndex(u16),
    /// A descriptor's number is not below the size of its table.
    #[error("descriptor {0} does not exist")]
    NoDescriptor(u16),
    /// A loop, or a chain that no driver needs.
    #[error("a descriptor chain is longer than {0}")]
    TooLong(usize),
    /// 2.7.4.2: all readable buffers come first.
    #[error("a buffer to read comes after one to write")]
    Order,
    /// 2.7.5.3.1: not nested, nor followed by others, and not empty.
    #[error(
        "a table of indirect descriptors of {0} bytes is empty, cut off, nested, or not the last"
    )]
    Indirect(u32),
    /// A buffer that is not in guest memory.
    #[error("a buffer of {size:#x} bytes at {address:#x} is outside guest memory")]
    Buffer {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        size: u32,
    },
}

/// Where a queue is and how far it has come: what a snapshot holds of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the available ring ("driver area").
    pub available: u64,
    /// Guest-physical address of the used ring ("device area").
    pub used: u64,
    /// Chains taken so far, modulo 65536.
    pub next_available: u16,
    /// Chains given back so far, modulo 65536.
    pub next_used: u16,
}

impl QueueState {
    /// Check that a device may use the queue: sizes, alignment (2.7), and that table and rings lie in memory.
    pub fn check(&self, mem: &GuestMemory) -> Result<(), QueueError> {
        self.parts(mem).map(drop)
    }

    /// Descriptor table, available ring and used ring, checked.
    fn parts(&self, mem: &GuestMemory) -> Result<[Part; 3], QueueError> {
        let size = self.size;
        let n = u64::from(size);
        let part = |what, address: u64, align, length| {
            let good = size.is_power_of_two() && size <= 32768 && address.is_multiple_of(align);
            let part = Part::find(mem, address, length).filter(|_| good);
            part.ok_or(QueueError::Layout {
                what,
                address,
                size,
            })
        };
        // Rings end in the event index of 2.7.6 and 2.7.8, whether or not it is negotiated.
        Ok([
            part(
                "the descriptor table",
                self.descriptors,
                16,
                n * DESCRIPTOR_SIZE,
            )?,
            part(
                "the available ring",
                self.available,
                2,
                RING as u64 + n * 2 + 2,
            )?,
            part("the used ring", self.used, 4, RING as u64 + n * 8 + 2)?,
        ])
    }
}

/// A part of a queue, looked up once: the region of memory that it lies in, and where.
struct Part {
    region: Arc<GuestRegionMmap>,
    offset: MemoryRegionAddress,
    length: usize,
}

impl Part {
    /// `length` bytes at `address`, if they all lie in one region.
    fn find(mem: &GuestMemory, address: u64, length: u64) -> Option<Self> {
        let address = GuestAddress(address);
        let region = mem.find_region(address)?;
        let offset = region.to_region_addr(address)?;
        // Takes nothing away from `mem`; it is what hands out the region itself.
        let (_, region) = mem.remove_region(region.start_addr(), region.len()).ok()?;
        let part = Self {
            region,
            offset,
            length: usize::try_from(length).ok()?,
        };
        part.slice().is_ok().then_some(part)
    }

    fn slice(&self) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        self.region.get_slice(self.offset, self.length)
    }

    fn load(&self, at: usize, order: Ordering) -> Result<u16, GuestMemoryError> {
        Ok(u16::from_le(self.slice()?.load(at, order)?))
    }

    fn store(&self, at: usize, value: u16, order: Ordering) -> Result<(), GuestMemoryError> {
        Ok(self.slice()?.store(value.to_le(), at, order)?)
    }
}

/// Where a region of guest memory is. Buffers mostly lie in the same as those before, which is then not searched again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extent {
    start: u64,
    size: u64,
}

impl Extent {
    /// That of `region`.
    pub fn of(region: &GuestRegionMmap) -> Self {
        Self {
            start: region.start_addr().0,
            size: region.len(),
        }
    }

    /// How far from its beginning `address` is, if `length` bytes there all lie in it.
    pub fn offset(&self, address: GuestAddress, length: u64) -> Option<u64> {
        let offset = address.0.checked_sub(self.start)?;
        (length <= self.size.checked_sub(offset)?).then_some(offset)
    }
}

/// A part of guest memory that a driver lent, all of it in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes, not 0.
    pub length: u32,
}

/// A descriptor chain: what the device may read, then what it may write. Keep one and use it again: it then allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    /// What gives it back: see [`ActiveQueue::add_used`].
    pub head: u16,
    /// Buffers to read, in order.
    pub readable: Vec<Buffer>,
    /// Buffers to write, in order.
    pub writable: Vec<Buffer>,
}

impl Chain {
    /// Bytes that may be read.
    pub fn readable_length(&self) -> u64 {
        length(&self.readable)
    }

    /// Bytes that may be written.
    pub fn writable_length(&self) -> u64 {
        length(&self.writable)
    }

    /// Copy out of the readable bytes from `offset` on; the number of bytes that were there.
    pub fn read(
        &self,
        mem: &GuestMemory,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, QueueError> {
        let mut done = 0;
        for (buffer, skip) in from(&self.readable, offset) {
            let rest = data.get_mut(done..).unwrap_or_default();
            let count = rest.len().min((buffer.length - skip) as usize);
            if count == 0 {
                break;
            }
            let address = GuestAddress(buffer.address.0 + u64::from(skip));
            mem.read_slice(rest.get_mut(..count).unwrap_or_default(), address)?;
            done += count;
        }
        Ok(done)
    }

    /// Copy to the writable bytes from `offset` on; the number of bytes that had room.
    pub fn write(&self, mem: &GuestMemory, offset: u64, data: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for (buffer, skip) in from(&self.writable, offset) {
            let rest = data.get(done..).unwrap_or_default();
            let count = rest.len().min((buffer.length - skip) as usize);
            if count == 0 {
                break;
            }
            let address = GuestAddress(buffer.address.0 + u64::from(skip));
            mem.write_slice(rest.get(..count).unwrap_or_default(), address)?;
            done += count;
        }
        Ok(done)
    }

    /// Add a descriptor's buffer, which was checked.
    fn push(&mut self, descriptor: &Descriptor) {
        let buffers = match descriptor.flags & VRING_DESC_F_WRITE {
            0 => &mut self.readable,
            _ => &mut self.writable,
        };
        buffers.push(Buffer {
            address: GuestAddress(descriptor.address),
            length: descriptor.length,
        });
    }
}

/// How many buffers came to `chain` since it had so many.
fn own_buffers(chain: &Chain, (readable, writable): (usize, usize)) -> usize {
    (chain.readable.len() + chain.writable.len()).saturating_sub(readable + writable)
}

fn length(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}

/// The buffers that hold what is behind the first `offset` bytes, the first of them with the bytes of it to skip.
pub fn from(buffers: &[Buffer], offset: u64) -> impl Iterator<Item = (Buffer, u32)> {
    let mut skip = offset;
    buffers.iter().filter_map(move |buffer| {
        let length = u64::from(buffer.length);
        let own = skip.min(length);
        skip -= own;
        (own < length).then_some((*buffer, own as u32))
    })
}

/// A queue in use by a device. It belongs to the device from `start` to `stop`.
pub struct ActiveQueue {
    index: u16,
    mem: GuestMemory,
    kick: Arc<EventFd>,
    irq: Arc<dyn Interrupt>,
    state: QueueState,
    table: Part,
    available_ring: Part,
    used_ring: Part,
    /// Where the last buffer was.
    extent: Extent,
    event_idx: bool,
    /// The available index when it was last read.
    available: Wrapping<u16>,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The used index that the driver knows.
    published: Wrapping<u16>,
    /// Hears what the device writes, where somebody wants to know.
    log: Option<Arc<WriteLog>>,
}

/// One descriptor (2.7.5).
struct Descriptor {
    address: u64,
    length: u32,
    flags: u32,
    next: u16,
}

impl Descriptor {
    /// Number `index` of `table`, of which there is no more than its descriptors.
    fn read(table: &VolatileSlice, index: u16) -> Result<Self, QueueError> {
        let at = usize::from(index) * DESCRIPTOR_SIZE as usize;
        let [low, high]: [u64; 2] = table
            .get_ref(at)
            .map_err(|_| QueueError::NoDescriptor(index))?
            .load();
        let high = u64::from_le(high);
        Ok(Self {
            address: u64::from_le(low),
            length: high as u32,
            flags: (high >> 32) as u32 & 0xffff,
            next: (high >> 48) as u16,
        })
    }

    /// Whether all of its buffer lies in a region.
    fn lies_in(&self, extent: &Extent) -> bool {
        let address = GuestAddress(self.address);
        extent.offset(address, self.length.into()).is_some()
    }
}

impl ActiveQueue {
    /// Queue number `index` of its device, in `mem`. `event_idx`: whether EVENT_IDX was negotiated.
    pub fn new(
        index: u16,
        state: QueueState,
        event_idx: bool,
        mem: GuestMemory,
        (kick, irq): (Arc<EventFd>, Arc<dyn Interrupt>),
    ) -> Result<Self, QueueError> {
        let [table, available_ring, used_ring] = state.parts(&mem)?;
        Ok(Self {
            index,
            mem,
            kick,
            irq,
            state,
            table,
            available_ring,
            used_ring,
            extent: Extent::default(),
            event_idx,
            available: Wrapping(state.next_available),
            next_available: Wrapping(state.next_available),
            next_used: Wrapping(state.next_used),
            published: Wrapping(state.next_used),
            log: None,
        })
    }

    /// Note in `log` what the device may write: each chain's buffers when it is popped, and the used ring. Whoever takes the log must
    /// first have the device stopped, so that nothing is written behind that which was noted before.
    pub fn log_writes(mut self, log: Option<Arc<WriteLog>>) -> Self {
        self.log = log;
        self
    }

    /// Note what the device changes in memory outside of the buffers that it may write.
    pub fn note_written(&self, address: u64, length: u64) {
        if let Some(log) = &self.log {
            log.note(address, length);
        }
    }

    /// Its number within the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The memory that it and its buffers lie in.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// Becomes readable when the driver has made buffers available.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// How the device interrupts its driver.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.irq
    }

    /// Another process has served it so far, and does not any more: it has taken the chains before the available index `next`.
    pub fn was_served(&mut self, next: u16) -> Result<(), QueueError> {
        self.next_available = Wrapping(next);
        self.available = self.next_available;
        self.next_used = Wrapping(self.used_ring.load(INDEX, Ordering::Acquire)?);
        self.published = self.next_used;
        Ok(())
    }

    /// How many chains were given back so far, modulo 65536, whoever did it.
    pub fn used_index(&self) -> Result<u16, QueueError> {
        self.used_ring
            .load(INDEX, Ordering::Acquire)
            .map_err(QueueError::from)
    }

    /// Where it is and how far it has come. What was added but not flushed is not given back yet.
    pub fn state(&self) -> QueueState {
        QueueState {
            next_available: self.next_available.0,
            next_used: self.next_used.0,
            ..self.state
        }
    }

    /// Take the next available chain into `chain`; false when there is none. After an error the queue is of no more use:
    /// nobody knows what the driver meant.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        chain.readable.clear();
        chain.writable.clear();
        self.pop_more(chain)
    }

    /// As [`ActiveQueue::pop`], but `chain` keeps the buffers that it has, and those of the next chain come behind them: for
    /// devices that fill chains in order.
    pub fn pop_more(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_available == self.available && !self.look()? {
            return Ok(false);
        }
        let slot = usize::from(self.next_available.0 & (self.state.size - 1));
        let entry = RING + 2 * slot;
        chain.head = self.available_ring.load(entry, Ordering::Relaxed)?;
        let first = Descriptor::read(&self.table.slice()?, chain.head)?;
        let before = chain.writable.len();
        match first.flags & (VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT) {
            // Alone, as nearly all buffers for packets are: nothing else has to be checked.
            0 if first.length > 0 && first.lies_in(&self.extent) => chain.push(&first),
            _ => self.extent = self.walk(chain, first)?,
        }
        if let Some(log) = &self.log {
            let own = chain.writable.iter().skip(before);
            own.for_each(|buffer| log.note(buffer.address.0, buffer.length.into()));
        }
        self.next_available += 1;
        Ok(true)
    }

    /// Put back the chain that was popped last: it will be popped again. For what has to wait.
    pub fn undo_pop(&mut self) {
        self.next_available -= 1;
    }

    /// How many chains are waiting to be popped.
    pub fn waiting(&mut self) -> Result<u16, QueueError> {
        self.look()?;
        Ok((self.available - self.next_available).0)
    }

    /// Read the available index; whether there is more than was taken.
    fn look(&mut self) -> Result<bool, QueueError> {
        self.available = Wrapping(self.available_ring.load(INDEX, Ordering::Acquire)?);
        let ahead = (self.available - self.next_available).0;
        if ahead > self.state.size {
            return Err(QueueError::AvailableIndex(ahead));
        }
        Ok(ahead > 0)
    }

    /// Take the buffers of the chain that begins with descriptor `first`; where the last of them is.
    fn walk(&self, chain: &mut Chain, first: Descriptor) -> Result<Extent, QueueError> {
        let mut extent = self.extent;
        let mut table = self.table.slice()?;
        let mut descriptor = first;
        let mut indirect = false;
        let mut left = usize::from(self.state.size);
        let before = (chain.readable.len(), chain.writable.len());
        loop {
            if descriptor.flags & VRING_DESC_F_INDIRECT != 0 {
                let entries = u64::from(descriptor.length) / DESCRIPTOR_SIZE;
                let whole = entries * DESCRIPTOR_SIZE == u64::from(descriptor.length);
                let last = descriptor.flags & VRING_DESC_F_NEXT == 0;
                if indirect || !whole || !last || entries == 0 || entries > u64::from(u16::MAX) {
                    return Err(QueueError::Indirect(descriptor.length));
                }
                indirect = true;
                table = self.indirect_table(descriptor.address, entries as u16)?;
                left = (entries as usize).min(MAX_BUFFERS);
                descriptor = Descriptor::read(&table, 0)?;
                continue;
            }
            let Some(fewer) = left.checked_sub(1) else {
                return Err(QueueError::TooLong(own_buffers(chain, before)));
            };
            left = fewer;
            self.push(chain, before, &descriptor, &mut extent)?;
            if descriptor.flags & VRING_DESC_F_NEXT == 0 {
                return Ok(extent);
            }
            descriptor = Descriptor::read(&table, descriptor.next)?;
        }
    }

    /// Add a descriptor's buffer to a chain that begins behind so many readable and writable buffers.
    fn push(
        &self,
        chain: &mut Chain,
        before: (usize, usize),
        descriptor: &Descriptor,
        extent: &mut Extent,
    ) -> Result<(), QueueError> {
        let Descriptor {
            address, length, ..
        } = *descriptor;
        let writable = descriptor.flags & VRING_DESC_F_WRITE != 0;
        if !writable && chain.writable.len() > before.1 {
            return Err(QueueError::Order);
        }
        if length == 0 {
            return Ok(());
        }
        if own_buffers(chain, before) >= MAX_BUFFERS {
            return Err(QueueError::TooLong(MAX_BUFFERS));
        }
        if !descriptor.lies_in(extent) {
            *extent = self.find_buffer(address, length)?;
        }
        chain.push(descriptor);
        Ok(())
    }

    /// The region that a buffer lies in.
    fn find_buffer(&self, address: u64, size: u32) -> Result<Extent, QueueError> {
        let place = GuestAddress(address);
        let extent = self.mem.find_region(place).map(Extent::of);
        let extent = extent.filter(|extent| extent.offset(place, size.into()).is_some());
        extent.ok_or(QueueError::Buffer { address, size })
    }

    /// `size` descriptors at `address`, looked up once for all of them.
    fn indirect_table(&self, address: u64, size: u16) -> Result<VolatileSlice<'_>, QueueError> {
        let bytes = u32::from(size) * DESCRIPTOR_SIZE as u32;
        let slice = self.mem.get_slice(GuestAddress(address), bytes as usize);
        slice.map_err(|_| QueueError::Buffer {
            address,
            size: bytes,
        })
    }

    /// Give a chain back after `written` bytes were written into it. The driver sees it at the next [`ActiveQueue::flush`].
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let slot = usize::from(self.next_used.0 & (self.state.size - 1));
        let element = u64::from(head) | u64::from(written) << 32;
        let ring = self.used_ring.slice()?;
        let entry = ring
            .get_ref(RING + 8 * slot)
            .map_err(GuestMemoryError::from)?;
        entry.store(element.to_le());
        self.note_used_ring(RING + 8 * slot, 8);
        self.next_used += 1;
        Ok(())
    }

    /// Show the driver what was added, and interrupt it if it wants that.
    pub fn flush(&mut self) -> Result<(), QueueError> {
        if self.publish()? {
            self.irq.queue(self.index);
        }
        Ok(())
    }

    /// As [`ActiveQueue::flush`], but the caller interrupts: true when the driver wants it.
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        let (new, old) = (self.next_used, self.published);
        if new == old {
            return Ok(false);
        }
        self.used_ring.store(INDEX, new.0, Ordering::Release)?;
        self.note_used_ring(INDEX, 2);
        self.published = new;
        // The driver writes its event index or flag, then looks at the used index; this is the other half.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = RING + 2 * usize::from(self.state.size);
            // 2.7.10: the index passed the event index with this batch.
            let event = Wrapping(self.available_ring.load(event, Ordering::Relaxed)?);
            return Ok((new - event - Wrapping(1)) < (new - old));
        }
        let flags = self.available_ring.load(0, Ordering::Relaxed)?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Ask the driver for a kick at its next available buffer; true when there are some already, for which it may not kick.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            let event = RING + 8 * usize::from(self.state.size);
            let next = self.next_available.0;
            self.used_ring.store(event, next, Ordering::Relaxed)?;
            self.note_used_ring(event, 2);
        } else {
            self.set_used_flags(0)?;
        }
        fence(Ordering::SeqCst);
        self.look()
    }

    /// Tell the driver that kicks are not needed. Only advice; with EVENT_IDX no kick comes anyway until
    /// [`ActiveQueue::enable_kicks`].
    pub fn disable_kicks(&mut self) -> Result<(), QueueError> {
        match self.event_idx {
            true => Ok(()),
            false => self.set_used_flags(VRING_USED_F_NO_NOTIFY as u16),
        }
    }

    fn set_used_flags(&self, flags: u16) -> Result<(), QueueError> {
        self.used_ring.store(0, flags, Ordering::Relaxed)?;
        self.note_used_ring(0, 2);
        Ok(())
    }

    /// Note `length` bytes from `offset` of the used ring.
    fn note_used_ring(&self, offset: usize, length: u64) {
        self.note_written(self.state.used + offset as u64, length);
    }
}

#[cfg(test)]
mod tests;
