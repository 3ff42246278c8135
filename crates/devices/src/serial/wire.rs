//! The receive half of a serial line: bytes that were sent to the guest and that it has not read.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Most bytes on the line, arrived or not.
pub const CAPACITY: usize = 64 * 1024;

/// Most bytes that arrive at once; the next ones follow after a pause.
///
/// Linux's interrupt handler reads for as long as the UART has data and puts it into a 64 KiB buffer that
/// only a worker thread empties. Fed without a pause, one vCPU never leaves the handler, the buffer
/// overflows, and the worker that would have stopped the sender by clearing RTS never ran. A real line
/// pauses by being slow. A larger burst costs the guest latency, a smaller one throughput.
const BURST: usize = 256;

/// The pause after a burst: this fraction of the time that the guest took to read it, so that a slow
/// machine (nested, emulated) gets as much air as a fast one.
const PAUSE_DIVISOR: u32 = 2;
/// Longest pause: a guest that was stopped in the middle of a burst must not wait for as long again.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// A UART at the guest's end of a [`Wire`].
pub trait Receiver: Send + Sync {
    /// Bytes have arrived. Called with no lock of the wire held.
    fn arrived(&self);
}

/// A serial line into the guest, shared by whoever sends on it and the UART.
///
/// It outlives the UART: bytes that a guest did not read are there for the next one. The sender has to call
/// [`Wire::service`] when it says so, and whenever the waker given to [`Wire::new`] was called.
pub struct Wire {
    line: Mutex<Line>,
    receiver: Mutex<Option<Weak<dyn Receiver>>>,
    waker: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Line {
    bytes: VecDeque<u8>,
    arrived: usize, // of `bytes`, at the front
    first_read: Option<Instant>,
    quiet_until: Option<Instant>,
}

impl Wire {
    /// An empty line. `waker` is called on a vCPU thread whenever the guest has read all that had arrived: there
    /// is room, and [`Wire::service`] has to be called. It must not block.
    pub fn new(waker: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            line: Mutex::default(),
            receiver: Mutex::new(None),
            waker: Box::new(waker),
        }
    }

    /// Send `bytes`; returns how many fitted, from the start.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut line = self.lock();
            let room = CAPACITY.saturating_sub(line.bytes.len());
            let taken = bytes.get(..room).unwrap_or(bytes);
            line.bytes.extend(taken);
            taken.len()
        };
        self.service();
        taken
    }

    /// How many bytes [`Wire::offer`] would take.
    pub fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.lock().bytes.len())
    }

    /// Whether the guest has read everything.
    pub fn is_empty(&self) -> bool {
        self.lock().bytes.is_empty()
    }

    /// Let bytes arrive if they are due. Returns in how long to call again; `None`: when the waker says so.
    pub fn service(&self) -> Option<Duration> {
        {
            let mut line = self.lock();
            if line.arrived > 0 || line.bytes.is_empty() {
                return None;
            }
            if let Some(until) = line.quiet_until {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    return Some(left);
                }
            }
            line.arrived = line.bytes.len().min(BURST);
            line.first_read = None;
        }
        let receiver = self
            .receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .and_then(Weak::upgrade);
        if let Some(receiver) = receiver {
            receiver.arrived();
        }
        None
    }

    /// Make `receiver` the one that is told of arriving bytes.
    pub(super) fn connect(&self, receiver: Weak<dyn Receiver>) {
        *self.receiver.lock().unwrap_or_else(PoisonError::into_inner) = Some(receiver);
    }

    /// How many bytes the guest may read now.
    pub(super) fn arrived(&self) -> usize {
        self.lock().arrived
    }

    /// The next byte that has arrived, and whether it was the last such: then [`Wire::wake`] is to be called.
    pub(super) fn take(&self) -> Option<(u8, bool)> {
        let mut line = self.lock();
        line.arrived = line.arrived.checked_sub(1)?;
        let byte = line.bytes.pop_front()?;
        let last = line.arrived == 0;
        if last || line.first_read.is_none() {
            let now = Instant::now();
            let first = *line.first_read.get_or_insert(now);
            if last {
                let pause = now.saturating_duration_since(first) / PAUSE_DIVISOR;
                line.quiet_until = Some(now + pause.min(PAUSE_MAX));
            }
        }
        Some((byte, last))
    }

    /// Call the waker.
    pub(super) fn wake(&self) {
        (self.waker)();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn wait_for_service(wire: &Wire) {
        while let Some(left) = wire.service() {
            std::thread::sleep(left);
        }
    }

    #[test]
    fn the_line_takes_what_fits_and_says_how_much() {
        let wire = Wire::new(|| {});
        assert_eq!(wire.offer(&[1; CAPACITY - 1]), CAPACITY - 1);
        assert_eq!(wire.room(), 1);
        assert_eq!(wire.offer(&[2, 3]), 1);
        assert_eq!(wire.offer(&[3]), 0);
        assert_eq!(wire.room(), 0);
    }

    #[test]
    fn bytes_arrive_in_bursts_and_in_order_and_the_sender_is_woken_after_each() {
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let wire = Wire::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let sent: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        assert_eq!(wire.offer(&sent), sent.len());
        let mut received = Vec::new();
        let mut bursts = 0;
        while !wire.is_empty() {
            assert!((1..=BURST).contains(&wire.arrived()));
            bursts += 1;
            while let Some((byte, last)) = wire.take() {
                received.push(byte);
                if last {
                    wire.wake();
                }
            }
            wait_for_service(&wire);
        }
        assert_eq!(received, sent);
        assert_eq!(bursts, 4);
        assert_eq!(woken.load(Ordering::Relaxed), 4);
    }
}
