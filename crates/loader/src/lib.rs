//! Turns files into what the monitor boots: kernels checked and unpacked on the host, and the
//! initramfs of the default guest.
//!
//! **Architecture Invariant:** this crate knows neither KVM nor guest memory. Its results are open
//! files and offsets in them; whoever maps guest memory reads or maps those.
//!
//! Every file is taken for hostile: no number from one is used before it is checked, what is
//! allocated or written is limited, and nothing here panics on bad input.

#![forbid(unsafe_code)]

pub mod initramfs;

mod bytes;
mod bzimage;
mod cache;
mod elf;
mod error;
mod kernel;
mod sections;
mod sparse;
mod unpack;

#[cfg(test)]
mod testing;

pub use cache::Cache;
pub use error::Error;
pub use kernel::{Format, Kernel, Segment, kernel_release};
pub use unpack::Compression;
