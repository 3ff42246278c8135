//! Packets from the guest (5.1.6.2): from its pages straight to the host.

use super::backend::{HEADER, LEAST, MOST, Packet, Sent};
use super::{Budget, Outcome, Path};
use husk_virtio::{ActiveQueue, Chain, DeviceError, QueueError};
use std::time::Instant;

/// Packets that are sent before the driver is shown that they are.
const BATCH: u16 = 64;

/// A transmit queue.
pub struct Tx {
    pair: u16,
    /// The queue, while the driver uses it.
    pub queue: Option<ActiveQueue>,
    chain: Chain,
    /// The limiter has let the next packet pass, and then the backend had no room for it.
    paid: bool,
}

impl Tx {
    /// The transmit queue of `pair`, not in use.
    pub fn new(pair: u16) -> Self {
        Self {
            pair,
            queue: None,
            chain: Chain::default(),
            paid: false,
        }
    }

    /// Begin to use a queue.
    pub fn start(&mut self, queue: ActiveQueue) {
        self.paid = false;
        self.queue = Some(queue);
    }

    /// Give the queue up; nothing is ever in flight.
    pub fn stop(&mut self) -> Option<ActiveQueue> {
        self.queue.take()
    }

    /// Send what is there, as far as the backend has room and the limiter allows.
    pub fn run(&mut self, path: &mut Path) -> Result<Outcome, DeviceError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(Outcome::Done);
        };
        let outcome = self.send(&mut queue, path);
        let index = queue.index();
        self.queue = Some(queue);
        outcome.map_err(|e| DeviceError::Queue(index, e))
    }

    fn send(&mut self, queue: &mut ActiveQueue, path: &mut Path) -> Result<Outcome, QueueError> {
        let mut budget = Budget::default();
        let mut outcome = Outcome::Done;
        let mut unshown = 0;
        let mut is_first = true;
        queue.disable_kicks()?;
        loop {
            let popped = queue.pop(&mut self.chain)?;
            let was_first = std::mem::take(&mut is_first);
            if !popped {
                if was_first {
                    path.metrics.no_tx_avail_buffer.inc();
                }
                queue.flush()?;
                if queue.enable_kicks()? {
                    queue.disable_kicks()?;
                    continue;
                }
                return Ok(outcome);
            }
            let length = self.chain.readable_length();
            match self.send_one(queue, path, length) {
                Sent::Done => self.paid = false,
                Sent::Gone => {
                    self.paid = false;
                    // The rest goes the same way as this packet, nowhere.
                    path.up = false;
                    outcome = Outcome::Gone;
                }
                Sent::Full => {
                    // A timer, or the backend, brings us back.
                    queue.undo_pop();
                    queue.flush()?;
                    return Ok(outcome);
                }
            }
            queue.add_used(self.chain.head, 0)?;
            unshown += 1;
            if unshown == BATCH {
                queue.flush()?;
                unshown = 0;
            }
            if budget.is_spent(length) {
                queue.flush()?;
                // Others have their turn; at its maximum the counter is readable already.
                path.metrics.tx_remaining_reqs_count.inc();
                let _ = queue.kick().write(1);
                return Ok(outcome);
            }
        }
    }

    /// Send the packet in `chain`. Full, too, when the limiter does not let it pass yet.
    fn send_one(&mut self, queue: &ActiveQueue, path: &mut Path, length: u64) -> Sent {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let metrics = path.metrics;
        if !path.up || !(LEAST..=MOST).contains(&length) {
            if path.up {
                metrics.tx_malformed_frames.inc();
            }
            metrics.tx_fails.inc();
            return Sent::Done;
        }
        if !self.paid && !path.limiter.consume(1, (length - HEADER) as u64) {
            metrics.tx_rate_limiter_throttled.inc();
            return Sent::Full;
        }
        self.paid = true;
        let packet = Packet {
            mem: queue.memory(),
            buffers: &self.chain.readable,
            length,
        };
        let begun = Instant::now();
        let sent = path.backend.send(self.pair, &packet);
        metrics.tap_write_agg.record(begun.elapsed());
        match sent {
            Sent::Done => {
                metrics.tx_count.inc();
                metrics.tx_packets_count.inc();
                metrics.tx_bytes_count.add((length - HEADER) as u64);
            }
            Sent::Full => {}
            Sent::Gone => {
                metrics.tap_write_fails.inc();
                metrics.tx_fails.inc();
            }
        }
        sent
    }
}
