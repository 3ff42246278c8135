//! PCI as a guest sees it: configuration space, one bus behind a host bridge with ECAM, memory BARs, MSI-X.
//!
//! Conventional configuration space (PCI Local Bus 3.0, 6) over ECAM (PCI Express 5.0, 7.2.2): one segment, bus 0, up to 31
//! functions beside the host bridge, each function 0 of its device with at most one memory BAR. No I/O ports, no INTx, no
//! bridges, no extended capabilities.
//!
//! **Architecture Invariant:** a leaf. It knows no KVM and no virtio: messages leave through a [`MsiSink`], and who registers
//! addresses with KVM implements [`Relocate`].
#![forbid(unsafe_code)]

mod bridge;
mod config;
mod msix;

pub use bridge::{Ecam, Function, HostBridge, MAX_FUNCTIONS, Relocate, Window};
pub use config::{ConfigSpace, Identity};
pub use msix::{MAX_VECTORS, Message, MsiSink, Msix};

/// Why a function cannot be built or put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The capabilities fill the 256 bytes.
    #[error(
        "PCI capability {0:#x} does not fit configuration space: leave out one, or make it smaller"
    )]
    CapabilitySpace(u8),
    /// Not a size that a BAR can have.
    #[error("a PCI BAR of {0:#x} bytes: give a power of two from 0x1000 to 0x80000000")]
    BarSize(u32),
    /// More vectors than the table can have.
    #[error("{0} MSI-X vectors: give 1 to {max}", max = MAX_VECTORS)]
    Vectors(u16),
    /// A saved table is not this function's.
    #[error("the saved MSI-X table has {0} vectors, and the function {1}")]
    OtherVectors(usize, u16),
    /// The device number is taken, or none.
    #[error("PCI device number {0} is taken, or does not exist")]
    Number(u8),
    /// All device numbers are taken.
    #[error("PCI bus 0 has {max} devices already: use fewer", max = MAX_FUNCTIONS - 1)]
    Full,
    /// No room for the BAR.
    #[error("no room for a PCI BAR of {0:#x} bytes: use fewer devices")]
    Window(u32),
}
