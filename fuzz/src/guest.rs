//! A guest that does anything, with any device.

use crate::bytes::{Bytes, Few, Number};
use arbitrary::Arbitrary;
use husk_config::DeviceUpdate;
use husk_virtio::testing::{Driver, Mmio, Pci, Registers};
use husk_virtio::{DeviceThread, GuestMemory, VirtioDevice};
use std::sync::{Arc, OnceLock};
use vm_memory::{Bytes as _, GuestAddress};

/// Guest memory in two regions with a hole between. The driver of the kit puts its queues at the start of the first.
const REGIONS: [(u64, u64); 2] = [(0x10_0000, 0x4_0000), (0x20_0000, 0x1_0000)];
/// Where this guest's buffers are: behind the queues.
const BUFFERS: u64 = 0x12_0000;
const BUFFERS_SIZE: u64 = 0x2_0000;

/// Descriptor flags (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A kind of device under test, and what of the host belongs to it.
pub trait Subject: Sized {
    /// A request of a driver that is more or less sound.
    type Request;
    /// What the host does to the device.
    type Host;

    /// A new one and its device, of a variant.
    fn new(variant: u8) -> (Self, Box<dyn VirtioDevice>);

    /// The buffers of a request.
    fn chain(&self, request: Self::Request) -> Chain;

    /// The host acts.
    fn host(&mut self, action: Self::Host, guest: &mut Guest);

    /// The driver was started anew: the device must do its work.
    fn check(&mut self, driver: &mut Driver);
}

/// Buffers for a queue.
#[derive(Debug, Default)]
pub struct Chain {
    /// The queue's number.
    pub queue: u16,
    /// For the device to read.
    pub readable: Vec<Vec<u8>>,
    /// Lengths of those that the device is to write.
    pub writable: Vec<u32>,
}

/// An input.
#[derive(Debug, Arbitrary)]
pub struct Program<R, H> {
    /// Over PCI, not MMIO.
    pub(crate) pci: bool,
    /// Of the device.
    pub(crate) variant: u8,
    set_up: SetUp,
    pub(crate) actions: Few<Action<R, H>, 255>,
}

/// How a driver begins.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub(crate) struct SetUp {
    /// Features that it does not want.
    without: u64,
    /// The logarithm of the size of its queues.
    size: u8,
}

/// What a guest, or its host, does.
#[derive(Debug, Arbitrary)]
pub(crate) enum Action<R, H> {
    Request {
        request: R,
        indirect: bool,
    },
    Chain {
        queue: u8,
        indirect: bool,
        parts: Few<Part, 16>,
    },
    Write {
        at: Place,
        bytes: Bytes,
    },
    Describe {
        queue: u8,
        index: u8,
        part: Part,
        flags: u16,
        next: u16,
    },
    Available {
        queue: u8,
        head: u16,
    },
    AvailableIndex {
        queue: u8,
        index: u16,
    },
    Notify {
        queue: u16,
    },
    Wait,
    Start(SetUp),
    Status(u8),
    ResetQueue {
        queue: u8,
    },
    EnableQueue {
        queue: u8,
        size: u16,
        part: u8,
        at: Place,
    },
    ReadConfig {
        offset: u16,
        length: u8,
    },
    WriteConfig {
        offset: u16,
        bytes: Bytes,
    },
    ReadRegister {
        offset: u16,
        length: u8,
    },
    WriteRegister {
        offset: u16,
        bytes: Bytes,
    },
    /// The host stops the device and lets it go on, as for a snapshot.
    Pause,
    Host(H),
}

/// A buffer.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub(crate) struct Part {
    at: Place,
    length: Number,
    writable: bool,
}

/// An address.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub(crate) enum Place {
    Buffer(u16),
    Other(u16),
    /// Before the end of the first region.
    End(u8),
    /// In a queue: its table, its rings.
    Queue {
        queue: u8,
        part: u8,
        offset: u16,
    },
    Any(u64),
}

/// The guest.
pub struct Guest {
    /// Memory, registers, and queues as they were set up last.
    pub driver: Driver,
    /// Where the next buffer goes.
    next: u64,
    /// The next descriptor of each queue to be used: those that the device has still may be among them.
    descriptors: Vec<u16>,
}

/// The thread of all devices, one for the process.
pub fn thread() -> &'static Arc<DeviceThread> {
    static THREAD: OnceLock<Arc<DeviceThread>> = OnceLock::new();
    THREAD.get_or_init(|| Arc::new(DeviceThread::start("io", || ()).expect("a thread")))
}

/// `device` behind one of the transports.
pub(crate) fn make(
    pci: bool,
    device: Box<dyn VirtioDevice>,
    mem: &GuestMemory,
) -> Box<dyn Registers> {
    match pci {
        false => Box::new(Mmio::new(device, thread(), mem)),
        true => Box::new(Pci::new(device, thread(), mem)),
    }
}

/// Run an input.
pub fn run<S: Subject>(program: Program<S::Request, S::Host>) {
    let (mut subject, mut guest) = Guest::of::<S>(&program);
    guest.run(&mut subject, program.actions.0);
    guest.wait();
    guest.driver.start(u64::MAX, 16);
    subject.check(&mut guest.driver);
}

impl Guest {
    /// The device that a program begins with, and its guest, which has begun to drive it.
    pub(crate) fn of<S: Subject>(program: &Program<S::Request, S::Host>) -> (S, Self) {
        let (subject, device) = S::new(program.variant);
        let ranges = REGIONS.map(|(start, size)| (GuestAddress(start), size as usize));
        let mem = GuestMemory::from_ranges(&ranges).expect("guest memory");
        let mut guest = Self {
            driver: Driver::new(make(program.pci, device, &mem), mem),
            next: 0,
            descriptors: Vec::new(),
        };
        guest.start(program.set_up);
        (subject, guest)
    }

    /// Do these.
    pub(crate) fn run<S: Subject>(
        &mut self,
        subject: &mut S,
        actions: Vec<Action<S::Request, S::Host>>,
    ) {
        for action in actions {
            match action {
                Action::Request { request, indirect } => {
                    let chain = subject.chain(request);
                    self.request(&chain, indirect);
                }
                Action::Host(action) => {
                    subject.host(action, self);
                    self.wait();
                }
                action => self.act(action),
            }
        }
    }

    fn start(&mut self, set_up: SetUp) {
        self.driver.set_up(!set_up.without, 1 << (set_up.size % 9));
        self.driver.registers.set_status(15);
        self.descriptors = vec![0; self.driver.queues.len()];
    }

    /// Until the device has seen all that was done. What it waits for itself may still be under way.
    pub fn wait(&self) {
        self.driver.registers.with_core(&mut |core| {
            core.with_device(|_| ());
        });
    }

    /// Change the device.
    pub fn update(&self, change: DeviceUpdate) {
        self.with_device(move |device| drop(device.update(&change)));
    }

    /// Call `what` with the device.
    pub fn with_device(&self, what: impl FnOnce(&mut dyn VirtioDevice) + Send + 'static) {
        let mut what = Some(what);
        self.driver.registers.with_core(&mut |core| {
            if let Some(what) = what.take() {
                core.with_device(what);
            }
        });
    }

    /// Stop the device, call `what` with it, and let it go on.
    pub fn pause(&self, what: impl FnOnce(&mut dyn VirtioDevice) + Send + 'static) {
        self.driver.registers.with_core(&mut |core| {
            core.suspend();
            core.save();
        });
        self.with_device(what);
        self.driver.registers.with_core(&mut |core| {
            core.resume();
        });
    }

    /// Lay a chain out, make it available, and ring.
    fn request(&mut self, chain: &Chain, indirect: bool) {
        let readable = chain.readable.iter().map(|data| {
            let at = self.place(data.len() as u64);
            let _ = self.driver.mem.write_slice(data, GuestAddress(at));
            (at, data.len() as u32, 0)
        });
        let mut parts: Vec<(u64, u32, u16)> = readable.collect();
        for &length in &chain.writable {
            parts.push((self.place(length.into()), length, WRITE));
        }
        self.offer(chain.queue.into(), &parts, indirect);
    }

    fn offer(&mut self, queue: usize, parts: &[(u64, u32, u16)], indirect: bool) {
        let count = self.driver.queues.len();
        let table = self.place(16 * parts.len() as u64);
        let at = queue % count;
        let (queue, next) = (&mut self.driver.queues[at], &mut self.descriptors[at]);
        let size = queue.state.size;
        let head = *next % size;
        for (index, &(address, length, flags)) in (0..).zip(parts) {
            let more = usize::from(index) + 1 < parts.len();
            let flags = flags | if more { NEXT } else { 0 };
            if indirect {
                let high = u64::from(length) | u64::from(flags) << 32 | u64::from(index + 1) << 48;
                let place = GuestAddress(table + 16 * u64::from(index));
                let _ = self
                    .driver
                    .mem
                    .write_obj([address.to_le(), high.to_le()], place);
                continue;
            }
            let own = head.wrapping_add(index) % size;
            queue.describe(own, address, length, flags, (own + 1) % size);
        }
        let used = match indirect {
            true => {
                queue.describe(head, table, 16 * parts.len() as u32, INDIRECT, 0);
                1
            }
            false => parts.len() as u16,
        };
        *next = head.wrapping_add(used);
        queue.make_available(head);
        self.driver.registers.notify(at as u16);
    }

    /// Room for `length` bytes among the buffers; the next ones lie behind, and sometimes over others.
    fn place(&mut self, length: u64) -> u64 {
        if self.next + length > BUFFERS_SIZE {
            self.next = 0;
        }
        let at = BUFFERS + self.next;
        self.next += length.min(BUFFERS_SIZE).next_multiple_of(16);
        at
    }

    fn address(&self, place: Place) -> u64 {
        let [(first, first_size), (other, _)] = REGIONS;
        match place {
            Place::Buffer(offset) => BUFFERS + u64::from(offset),
            Place::Other(offset) => other + u64::from(offset),
            Place::End(before) => first + first_size - u64::from(before),
            Place::Queue {
                queue,
                part,
                offset,
            } => {
                let state = self.driver.queues[self.queue(queue)].state;
                let start = match part % 3 {
                    0 => state.descriptors,
                    1 => state.available,
                    _ => state.used,
                };
                start + u64::from(offset)
            }
            Place::Any(address) => address,
        }
    }

    /// A queue that exists.
    fn queue(&self, number: u8) -> usize {
        usize::from(number) % self.driver.queues.len()
    }

    fn act<R, H>(&mut self, action: Action<R, H>) {
        match action {
            Action::Chain {
                queue,
                indirect,
                parts,
            } => {
                let parts: Vec<(u64, u32, u16)> = parts
                    .0
                    .iter()
                    .map(|part| {
                        let flags = if part.writable { WRITE } else { 0 };
                        (self.address(part.at), part.length.get(), flags)
                    })
                    .collect();
                self.offer(self.queue(queue), &parts, indirect);
            }
            Action::Write { at, bytes } => {
                let address = GuestAddress(self.address(at));
                let _ = self.driver.mem.write_slice(&bytes.0, address);
            }
            Action::Describe {
                queue,
                index,
                part,
                flags,
                next,
            } => {
                let address = self.address(part.at);
                let flags = flags | if part.writable { WRITE } else { 0 };
                let queue = &self.driver.queues[self.queue(queue)];
                let index = u16::from(index) % queue.state.size;
                queue.describe(index, address, part.length.get(), flags, next);
            }
            Action::Available { queue, head } => {
                let queue = self.queue(queue);
                self.driver.queues[queue].make_available(head);
            }
            Action::AvailableIndex { queue, index } => {
                let queue = self.queue(queue);
                self.driver.queues[queue].set_available_index(index);
            }
            Action::Wait => self.wait(),
            Action::Start(set_up) => self.start(set_up),
            Action::Pause => self.pause(|_| ()),
            Action::EnableQueue {
                queue,
                size,
                part,
                at,
            } => self.enable_queue(queue, size, part, at),
            other => self.access(other),
        }
    }

    /// Registers.
    fn access<R, H>(&mut self, action: Action<R, H>) {
        let registers = &self.driver.registers;
        let (raw, size) = registers.raw();
        let mut data = [0; 8];
        // What a vCPU's instruction moves.
        let width = |length: u8| usize::from(length % 8) + 1;
        match action {
            Action::Notify { queue } => registers.notify(queue),
            Action::Status(status) => registers.set_status(status),
            Action::ResetQueue { queue } => registers.reset_queue(self.queue(queue) as u16),
            Action::ReadConfig { offset, length } => {
                registers.read_config(offset.into(), &mut data[..width(length)]);
            }
            Action::WriteConfig { offset, bytes } => {
                for part in bytes.0.chunks(8) {
                    registers.write_config(offset.into(), part);
                }
            }
            Action::ReadRegister { offset, length } => {
                raw.read(u64::from(offset) % size, &mut data[..width(length)]);
            }
            Action::WriteRegister { offset, bytes } => {
                for part in bytes.0.chunks(8) {
                    raw.write(u64::from(offset) % size, part);
                }
            }
            _ => {}
        }
    }

    /// Set a queue up anew, elsewhere if `size` is not 0.
    fn enable_queue(&mut self, queue: u8, size: u16, part: u8, at: Place) {
        let index = self.queue(queue);
        let mut state = self.driver.queues[index].state;
        if size != 0 {
            let address = self.address(at);
            state.size = size;
            match part % 4 {
                0 => state.descriptors = address,
                1 => state.available = address,
                2 => state.used = address,
                _ => {}
            }
        }
        self.driver.registers.enable_queue(index as u16, &state);
    }
}
