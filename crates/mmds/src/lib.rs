//! The microVM metadata service: JSON that the host stores ([`Mmds`]) and that the guest fetches over HTTP from a link-local
//! address. It is compatible with Firecracker's, and so with EC2's IMDS as far as that goes.
//!
//! Nothing of it is on the host's network. A [`Stack`] takes the Ethernet frames that a guest sends to the address, has them
//! answered by a TCP/IP stack of its own (smoltcp), and gives back the frames that are to go to the guest. The [`Server`]
//! answers what comes in over TCP.
//!
//! The guest is hostile: its requests are bounded in size and time, its connections in number, and what it makes the service
//! remember is bounded by these. Time is an argument everywhere, so that tests need not wait.
//!
//! **Architecture Invariant:** nothing here knows KVM, virtio or a file descriptor.
#![forbid(unsafe_code)]

mod connection;
mod http;
mod server;
mod stack;
mod store;
mod token;

pub use server::{Reply, Server};
pub use stack::{LONGEST_FRAME, MAC, Stack};
pub use store::{DEFAULT_LIMIT, Mmds, StoreError};

/// Fill at most 256 bytes. By the system call: the usual library opens /dev/urandom in a static program, for good, which a process that is
/// forked has not.
fn fill_random(bytes: &mut [u8]) -> std::io::Result<()> {
    use rustix::rand::{GetRandomFlags, getrandom};
    match getrandom(&mut *bytes, GetRandomFlags::empty())? == bytes.len() {
        true => Ok(()),
        false => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}
