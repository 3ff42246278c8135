//! virtio-vsock (5.10): stream sockets between the guest and programs of the host, which see Unix sockets.
//!
//! A program of the host connects to the device's Unix socket and sends `CONNECT <port>\n`; when the guest accepts, it reads
//! `OK <host port>\n`, and then both talk. A guest that connects to port P of context ID 2 reaches the program that listens
//! on the Unix socket's path with `_P` behind. It is Firecracker's mapping, so that its clients work unchanged.
//!
//! From packets to sockets: `packet` lies in descriptor chains of any layout; `connection` is the protocol's state machine,
//! with no I/O; `stream` joins one to a socket, `muxer` all of them to a device. Data goes between sockets and guest memory
//! by the kernel, without a copy here, unless a program is slow to take it.
//!
//! A program that the guest writes to may go at any time: SIGPIPE must be ignored, as Rust's runtime does.

pub mod connection;
mod muxer;
pub mod packet;
mod ring;
mod slots;
mod stream;
#[cfg(test)]
mod tests;
mod unix;

use husk_metrics::{METRICS, VsockMetrics};
use husk_virtio::{
    ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, DeviceState, GuestMemory, QueueError,
    VirtioDevice,
};
use muxer::{Muxer, ReceiveError};
use packet::HEADER_SIZE;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

pub use muxer::MAX_CONNECTIONS;

/// Feature bit: stream sockets (5.10.3, VIRTIO_VSOCK_F_STREAM).
const F_STREAM: u64 = 1 << 0;
/// Event: connections are lost (5.10.6.7, VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).
const EVENT_TRANSPORT_RESET: u32 = 0;

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZE: u16 = 256;

/// Packets in one direction before other devices have a turn.
const BATCH: usize = 128;
/// How often so many are taken from a driver that is gone: more than its queue holds.
const LAST_TURNS: usize = 4;

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Someone listens there.
    #[error("the vsock socket {0:?} is in use by another process: give another uds_path")]
    InUse(PathBuf),
    /// Something is there, perhaps left by a process that has ended.
    #[error("{0:?} is where the vsock socket is to be, but nobody listens there: remove it")]
    Stale(PathBuf),
    /// The host does not let us.
    #[error("cannot listen on the vsock socket {0:?}: its folder must exist and be writable")]
    Listen(PathBuf, #[source] std::io::Error),
    /// Out of descriptors, probably.
    #[error("cannot wait for the vsock socket {0:?}: the limit of open files may be too low")]
    Wait(PathBuf, #[source] std::io::Error),
}

/// The device.
pub struct Vsock {
    config: Arc<ConfigSpace>,
    muxer: Muxer,
    rx: Option<ActiveQueue>,
    tx: Option<ActiveQueue>,
    event: Option<ActiveQueue>,
    mem: Option<GuestMemory>,
    chain: Chain,
    /// The driver believes in connections that are gone, and is to be told.
    transport_reset: bool,
    metrics: Arc<VsockMetrics>,
}

impl Vsock {
    /// Listen on `config.uds_path`, where nothing may be. The socket is removed when the device is dropped.
    pub fn new(config: &husk_config::Vsock) -> Result<Self, Error> {
        Self::with_metrics(config, METRICS.vsock.member(""))
    }

    fn with_metrics(
        config: &husk_config::Vsock,
        metrics: Arc<VsockMetrics>,
    ) -> Result<Self, Error> {
        let cid = u64::from(config.guest_cid);
        Ok(Self {
            config: ConfigSpace::new(cid.to_le_bytes().to_vec()),
            muxer: Muxer::new(cid, &config.uds_path, Arc::clone(&metrics))?,
            rx: None,
            tx: None,
            event: None,
            mem: None,
            chain: Chain::default(),
            transport_reset: false,
            metrics,
        })
    }

    /// Move packets both ways; a bounded number, and if there are more, another turn comes.
    fn run(&mut self) -> Result<(), DeviceError> {
        let more_from = self.take_packets()?;
        let waited = !self.muxer.has_room();
        let more_to = self.give_packets()?;
        if more_from || more_to || waited && self.muxer.has_room() {
            self.muxer.wake();
        }
        Ok(())
    }

    /// Take packets from the guest; true when there are more that could be taken at once.
    fn take_packets(&mut self) -> Result<bool, DeviceError> {
        let (Some(queue), Some(mem)) = (&mut self.tx, &self.mem) else {
            return Ok(false);
        };
        let (muxer, chain) = (&mut self.muxer, &mut self.chain);
        let received = receive(queue, mem, muxer, chain);
        let received = received.inspect_err(|_| self.metrics.tx_queue_event_fails.inc());
        received.map_err(|error| match error {
            ReceiveError::NoHeader => DeviceError::Driver("sent a vsock packet with no header"),
            ReceiveError::Memory(error) => DeviceError::Queue(TX, error),
        })
    }

    /// Give packets to the guest; true when there are more that could be given at once.
    fn give_packets(&mut self) -> Result<bool, DeviceError> {
        let (Some(queue), Some(mem)) = (&mut self.rx, &self.mem) else {
            return Ok(false);
        };
        let (muxer, chain) = (&mut self.muxer, &mut self.chain);
        let sent = send(queue, mem, muxer, chain);
        if !matches!(sent, Ok(Some(_))) {
            self.metrics.rx_queue_event_fails.inc();
        }
        match sent {
            Ok(Some(more)) => Ok(more),
            Ok(None) => Err(DeviceError::Driver(
                "gave a vsock receive buffer with no room for data",
            )),
            Err(error) => Err(DeviceError::Queue(RX, error)),
        }
    }

    /// Tell the driver that connections are gone, if it has a buffer for it.
    fn tell_reset(&mut self) -> Result<(), DeviceError> {
        let (Some(queue), Some(mem), true) = (&mut self.event, &self.mem, self.transport_reset)
        else {
            return Ok(());
        };
        let chain = &mut self.chain;
        let mut tell = || {
            if !(queue.pop(chain)? || queue.enable_kicks()? && queue.pop(chain)?) {
                return Ok(None);
            }
            let written = chain.write(mem, 0, &EVENT_TRANSPORT_RESET.to_le_bytes())?;
            queue.add_used(chain.head, written as u32)?;
            queue.flush()?;
            Ok(Some(written))
        };
        match tell().map_err(|e| DeviceError::Queue(EVENT, e))? {
            None => Ok(()),
            Some(4) => {
                self.transport_reset = false;
                Ok(())
            }
            Some(_) => Err(DeviceError::Driver(
                "gave a vsock event buffer of less than 4 bytes",
            )),
        }
    }
}

impl Drop for Vsock {
    /// What the guest had sent when it ended belongs to the host's programs: what is in the queue, and what they have not
    /// taken yet. A guest may well write, close and power off.
    fn drop(&mut self) {
        for _ in 0..LAST_TURNS {
            if !matches!(self.take_packets(), Ok(true)) {
                break;
            }
        }
        self.muxer.deliver();
    }
}

fn receive(
    queue: &mut ActiveQueue,
    mem: &GuestMemory,
    muxer: &mut Muxer,
    chain: &mut Chain,
) -> Result<bool, ReceiveError> {
    queue.disable_kicks()?;
    for _ in 0..BATCH {
        if !muxer.has_room() {
            // The guest has first to take answers; then another turn comes.
            queue.flush()?;
            return Ok(false);
        }
        if !queue.pop(chain)? {
            queue.flush()?;
            if !queue.enable_kicks()? {
                return Ok(false);
            }
            queue.disable_kicks()?;
            continue;
        }
        muxer.receive(mem, chain)?;
        queue.add_used(chain.head, 0)?;
    }
    queue.flush()?;
    Ok(true)
}

/// None: a buffer is too small.
fn send(
    queue: &mut ActiveQueue,
    mem: &GuestMemory,
    muxer: &mut Muxer,
    chain: &mut Chain,
) -> Result<Option<bool>, QueueError> {
    // Kicks are for when there is something to send and no buffer for it.
    queue.disable_kicks()?;
    for _ in 0..BATCH {
        if !muxer.has_packets() {
            queue.flush()?;
            return Ok(Some(false));
        }
        if !queue.pop(chain)? {
            queue.flush()?;
            if !queue.enable_kicks()? {
                return Ok(Some(false));
            }
            continue;
        }
        if chain.writable_length() <= HEADER_SIZE as u64 {
            return Ok(None);
        }
        match muxer.send(mem, chain)? {
            Some(written) => queue.add_used(chain.head, written)?,
            None => queue.undo_pop(),
        }
    }
    queue.flush()?;
    Ok(Some(true))
}

impl VirtioDevice for Vsock {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: VIRTIO_ID_VSOCK,
            features: F_STREAM,
            queue_sizes: vec![QUEUE_SIZE; 3],
            config: Arc::clone(&self.config),
        }
    }

    fn start(&mut self, _features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        for queue in queues {
            self.mem.get_or_insert_with(|| queue.memory().clone());
            match queue.index() {
                RX => self.rx = Some(queue),
                TX => self.tx = Some(queue),
                _ => self.event = Some(queue),
            }
        }
        // Programs may have come before the driver.
        self.muxer.wake();
        Ok(())
    }

    fn not_started(&mut self) {
        self.metrics.activate_fails.inc();
    }

    /// Nothing in it is the driver's to change.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.metrics.cfg_fails.inc();
    }

    /// All connections end: the host's programs see it once they have what the guest had sent, and the driver is told if it
    /// does not reset the device.
    fn stop(&mut self) -> Vec<ActiveQueue> {
        self.transport_reset |= self.muxer.clear();
        self.suspend()
    }

    /// Connections stay, of this device; one that is loaded has none.
    fn suspend(&mut self) -> Vec<ActiveQueue> {
        self.mem = None;
        let queues = [self.rx.take(), self.tx.take(), self.event.take()];
        queues.into_iter().flatten().collect()
    }

    fn queue_ready(&mut self, index: u16) -> Result<(), DeviceError> {
        match index {
            EVENT => {
                let told = self.tell_reset();
                return told.inspect_err(|_| self.metrics.ev_queue_event_fails.inc());
            }
            RX => self.metrics.rx_queue_event_count.inc(),
            _ => self.metrics.tx_queue_event_count.inc(),
        }
        self.run()
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        vec![(self.muxer.fd(), 0)]
    }

    fn source_ready(&mut self, _token: u32) -> Result<(), DeviceError> {
        let polled = self.muxer.poll();
        let polled = polled.inspect_err(|_| self.metrics.muxer_event_fails.inc());
        polled.map_err(|e| DeviceError::Host("cannot wait for vsock's sockets", e))?;
        self.run()
    }

    /// The connections of a saved guest are not there any more: its driver is told when it has a buffer for it.
    fn load(&mut self, _state: DeviceState) -> Result<(), DeviceError> {
        self.transport_reset = true;
        Ok(())
    }
}
