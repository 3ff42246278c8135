//! Packets for the guest (5.1.6.3, 5.1.6.4).
//!
//! The host writes a packet straight into the guest's buffers, as many as the packets before needed; what has no room there
//! lands in memory of ours and is copied. So small packets do not cost the buffers of large ones, and none is cut off.

use super::backend::{HEADER, LEAST, MOST, MOST_BUFFERS, Received, Room};
use super::{Budget, Outcome, Path};
use husk_virtio::{ActiveQueue, Chain, DeviceError, QueueError};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: u64 = 10;
/// Chains that are used before the driver is shown them: it can take them while the next packets come.
const BATCH: u16 = 64;

/// A receive queue.
pub struct Rx {
    /// The queue, while the driver uses it.
    pub queue: Option<ActiveQueue>,
    receiver: Receiver,
}

impl Rx {
    /// The receive queue of `pair`, not in use.
    pub fn new(pair: u16) -> Self {
        Self {
            queue: None,
            receiver: Receiver::new(pair),
        }
    }

    /// Begin to use a queue. `mergeable`: whether a packet may take more than one chain (VIRTIO_NET_F_MRG_RXBUF).
    pub fn start(&mut self, queue: ActiveQueue, mergeable: bool) {
        self.receiver.mergeable = mergeable;
        self.receiver.readable = true;
        self.queue = Some(queue);
    }

    /// Give the queue up, with all chains that hold no packet. A packet that waits for buffers is lost.
    pub fn stop(&mut self) -> Option<ActiveQueue> {
        let mut queue = self.queue.take()?;
        self.receiver.held = None;
        self.receiver.put_back(&mut queue);
        Some(queue)
    }

    /// The backend has packets.
    pub fn set_readable(&mut self) {
        self.receiver.readable = true;
    }

    /// Receive what is there, as far as there are buffers and the limiter allows.
    pub fn run(&mut self, path: &mut Path) -> Result<Outcome, DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(Outcome::Done);
        };
        let outcome = match path.up {
            true => self.receiver.deliver(queue, path),
            false => Ok(self.receiver.discard(queue, path)),
        };
        let outcome = outcome.map_err(|bad| bad.of(queue.index()))?;
        // Chains that are ready stay so: they need not be read again for the next packet.
        self.receiver.unshown = 0;
        queue
            .flush()
            .map_err(|e| DeviceError::Queue(queue.index(), e))?;
        Ok(outcome)
    }
}

/// What a driver can do wrong.
enum Bad {
    Queue(QueueError),
    Small,
}

impl From<QueueError> for Bad {
    fn from(error: QueueError) -> Self {
        Bad::Queue(error)
    }
}

impl Bad {
    fn of(self, index: u16) -> DeviceError {
        match self {
            Bad::Queue(error) => DeviceError::Queue(index, error),
            Bad::Small => DeviceError::Driver("offers a buffer with no room for a packet's header"),
        }
    }
}

/// A chain that was popped. Its writable buffers are with those of the others.
struct Ready {
    head: u16,
    buffers: usize,
    /// Bytes of them.
    room: u64,
}

/// A packet that was read and is not handed over yet. Its first `direct` bytes are in the chains that are ready.
#[derive(Clone, Copy)]
struct Held {
    length: u64,
    direct: u64,
    /// The limiter has let it pass.
    paid: bool,
}

/// What became of a step.
enum Step<T> {
    Got(T),
    /// Nothing can be done until something happens.
    Wait,
    Gone,
}

struct Receiver {
    pair: u16,
    mergeable: bool,
    /// The backend may have packets. It says so once.
    readable: bool,
    /// Chains that were popped, in order, all their buffers one behind the other, and their room in bytes.
    ready: Vec<Ready>,
    buffers: Chain,
    room: u64,
    /// Chains that the driver has not been shown yet.
    unshown: u16,
    rest: Vec<u8>,
    held: Option<Held>,
    /// Bytes that the next packet is likely to have.
    expected: u64,
}

impl Receiver {
    fn new(pair: u16) -> Self {
        Self {
            pair,
            mergeable: false,
            readable: false,
            ready: Vec::new(),
            buffers: Chain::default(),
            room: 0,
            unshown: 0,
            rest: Vec::new(),
            held: None,
            expected: 0,
        }
    }

    fn deliver(&mut self, queue: &mut ActiveQueue, path: &mut Path) -> Result<Outcome, Bad> {
        queue.disable_kicks()?;
        let mut budget = Budget::default();
        loop {
            let mut held = match self.held.take() {
                Some(held) => held,
                None => match self.receive(queue, path)? {
                    Step::Got(held) => held,
                    Step::Wait => return Ok(Outcome::Done),
                    Step::Gone => return Ok(Outcome::Gone),
                },
            };
            if !held.paid && !path.limiter.consume(1, held.length - HEADER as u64) {
                // The limiter's timer brings us back.
                path.metrics.rx_rate_limiter_throttled.inc();
                self.held = Some(held);
                return Ok(Outcome::Done);
            }
            held.paid = true;
            match self.make_room(queue, held)? {
                Step::Got(true) => {
                    self.hand_over(queue, held)?;
                    path.metrics.rx_packets_count.inc();
                    path.metrics.rx_bytes_count.add(held.length - HEADER as u64);
                }
                // No buffer is large enough, or all of them together are not.
                Step::Got(false) | Step::Gone => {
                    path.metrics.rx_partial_writes.inc();
                    path.metrics.rx_fails.inc();
                    log::debug!("a packet for a guest is too large");
                }
                Step::Wait => {
                    path.metrics.no_rx_avail_buffer.inc();
                    self.held = Some(held);
                    return Ok(Outcome::Done);
                }
            }
            if self.unshown >= BATCH {
                queue.flush()?;
                self.unshown = 0;
            }
            if budget.is_spent(held.length) {
                // Others have their turn; at its maximum the counter is readable already.
                let _ = queue.kick().write(1);
                return Ok(Outcome::Done);
            }
        }
    }

    /// Read a packet, if there is one and a buffer to begin it in.
    fn receive(&mut self, queue: &mut ActiveQueue, path: &mut Path) -> Result<Step<Held>, Bad> {
        loop {
            if !self.readable {
                return Ok(Step::Wait);
            }
            let expected = if self.mergeable { self.expected } else { 0 };
            if !self.gather(queue, expected)? && self.ready.is_empty() {
                return Ok(Step::Wait);
            }
            // As many as the kernel takes, and nearly always all.
            let all = self.buffers.writable.as_slice();
            let (buffers, direct) = match all.get(..MOST_BUFFERS) {
                Some(most) => (most, most.iter().map(|b| u64::from(b.length)).sum()),
                None => (all, self.room),
            };
            if self.rest.is_empty() {
                self.rest = vec![0; MOST + 1];
            }
            let mut room = Room {
                mem: queue.memory(),
                buffers,
                rest: &mut self.rest,
            };
            let length = match path.backend.receive(self.pair, &mut room) {
                Received::Packet(length) => length,
                Received::Empty => {
                    self.readable = false;
                    return Ok(Step::Wait);
                }
                Received::Gone => {
                    path.metrics.tap_read_fails.inc();
                    self.readable = false;
                    return Ok(Step::Gone);
                }
            };
            path.metrics.rx_count.inc();
            // With a byte more of room than any packet has, one that is cut off is too long.
            if (LEAST..=MOST).contains(&length) {
                let length = length as u64;
                // Large packets come in rows; it shrinks slowly.
                self.expected = length.max(self.expected - self.expected / 8);
                return Ok(Step::Got(Held {
                    length,
                    direct: direct.min(length),
                    paid: false,
                }));
            }
            path.metrics.rx_fails.inc();
        }
    }

    /// Throw away what comes while the link is down, so that it does not come later.
    fn discard(&mut self, queue: &mut ActiveQueue, path: &mut Path) -> Outcome {
        self.held = None;
        if self.rest.is_empty() {
            self.rest = vec![0; MOST + 1];
        }
        let mut budget = Budget::default();
        while self.readable {
            let mut room = Room {
                mem: queue.memory(),
                buffers: &[],
                rest: &mut self.rest,
            };
            match path.backend.receive(self.pair, &mut room) {
                Received::Packet(length) if budget.is_spent(length as u64) => {
                    let _ = queue.kick().write(1);
                    return Outcome::Done;
                }
                Received::Packet(_) => {}
                Received::Empty => self.readable = false,
                Received::Gone => {
                    self.readable = false;
                    return Outcome::Gone;
                }
            }
        }
        Outcome::Done
    }

    /// Have chains ready for `length` bytes, at least one; false when there are not enough, and the driver is asked for a kick
    /// when it has more.
    fn gather(&mut self, queue: &mut ActiveQueue, length: u64) -> Result<bool, Bad> {
        while self.ready.is_empty() || self.room < length {
            let before = self.buffers.writable.len();
            if !queue.pop_more(&mut self.buffers)? {
                if self.ask_for_more(queue)? {
                    continue;
                }
                return Ok(false);
            }
            // A driver has nothing to say here.
            self.buffers.readable.clear();
            let own = self.buffers.writable.get(before..).unwrap_or_default();
            let ready = Ready {
                head: self.buffers.head,
                buffers: own.len(),
                room: own.iter().map(|buffer| u64::from(buffer.length)).sum(),
            };
            let room = ready.room;
            self.room += room;
            self.ready.push(ready);
            if room < HEADER as u64 {
                return Err(Bad::Small);
            }
        }
        Ok(true)
    }

    /// The queue is empty. What was used has to be shown, or the driver may wait for it; true when there is more already.
    fn ask_for_more(&mut self, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        queue.flush()?;
        self.unshown = 0;
        let more = queue.enable_kicks()?;
        if more {
            queue.disable_kicks()?;
        }
        Ok(more)
    }

    /// Have chains ready for all of a packet; false when the driver never gives that many.
    fn make_room(&mut self, queue: &mut ActiveQueue, held: Held) -> Result<Step<bool>, Bad> {
        if !self.mergeable {
            return Ok(Step::Got(self.room >= held.length));
        }
        if self.gather(queue, held.length)? {
            return Ok(Step::Got(true));
        }
        // The driver has given all it can.
        if self.ready.len() >= usize::from(queue.state().size) {
            return Ok(Step::Got(false));
        }
        Ok(Step::Wait)
    }

    /// Give a packet to the driver in the first chains that are ready.
    fn hand_over(&mut self, queue: &mut ActiveQueue, held: Held) -> Result<(), QueueError> {
        let Held { length, direct, .. } = held;
        let mut left = length;
        let (mut chains, mut buffers) = (0, 0);
        for ready in &self.ready {
            let written = left.min(ready.room);
            // It fits: no packet is longer than MOST.
            queue.add_used(ready.head, written as u32)?;
            self.room -= ready.room;
            left -= written;
            buffers += ready.buffers;
            chains += 1;
            if left == 0 {
                break;
            }
        }
        if direct < length {
            let rest = self.rest.get(..(length - direct) as usize);
            self.buffers
                .write(queue.memory(), direct, rest.unwrap_or_default())?;
        }
        let count = u16::try_from(chains).unwrap_or(u16::MAX);
        self.buffers
            .write(queue.memory(), NUM_BUFFERS, &count.to_le_bytes())?;
        self.ready.drain(..chains);
        self.buffers.writable.drain(..buffers);
        self.unshown += count;
        Ok(())
    }

    /// The chains that are ready go back.
    fn put_back(&mut self, queue: &mut ActiveQueue) {
        for _ in self.ready.drain(..) {
            queue.undo_pop();
        }
        self.buffers.writable.clear();
        self.room = 0;
        self.unshown = 0;
    }
}
