//! A 16550A UART (National Semiconductor PC16550D), as Linux's 8250 driver and others know it.
//!
//! Own code, and not vm-superio's, because a guest's start-up must lose no input (a FIFO reset or a stray
//! read of RBR throws typed-ahead bytes away there), because RTS must hold the sender, and because a
//! transmitted byte must not cost a system call.

mod registers;
mod wire;

pub use registers::Registers;
pub use wire::{CAPACITY, Receiver, Wire};

use crate::{ports_of, pulse};
use husk_bus::BusDevice;
use husk_metrics::METRICS;
use registers::{PORTS, THR};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Where the guest's bytes go.
pub trait Output: Send + Sync {
    /// Take all of `bytes`. Called on a vCPU thread with no lock of the UART held, so it may block while the
    /// host is slow: that is the guest's back-pressure. It must return at once (and may drop `bytes`) when
    /// the VM is being ended.
    fn write(&self, bytes: &[u8]);
}

/// The UART: 8 byte-wide ports.
///
/// Transmission takes no time: LSR always says that the transmitter is empty, and a write to THR returns
/// when the output has the byte.
///
/// Reception: bytes wait on the [`Wire`] until the guest is really receiving (see [`Registers`]).
/// The interrupt is an ISA edge: one pulse whenever an enabled condition arises.
pub struct Serial {
    registers: Mutex<Registers>,
    wire: Arc<Wire>,
    output: Arc<dyn Output>,
    irq: EventFd,
}

impl Serial {
    /// A UART as after a reset. It becomes the receiver of `wire`, in place of an earlier one.
    pub fn new(irq: EventFd, output: Arc<dyn Output>, wire: Arc<Wire>) -> Arc<Self> {
        let serial = Arc::new(Self {
            registers: Mutex::default(),
            wire,
            output,
            irq,
        });
        let receiver: Arc<dyn Receiver> = serial.clone();
        serial.wire.connect(Arc::downgrade(&receiver));
        serial
    }

    /// Read one register; 0xff past the last.
    pub fn read_register(&self, offset: u64) -> u8 {
        let (value, drained, interrupt) = {
            let mut registers = self.lock();
            let mut port = registers.access(&self.wire);
            let value = port.read(offset);
            (value, port.drained(), port.interrupt())
        };
        if interrupt {
            pulse(&self.irq);
        }
        if drained {
            self.wire.wake();
        }
        value
    }

    /// Write one register. Blocks in [`Output::write`] when it transmits.
    pub fn write_register(&self, offset: u64, value: u8) {
        self.write_many(offset, &[value]);
    }

    /// Write each of `values` to the same register (`rep outsb`).
    pub fn write_many(&self, offset: u64, values: &[u8]) {
        let transmits = offset == THR && self.lock().transmits();
        if transmits {
            // Before THRE is signalled, so that no other vCPU's byte can overtake.
            self.output.write(values);
            METRICS.uart.write_count.add(values.len() as u64);
        }
        let interrupt = {
            let mut registers = self.lock();
            let mut port = registers.access(&self.wire);
            if transmits {
                port.transmitted();
            } else {
                values.iter().for_each(|&value| port.write(offset, value));
            }
            port.interrupt()
        };
        if interrupt {
            pulse(&self.irq);
        }
    }

    /// Fill `data` from one register (`rep insb`).
    pub fn read_many(&self, offset: u64, data: &mut [u8]) {
        data.fill_with(|| self.read_register(offset));
    }

    /// The registers, for a snapshot.
    pub fn registers(&self) -> Registers {
        self.lock().clone()
    }

    /// Put back what [`Serial::registers`] returned, and interrupt for what is pending in it.
    pub fn restore(&self, registers: Registers) {
        let interrupt = {
            let mut current = self.lock();
            *current = registers.checked();
            current.interrupts(&self.wire)
        };
        if interrupt {
            pulse(&self.irq);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receiver for Serial {
    fn arrived(&self) {
        let interrupt = self.lock().receives(&self.wire);
        if interrupt {
            pulse(&self.irq);
        }
    }
}

/// Bytes of an access of `len` at `offset` that are behind the last register.
fn behind(offset: u64, len: usize) -> u64 {
    (len as u64).saturating_sub(PORTS.saturating_sub(offset))
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            if let Some(byte) = data.get_mut(at) {
                *byte = self.read_register(port);
            }
        }
        if let missed @ 1.. = behind(offset, data.len()) {
            METRICS.uart.missed_read_count.add(missed);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            if let Some(&value) = data.get(at) {
                self.write_register(port, value);
            }
        }
        if let missed @ 1.. = behind(offset, data.len()) {
            METRICS.uart.missed_write_count.add(missed);
        }
    }

    fn write_repeated(&self, offset: u64, data: &[u8], size: usize) {
        if size == 1 && offset < PORTS {
            return self.write_many(offset, data);
        }
        for element in data.chunks(size.max(1)) {
            self.write(offset, element);
        }
    }
}

#[cfg(test)]
mod tests;
