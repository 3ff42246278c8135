//! An i8042 with an AT keyboard on which only Ctrl, Alt and Del can be pressed.
//!
//! What Linux's drivers i8042 and atkbd need, and what they would otherwise wait for, is answered at once. Replies are polled
//! for or come by interrupt, a byte at a time, each announced by an edge. There is no mouse.

use crate::{GuestEvent, GuestEvents, ports_of, pulse};
use husk_bus::BusDevice;
use husk_metrics::{I8042Metrics, METRICS};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Number of I/O ports, from 0x60.
pub const PORTS: u64 = 5;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4; // write; read: status

/// As without a keyboard: see [`crate::i8042`].
const PORT_B_VALUE: u8 = 0x20;

/// Status: a byte for the guest waits at the data port.
const OUTPUT_FULL: u8 = 1;
/// Status, as in the command byte: the self-test has passed.
const SYSTEM: u8 = 1 << 2;
/// Status: the last byte that was written was a command.
const WAS_COMMAND: u8 = 1 << 3;
/// Status: the keyboard is not locked.
const UNLOCKED: u8 = 1 << 4;

/// Command byte: interrupt when the keyboard has sent a byte.
const INTERRUPTS: u8 = 1;
/// Command byte: the keyboard's clock is stopped.
const KEYBOARD_OFF: u8 = 1 << 4;
/// Command byte: the mouse's clock is stopped.
const MOUSE_OFF: u8 = 1 << 5;
/// Command byte: scan codes of set 2 become those of set 1.
const TRANSLATE: u8 = 1 << 6;

/// The most that may wait for the guest; what more it asks for is lost.
const MOST: usize = 32;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;

/// Ctrl, Alt and Del pressed and let go, in set 1, and in set 2 for a guest that has turned translation off.
const KEYS_SET_1: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const KEYS_SET_2: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

/// The controller and its keyboard. `0xfe` to the command port resets the machine, as without a keyboard.
pub struct Keyboard {
    events: Arc<dyn GuestEvents>,
    irq: EventFd,
    state: Mutex<State>,
    metrics: &'static I8042Metrics,
}

/// What the guest has made of the controller and its keyboard.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    command_byte: u8,
    /// Bytes that wait for the guest.
    output: VecDeque<u8>,
    was_command: bool,
    /// What the next byte at the data port is for.
    next: Next,
    /// A driver has told the keyboard to send keys.
    scanning: bool,
}

/// What a byte at the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum Next {
    /// A command for the keyboard.
    Keyboard,
    /// The keyboard's last command.
    KeyboardParameter(u8),
    /// The controller's last command.
    Controller(u8),
}

impl Default for State {
    fn default() -> Self {
        Self {
            command_byte: INTERRUPTS | SYSTEM | MOUSE_OFF | TRANSLATE,
            output: VecDeque::with_capacity(MOST),
            was_command: false,
            next: Next::Keyboard,
            scanning: false,
        }
    }
}

impl State {
    fn status(&self) -> u8 {
        let bit = |there, bit| if there { bit } else { 0 };
        UNLOCKED
            | self.command_byte & SYSTEM
            | bit(!self.output.is_empty(), OUTPUT_FULL)
            | bit(self.was_command, WAS_COMMAND)
    }

    fn send(&mut self, bytes: &[u8]) {
        let room = MOST.saturating_sub(self.output.len());
        self.output.extend(bytes.iter().take(room));
    }

    /// The keyboard's words for "keyboard with translation" and "set 2" are translated like scan codes.
    fn translated(&self, set_2: u8, set_1: u8) -> u8 {
        match self.command_byte & TRANSLATE {
            0 => set_2,
            _ => set_1,
        }
    }

    /// A command to the controller. True when it resets the machine; None when there is no such command.
    fn command(&mut self, command: u8) -> Option<bool> {
        self.next = Next::Keyboard;
        match command {
            0x20 => self.send(&[self.command_byte]),
            // With a byte to come: command byte, output port, what the keyboard or the mouse shall seem to have sent, and
            // what the mouse shall get.
            0x60 | 0xd1..=0xd4 => self.next = Next::Controller(command),
            0xa7 => self.command_byte |= MOUSE_OFF,
            0xa8 => self.command_byte &= !MOUSE_OFF,
            // Test of the mouse's line: its clock is stuck low.
            0xa9 => self.send(&[1]),
            // Self-test: passed.
            0xaa => {
                *self = Self::default();
                self.send(&[0x55]);
            }
            // Test of the keyboard's line: it is sound.
            0xab => self.send(&[0]),
            0xad => self.command_byte |= KEYBOARD_OFF,
            0xae => self.command_byte &= !KEYBOARD_OFF,
            // Output port: no reset, A20 on.
            0xd0 => self.send(&[3]),
            // Pulse the output lines whose bits are 0; bit 0 is the reset line.
            0xf0..=0xff => return Some(command & 1 == 0),
            _ => return None,
        }
        Some(false)
    }

    /// A byte at the data port. True when it resets the machine.
    fn data(&mut self, byte: u8) -> bool {
        match std::mem::replace(&mut self.next, Next::Keyboard) {
            Next::Controller(0x60) => self.command_byte = byte,
            Next::Controller(0xd1) => return byte & 1 == 0,
            // Without the status bit that says so, nothing comes from a mouse: a driver that tests for one sees that.
            Next::Controller(0xd2 | 0xd3) => self.send(&[byte]),
            Next::Controller(_) => {}
            Next::KeyboardParameter(0xf0) if byte == 0 => {
                let set = self.translated(2, 0x41);
                self.send(&[ACKNOWLEDGE, set]);
            }
            Next::KeyboardParameter(_) => self.send(&[ACKNOWLEDGE]),
            Next::Keyboard => self.keyboard(byte),
        }
        false
    }

    /// A command to the keyboard, which also starts its clock.
    fn keyboard(&mut self, command: u8) {
        self.command_byte &= !KEYBOARD_OFF;
        match command {
            // LEDs, scan-code set, repetition: with a byte to come.
            0xed | 0xf0 | 0xf3 => {
                self.next = Next::KeyboardParameter(command);
                self.send(&[ACKNOWLEDGE]);
            }
            0xee => self.send(&[0xee]),
            0xf2 => {
                let kind = self.translated(0x83, 0x41);
                self.send(&[ACKNOWLEDGE, 0xab, kind]);
            }
            0xf4 => {
                self.scanning = true;
                self.send(&[ACKNOWLEDGE]);
            }
            0xf5 | 0xf6 => {
                self.scanning &= command == 0xf6;
                self.send(&[ACKNOWLEDGE]);
            }
            // Reset: the test has passed.
            0xff => {
                self.scanning = false;
                self.send(&[ACKNOWLEDGE, 0xaa]);
            }
            _ => self.send(&[RESEND]),
        }
    }

    /// A byte waits, and the guest wants to be interrupted for it.
    fn interrupts(&self) -> bool {
        self.command_byte & INTERRUPTS != 0 && !self.output.is_empty()
    }
}

impl Keyboard {
    /// A controller that reports [`GuestEvent::Reset`] to `events`; `irq` is its line (edge).
    pub fn new(irq: EventFd, events: Arc<dyn GuestEvents>) -> Self {
        Self {
            events,
            irq,
            state: Mutex::default(),
            metrics: &METRICS.i8042,
        }
    }

    /// Press Ctrl, Alt and Del and let them go. False when no driver listens to the keyboard. Keys that were pressed before
    /// and that the guest has not read yet will do.
    pub fn press_ctrl_alt_del(&self) -> bool {
        let mut state = self.lock();
        let listens =
            state.scanning && state.command_byte & (INTERRUPTS | KEYBOARD_OFF) == INTERRUPTS;
        if !listens {
            self.metrics.error_count.inc();
            return false;
        }
        if state.output.is_empty() {
            match state.command_byte & TRANSLATE {
                0 => state.send(&KEYS_SET_2),
                _ => state.send(&KEYS_SET_1),
            }
        }
        drop(state);
        pulse(&self.irq);
        true
    }

    /// The state, for a snapshot.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Put back what [`Keyboard::state`] told.
    pub fn restore(&self, mut state: State) {
        state.output.truncate(MOST);
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Keyboard {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut interrupt = false;
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            let value = match port {
                DATA => {
                    let mut state = self.lock();
                    let byte = state.output.pop_front();
                    interrupt |= state.interrupts();
                    byte.unwrap_or(0)
                }
                PORT_B => PORT_B_VALUE,
                COMMAND => self.lock().status(),
                _ => {
                    self.metrics.missed_read_count.inc();
                    continue;
                }
            };
            self.metrics.read_count.inc();
            if let Some(byte) = data.get_mut(at) {
                *byte = value;
            }
        }
        if interrupt {
            pulse(&self.irq);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (port, at) in ports_of(offset, data.len(), PORTS) {
            let value = data.get(at).copied().unwrap_or_default();
            let mut state = self.lock();
            let taken = match port {
                DATA => Some(state.data(value)),
                PORT_B => Some(false),
                COMMAND => state.command(value),
                _ => None,
            };
            if let DATA | COMMAND = port {
                state.was_command = port == COMMAND;
            }
            let Some(reset) = taken else {
                self.metrics.missed_write_count.inc();
                continue;
            };
            self.metrics.write_count.inc();
            let interrupt = port == DATA && state.interrupts();
            drop(state);
            if interrupt {
                pulse(&self.irq);
            }
            if reset {
                self.metrics.reset_count.inc();
                self.events.event(GuestEvent::Reset);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{Recorder, irq};

    struct Guest {
        keyboard: Keyboard,
        events: Arc<Recorder>,
        line: EventFd,
    }

    impl Guest {
        fn new() -> Self {
            let events = Arc::new(Recorder::default());
            let (device_end, line) = irq();
            let keyboard = Keyboard::new(device_end, events.clone());
            Self {
                keyboard,
                events,
                line,
            }
        }

        fn read(&self, port: u64) -> u8 {
            let mut data = [0xff];
            self.keyboard.read(port, &mut data);
            data[0]
        }

        fn command(&self, command: u8) {
            assert_eq!(self.read(COMMAND) & 2, 0, "the input buffer is empty");
            self.keyboard.write(COMMAND, &[command]);
        }

        fn data(&self, byte: u8) {
            assert_eq!(self.read(COMMAND) & 2, 0, "the input buffer is empty");
            self.keyboard.write(DATA, &[byte]);
        }

        /// What is read until nothing waits any more.
        fn drain(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.read(COMMAND) & OUTPUT_FULL != 0 {
                bytes.push(self.read(DATA));
                assert!(bytes.len() <= MOST);
            }
            bytes
        }

        /// As [`Guest::drain`], but a byte at a time and only after an interrupt.
        fn drain_by_interrupts(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            while self.line.read().is_ok() {
                assert_ne!(self.read(COMMAND) & OUTPUT_FULL, 0);
                bytes.push(self.read(DATA));
            }
            bytes
        }

        /// As Linux's drivers bring it up.
        fn bring_up(&self) {
            assert!(self.drain().is_empty());
            self.command(0x20);
            let command_byte = self.drain()[0];
            assert_ne!(command_byte & TRANSLATE, 0);
            self.command(0x60);
            self.data(command_byte & !INTERRUPTS | KEYBOARD_OFF);
            // There is no mouse, and that shows at once.
            self.command(0xd3);
            self.data(0x5a);
            assert_eq!(self.read(COMMAND) & 0x20, 0, "not from a mouse");
            assert_eq!(self.drain(), [0x5a]);
            self.command(0xa9);
            assert!(!matches!(self.drain()[..], [0 | 0xfa | 0xff]));
            self.command(0x60);
            self.data((command_byte | INTERRUPTS) & !KEYBOARD_OFF);
            let _ = self.line.read();
            for (byte, replies) in [
                (0xf2, &[0xfa, 0xab, 0x41][..]),
                (0xf5, &[0xfa]),
                (0xed, &[0xfa]),
                (0x00, &[0xfa]),
                (0xf3, &[0xfa]),
                (0x00, &[0xfa]),
                (0xf4, &[0xfa]),
            ] {
                self.data(byte);
                assert_eq!(self.drain_by_interrupts(), replies, "{byte:#x}");
            }
        }
    }

    #[test]
    fn a_driver_brings_it_up_and_hears_the_keys() {
        let guest = Guest::new();
        assert!(!guest.keyboard.press_ctrl_alt_del(), "nobody listens");
        assert!(guest.drain().is_empty());
        guest.bring_up();
        assert!(guest.keyboard.press_ctrl_alt_del());
        // Pressed again before the guest has looked: once is enough.
        assert!(guest.keyboard.press_ctrl_alt_del());
        assert_eq!(guest.drain_by_interrupts(), KEYS_SET_1);
        assert!(guest.keyboard.press_ctrl_alt_del());
        assert_eq!(guest.drain_by_interrupts(), KEYS_SET_1);
    }

    #[test]
    fn a_guest_without_translation_gets_set_2() {
        let guest = Guest::new();
        guest.bring_up();
        guest.command(0x60);
        guest.data(INTERRUPTS | SYSTEM);
        guest.data(0xf2);
        assert_eq!(guest.drain_by_interrupts(), [0xfa, 0xab, 0x83]);
        assert!(guest.keyboard.press_ctrl_alt_del());
        assert_eq!(guest.drain_by_interrupts(), KEYS_SET_2);
    }

    #[test]
    fn keys_are_not_sent_to_a_driver_that_has_gone() {
        for goodbye in [
            &[(DATA, 0xf5)][..],
            &[(DATA, 0xff)],
            &[(COMMAND, 0xad)],
            &[(COMMAND, 0xaa)],
            &[(COMMAND, 0x60), (DATA, TRANSLATE)],
        ] {
            let guest = Guest::new();
            guest.bring_up();
            for (port, byte) in goodbye {
                guest.keyboard.write(*port, &[*byte]);
            }
            guest.drain();
            assert!(!guest.keyboard.press_ctrl_alt_del(), "{goodbye:x?}");
            assert!(guest.drain().is_empty());
        }
    }

    #[test]
    fn the_self_test_passes_and_the_reset_line_resets() {
        let guest = Guest::new();
        guest.command(0xaa);
        assert_eq!(guest.drain(), [0x55]);
        guest.command(0xab);
        assert_eq!(guest.drain(), [0]);
        for harmless in [0xff, 0xf1, 0xd0, 0xae] {
            guest.command(harmless);
        }
        guest.command(0xd1);
        guest.data(0xdf);
        assert!(guest.events.0.lock().unwrap().is_empty());
        guest.command(0xfe);
        guest.command(0xd1);
        guest.data(0xfe);
        let seen = guest.events.0.lock().unwrap();
        assert_eq!(*seen, [GuestEvent::Reset, GuestEvent::Reset]);
    }

    #[test]
    fn no_guest_makes_it_grow_or_fail() {
        let guest = Guest::new();
        let mut state = 1u32;
        for _ in 0..100_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [byte, port, what, _] = state.to_be_bytes();
            match what % 4 {
                0 => drop(guest.read(u64::from(port % 8))),
                _ => guest.keyboard.write(u64::from(port % 8), &[byte, byte]),
            }
            guest.keyboard.press_ctrl_alt_del();
            assert!(guest.keyboard.lock().output.len() <= MOST);
        }
        guest.keyboard.write(u64::MAX, &[0; 8]);
    }

    #[test]
    fn it_counts_where_the_other_controller_does() {
        let m: &I8042Metrics = Box::leak(Box::default());
        let counts = || {
            [
                m.error_count.total(),
                m.missed_read_count.total(),
                m.missed_write_count.total(),
                m.read_count.total(),
                m.write_count.total(),
                m.reset_count.total(),
            ]
        };
        let mut guest = Guest::new();
        guest.keyboard.metrics = m;
        assert!(!guest.keyboard.press_ctrl_alt_del());
        guest.read(2);
        guest.keyboard.write(2, &[0]);
        guest.command(0x55);
        guest.command(0xaa);
        assert_eq!(guest.drain(), [0x55]);
        guest.command(0xfe);
        assert_eq!(counts(), [1, 1, 2, 6, 2, 1]);
    }
}
