//! The registers of both transports, and PCI's configuration spaces.
#![no_main]

use arbitrary::Arbitrary;
use husk_bus::{Bus, BusDevice};
use husk_fuzz::bytes::{Bytes, Few};
use husk_fuzz::echo::Echo;
use husk_fuzz::guest::thread;
use husk_pci::{HostBridge, Relocate};
use husk_virtio::GuestMemory;
use husk_virtio::testing::{Driver, Mmio, Pci, Registers};
use libfuzzer_sys::fuzz_target;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes as _, GuestAddress};

/// Guest memory, where the kit's driver has its queues.
const MEMORY: (u64, usize) = (0x10_0000, 0x2_0000);
/// Where things are on the bus.
const MMIO: u64 = 0xc000_0000;
const ECAM: u64 = 0xe000_0000;
const WINDOW: u64 = 0xe800_0000;
const WINDOW_SIZE: u64 = 0x10_0000;
/// Of the device that the kit's driver drives: behind the bridge, and another one with its BAR behind.
const BAR: u64 = WINDOW;
const FUNCTION: u64 = ECAM + (1 << 15);

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Place {
    /// A register of the transport that the driver uses.
    Register(u16),
    /// Configuration space of a function, by its device number.
    Config { device: u8, offset: u16 },
    /// The window of BARs.
    Window(u32),
}

#[derive(Debug, Arbitrary)]
enum Action {
    Read {
        at: Place,
        width: u8,
    },
    Write {
        at: Place,
        bytes: Bytes,
    },
    /// Write a 32-bit number to a register of the one transport, or a narrow one to one of the other.
    Set {
        register: u8,
        value: u32,
        width: u8,
    },
    Memory {
        offset: u32,
        bytes: Bytes,
    },
    /// Set the status and make a queue that is sound.
    Enable {
        queue: bool,
    },
    Status(u8),
    Pause,
}

#[derive(Debug, Arbitrary)]
struct Program {
    pci: bool,
    /// The driver has come as far as DRIVER_OK.
    started: bool,
    actions: Few<Action, 255>,
}

/// Where the doorbells are, as whoever registers them knows.
#[derive(Clone, Default)]
struct Doorbells(Arc<Mutex<Option<u64>>>);

impl Relocate for Doorbells {
    fn relocate(&self, from: Option<u64>, to: Option<u64>) {
        let mut place = self.0.lock().expect("no panic before");
        assert_eq!(*place, from, "doorbells are somewhere else");
        *place = to;
    }
}

struct Machine {
    driver: Driver,
    bus: Bus,
    pci: bool,
}

impl Machine {
    fn new(pci: bool) -> Self {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(MEMORY.0), MEMORY.1)]).expect("memory");
        let bus = Bus::default();
        let bridge = HostBridge::new(WINDOW..WINDOW + WINDOW_SIZE);
        let place = |start, size, device: Arc<dyn BusDevice>| {
            bus.insert(start, size, device).expect("a free place");
        };
        place(ECAM, HostBridge::ECAM_SIZE, bridge.ecam());
        place(WINDOW, WINDOW_SIZE, bridge.window());
        let mmio = Mmio::new(Echo::boxed(), thread(), &mem);
        place(MMIO, mmio.raw().1, mmio.transport.clone());
        let function = Pci::new(Echo::boxed(), thread(), &mem);
        for transport in [&function, &Pci::new(Echo::boxed(), thread(), &mem)] {
            let doorbells = Box::new(Doorbells::default());
            bridge
                .add(transport.transport.clone(), Some(doorbells))
                .expect("room on the bus");
        }
        let registers: Box<dyn Registers> = if pci {
            Box::new(function)
        } else {
            Box::new(mmio)
        };
        Self {
            driver: Driver::new(registers, mem),
            bus,
            pci,
        }
    }

    fn address(&self, place: Place) -> u64 {
        match place {
            Place::Register(offset) if self.pci => BAR + u64::from(offset % 0x4000),
            Place::Register(offset) => MMIO + u64::from(offset % 0x1000),
            Place::Config { device, offset } => {
                ECAM + (u64::from(device % 4) << 15) + u64::from(offset)
            }
            Place::Window(offset) => WINDOW + u64::from(offset) % WINDOW_SIZE,
        }
    }

    fn act(&mut self, action: Action) {
        let registers = &self.driver.registers;
        match action {
            Action::Read { at, width } => {
                let mut data = [0; 8];
                self.bus
                    .read(self.address(at), &mut data[..usize::from(width % 8) + 1]);
            }
            Action::Write { at, bytes } => {
                // One after the other, as for a string instruction.
                for (index, part) in (0..).zip(bytes.0.chunks(4)) {
                    self.bus
                        .write(self.address(at).wrapping_add(4 * index), part);
                }
            }
            Action::Set {
                register,
                value,
                width,
            } => {
                let width = 1 << (width % 3);
                let start = match (self.pci, register >= 64) {
                    (false, _) => MMIO,
                    (true, false) => BAR,
                    (true, true) => FUNCTION,
                };
                let offset = u64::from(register) & !(width as u64 - 1);
                self.bus
                    .write(start + offset, &value.to_le_bytes()[..width]);
            }
            Action::Memory { offset, bytes } => {
                let address = GuestAddress(MEMORY.0 + u64::from(offset));
                let _ = self.driver.mem.write_slice(&bytes.0, address);
            }
            Action::Enable { queue } => {
                if let Some(queue) = self.driver.queues.get(usize::from(queue)) {
                    registers.enable_queue(queue.index, &queue.state);
                    registers.notify(queue.index);
                }
            }
            Action::Status(status) => registers.set_status(status),
            Action::Pause => registers.with_core(&mut |core| {
                core.suspend();
                core.save();
                core.resume();
            }),
        }
    }
}

fuzz_target!(|program: Program| {
    let mut machine = Machine::new(program.pci);
    if program.started {
        machine.driver.start(u64::MAX, 16);
    }
    for action in program.actions.0 {
        machine.act(action);
    }
    machine.driver.start(u64::MAX, 16);
    for queue in 0..2 {
        let answer = machine.driver.request(queue, &[b"abc"], &[2, 5]);
        assert_eq!(answer, b"abc");
    }
});
