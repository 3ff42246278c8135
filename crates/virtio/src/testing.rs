//! The guest's side of a virtio device, for tests and fuzzing: a driver that keeps to the rules ([`Driver`], [`DriverQueue`]),
//! and a kit ([`check_device`]) of what every device must survive over every transport.

mod kit;
mod pci;

pub use kit::{Subject, check_device};
pub use pci::Pci;

use crate::queue::QueueState;
use crate::transport::mmio::MmioTransport;
use crate::transport::{Core, Ring};
use crate::{DeviceError, DeviceState, DeviceThread, GuestMemory, VirtioDevice};
use crate::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use husk_bus::BusDevice;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a device may take for anything here. Long, because machines that run tests are busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of guest memory in tests.
pub const MEMORY: u64 = 32 << 20;
/// Where buffers and queues are; below is nothing that a test uses.
const FIRST: u64 = 0x10_0000;

/// Guest memory of [`MEMORY`] bytes from address 0.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory for a test")
}

/// What a driver does with a transport's registers.
pub trait Registers {
    /// The status.
    fn status(&self) -> u8;
    /// Write the status.
    fn set_status(&self, value: u8);
    /// Features that the device offers.
    fn device_features(&self) -> u64;
    /// Accept features.
    fn set_driver_features(&self, features: u64);
    /// Largest size of a queue.
    fn queue_max_size(&self, queue: u16) -> u16;
    /// Set up and enable a queue.
    fn enable_queue(&self, queue: u16, state: &QueueState);
    /// Reset one queue.
    fn reset_queue(&self, queue: u16);
    /// Ring the doorbell, without KVM.
    fn notify(&self, queue: u16);
    /// Read the device's configuration.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Write to the device's configuration.
    fn write_config(&self, offset: u64, data: &[u8]);
    /// Whether there was an interrupt since the last call.
    fn take_interrupt(&self) -> bool;
    /// Suspend the device.
    fn suspend(&self);
    /// Let it go on.
    fn resume(&self);
    /// What a snapshot holds of it all.
    fn save(&self) -> DeviceState;
    /// Take that over.
    fn load(&self, state: DeviceState) -> Result<(), DeviceError>;
    /// The transport's core, for what no driver can do.
    fn with_core(&self, what: &mut dyn FnMut(&mut Core));
    /// The registers themselves, for what no driver would do; the size in bytes with them.
    fn raw(&self) -> (Arc<dyn BusDevice>, u64);
}

/// Any device behind an MMIO transport.
pub struct Mmio {
    /// The transport.
    pub transport: Arc<MmioTransport>,
    line: EventFd,
    remote: Option<EventFd>,
}

impl Mmio {
    /// Put `device` behind one.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        thread: &Arc<DeviceThread>,
        mem: &GuestMemory,
    ) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let end = line.try_clone().expect("an eventfd");
        let transport = MmioTransport::new(device, Arc::clone(thread), mem.clone(), end);
        let transport = Arc::new(transport.expect("a transport"));
        let remote = transport.remote_line().map(EventFd::try_clone);
        Self {
            remote: remote.transpose().expect("an eventfd"),
            transport,
            line,
        }
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }
}

impl Registers for Mmio {
    fn status(&self) -> u8 {
        self.get(0x70) as u8
    }
    fn set_status(&self, value: u8) {
        self.set(0x70, value.into());
    }
    fn device_features(&self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        high << 32 | u64::from(self.get(0x10))
    }
    fn set_driver_features(&self, features: u64) {
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
    }
    fn queue_max_size(&self, queue: u16) -> u16 {
        self.set(0x30, queue.into());
        self.get(0x34) as u16
    }
    fn enable_queue(&self, queue: u16, state: &QueueState) {
        self.set(0x30, queue.into());
        self.set(0x38, state.size.into());
        for (offset, address) in [
            (0x80, state.descriptors),
            (0x90, state.available),
            (0xa0, state.used),
        ] {
            self.set(offset, address as u32);
            self.set(offset + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }
    fn reset_queue(&self, queue: u16) {
        self.set(0x30, queue.into());
        self.set(0xc0, 1);
    }
    fn notify(&self, queue: u16) {
        self.set(0x50, queue.into());
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.transport.read(0x100 + offset, data);
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        self.transport.write(0x100 + offset, data);
    }
    fn take_interrupt(&self) -> bool {
        let remote = self.remote.as_ref().map(EventFd::read);
        let edge = self.line.read().is_ok() || remote.is_some_and(|read| read.is_ok());
        // A device that another process serves always says that it may be a queue.
        let always = u32::from(self.remote.is_some());
        let status = self.get(0x60) & !always;
        self.set(0x64, status);
        edge || status != 0
    }
    fn suspend(&self) {
        self.transport.suspend();
    }
    fn resume(&self) {
        self.transport.resume();
    }
    fn save(&self) -> DeviceState {
        to_value(self.transport.save())
    }
    fn load(&self, state: DeviceState) -> Result<(), DeviceError> {
        self.transport.load(from_value(state)?)
    }
    fn with_core(&self, what: &mut dyn FnMut(&mut Core)) {
        self.transport.with_core(|core| what(core));
    }
    fn raw(&self) -> (Arc<dyn BusDevice>, u64) {
        (self.transport.clone(), MmioTransport::SIZE)
    }
}

/// The state of a device that was not lost, as data.
fn to_value(state: Option<impl Serialize>) -> DeviceState {
    let state = state.expect("a device that was not lost");
    serde_json::to_value(state).expect("a state is data")
}

fn from_value<T: DeserializeOwned>(state: DeviceState) -> Result<T, DeviceError> {
    serde_json::from_value(state).map_err(|e| DeviceError::Unsupported(e.to_string()))
}

/// How a chain lies in the descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One descriptor after the other.
    Direct,
    /// One descriptor that points to a table.
    Indirect,
}

/// A driver of one device that keeps to the rules.
pub struct Driver {
    /// The transport.
    pub registers: Box<dyn Registers>,
    /// Guest memory.
    pub mem: GuestMemory,
    /// Features that both sides agreed on.
    pub features: u64,
    /// The queues, all of them enabled.
    pub queues: Vec<DriverQueue>,
    next: u64,
}

impl Driver {
    /// For a device that nobody drives yet.
    pub fn new(registers: Box<dyn Registers>, mem: GuestMemory) -> Self {
        Self {
            registers,
            mem,
            features: 0,
            queues: Vec::new(),
            next: FIRST,
        }
    }

    /// Reset the device and start it with all that it offers of `features` and all of its queues, each with at most
    /// `queue_size` descriptors.
    pub fn start(&mut self, features: u64, queue_size: u16) {
        self.set_up(features, queue_size);
        self.registers.set_status(15);
        assert_eq!(self.registers.status(), 15, "the device does not start");
    }

    /// As [`Driver::start`], but with a first queue that lies outside of memory: the device cannot start.
    #[track_caller]
    pub fn start_badly(&mut self) {
        self.set_up(u64::MAX, 16);
        self.registers.set_status(0);
        self.registers.set_status(1);
        self.registers.set_status(3);
        self.registers.set_driver_features(self.features);
        self.registers.set_status(11);
        let mut state = self.queues[0].state;
        state.descriptors = 1 << 40;
        self.registers.enable_queue(0, &state);
        self.registers.set_status(15);
        assert_ne!(self.registers.status() & 0x40, 0, "the device starts");
    }

    /// As [`Driver::start`], but stop before DRIVER_OK.
    pub fn set_up(&mut self, features: u64, queue_size: u16) {
        self.registers.set_status(0);
        assert_eq!(self.registers.status(), 0, "the reset is not done");
        self.next = FIRST;
        self.queues.clear();
        self.registers.set_status(1);
        self.registers.set_status(3);
        self.features = self.registers.device_features() & (features | F_VERSION_1);
        self.registers.set_driver_features(self.features);
        self.registers.set_status(11);
        assert_eq!(self.registers.status(), 11, "the features are refused");
        for index in 0.. {
            let most = self.registers.queue_max_size(index);
            if most == 0 {
                break;
            }
            let queue = self.new_queue(index, most.min(queue_size));
            self.registers.enable_queue(index, &queue.state);
            self.queues.push(queue);
        }
    }

    /// A queue in fresh memory.
    pub fn new_queue(&mut self, index: u16, size: u16) -> DriverQueue {
        let n = u64::from(size);
        let state = QueueState {
            size,
            descriptors: self.allocate(n * 16),
            available: self.allocate(n * 2 + 6),
            used: self.allocate(n * 8 + 6),
            ..QueueState::default()
        };
        let event_idx = self.features & F_EVENT_IDX != 0;
        DriverQueue::new(index, state, self.mem.clone(), event_idx)
    }

    /// Zeroed guest memory, page-aligned.
    pub fn allocate(&mut self, length: u64) -> u64 {
        let address = self.next;
        self.next += length.next_multiple_of(4096);
        assert!(self.next <= MEMORY, "the test needs more memory");
        let zeroes = vec![0; length as usize];
        self.mem
            .write_slice(&zeroes, GuestAddress(address))
            .unwrap();
        address
    }

    /// Make a chain available in queue `queue`, ring, wait until it is used; what was written into it.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Vec<u8> {
        let layout = match self.features & F_INDIRECT_DESC {
            0 => Layout::Direct,
            _ => Layout::Indirect,
        };
        let before = self.next;
        let chain = self.chain(readable, writable);
        self.queues[queue].add(&chain, layout, self.next);
        self.registers.notify(queue as u16);
        let (_, written) = self.wait_used(queue);
        let data = chain.written(&self.mem, written as usize);
        self.next = before;
        data
    }

    /// Buffers in fresh memory, the readable ones filled.
    pub fn chain(&mut self, readable: &[&[u8]], writable: &[usize]) -> Buffers {
        let readable = readable.iter().map(|data| {
            let address = self.allocate(data.len() as u64);
            self.mem.write_slice(data, GuestAddress(address)).unwrap();
            (address, data.len() as u32)
        });
        let readable = readable.collect();
        let writable = writable
            .iter()
            .map(|&length| (self.allocate(length as u64), length as u32));
        Buffers {
            readable,
            writable: writable.collect(),
        }
    }

    /// Wait until a chain of a queue is used: its first descriptor, and the bytes written.
    #[track_caller]
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = self.queues[queue].take_used() {
                return used;
            }
            let status = self.registers.status();
            assert_eq!(status, 15, "the device needs a reset");
            assert!(Instant::now() < until, "the device does not answer");
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

/// Buffers of a chain: guest-physical addresses and lengths.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    /// For the device to read.
    pub readable: Vec<(u64, u32)>,
    /// For the device to write.
    pub writable: Vec<(u64, u32)>,
}

impl Buffers {
    /// The first `length` bytes of the writable buffers.
    pub fn written(&self, mem: &GuestMemory, length: usize) -> Vec<u8> {
        let mut data = Vec::new();
        for &(address, size) in &self.writable {
            let mut part = vec![0; size as usize];
            mem.read_slice(&mut part, GuestAddress(address)).unwrap();
            data.extend(part);
        }
        assert!(length <= data.len(), "more written than there was room for");
        data.truncate(length);
        data
    }
}

/// The driver's side of a queue.
pub struct DriverQueue {
    /// Its number.
    pub index: u16,
    /// Where it lies.
    pub state: QueueState,
    mem: GuestMemory,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of each chain that the device has, by the first.
    lent: Vec<Vec<u16>>,
    next_available: u16,
    last_used: u16,
}

impl DriverQueue {
    /// Nothing is lent yet.
    pub fn new(index: u16, state: QueueState, mem: GuestMemory, event_idx: bool) -> Self {
        let size = state.size;
        Self {
            index,
            state,
            mem,
            event_idx,
            free: (0..size).rev().collect(),
            lent: vec![Vec::new(); usize::from(size)],
            next_available: 0,
            last_used: 0,
        }
    }

    /// Make a chain available; its first descriptor. `table`: where an indirect table may be put.
    pub fn add(&mut self, buffers: &Buffers, layout: Layout, table: u64) -> u16 {
        let readable = buffers.readable.iter().map(|&(a, l)| (a, l, 0));
        let writable = buffers.writable.iter().map(|&(a, l)| (a, l, 2));
        let all: Vec<(u64, u32, u16)> = readable.chain(writable).collect();
        let mut own = Vec::new();
        match layout {
            Layout::Direct => {
                own.extend(
                    all.iter()
                        .map(|_| self.free.pop().expect("a free descriptor")),
                );
                for (at, &(address, length, flags)) in all.iter().enumerate() {
                    let next = own.get(at + 1).copied();
                    let flags = flags | u16::from(next.is_some());
                    self.describe(own[at], address, length, flags, next.unwrap_or(0));
                }
            }
            Layout::Indirect => {
                own.push(self.free.pop().expect("a free descriptor"));
                for (at, &(address, length, flags)) in all.iter().enumerate() {
                    let more = at + 1 < all.len();
                    let place = table + 16 * at as u64;
                    let flags = flags | u16::from(more);
                    write_descriptor(&self.mem, place, address, length, flags, at as u16 + 1);
                }
                self.describe(own[0], table, 16 * all.len() as u32, 4, 0);
            }
        }
        let head = own[0];
        self.lent[usize::from(head)] = own;
        self.make_available(head);
        head
    }

    /// Fill a descriptor, with whatever.
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let place = self.state.descriptors + 16 * u64::from(index);
        write_descriptor(&self.mem, place, address, length, flags, next);
    }

    /// Make the chain that begins at `head` available.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.state.size);
        let entry = self.state.available + 4 + 2 * slot;
        self.mem
            .write_obj(head.to_le(), GuestAddress(entry))
            .unwrap();
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Set the available index, to whatever.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        let place = GuestAddress(self.state.available + 2);
        let order = std::sync::atomic::Ordering::SeqCst;
        self.mem.store(index.to_le(), place, order).unwrap();
    }

    /// A chain that the device has used: its first descriptor, and the bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let order = std::sync::atomic::Ordering::SeqCst;
        let index: u16 = self
            .mem
            .load(GuestAddress(self.state.used + 2), order)
            .unwrap();
        if u16::from_le(index) == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.state.size);
        let entry = GuestAddress(self.state.used + 4 + 8 * slot);
        let [head, written]: [u32; 2] = self.mem.read_obj(entry).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_idx {
            let event = self.state.available + 4 + 2 * u64::from(self.state.size);
            let event = GuestAddress(event);
            self.mem
                .store(self.last_used.to_le(), event, order)
                .unwrap();
        }
        let head = u32::from_le(head) as u16;
        let own = std::mem::take(&mut self.lent[usize::from(head)]);
        assert!(!own.is_empty(), "a chain came back that was not lent");
        self.free.extend(own);
        Some((head, u32::from_le(written)))
    }

    /// How many chains the device has.
    pub fn lent(&self) -> usize {
        self.lent.iter().filter(|own| !own.is_empty()).count()
    }
}

fn write_descriptor(mem: &GuestMemory, at: u64, address: u64, length: u32, flags: u16, next: u16) {
    let high = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
    mem.write_obj([address.to_le(), high.to_le()], GuestAddress(at))
        .unwrap();
}

/// The three parts of a queue, for tests that go through all of them.
pub const RINGS: [Ring; 3] = [Ring::Descriptors, Ring::Available, Ring::Used];
