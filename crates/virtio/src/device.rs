//! What a device is to the rest of Husk.

use crate::queue::{ActiveQueue, QueueError};
use husk_config::DeviceUpdate;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Constant facts of a device, as data.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// virtio device ID (5).
    pub id: u32,
    /// The device's own feature bits. Those of the rings are the transport core's to add, but for RING_RESET.
    pub features: u64,
    /// Largest size of each queue, powers of two up to 32768. There are at most 64 queues.
    pub queue_sizes: Vec<u16>,
    /// The device's configuration space.
    pub config: Arc<ConfigSpace>,
}

/// A device's configuration space (2.5), shared by the device, which changes it, and the transport, which reads it on a vCPU
/// thread.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    generation: AtomicU8,
}

impl ConfigSpace {
    /// With these contents, whose length never changes.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            generation: AtomicU8::new(0),
        })
    }

    /// Fill `data` from `offset`; what lies behind the end reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(source) = bytes.get(start..) {
            for (to, from) in data.iter_mut().zip(source) {
                *to = *from;
            }
        }
    }

    /// Change what is at `offset`, as the device; what lies behind the end is dropped. Tell the driver with
    /// [`husk_bus::Interrupt::config`] afterwards.
    pub fn set(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = bytes.get_mut(offset..) {
            for (to, from) in target.iter_mut().zip(data) {
                *to = *from;
            }
        }
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes with every [`ConfigSpace::set`] (2.5.2).
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// All of it.
    pub fn contents(&self) -> Vec<u8> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.clone()
    }

    /// Count on from the generation that the driver of a saved device has seen.
    pub fn set_generation(&self, generation: u8) {
        self.generation.store(generation, Ordering::Release);
    }
}

/// Why a device cannot go on with what its driver did. The device then needs a reset (2.1, DEVICE_NEEDS_RESET).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A queue is not as it must be.
    #[error("queue {0}")]
    Queue(u16, #[source] QueueError),
    /// The host failed the device.
    #[error("{0}")]
    Host(&'static str, #[source] std::io::Error),
    /// The driver broke a rule of this kind of device.
    #[error("the driver {0}")]
    Driver(&'static str),
    /// The device does not do that.
    #[error("{0}")]
    Unsupported(String),
}

/// Progress of a device that its configuration does not tell, for a snapshot. Self-describing.
pub type DeviceState = serde_json::Value;

/// A virtio device. It is *stopped* (moved freely, no queues) or *started* (on its [`crate::DeviceThread`], which makes all
/// calls below). Nothing here may block for longer than a request to the host takes.
pub trait VirtioDevice: Send {
    /// Constant facts; `config` is always the same space.
    fn info(&self) -> DeviceInfo;

    /// Some: another process serves the queues. It takes kicks and interrupts the driver itself ([`husk_bus::Interrupt::remote`]),
    /// no [`VirtioDevice::queue_ready`] comes, and of [`crate::RING_FEATURES`] these are offered, with VERSION_1 among them.
    fn remote_ring_features(&self) -> Option<u64> {
        None
    }

    /// The driver wrote `data` at `offset` of the configuration space. The device takes over what the driver may change.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: it took `features`, and enabled these queues (others do not exist for it). Buffers may be
    /// waiting in them already, and [`VirtioDevice::queue_ready`] is called for each soon.
    fn start(&mut self, features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError>;

    /// The driver wanted it to start, and it has not: [`VirtioDevice::start`] has failed, or a queue cannot be used. It is
    /// stopped. To be counted.
    fn not_started(&mut self) {}

    /// Finish what is in flight, forget what the driver negotiated, and give the queues back. Without effect when stopped.
    fn stop(&mut self) -> Vec<ActiveQueue>;

    /// As [`VirtioDevice::stop`], but the driver is to notice nothing: what it has begun goes on at the next
    /// [`VirtioDevice::start`], of this device, or of one that has loaded what [`VirtioDevice::save`] tells now.
    fn suspend(&mut self) -> Vec<ActiveQueue> {
        self.stop()
    }

    /// The driver has made buffers available in queue `index`. Called at least once after the last of them.
    fn queue_ready(&mut self, index: u16) -> Result<(), DeviceError>;

    /// File descriptors to watch for input while started, each with a number of the device's own below 65536. They are
    /// watched edge-triggered: take all that is there, or remember that something is. Asked for once, after `start`.
    fn sources(&self) -> Vec<(RawFd, u32)> {
        Vec::new()
    }

    /// The descriptor that was listed with `token` has become readable, or has failed.
    fn source_ready(&mut self, _token: u32) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Give up queue `index` alone, after what is in flight in it (2.6.1). Only with `F_RING_RESET` among the features.
    fn reset_queue(&mut self, _index: u16) -> Option<ActiveQueue> {
        None
    }

    /// Take a queue that was reset and is enabled again.
    fn enable_queue(&mut self, _queue: ActiveQueue) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Change the device while the VM runs. An error changes nothing.
    fn update(&mut self, change: &DeviceUpdate) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported(format!(
            "the device does not take {change:?}"
        )))
    }

    /// What can be told of the device at this moment, for a person or program outside; null: nothing.
    fn report(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Progress that a snapshot must hold. Only while stopped.
    fn save(&self) -> DeviceState {
        DeviceState::Null
    }

    /// Go on from what [`VirtioDevice::save`] gave. Only while stopped.
    fn load(&mut self, _state: DeviceState) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_may_be_read_at_any_offset_and_length() {
        let space = ConfigSpace::new((1..=6).collect());
        for (offset, wanted) in [
            (0, [1, 2, 3, 4]),
            (3, [4, 5, 6, 0]),
            (6, [0; 4]),
            (u64::MAX, [0; 4]),
        ] {
            let mut data = [0xff; 4];
            space.read(offset, &mut data);
            assert_eq!(data, wanted, "{offset}");
        }
    }

    #[test]
    fn a_change_shows_in_the_generation_and_never_grows_the_space() {
        let space = ConfigSpace::new(vec![0; 4]);
        let before = space.generation();
        space.set(2, &[7, 8, 9]);
        space.set(100, &[1]);
        assert_ne!(space.generation(), before);
        let mut data = [0xff; 8];
        space.read(0, &mut data);
        assert_eq!(data, [0, 0, 7, 8, 0, 0, 0, 0]);
    }
}
