//! virtio-blk (virtio 1.2, 5.2): disks in raw files and block devices of the host.
//!
//! A request goes straight between the file and the guest's pages, either waited for on the I/O thread or through io_uring,
//! with one ring for the whole device. `request` makes a descriptor chain into steps, each a call to the host; `io` makes the
//! calls; `engine` goes from queue to queue; here are start, stop and the changes while the VM runs.
//!
//! **Architecture Invariant:** `unsafe` is in `io` only. Nothing here interprets what is in the file: images are raw.

mod bounce;
mod disk;
mod engine;
mod io;
mod layout;
mod overlay;
mod request;
#[cfg(test)]
mod tests;

use crate::rate_limiter::{self, RateLimiter};
use bounce::Bounce;
use disk::{Access, Disk};
use engine::Engine;
use husk_config::{DeviceUpdate, Drive};
use husk_metrics::{BlockMetrics, METRICS};
use husk_virtio::{
    ActiveQueue, Chain, ConfigSpace, DeviceError, DeviceInfo, DeviceState, GuestMemory,
    VirtioDevice,
};
pub use overlay::{CLUSTER, LARGEST, Overlay, unnamed, usual_directory};
use request::Rules;
use std::fs::File;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

/// Bytes of a sector, the unit of the protocol (5.2.5).
const SECTOR: u64 = 512;
/// Descriptors of a queue, at most: so many that a request of 1 MiB in pages is not cut in two.
const QUEUE_SIZE: u16 = 512;
/// Buffers of data in a request, at most: what a queue has room for, without header and status.
const SEGMENTS: u32 = 510;
/// Bytes of each of them, at most, so that no request keeps the I/O thread for long.
const SEGMENT_SIZE: u32 = 1 << 20;
/// Segments of a discard, at most.
const MAX_DISCARD_SEGMENTS: u32 = 64;
/// The source that tells of completions.
const COMPLETIONS: u32 = 0;
/// The source that tells of tokens.
const TOKENS: u32 = 1;

/// How the file under an overlay is opened.
const BASE: Access = Access {
    read_only: true,
    direct: false,
};

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// open, read-only.
    #[error("the disk {0} cannot be opened")]
    Open(PathBuf, #[source] std::io::Error),
    /// open, for writing.
    #[error(
        "the disk {0} cannot be opened for reading and writing; attach it read-only if the guest need not write"
    )]
    OpenToWrite(PathBuf, #[source] std::io::Error),
    /// The file system has no O_DIRECT.
    #[error("the disk {0} cannot be opened with O_DIRECT; attach it without `direct`")]
    Direct(PathBuf, #[source] std::io::Error),
    /// Neither a file nor a block device.
    #[error("the disk {0} is neither a file nor a block device; give a raw image")]
    NotADisk(PathBuf),
    /// stat, or the like.
    #[error("the size of the disk {0} cannot be read")]
    Read(PathBuf, #[source] std::io::Error),
    /// Locked, wanted for writing.
    #[error(
        "the disk {0} is in use by another VM or process; stop that one, or attach the disk read-only to all"
    )]
    Used(PathBuf),
    /// Locked for writing, wanted read-only.
    #[error(
        "the disk {0} is being written by another VM or process; stop that one, or attach the disk read-only there too"
    )]
    Written(PathBuf),
    /// A new file with larger blocks than the guest knows of.
    #[error(
        "the disk {0} needs blocks of {1} bytes, and the guest was told {2}; give one with smaller blocks"
    )]
    Blocks(PathBuf, u32, u32),
    /// Another file for a saved guest.
    #[error(
        "the disk {0} has {1} bytes, and the guest knows one of {2}; give one that is not smaller"
    )]
    Smaller(PathBuf, u64, u64),
    /// A saved disk that is none.
    #[error("the disk {0} cannot go on from what was saved: it lacks a size that a disk has")]
    State(PathBuf),
    /// io_uring was asked for, and there is none.
    #[error("io_uring cannot be set up for the disk {0}; choose the engine Sync or Auto")]
    IoUring(PathBuf, #[source] std::io::Error),
    /// No file for an overlay.
    #[error("no file for the overlay of the disk {0} can be made in {1}; name another directory")]
    Overlay(PathBuf, PathBuf, #[source] std::io::Error),
    /// Too much to note what is written.
    #[error("the disk {0} is too large for an overlay, which takes 16 TiB; attach it without")]
    OverlayTooLarge(PathBuf),
    /// An overlay from elsewhere.
    #[error("the disk {0} is not the one that its overlay was made for")]
    ForeignOverlay(PathBuf),
    /// The base of an overlay stays what it is.
    #[error("the disk {0} has an overlay, and keeps its file; give it without path_on_host")]
    OverlayStays(PathBuf),
    /// No timer.
    #[error("the limits of the disk {0} cannot be set up")]
    Limiter(PathBuf, #[source] rate_limiter::Error),
}

/// A block device.
pub struct Block {
    access: Access,
    /// The guest cannot write.
    read_only: bool,
    features: u64,
    queue_count: u16,
    id: [u8; 20],
    config: Arc<ConfigSpace>,
    disk: Disk,
    /// What takes the writes instead of the file.
    overlay: Option<Overlay>,
    limiter: RateLimiter,
    engine: Engine,
    bounce: Bounce,
    chain: Chain,
    /// By number; those that the driver enabled.
    queues: Vec<Option<Queue>>,
    /// Where the next turn of waiting queues begins.
    turn: usize,
    started: Option<Started>,
    /// A failure of the host was reported.
    has_warned: bool,
    metrics: Arc<BlockMetrics>,
    /// When the last request that was waited for, or the last batch, began or ended, in nanoseconds since `made`.
    clock: u64,
    made: Instant,
}

/// A queue in use.
struct Queue {
    active: ActiveQueue,
    /// It may hold requests that there were no tokens or no room for.
    waits: bool,
}

/// What lasts from start to stop.
struct Started {
    mem: Arc<GuestMemory>,
    rules: Rules,
}

impl Block {
    /// Open and lock the file of `drive`, which was checked with its VM's configuration.
    pub fn new(drive: &Drive) -> Result<Self, Error> {
        let access = Access {
            read_only: drive.read_only(),
            direct: drive.direct,
        };
        let path = drive.path();
        match &drive.overlay {
            None => Self::with(drive, access, Disk::open(path, access)?, None),
            Some(overlay) => {
                let disk = Disk::open(path, BASE)?;
                let overlay = overlay::create(overlay, path, disk.capacity)?;
                Self::with(drive, BASE, disk, Some(overlay))
            }
        }
    }

    /// As [`Block::new`], with an overlay that is there already, over the file that the drive's path names or, where it is open
    /// already, and not with O_DIRECT, `base`. The lock that others have by the same open file description is changed to one for reading.
    ///
    /// # Errors
    /// As [`Block::new`], and if the overlay is one of a disk of another size.
    pub fn with_overlay(
        drive: &Drive,
        base: Option<File>,
        overlay: Overlay,
    ) -> Result<Self, Error> {
        let path = drive.path();
        let disk = match base {
            Some(file) => Disk::of(file, path, BASE, None)?.0,
            None => Disk::open(path, BASE)?,
        };
        if overlay.capacity() != disk.capacity {
            return Err(Error::ForeignOverlay(path.into()));
        }
        Self::with(drive, BASE, disk, Some(overlay))
    }

    /// As [`Block::new`] of a drive with an overlay, over `base`, which is open already, and which others read and nobody writes to.
    pub fn over(drive: &Drive, base: File) -> Result<Self, Error> {
        let path = drive.path();
        let disk = Disk::of(base, path, BASE, None)?.0;
        let own = drive.overlay.clone().unwrap_or_default();
        let overlay = overlay::create(&own, path, disk.capacity)?;
        Self::with(drive, BASE, disk, Some(overlay))
    }

    fn with(
        drive: &Drive,
        access: Access,
        mut disk: Disk,
        overlay: Option<Overlay>,
    ) -> Result<Self, Error> {
        let path = drive.path();
        if overlay.is_some() {
            disk.physical_size = disk.physical_size.max(CLUSTER as u32);
        }
        let limiter = RateLimiter::new(drive.rate_limiter);
        let mut id = [0; 20];
        for (to, from) in id.iter_mut().zip(drive.drive_id.bytes()) {
            *to = from;
        }
        Ok(Self {
            access,
            read_only: drive.read_only(),
            features: layout::features(drive),
            queue_count: drive.queues,
            id,
            config: ConfigSpace::new(layout::config(drive, &disk)),
            limiter: limiter.map_err(|e| Error::Limiter(path.into(), e))?,
            engine: Engine::new(drive)?,
            disk,
            overlay,
            bounce: Bounce::default(),
            chain: Chain::default(),
            queues: (0..drive.queues).map(|_| None).collect(),
            turn: 0,
            started: None,
            has_warned: false,
            metrics: METRICS.block.member(&drive.drive_id),
            clock: 0,
            made: Instant::now(),
        })
    }

    /// What was written, where that goes to an overlay. All of it only while nothing is in flight.
    pub fn overlay(&self) -> Option<&Overlay> {
        self.overlay.as_ref()
    }

    /// Look at the time, for how long requests take.
    fn tick(&mut self) {
        self.clock = self.made.elapsed().as_nanos() as u64;
    }

    /// What requests must keep to from now on.
    fn rules(&self, features: u64) -> Rules {
        let (max_discard, max_zeroes) = layout::segment_limits(&self.disk);
        let flush = 1 << VIRTIO_BLK_F_FLUSH;
        Rules {
            capacity: self.disk.capacity,
            block_size: self.disk.block_size.into(),
            read_only: self.read_only,
            // What changes something goes to an overlay's file.
            is_device: self.disk.is_device && self.overlay.is_none(),
            features,
            // 5.2.6.2: without flushes, what is written is on the disk.
            write_through: self.features & flush != 0 && features & flush == 0,
            max_discard,
            max_zeroes,
            id: self.id,
        }
    }

    /// Go on with another file, or with what is new about this one; whether the driver should look at its capacity.
    fn change_file(&mut self, path: Option<&Path>) -> Result<bool, Error> {
        if self.overlay.is_some() {
            // What it is the overlay of must not change.
            return match path {
                None => Ok(false),
                Some(_) => Err(Error::OverlayStays(self.disk.path.clone())),
            };
        }
        let Some(path) = path else {
            return self.disk.read_size();
        };
        let (mut disk, same) = Disk::open_beside(path, self.access, Some(&self.disk))?;
        if same {
            return self.disk.read_size();
        }
        if disk.block_size > self.disk.block_size {
            let sizes = (disk.block_size, self.disk.block_size);
            return Err(Error::Blocks(path.into(), sizes.0, sizes.1));
        }
        // The guest goes on with the blocks that it knows.
        disk.block_size = self.disk.block_size;
        disk.read_size()?;
        self.disk = disk;
        Ok(true)
    }

    /// The file of a guest that goes on, which knows its size and its blocks.
    fn go_on_from(&mut self, state: &DeviceState) -> Result<(), Error> {
        let path = self.disk.path.clone();
        let number = |name: &str| state.get(name).and_then(DeviceState::as_u64);
        let blocks = number("block_size").and_then(|size| u32::try_from(size).ok());
        let blocks = blocks.filter(|size| size.is_power_of_two() && (512..=4096).contains(size));
        let (Some(capacity), Some(blocks)) = (number("capacity"), blocks) else {
            return Err(Error::State(path));
        };
        if self.disk.block_size > blocks {
            return Err(Error::Blocks(path, self.disk.block_size, blocks));
        }
        if self.disk.block_size < blocks {
            self.disk.block_size = blocks;
            self.disk.read_size()?;
            self.config.set(layout::BLOCK_SIZE, &blocks.to_le_bytes());
            let sectors = self.disk.sectors().to_le_bytes();
            self.config.set(layout::CAPACITY, &sectors);
        }
        if self.disk.capacity < capacity {
            return Err(Error::Smaller(path, self.disk.capacity, capacity));
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: VIRTIO_ID_BLOCK,
            features: self.features,
            queue_sizes: vec![QUEUE_SIZE; usize::from(self.queue_count)],
            config: Arc::clone(&self.config),
        }
    }

    fn start(&mut self, features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        let Some(mem) = queues.first().map(|queue| queue.memory().clone()) else {
            return Ok(());
        };
        let mem = Arc::new(mem);
        self.engine.start(&mem);
        self.started = Some(Started {
            mem,
            rules: self.rules(features),
        });
        for active in queues {
            if let Some(place) = self.queues.get_mut(usize::from(active.index())) {
                *place = Some(Queue {
                    active,
                    waits: false,
                });
            }
        }
        Ok(())
    }

    fn not_started(&mut self) {
        self.metrics.activate_fails.inc();
    }

    /// Nothing in it is the driver's to change.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.metrics.cfg_fails.inc();
    }

    fn stop(&mut self) -> Vec<ActiveQueue> {
        if let Err(e) = self.drain() {
            log::debug!("a disk stops with a broken queue: {e}");
        }
        self.engine.stop();
        self.started = None;
        let queues = self.queues.iter_mut().filter_map(Option::take);
        queues.map(|queue| queue.active).collect()
    }

    fn queue_ready(&mut self, index: u16) -> Result<(), DeviceError> {
        self.metrics.queue_event_count.inc();
        let served = self.serve(index);
        served.inspect_err(|_| self.metrics.event_fails.inc())
    }

    fn sources(&self) -> Vec<(RawFd, u32)> {
        let completions = self.engine.source().map(|fd| (fd, COMPLETIONS));
        let tokens = (self.limiter.source(), TOKENS);
        completions.into_iter().chain([tokens]).collect()
    }

    fn source_ready(&mut self, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKENS if !self.limiter.timer_fired() => return Ok(()),
            TOKENS => self.metrics.rate_limiter_event_count.inc(),
            _ => {
                self.engine.submit()?;
                self.complete()?;
            }
        }
        self.serve_waiting()
    }

    fn update(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        self.metrics.update_count.inc();
        let updated = self.change(change);
        updated.inspect_err(|_| self.metrics.update_fails.inc())
    }

    fn save(&self) -> DeviceState {
        let (capacity, block_size) = (self.disk.capacity, self.disk.block_size);
        serde_json::json!({ "capacity": capacity, "block_size": block_size })
    }

    fn load(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        self.go_on_from(&state).map_err(refused)
    }
}

impl Block {
    fn change(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        let DeviceUpdate::Disk { path, rate_limiter } = change else {
            let what = format!("a disk does not take {change:?}");
            return Err(DeviceError::Unsupported(what));
        };
        // Requests in flight end with the file that they began with.
        self.drain()?;
        let changed = self.change_file(path.as_deref()).map_err(refused)?;
        if let Some(features) = self.started.as_ref().map(|s| s.rules.features) {
            let rules = self.rules(features);
            if let Some(started) = &mut self.started {
                started.rules = rules;
            }
        }
        // Nothing fails from here on.
        if let Some(limits) = rate_limiter {
            self.limiter.update(*limits);
        }
        if changed {
            let sectors = self.disk.sectors().to_le_bytes();
            self.config.set(layout::CAPACITY, &sectors);
            self.has_warned = false;
            if let Some(queue) = self.queues.iter().flatten().next() {
                queue.active.interrupt().config();
            }
        }
        Ok(())
    }
}

/// An update that cannot be, with its causes.
fn refused(error: Error) -> DeviceError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    DeviceError::Unsupported(text)
}
