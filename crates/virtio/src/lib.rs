//! virtio 1.2: queues, transports, and the thread that devices run on.
//!
//! A device implements [`VirtioDevice`] and knows neither transport nor thread. A transport ([`transport`]) is a map of
//! registers over one core, which holds the status machine and moves the device *by value* to a [`DeviceThread`] when the
//! driver says DRIVER_OK, and back at a reset.
//!
//! **Architecture Invariant:** no KVM. A transport lists its doorbells, and interrupts through an eventfd or a closure; who
//! builds the VM connects them. No legacy (pre-1.0) interface.
#![forbid(unsafe_code)]

mod device;
mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod thread;
pub mod transport;
mod write_log;

pub use device::{ConfigSpace, DeviceError, DeviceInfo, DeviceState, VirtioDevice};
pub use queue::{ActiveQueue, Buffer, Chain, Extent, QueueError, QueueState, from as buffers_from};
pub use thread::{DeviceThread, RunningId, ThreadError};
pub use write_log::WriteLog;

use virtio_bindings::bindings::{virtio_config, virtio_ring};

/// Guest memory as devices see it. A clone is another handle on the same memory.
pub type GuestMemory = vm_memory::GuestMemoryMmap;

/// Feature bit: not a legacy device (6, VIRTIO_F_VERSION_1). Every transport offers and insists on it.
pub const F_VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
/// Feature bit: a queue can be reset alone (6, VIRTIO_F_RING_RESET).
pub const F_RING_RESET: u64 = 1 << virtio_config::VIRTIO_F_RING_RESET;
/// Feature bit: descriptors may point to tables of descriptors (2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bit: each side says from which index on it wants to be told (2.7.7, 2.7.10).
pub const F_EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// What the transport core offers for every device.
pub const RING_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;
