//! HTTP over a Unix socket, in the shape of Firecracker's API, on one thread.
//!
//! A request becomes a [`husk_config::VmmRequest`] ([`parse`]), which somebody else answers; hyper speaks HTTP. [`client`] is the
//! other end, for `husk api` and its like.
//!
//! **Architecture Invariant:** nothing here knows KVM, devices or the state of a VM, and nothing waits for a VM while other
//! clients could be served.
#![forbid(unsafe_code)]

pub mod client;
pub mod openapi;
mod parse;
mod server;
mod socket;

pub use parse::{Call, Parsed, Refused, parse};
pub use server::{Handler, Outcome, Refusal, Reply, Server, Settings};
pub use socket::{SocketError, bind};

/// Largest body of a request, in bytes, unless the user says otherwise. As Firecracker's.
pub const MAX_BODY: usize = 51_200;

/// The version of Firecracker's API that this is a drop-in for.
pub const FIRECRACKER_VERSION: &str = "1.15.0";
