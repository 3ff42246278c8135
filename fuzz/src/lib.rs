//! What fuzz targets have in common: programs of what a hostile guest does, and whom it does it to.
//!
//! An input is a [`guest::Program`]. It is run with a device and a guest's memory of its own, over one of the transports, and
//! whatever it did, the device must then answer a reset, start, and do its work for a driver that keeps to the rules. So a
//! finding is a panic (in any thread), a hang, memory that grows, or a device that is of no more use.

pub mod balloon;
pub mod block;
pub mod bytes;
pub mod echo;
pub mod entropy;
pub mod guest;
pub mod json;
pub mod net;
pub mod saved;
pub mod vsock;
