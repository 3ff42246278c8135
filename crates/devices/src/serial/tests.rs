use super::wire::CAPACITY;
use super::*;
use crate::test_support::irq;
use std::sync::mpsc;
use std::time::Duration;

const RBR: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const RDI: u8 = 1;
const THRI: u8 = 2;
const NO_INT: u8 = 1;
const DR: u8 = 1;
const OPEN: u8 = 0x0b; // DTR, RTS, OUT2

#[derive(Default)]
struct Sink(Mutex<Vec<u8>>);

impl Output for Sink {
    fn write(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend(bytes);
    }
}

struct Bench {
    serial: Arc<Serial>,
    wire: Arc<Wire>,
    sink: Arc<Sink>,
    line: EventFd,
    woken: mpsc::Receiver<()>,
}

fn bench() -> Bench {
    let (tell, woken) = mpsc::channel();
    let wire = Arc::new(Wire::new(move || tell.send(()).unwrap_or_default()));
    let (device_end, line) = irq();
    let sink = Arc::new(Sink::default());
    let serial = Serial::new(device_end, sink.clone(), wire.clone());
    Bench {
        serial,
        wire,
        sink,
        line,
        woken,
    }
}

impl Bench {
    fn read(&self, offset: u64) -> u8 {
        let mut data = [0xff];
        BusDevice::read(&*self.serial, offset, &mut data);
        data[0]
    }

    fn write(&self, offset: u64, value: u8) {
        BusDevice::write(&*self.serial, offset, &[value]);
    }

    /// Whether there was an edge since the last question.
    fn interrupted(&self) -> bool {
        self.line.read().is_ok()
    }

    fn sent(&self) -> Vec<u8> {
        self.sink.0.lock().unwrap().clone()
    }

    /// Linux's interrupt handler, receiving only.
    fn linux_receive(&self, received: &mut Vec<u8>) {
        while self.read(IIR) & NO_INT == 0 {
            while self.read(LSR) & DR != 0 {
                received.push(self.read(RBR));
            }
            self.read(MSR);
        }
    }

    fn clear_fifos(&self) {
        self.write(FCR, 1);
        self.write(FCR, 7);
        self.write(FCR, 0);
    }

    fn clear_interrupts(&self) {
        for offset in [LSR, RBR, IIR, MSR] {
            self.read(offset);
        }
    }

    /// Linux 6.12, `autoconfig` and `autoconfig_16550a` with all variants probed. True: a 16550A.
    fn linux_autoconfig(&self) -> bool {
        let ier = self.read(IER);
        self.write(IER, 0);
        let cleared = self.read(IER) & 0x0f;
        self.write(IER, 0x0f);
        let set = self.read(IER) & 0x0f;
        self.write(IER, ier);
        let (mcr, lcr) = (self.read(MCR), self.read(LCR));
        self.write(MCR, 0x10 | 0x08 | 0x02);
        let looped = self.read(MSR) & 0xf0;
        self.write(MCR, mcr);
        self.write(LCR, 0xbf);
        self.write(FCR, 0);
        self.write(LCR, 0);
        self.write(FCR, 1);
        let fifo = self.read(IIR) & 0xc0;
        let plain = self.linux_no_variant();
        self.write(LCR, lcr);
        self.write(MCR, mcr);
        self.clear_fifos();
        self.read(RBR);
        self.write(IER, 0);
        (cleared, set, looped, fifo) == (0, 0x0f, 0x90, 0xc0) && plain
    }

    /// The checks of `autoconfig_16550a`: no EFR, no 64-byte FIFO, no NS bank, no UUE, a FIFO of 16.
    fn linux_no_variant(&self) -> bool {
        self.write(LCR, 0x80);
        let efr_a = self.read(FCR) != 0;
        self.write(LCR, 0xbf);
        let efr_b = self.read(FCR) != 0;
        self.write(LCR, 0);
        let mcr = self.read(MCR);
        self.write(LCR, 0xe0);
        let bank = self.read(2);
        self.write(LCR, 0);
        self.write(MCR, mcr ^ 0x10);
        self.write(LCR, 0xe0);
        let no_bank = (self.read(2) ^ bank) & 0x10 == 0;
        self.write(LCR, 0);
        self.write(MCR, mcr);
        let mut fifo_64 = Vec::new();
        for lcr in [0, 0x80] {
            self.write(LCR, lcr);
            self.write(FCR, 1 | 0x20);
            fifo_64.push(self.read(IIR) & 0xe0);
            self.write(FCR, 1);
        }
        self.write(LCR, 0);
        let ier = self.read(IER);
        self.write(IER, ier | 0x40);
        let no_uue = self.read(IER) & 0x40 == 0;
        self.write(IER, ier);
        efr_a
            && efr_b
            && no_bank
            && fifo_64 == [0xc0, 0xc0]
            && no_uue
            && self.linux_size_fifo() == 16
    }

    fn linux_size_fifo(&self) -> usize {
        let (fcr, mcr) = (self.read(IIR), self.read(MCR));
        self.write(FCR, 7);
        self.write(MCR, 0x10);
        self.write(LCR, 0x80);
        self.write(0, 1);
        self.write(1, 0);
        self.write(LCR, 3);
        (0..=255).for_each(|value| self.write(0, value));
        let mut count = 0;
        while self.read(LSR) & DR != 0 && count < 256 {
            self.read(RBR);
            count += 1;
        }
        self.write(FCR, fcr);
        self.write(MCR, mcr);
        self.write(LCR, 0);
        count
    }

    /// Linux 6.12, `serial8250_do_startup` to the enabling of interrupts and RTS. False: a workaround would be on.
    fn linux_startup(&self) -> bool {
        self.clear_fifos();
        self.clear_interrupts();
        let present = self.read(LSR) != 0xff;
        let mut thre = [0; 2];
        for iir in &mut thre {
            self.write(IER, THRI);
            *iir = self.read(IIR);
            self.write(IER, 0);
        }
        let reasserts = thre.map(|iir| iir & NO_INT) == [0, 0];
        self.write(LCR, 3);
        self.write(MCR, 0x08);
        self.write(IER, THRI);
        let (lsr, iir) = (self.read(LSR), self.read(IIR));
        self.write(IER, 0);
        let tx_interrupt = lsr & 0x40 != 0 && iir & NO_INT == 0;
        self.clear_interrupts();
        self.write(FCR, 1);
        self.write(FCR, 0x81);
        self.write(MCR, OPEN);
        self.write(IER, 5);
        present && reasserts && tx_interrupt
    }
}

#[test]
fn linux_finds_a_16550a_and_needs_no_workaround() {
    let bench = bench();
    assert!(bench.linux_autoconfig());
    assert!(bench.linux_startup());
    assert!(bench.sent().is_empty(), "probing prints nothing");
}

#[test]
fn input_sent_before_linux_opens_the_port_is_all_read_after() {
    // Once as with an early console, which sets DTR and RTS before the driver probes.
    for early_mcr in [0, 3] {
        let bench = bench();
        bench.write(MCR, early_mcr);
        assert_eq!(bench.wire.offer(b"typed ahead\n"), 12);
        assert!(bench.linux_autoconfig());
        assert!(bench.linux_startup());
        assert!(bench.interrupted());
        let mut received = Vec::new();
        bench.linux_receive(&mut received);
        assert_eq!(received, b"typed ahead\n");
    }
}

#[test]
fn a_closed_and_reopened_port_loses_nothing() {
    let bench = bench();
    bench.linux_startup();
    bench.write(IER, 0); // serial8250_do_shutdown
    bench.write(MCR, 0);
    bench.wire.offer(b"x");
    bench.clear_fifos();
    assert_eq!(bench.read(RBR), 0);
    bench.interrupted();
    assert!(bench.linux_startup());
    assert!(bench.interrupted());
    let mut received = Vec::new();
    bench.linux_receive(&mut received);
    assert_eq!(received, b"x");
}

#[test]
fn rts_holds_the_sender_and_lets_it_go() {
    let bench = bench();
    bench.linux_startup();
    bench.write(MCR, 0x09);
    bench.interrupted();
    bench.wire.offer(b"held");
    assert!(!bench.interrupted());
    assert_eq!(bench.read(LSR) & DR, 0);
    bench.write(MCR, OPEN);
    assert!(bench.interrupted());
    assert_eq!(bench.read(RBR), b'h');
}

#[test]
fn a_guest_that_never_uses_rts_receives_by_interrupt() {
    let bench = bench();
    bench.write(IER, RDI);
    bench.wire.offer(b"a");
    assert!(bench.interrupted());
    assert_eq!(bench.read(IIR) & 0x0f, 0x04);
    assert_eq!(bench.read(RBR), b'a');
    assert_eq!(bench.read(IIR) & 0x0f, NO_INT);
}

#[test]
fn a_guest_that_polls_receives_and_echoes() {
    let bench = bench();
    bench.wire.offer(b"ab");
    assert!((0..15).all(|_| bench.read(LSR) & DR == 0));
    assert_eq!(bench.read(LSR) & DR, DR);
    assert_eq!(bench.read(RBR), b'a');
    bench.write(0, b'a');
    assert_eq!(bench.read(LSR) & DR, DR);
    assert_eq!(bench.read(RBR), b'b');
    assert_eq!(bench.sent(), b"a");
    bench.wire.offer(b"c");
    bench.write(IER, 0);
    assert_eq!(bench.read(LSR) & DR, 0, "any other access ends it");
}

#[test]
fn a_fifo_reset_keeps_what_is_on_the_wire() {
    let bench = bench();
    bench.linux_startup();
    bench.wire.offer(b"abc");
    assert_eq!(bench.read(RBR), b'a');
    bench.write(FCR, 7);
    assert_eq!(bench.read(RBR), b'b');
    bench.write(FCR, 0);
    assert_eq!(bench.read(RBR), b'c');
}

#[test]
fn loopback_neither_prints_nor_eats_input() {
    let bench = bench();
    bench.linux_startup();
    bench.wire.offer(b"in");
    bench.write(MCR, OPEN | 0x10);
    assert_eq!(bench.read(LSR) & DR, 0);
    bench.write(0, 0x55);
    assert_eq!(bench.read(LSR) & DR, DR);
    assert_eq!(bench.read(RBR), 0x55);
    for value in 0..17 {
        bench.write(0, value);
    }
    assert_eq!(bench.read(LSR) & 2, 2, "the 17th byte overruns the FIFO");
    assert_eq!(bench.read(LSR) & 2, 0, "and is told once");
    bench.write(FCR, 7);
    assert_eq!(bench.read(LSR) & DR, 0);
    bench.write(MCR, OPEN);
    assert_eq!((bench.read(RBR), bench.read(RBR)), (b'i', b'n'));
    assert!(bench.sent().is_empty());
}

#[test]
fn a_new_guest_gets_what_the_old_one_did_not_read() {
    let first = bench();
    first.linux_startup();
    first.wire.offer(b"abc");
    assert_eq!(first.read(RBR), b'a');
    let (device_end, line) = irq();
    let serial = Serial::new(device_end, first.sink.clone(), first.wire.clone());
    let second = Bench {
        serial,
        line,
        ..first
    };
    assert!(second.linux_startup());
    assert!(second.interrupted());
    let mut received = Vec::new();
    second.linux_receive(&mut received);
    assert_eq!(received, b"bc");
}

#[test]
fn the_transmitter_interrupt_comes_on_enabling_and_after_every_byte() {
    let bench = bench();
    bench.write(IER, THRI);
    assert!(bench.interrupted());
    assert_eq!(bench.read(IIR) & 0x0f, 0x02);
    assert_eq!(bench.read(IIR) & 0x0f, NO_INT, "reading IIR clears it");
    bench.write(0, b'a');
    assert!(bench.interrupted());
    bench.write(0, b'b');
    assert!(!bench.interrupted(), "still pending: no second edge");
    assert_eq!(bench.read(IIR) & 0x0f, 0x02);
    bench.write(IER, 0);
    bench.write(IER, THRI);
    assert!(bench.interrupted());
    assert_eq!(bench.sent(), b"ab");
}

#[test]
fn an_unmasked_uart_interrupts_again_for_what_is_still_pending() {
    let bench = bench();
    bench.linux_startup();
    bench.wire.offer(b"a");
    assert!(bench.interrupted());
    // Linux's console output: mask, print, unmask.
    bench.write(IER, 0);
    bench.write(0, b'!');
    bench.write(IER, 5);
    assert!(bench.interrupted());
}

#[test]
fn received_data_comes_before_the_transmitter_and_a_short_fill_is_a_timeout() {
    let bench = bench();
    bench.linux_startup(); // trigger level 8
    bench.write(IER, 7);
    bench.wire.offer(b"1234567");
    assert_eq!(bench.read(IIR), 0xcc);
    bench.wire.offer(b"8");
    (0..7).for_each(|_| assert_ne!(bench.read(RBR), 0));
    assert_eq!(bench.read(IIR), 0xc2);
    bench.wire.offer(b"123456789");
    let pause = bench.wire.service().unwrap_or_default();
    std::thread::sleep(pause);
    bench.wire.service();
    assert_eq!(bench.read(IIR), 0xc4);
}

#[test]
fn registers_keep_what_they_hold_and_unused_bits_read_zero() {
    let bench = bench();
    bench.write(SCR, 0xa5);
    bench.write(LCR, 0x9b);
    bench.write(0, 0x34);
    bench.write(1, 0x12);
    assert_eq!(
        [0, 1, LCR, SCR].map(|o| bench.read(o)),
        [0x34, 0x12, 0x9b, 0xa5]
    );
    bench.write(LCR, 0);
    bench.write(IER, 0xff);
    bench.write(MCR, 0xff);
    assert_eq!([IER, MCR].map(|o| bench.read(o)), [0x0f, 0x1f]);
    bench.write(LSR, 0xff);
    bench.write(MSR, 0xff);
    assert_eq!(bench.read(LSR), 0x60);
    assert!(
        bench.sent().is_empty(),
        "with DLAB, and in loopback, nothing goes out"
    );
}

#[test]
fn the_registers_survive_a_snapshot() {
    let first = bench();
    first.linux_startup();
    let second = bench();
    second.wire.offer(b"a");
    second.serial.restore(first.serial.registers());
    assert!(second.interrupted());
    assert_eq!(second.read(RBR), b'a');
}

#[test]
fn registers_of_a_snapshot_are_no_more_than_those_of_a_uart() {
    let bench = bench();
    let mut state = serde_json::to_value(bench.serial.registers()).unwrap();
    state["looped"] = vec![7u8; 1000].into();
    state["mcr"] = 0xff.into();
    state["ier"] = 0xff.into();
    bench.serial.restore(serde_json::from_value(state).unwrap());
    assert_eq!((bench.read(MCR), bench.read(IER)), (0x1f, 0x0f));
    let waiting = std::iter::from_fn(|| (bench.read(LSR) & 1 != 0).then(|| bench.read(RBR)));
    assert_eq!(waiting.count(), 16);
}

#[test]
fn every_offset_and_length_is_accepted() {
    let bench = bench();
    for offset in (0..10).chain([u64::MAX - 1, u64::MAX]) {
        for len in 0..9 {
            let mut data = vec![0xff; len];
            BusDevice::read(&*bench.serial, offset, &mut data);
            BusDevice::write(&*bench.serial, offset, &data);
        }
    }
    bench.write(MCR, 0);
    bench.write(LCR, 0);
    let mut data = [0; 2];
    BusDevice::read(&*bench.serial, LSR, &mut data);
    assert_eq!(data[1] & 0xf0, 0xb0, "a word access reads two registers");
}

#[test]
fn a_string_of_bytes_goes_out_whole_with_one_edge() {
    let bench = bench();
    bench.write(IER, THRI);
    bench.read(IIR);
    bench.interrupted();
    let flood: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    bench.serial.write_many(0, &flood);
    assert_eq!(bench.sent(), flood);
    assert_eq!(bench.line.read().unwrap(), 1);
}

#[test]
fn ten_megabytes_reach_an_interrupt_driven_guest_that_resets_its_fifo() {
    const SIZE: usize = 10_000_000;
    let bench = bench();
    bench.linux_startup();
    let byte = |i: usize| (i ^ (i >> 8) ^ (i >> 16)) as u8;
    std::thread::scope(|scope| {
        let (wire, woken) = (&bench.wire, &bench.woken);
        let (serial, line) = (&bench.serial, &bench.line);
        let guest = scope.spawn(move || {
            let mut received = Vec::with_capacity(SIZE);
            let mut interrupts = 0usize;
            while received.len() < SIZE {
                if line.read().is_err() {
                    std::thread::yield_now();
                    continue;
                }
                interrupts += 1;
                if interrupts.is_multiple_of(64) {
                    serial.write_register(FCR, 0x87);
                }
                while serial.read_register(IIR) & NO_INT == 0 {
                    while serial.read_register(LSR) & DR != 0 {
                        received.push(serial.read_register(RBR));
                    }
                }
            }
            received
        });
        let sent: Vec<u8> = (0..SIZE).map(byte).collect();
        let mut at = 0;
        while at < SIZE || !wire.is_empty() {
            at += wire.offer(&sent[at..]);
            match wire.service() {
                Some(left) => std::thread::sleep(left),
                None => drop(woken.recv_timeout(Duration::from_millis(10))),
            }
        }
        assert!(guest.join().unwrap() == sent);
    });
    assert_eq!(bench.wire.room(), CAPACITY);
}

#[test]
fn bytes_are_counted_both_ways() {
    // Other tests of this process count there, too.
    let uart = &husk_metrics::METRICS.uart;
    let (written, read) = (uart.write_count.total(), uart.read_count.total());
    let bench = bench();
    bench.serial.write_many(0, b"hello");
    assert!(uart.write_count.total() >= written + 5);
    bench.wire.offer(b"x");
    BusDevice::write(&*bench.serial, IER, &[RDI]);
    assert_eq!(bench.read(RBR), b'x');
    assert!(uart.read_count.total() > read);
}

#[test]
fn an_access_may_reach_behind_the_last_register() {
    for (offset, len, wanted) in [
        (0, 8, 0),
        (SCR, 1, 0),
        (SCR, 4, 3),
        (0, 9, 1),
        (u64::MAX, 2, 2),
    ] {
        assert_eq!(behind(offset, len), wanted, "{offset} {len}");
    }
}
