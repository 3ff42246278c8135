//! vhost-user-block: a disk whose requests another process serves, in the guest's memory, without Husk.
//!
//! Over a Unix socket that process (the server, "back end") is told where queues and memory are, and gets the eventfds of kicks and
//! interrupts, whose other ends KVM has. Husk is asked again only when the driver stops or starts the device. `connection` has messages,
//! and a time limit on all of them; `frontend` what they mean; here is the device.
//!
//! **Architecture Invariant:** a server has the guest in its hand, but not Husk: nothing that it says is believed, and nothing waits for
//! it without an end.

mod connection;
mod frontend;
mod layout;
#[cfg(test)]
mod tests;

pub use connection::Error;

use connection::PATIENCE;
use frontend::Frontend;
use husk_config::{DeviceUpdate, Drive};
use husk_metrics::{METRICS, VhostUserBlockMetrics};
use husk_virtio::{ActiveQueue, ConfigSpace, DeviceError, DeviceInfo, RING_FEATURES, VirtioDevice};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_RO;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

/// Descriptors of a queue, at most.
const QUEUE_SIZE: u16 = 256;
/// The source that tells of the server's end.
const SERVER: u32 = 0;

/// A disk that another process serves.
pub struct VhostUserBlock {
    path: PathBuf,
    id: String,
    queue_count: u16,
    /// The device's own features, as they are offered.
    features: u64,
    ring_features: u64,
    config: Arc<ConfigSpace>,
    server: Server,
    queues: Vec<ActiveQueue>,
    /// The loss of the server was reported.
    has_warned: bool,
    metrics: Arc<VhostUserBlockMetrics>,
}

/// The connection to the server.
enum Server {
    Ready(Frontend),
    /// It is of no more use, and stays open until nobody watches its descriptor.
    Lost(#[expect(dead_code, reason = "kept open")] Frontend),
    Gone,
}

impl VhostUserBlock {
    /// Call the server of `drive`, which was checked with its VM's configuration.
    pub fn new(drive: &Drive) -> Result<Self, Error> {
        let begun = Instant::now();
        let path = drive.socket.clone().unwrap_or_default();
        let until = begun + PATIENCE;
        let server = Frontend::open(&path, drive.queues, until)?;
        let (features, config) = layout::learn(drive, &server, until)?;
        let metrics = METRICS.vhost_user_block.member(&drive.drive_id);
        metrics.init_time_us.set(begun.elapsed());
        Ok(Self {
            path,
            id: drive.drive_id.clone(),
            queue_count: drive.queues,
            features,
            ring_features: server.features() & RING_FEATURES,
            config: ConfigSpace::new(config),
            server: Server::Ready(server),
            queues: Vec::new(),
            has_warned: false,
            metrics,
        })
    }

    /// The server lets nobody write.
    pub fn is_read_only(&self) -> bool {
        self.features & 1 << VIRTIO_BLK_F_RO != 0
    }

    /// The server as it can be started. One that was lost is called again: it may have been started anew.
    fn ready(&mut self, until: Instant) -> Result<&Frontend, Error> {
        let is_alive = match &self.server {
            Server::Ready(server) => server.connection().is_alive(),
            Server::Lost(_) | Server::Gone => false,
        };
        if !is_alive {
            // Before the new one is called: a server may have one client at a time.
            self.server = Server::Gone;
            let server = Frontend::open(&self.path, self.queue_count, until)?;
            let config = layout::read(&server, self.features, self.queue_count, until)?;
            self.config.set(0, &config);
            self.server = Server::Ready(server);
        }
        match &self.server {
            Server::Ready(server) => Ok(server),
            Server::Lost(_) | Server::Gone => Err(Error::Closed),
        }
    }

    fn run(&mut self, features: u64, queues: &[ActiveQueue]) -> Result<(), Error> {
        let begun = Instant::now();
        let until = begun + PATIENCE;
        let started = self
            .ready(until)
            .and_then(|server| server.start(features, queues, until));
        match started {
            Ok(()) => {
                self.metrics.activate_time_us.set(begun.elapsed());
                Ok(())
            }
            Err(e) => {
                self.metrics.activate_fails.inc();
                self.lose(&e);
                Err(e)
            }
        }
    }

    /// Do without the server from now on. Said once, until the host asks for the disk and finds it: a guest can lose servers without end.
    fn lose(&mut self, why: &Error) {
        self.server = match std::mem::replace(&mut self.server, Server::Gone) {
            Server::Ready(server) => {
                server.connection().shut();
                Server::Lost(server)
            }
            other => other,
        };
        if !std::mem::replace(&mut self.has_warned, true) {
            log::error!(
                "the disk {} at {} is lost to the guest until its driver starts it again, at a reboot for example: {}",
                self.id,
                self.path.display(),
                chain(why)
            );
        }
    }

    /// Read the configuration space anew, and tell the driver.
    fn change(&mut self) -> Result<(), Error> {
        let begun = Instant::now();
        let Server::Ready(server) = &self.server else {
            return Err(Error::Closed);
        };
        let read = layout::read(server, self.features, self.queue_count, begun + PATIENCE);
        match read {
            Ok(config) => {
                self.config.set(0, &config);
                self.has_warned = false;
            }
            // What it says of its disk makes no sense: the disk that the guest knows goes on.
            Err(e @ Error::Disk(_)) => return Err(e),
            Err(e) => {
                self.lose(&e);
                if let Some(queue) = self.queues.first() {
                    queue.interrupt().needs_reset();
                }
                return Err(e);
            }
        }
        if let Some(queue) = self.queues.first() {
            queue.interrupt().config();
        }
        self.metrics.config_change_time_us.set(begun.elapsed());
        Ok(())
    }
}

impl VirtioDevice for VhostUserBlock {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: VIRTIO_ID_BLOCK,
            features: self.features,
            queue_sizes: vec![QUEUE_SIZE; usize::from(self.queue_count)],
            config: Arc::clone(&self.config),
        }
    }

    fn remote_ring_features(&self) -> Option<u64> {
        Some(self.ring_features)
    }

    fn start(&mut self, features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        let started = self.run(features, &queues);
        // They are given back at the stop, whether or not they were started.
        self.queues = queues;
        started.map_err(broken)
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        let until = Instant::now() + PATIENCE;
        let mut queues = std::mem::take(&mut self.queues);
        for queue in &mut queues {
            let base = match &self.server {
                Server::Ready(server) => server.stop(queue, until),
                Server::Lost(_) | Server::Gone => Err(Error::Closed),
            };
            let base = match base {
                Ok(base) => Ok(base),
                Err(e) => {
                    self.lose(&e);
                    // What it took and did not give back is lost with it.
                    queue.used_index()
                }
            };
            if let Err(e) = base.and_then(|base| queue.was_served(base)) {
                log::debug!("a disk stops with a broken queue: {e}");
            }
        }
        // Nobody watches its descriptor any more.
        if let Server::Lost(_) = self.server {
            self.server = Server::Gone;
        }
        queues
    }

    fn queue_ready(&mut self, _index: u16) -> Result<(), DeviceError> {
        Ok(())
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        match &self.server {
            Server::Ready(server) => vec![(server.connection().stream().as_raw_fd(), SERVER)],
            Server::Lost(_) | Server::Gone => Vec::new(),
        }
    }

    fn source_ready(&mut self, _token: u32) -> Result<(), DeviceError> {
        let error = match &self.server {
            // An answer came, and was taken.
            Server::Ready(server) if server.connection().is_alive() => return Ok(()),
            Server::Ready(_) => Error::Closed,
            Server::Lost(_) | Server::Gone => return Ok(()),
        };
        self.metrics.event_fails.inc();
        self.lose(&error);
        Err(broken(error))
    }

    fn update(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        let DeviceUpdate::Disk {
            path: None,
            rate_limiter: None,
        } = change
        else {
            let what = format!("a disk that a server has does not take {change:?}");
            return Err(DeviceError::Unsupported(what));
        };
        self.change().map_err(|e| {
            self.metrics.cfg_fails.inc();
            DeviceError::Unsupported(chain(&e))
        })
    }
}

fn broken(error: Error) -> DeviceError {
    DeviceError::Host("the disk's server", std::io::Error::other(error))
}

/// An error with its causes.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
