//! Transports: the registers through which a driver finds, sets up and starts a device.

mod core;
pub mod mmio;
pub mod pci;

pub use self::core::{Core, CoreState, QueueSetup, Ring};

use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// A register whose writes mean "look at a queue": KVM can turn them into an event without leaving the kernel (ioeventfd).
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// Offset in the transport's registers (for PCI: in its BAR).
    pub offset: u64,
    /// The value that is written, 32 bits for MMIO; None when any write counts, because the address says which queue.
    pub value: Option<u32>,
    /// What is to become readable.
    pub event: Arc<EventFd>,
}

#[cfg(test)]
mod tests;
