//! MSI-X (PCI Local Bus 3.0, 6.8.2): messages instead of interrupt lines.

use crate::{ConfigSpace, Error};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Most vectors that a function may have here; the format has room for 2048.
pub const MAX_VECTORS: u16 = 128;

const CAPABILITY: u8 = 0x11;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: this vector is masked.
const MASK: u32 = 1;
/// Dwords of a table entry: address (low, high), data, vector control.
const ENTRY: usize = 4;

/// What a vector writes to interrupt a processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Guest-physical address, whatever the guest has put there.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// Where messages go.
pub trait MsiSink: Send + Sync {
    /// From now on these vectors send these messages. Called, with all changes of one guest access at once, before the first
    /// `trigger` that is to send them; on a vCPU thread, with the table locked.
    fn set(&self, messages: &[(u16, Message)]);
    /// Send a vector's message. On any thread, as often as a device likes: neither lock nor block.
    fn trigger(&self, vector: u16);
    /// From now on a write to `event`, by whoever has it, sends the message of `vector`, which has one; what was written before sends
    /// it at once. On a vCPU thread.
    fn connect(&self, vector: u16, event: &EventFd) -> std::io::Result<()>;
    /// Not any more: writes to `event` send nothing, and are kept in it. It was connected with `vector`.
    fn disconnect(&self, vector: u16, event: &EventFd);
}

/// The MSI-X table and pending bits of one function.
pub struct Msix {
    state: Mutex<State>,
    enabled: AtomicBool,
    vectors: Vec<Vector>,
    sink: Arc<dyn MsiSink>,
}

/// What the way of an interrupt looks at, without a lock.
struct Vector {
    masked: AtomicBool,
    pending: AtomicBool,
}

struct State {
    control: u16,
    table: Vec<[u32; ENTRY]>,
    /// What the sink was told.
    told: Vec<Option<Message>>,
}

impl Msix {
    /// With `count` vectors, 1 to [`MAX_VECTORS`], all masked, and MSI-X off.
    pub fn new(count: u16, sink: Arc<dyn MsiSink>) -> Result<Self, Error> {
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(Error::Vectors(count));
        }
        let vector = || Vector {
            masked: AtomicBool::new(true),
            pending: AtomicBool::new(false),
        };
        let length = usize::from(count);
        Ok(Self {
            state: Mutex::new(State {
                control: 0,
                table: vec![[0, 0, 0, MASK]; length],
                told: vec![None; length],
            }),
            enabled: AtomicBool::new(false),
            vectors: (0..count).map(|_| vector()).collect(),
            sink,
        })
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Append the capability (6.8.2): table and pending bits lie in BAR 0 at these offsets, multiples of 8. Its offset;
    /// message control is two bytes behind, and [`Msix::set_control`] must hear of writes to it.
    pub fn add_capability(
        &self,
        space: &mut ConfigSpace,
        table: u32,
        pending: u32,
    ) -> Result<u8, Error> {
        let mut body = Vec::with_capacity(10);
        body.extend((self.count() - 1).to_le_bytes());
        body.extend((table & !7).to_le_bytes());
        body.extend((pending & !7).to_le_bytes());
        space.add_capability(CAPABILITY, &body, &(ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// MSI-X is on: interrupts are messages, and nothing else.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Messages of `vector` may be sent: it exists, MSI-X is on, and neither is masked.
    pub fn is_open(&self, vector: u16) -> bool {
        let vector = self.vectors.get(usize::from(vector));
        vector.is_some_and(|vector| !vector.masked.load(Ordering::SeqCst))
    }

    /// Where messages go.
    pub fn sink(&self) -> &dyn MsiSink {
        &*self.sink
    }

    /// Send the message of `vector`, or remember that it is pending while it is masked. Without a lock. Vectors that do not
    /// exist send nothing.
    pub fn trigger(&self, vector: u16) {
        let Some(state) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        if state.masked.load(Ordering::SeqCst) {
            state.pending.store(true, Ordering::SeqCst);
            // Unmasked meanwhile: one of the two sides takes the pending bit and sends.
            let late = !state.masked.load(Ordering::SeqCst);
            if !(late && state.pending.swap(false, Ordering::SeqCst)) {
                return;
            }
        }
        self.sink.trigger(vector);
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        if state.control != control {
            state.control = control;
            self.enabled.store(control & ENABLE != 0, Ordering::Release);
            self.refresh(&mut state);
        }
    }

    /// The table, and whether each vector is pending: what a snapshot must hold beside message control.
    pub fn state(&self) -> (Vec<[u32; ENTRY]>, Vec<bool>) {
        let pending = |vector: &Vector| vector.pending.load(Ordering::SeqCst);
        let table = self.lock().table.clone();
        (table, self.vectors.iter().map(pending).collect())
    }

    /// Take over what [`Msix::state`] gave, with message control. The sink hears of all messages at once.
    pub fn restore(
        &self,
        control: u16,
        table: &[[u32; ENTRY]],
        pending: &[bool],
    ) -> Result<(), Error> {
        if table.len() != self.vectors.len() || pending.len() != self.vectors.len() {
            return Err(Error::OtherVectors(
                table.len().min(pending.len()),
                self.count(),
            ));
        }
        let mut state = self.lock();
        for (own, saved) in state.table.iter_mut().zip(table) {
            let [low, high, data, vector_control] = *saved;
            *own = [low, high, data, vector_control & MASK];
        }
        for (vector, pending) in self.vectors.iter().zip(pending) {
            vector.pending.store(*pending, Ordering::SeqCst);
        }
        state.control = control;
        self.enabled.store(control & ENABLE != 0, Ordering::Release);
        self.refresh(&mut state);
        Ok(())
    }

    /// Fill `data` from the table. Only aligned dwords and qwords are defined (6.8.2); others read as 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        read_dwords(offset, data, |index| {
            let entry = state.table.get(index / ENTRY)?;
            entry.get(index % ENTRY).copied()
        });
    }

    /// The guest wrote to the table; what is not an aligned dword or qword is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let Some(first) = dword_index(offset, data.len()) else {
            return;
        };
        let mut state = self.lock();
        for (index, bytes) in (first..).zip(data.chunks_exact(4)) {
            let entry = state.table.get_mut(index / ENTRY);
            let field = entry.and_then(|entry| entry.get_mut(index % ENTRY));
            if let (Some(field), Ok(bytes)) = (field, bytes.try_into()) {
                let value = u32::from_le_bytes(bytes);
                // 6.8.2.9: the other bits of vector control are reserved.
                *field = match index % ENTRY {
                    3 => value & MASK,
                    _ => value,
                };
            }
        }
        self.refresh(&mut state);
    }

    /// Fill `data` from the pending bits, as [`Msix::read_table`]. They are read-only.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let qwords = self.vectors.len().div_ceil(64);
        read_dwords(offset, data, |index| {
            let bits = self.vectors.iter().skip(index.checked_mul(32)?).take(32);
            let bit = |(shift, vector): (u32, &Vector)| {
                u32::from(vector.pending.load(Ordering::SeqCst)) << shift
            };
            (index / 2 < qwords).then(|| (0..).zip(bits).map(bit).sum())
        });
    }

    /// After any change: tell the sink of new messages of vectors that are open, then open and close vectors, and send what
    /// was pending.
    fn refresh(&self, state: &mut State) {
        let open = state.control & ENABLE != 0 && state.control & FUNCTION_MASK == 0;
        let mut messages = Vec::new();
        for ((vector, entry), told) in (0..).zip(&state.table).zip(&mut state.told) {
            let [low, high, data, control] = *entry;
            let address = u64::from(high) << 32 | u64::from(low);
            let message = Message { address, data };
            if open && control & MASK == 0 && *told != Some(message) {
                *told = Some(message);
                messages.push((vector, message));
            }
        }
        if !messages.is_empty() {
            self.sink.set(&messages);
        }
        for ((index, vector), entry) in (0..).zip(&self.vectors).zip(&state.table) {
            let masked = !open || entry[3] & MASK != 0;
            vector.masked.store(masked, Ordering::SeqCst);
            if !masked && vector.pending.swap(false, Ordering::SeqCst) {
                self.sink.trigger(index);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of the first dword of an access that is defined.
fn dword_index(offset: u64, length: usize) -> Option<usize> {
    let aligned = matches!(length, 4 | 8) && offset.is_multiple_of(length as u64);
    aligned.then(|| usize::try_from(offset / 4).ok()).flatten()
}

fn read_dwords(offset: u64, data: &mut [u8], dword: impl Fn(usize) -> Option<u32>) {
    let first = dword_index(offset, data.len());
    data.fill(0);
    if let Some(first) = first {
        for (index, to) in (first..).zip(data.chunks_exact_mut(4)) {
            to.copy_from_slice(&dword(index).unwrap_or(0).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Event {
        Set(Vec<(u16, Message)>),
        Sent(u16),
    }

    #[derive(Default)]
    struct Recorder(Mutex<Vec<Event>>);

    impl MsiSink for Recorder {
        fn set(&self, messages: &[(u16, Message)]) {
            self.0.lock().unwrap().push(Event::Set(messages.to_vec()));
        }
        fn trigger(&self, vector: u16) {
            self.0.lock().unwrap().push(Event::Sent(vector));
        }
        fn connect(&self, _: u16, _: &EventFd) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
        fn disconnect(&self, _: u16, _: &EventFd) {}
    }

    impl Recorder {
        fn take(&self) -> Vec<Event> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn new(count: u16) -> (Arc<Recorder>, Msix) {
        let sink = Arc::new(Recorder::default());
        let msix = Msix::new(count, sink.clone()).unwrap();
        (sink, msix)
    }

    fn message(vector: u16) -> Message {
        Message {
            address: 0xfee0_1000 + (1 << 40),
            data: 0x40 + u32::from(vector),
        }
    }

    fn program(msix: &Msix, vector: u16, masked: bool) {
        let at = u64::from(vector) * 16;
        let Message { address, data } = message(vector);
        msix.write_table(at, &(address as u32).to_le_bytes());
        msix.write_table(at + 4, &((address >> 32) as u32).to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix, dword: u64) -> u32 {
        let mut data = [0; 4];
        msix.read_pending(dword * 4, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_vector_sends_only_when_on_and_unmasked_and_what_waited_is_sent_once() {
        let (sink, msix) = new(4);
        program(&msix, 1, true);
        msix.trigger(1);
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert!(msix.is_enabled());
        msix.trigger(1);
        msix.write_table(16 + 12, &[0; 4]);
        msix.trigger(1);
        assert_eq!(sink.take(), []);
        assert_eq!(pending(&msix, 0), 0b10);

        msix.set_control(ENABLE);
        let set = Event::Set(vec![(1, message(1))]);
        assert_eq!(sink.take(), [set, Event::Sent(1)]);
        assert_eq!(pending(&msix, 0), 0);

        msix.trigger(1);
        msix.trigger(1);
        assert_eq!(sink.take(), [Event::Sent(1), Event::Sent(1)]);

        msix.write_table(16 + 12, &MASK.to_le_bytes());
        msix.trigger(1);
        assert_eq!((sink.take(), pending(&msix, 0)), (vec![], 0b10));
        // The same message: the sink need not hear it again.
        msix.write_table(16 + 12, &[0; 4]);
        assert_eq!(sink.take(), [Event::Sent(1)]);
    }

    #[test]
    fn a_new_message_reaches_the_sink_before_it_is_sent() {
        let (sink, msix) = new(2);
        msix.set_control(ENABLE);
        program(&msix, 0, false);
        sink.take();
        msix.write_table(12, &MASK.to_le_bytes());
        msix.write_table(8, &[0x99, 0, 0, 0]);
        msix.trigger(0);
        assert_eq!(sink.take(), []);
        msix.write_table(12, &[0; 4]);
        let moved = Message {
            data: 0x99,
            ..message(0)
        };
        let wanted = [Event::Set(vec![(0, moved)]), Event::Sent(0)];
        assert_eq!(sink.take(), wanted);
    }

    #[test]
    fn opening_the_function_tells_of_all_vectors_at_once() {
        let (sink, msix) = new(3);
        for vector in 0..3 {
            program(&msix, vector, vector == 1);
        }
        msix.set_control(ENABLE);
        let wanted = vec![(0, message(0)), (2, message(2))];
        assert_eq!(sink.take(), [Event::Set(wanted)]);
    }

    #[test]
    fn vectors_that_do_not_exist_send_nothing() {
        let (sink, msix) = new(2);
        msix.set_control(ENABLE);
        for vector in [2, 63, 64, 0xffff] {
            msix.trigger(vector);
        }
        assert_eq!(sink.take(), []);
        assert!(Msix::new(0, sink.clone()).is_err());
        assert!(Msix::new(MAX_VECTORS + 1, sink).is_err());
    }

    #[test]
    fn pending_bits_of_many_vectors_lie_where_the_standard_says() {
        let (_, msix) = new(70);
        for vector in [0, 31, 32, 69] {
            msix.trigger(vector);
        }
        let dwords: Vec<u32> = (0..5).map(|dword| pending(&msix, dword)).collect();
        assert_eq!(dwords, [1 | 1 << 31, 1, 1 << 5, 0, 0]);
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        assert_eq!(data, [1, 0, 0, 0x80, 1, 0, 0, 0]);
    }

    #[test]
    fn the_table_reads_back_and_odd_accesses_do_nothing() {
        let (_, msix) = new(2);
        msix.write_table(16, &0x1122_3344_5566_7788_u64.to_le_bytes());
        msix.write_table(28, &[0xff; 4]);
        let before = {
            let mut data = [0; 8];
            msix.read_table(16, &mut data);
            assert_eq!(u64::from_le_bytes(data), 0x1122_3344_5566_7788);
            msix.read_table(24, &mut data);
            assert_eq!(data, [0, 0, 0, 0, 1, 0, 0, 0], "reserved bits stay 0");
            data
        };
        for (offset, length) in [
            (17, 4),
            (16, 1),
            (16, 3),
            (20, 8),
            (32, 4),
            (u64::MAX - 3, 4),
        ] {
            msix.write_table(offset, &[0xff; 8][..length]);
            let mut data = [0xff; 8];
            msix.read_table(offset, &mut data[..length]);
            assert!(data[..length].iter().all(|byte| *byte == 0), "{offset}");
        }
        let mut data = [0; 8];
        msix.read_table(24, &mut data);
        assert_eq!(data, before);
        msix.read_table(16, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x1122_3344_5566_7788);
    }

    #[test]
    fn the_capability_says_where_table_and_pending_bits_are() {
        let (_, msix) = new(5);
        let mut space = ConfigSpace::new(&crate::Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let at = u16::from(msix.add_capability(&mut space, 0x2000, 0x2800).unwrap());
        assert_eq!(space.word(at) & 0xff, 0x11);
        assert_eq!(space.word(at + 2), 4, "the last vector's number, all off");
        assert_eq!(
            (space.dword(at + 4), space.dword(at + 8)),
            (0x2000, 0x2800),
            "in BAR 0"
        );
        space.write(at + 2, &[0xff; 2]);
        assert_eq!(space.word(at + 2), ENABLE | FUNCTION_MASK | 4);
    }

    #[test]
    fn no_interrupt_is_lost_while_a_vector_is_masked_and_unmasked() {
        let (sink, msix) = new(1);
        msix.set_control(ENABLE);
        program(&msix, 0, false);
        let sent = |sink: &Recorder| {
            let sent = sink.take();
            sent.iter().filter(|e| **e == Event::Sent(0)).count()
        };
        for _ in 0..200 {
            std::thread::scope(|scope| {
                scope.spawn(|| msix.trigger(0));
                scope.spawn(|| {
                    msix.write_table(12, &MASK.to_le_bytes());
                    msix.write_table(12, &[0; 4]);
                });
            });
            assert_eq!(sent(&sink), 1);
        }
    }
}
