//! The register file and what decides about interrupts.

use super::wire::Wire;
use husk_metrics::METRICS;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

pub(super) const PORTS: u64 = 8;

pub(super) const THR: u64 = 0; // read: RBR; with DLAB: DLL
const IER: u64 = 1; // with DLAB: DLM
const IIR: u64 = 2; // write: FCR
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

// IER's bits, and at the same time the conditions that they enable.
const RDI: u8 = 1; // received data
const THRI: u8 = 2; // transmitter empty
const RLSI: u8 = 4; // receiver line status
const MSI: u8 = 8; // modem status
const IER_BITS: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MSI: u8 = 0x00;
const IIR_THRI: u8 = 0x02;
const IIR_RDI: u8 = 0x04;
const IIR_RLSI: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const FCR_TRIGGER_SHIFT: u8 = 6;
const FIFO_SIZE: usize = 16;

const LCR_DLAB: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;
const MCR_BITS: u8 = 0x1f;

const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_EMPTY: u8 = 0x60; // THRE and TEMT

const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;
const MSR_TERI: u8 = 0x04;

/// So many reads of LSR in a row, with no other access between them, are a guest that polls for input.
const POLLING: u8 = 16;

/// The UART's state, less the bytes on the wire.
///
/// A byte is visible to the guest (LSR.DR, the interrupt, RBR) only while the guest is receiving:
/// - it has enabled the received-data interrupt, and asserts RTS, unless it has never asserted RTS since the
///   reset: then it does not use it. RTS alone is not enough: Linux's early console sets it, and the
///   driver that follows reads RBR several times just to clear it; or
/// - it polls: it has read LSR 16 times in a row.
///
/// A FIFO reset discards nothing but what was looped back: the bytes are still on the wire.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Registers {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    lsr_errors: u8,
    msr_deltas: u8,
    scr: u8,
    divisor: [u8; 2],
    looped: VecDeque<u8>,
    thre_pending: bool,
    rts_used: bool,
    lsr_reads: u8,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            lsr_errors: 0,
            msr_deltas: 0,
            scr: 0,
            divisor: [1, 0], // 115200 baud: Linux divides by it when it probes the speed
            looped: VecDeque::new(),
            thre_pending: false,
            rts_used: false,
            lsr_reads: 0,
        }
    }
}

impl Registers {
    /// What a guest can have made of them; those of a snapshot may say anything.
    pub(super) fn checked(mut self) -> Self {
        self.ier &= IER_BITS;
        self.mcr &= MCR_BITS;
        self.looped.truncate(FIFO_SIZE);
        self
    }

    /// Whether a write to THR goes out of the machine (not looped back, not to the divisor).
    pub(super) fn transmits(&self) -> bool {
        self.lcr & LCR_DLAB == 0 && !self.loopback()
    }

    /// Whether the received-data interrupt is due.
    pub(super) fn receives(&self, wire: &Wire) -> bool {
        self.conditions(wire) & RDI != 0
    }

    /// Whether any interrupt is due.
    pub(super) fn interrupts(&self, wire: &Wire) -> bool {
        self.conditions(wire) != 0
    }

    /// Begin an access by the guest.
    pub(super) fn access<'a>(&'a mut self, wire: &'a Wire) -> Access<'a> {
        Access {
            before: self.conditions(wire),
            registers: self,
            wire,
            drained: false,
        }
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn polling(&self) -> bool {
        self.lsr_reads >= POLLING
    }

    /// Number of bytes that the guest can see.
    fn readable(&self, wire: &Wire) -> usize {
        let rts = self.mcr & MCR_RTS != 0 || !self.rts_used;
        if self.loopback() {
            self.looped.len()
        } else if self.polling() || (self.ier & RDI != 0 && rts) {
            wire.arrived()
        } else {
            0
        }
    }

    /// The enabled conditions that are pending, as IER's bits.
    fn conditions(&self, wire: &Wire) -> u8 {
        let mut pending = 0;
        if self.ier & RDI != 0 && self.readable(wire) > 0 {
            pending |= RDI;
        }
        if self.thre_pending {
            pending |= THRI;
        }
        if self.lsr_errors != 0 {
            pending |= RLSI;
        }
        if self.msr_deltas != 0 {
            pending |= MSI;
        }
        pending & self.ier
    }

    fn modem_lines(&self) -> u8 {
        if !self.loopback() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [
            (MCR_RTS, MSR_CTS),
            (MCR_DTR, MSR_DSR),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |lines, (_, input)| lines | input)
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn trigger_level(&self) -> usize {
        match (self.fifo_enabled(), self.fcr >> FCR_TRIGGER_SHIFT) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        }
    }

    fn write_ier(&mut self, value: u8) {
        let value = value & IER_BITS;
        // Enabling it while the transmitter is empty raises it, even if it was read before.
        self.thre_pending |= value & !self.ier & THRI != 0;
        self.ier = value;
    }

    fn write_fcr(&mut self, value: u8) {
        let toggled = (value ^ self.fcr) & FCR_ENABLE != 0;
        if toggled || value & FCR_CLEAR_RECEIVER != 0 {
            self.looped.clear();
        }
        self.fcr = value;
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value & MCR_BITS;
        let after = self.modem_lines();
        let changed = (before ^ after) >> 4;
        let ring_ended = before & !after & MSR_RI != 0;
        self.msr_deltas |= changed & !MSR_TERI | if ring_ended { MSR_TERI } else { 0 };
        // In loopback the pin is inactive, whatever the bit says.
        self.rts_used |= !self.loopback() && self.mcr & MCR_RTS != 0;
    }

    fn loop_back(&mut self, value: u8) {
        let room = if self.fifo_enabled() { FIFO_SIZE } else { 1 };
        if self.looped.len() < room {
            self.looped.push_back(value);
        } else {
            self.lsr_errors |= LSR_OVERRUN;
        }
        self.thre_pending = true;
    }

    /// Count reads of LSR. Once polling, a guest may read and transmit (echo) and still polls.
    fn note(&mut self, offset: u64, write: bool) {
        self.lsr_reads = match (offset, write) {
            (LSR, false) => self.lsr_reads.saturating_add(1),
            (THR, _) if self.polling() => self.lsr_reads,
            _ => 0,
        };
    }
}

/// One access by the guest, from `Registers::access` to the question whether it interrupts.
pub(super) struct Access<'a> {
    registers: &'a mut Registers,
    wire: &'a Wire,
    before: u8,
    drained: bool,
}

impl Access<'_> {
    pub(super) fn read(&mut self, offset: u64) -> u8 {
        let wire = self.wire;
        let dlab = self.registers.lcr & LCR_DLAB != 0;
        let value = match offset {
            THR if dlab => self.registers.divisor[0],
            IER if dlab => self.registers.divisor[1],
            THR => self.read_rbr(),
            IER => self.registers.ier,
            IIR => self.read_iir(),
            LCR => self.registers.lcr,
            MCR => self.registers.mcr,
            LSR => {
                self.registers.note(offset, false);
                let errors = std::mem::take(&mut self.registers.lsr_errors);
                let data = self.registers.readable(wire) > 0;
                LSR_EMPTY | errors | if data { LSR_DATA } else { 0 }
            }
            MSR => self.registers.modem_lines() | std::mem::take(&mut self.registers.msr_deltas),
            SCR => self.registers.scr,
            _ => 0xff,
        };
        if offset != LSR {
            self.registers.note(offset, false);
        }
        value
    }

    pub(super) fn write(&mut self, offset: u64, value: u8) {
        let registers = &mut *self.registers;
        registers.note(offset, true);
        let dlab = registers.lcr & LCR_DLAB != 0;
        match offset {
            THR if dlab => registers.divisor[0] = value,
            IER if dlab => registers.divisor[1] = value,
            THR if registers.loopback() => registers.loop_back(value),
            IER => {
                registers.write_ier(value);
                // Any write interrupts anew for what is still pending: a guest that has masked and unmasked
                // the UART must not depend on an edge from before.
                self.before = 0;
            }
            IIR => registers.write_fcr(value),
            LCR => registers.lcr = value,
            MCR => registers.write_mcr(value),
            SCR => registers.scr = value,
            _ => {} // THR here: another vCPU turned loopback off meanwhile, and the byte is in neither place
        }
    }

    /// Bytes written to THR have gone out.
    pub(super) fn transmitted(&mut self) {
        self.registers.note(THR, true);
        self.registers.thre_pending = true;
    }

    /// Whether the guest has read the last byte that had arrived.
    pub(super) fn drained(&self) -> bool {
        self.drained
    }

    /// Whether an enabled condition has arisen.
    ///
    /// One edge for each condition that becomes pending, even if another already holds the line: Linux's handler
    /// gives up after a number of rounds, and would then wait for an edge that never comes.
    pub(super) fn interrupt(&self) -> bool {
        self.registers.conditions(self.wire) & !self.before != 0
    }

    fn read_rbr(&mut self) -> u8 {
        if self.registers.loopback() {
            return self.registers.looped.pop_front().unwrap_or(0);
        }
        if self.registers.readable(self.wire) == 0 {
            return 0;
        }
        let (byte, last) = self.wire.take().unwrap_or((0, false));
        METRICS.uart.read_count.inc();
        self.drained |= last;
        byte
    }

    fn read_iir(&mut self) -> u8 {
        let conditions = self.registers.conditions(self.wire);
        let id = if conditions & RLSI != 0 {
            IIR_RLSI
        } else if conditions & RDI != 0 {
            // Below the trigger level it is the character timeout: no more follows soon.
            match self.registers.readable(self.wire) >= self.registers.trigger_level() {
                true => IIR_RDI,
                false => IIR_TIMEOUT,
            }
        } else if conditions & THRI != 0 {
            self.registers.thre_pending = false;
            IIR_THRI
        } else if conditions & MSI != 0 {
            IIR_MSI
        } else {
            IIR_NONE
        };
        let fifo = if self.registers.fifo_enabled() {
            IIR_FIFO
        } else {
            0
        };
        id | fifo
    }
}
