//! What a network device needs of its host.

use husk_virtio::{Buffer, GuestMemory, buffers_from};
use std::os::fd::RawFd;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of `struct virtio_net_hdr` (5.1.6) with `num_buffers`, which VERSION_1 always has.
pub const HEADER: usize = 12;
/// Most bytes of a packet with its header: 64 KiB of IP, Ethernet's header, and two VLAN tags.
pub const MOST: usize = HEADER + 65_536 + 14 + 8;
/// Fewest: an Ethernet header with nothing behind it.
pub const LEAST: usize = HEADER + 14;
/// Most buffers for one packet received: Linux takes 1024 (UIO_MAXIOV), and one is [`Room::rest`].
pub const MOST_BUFFERS: usize = 1023;

/// Constant facts of a backend, as data.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The virtio features of network devices that depend on the backend.
    pub features: u64,
    /// The MTU that the guest should have, where the backend cares.
    pub mtu: Option<u16>,
}

/// Where a received packet goes: into guest memory, and what has no room there into `rest`.
pub struct Room<'a> {
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// Writable parts of it, at most [`MOST_BUFFERS`].
    pub buffers: &'a [Buffer],
    /// Memory of ours for the rest.
    pub rest: &'a mut [u8],
}

impl Room<'_> {
    /// Fill it with `data` from `offset` on.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        let mut data = data;
        for (buffer, skip) in buffers_from(self.buffers, offset as u64) {
            let length = (buffer.length - skip) as usize;
            let (now, later) = data.split_at(data.len().min(length));
            // Checked to lie in guest memory when its chain was popped.
            let address = GuestAddress(buffer.address.0 + u64::from(skip));
            let _ = self.mem.write_slice(now, address);
            data = later;
            if data.is_empty() {
                return;
            }
        }
        let inside: usize = self.buffers.iter().map(|b| b.length as usize).sum();
        let skip = offset.saturating_sub(inside);
        let rest = self.rest.get_mut(skip..).unwrap_or_default();
        for (to, from) in rest.iter_mut().zip(data) {
            *to = *from;
        }
    }
}

/// A packet to send, in guest memory.
pub struct Packet<'a> {
    /// Guest memory.
    pub mem: &'a GuestMemory,
    /// Header and frame.
    pub buffers: &'a [Buffer],
    /// Bytes of both, [`LEAST`] to [`MOST`].
    pub length: usize,
}

impl Packet<'_> {
    /// Append all but the first `skip` bytes to `data`.
    pub fn copy(&self, skip: usize, data: &mut Vec<u8>) {
        for (buffer, skip) in buffers_from(self.buffers, skip as u64) {
            let start = data.len();
            data.resize(start + (buffer.length - skip) as usize, 0);
            let part = data.get_mut(start..).unwrap_or_default();
            // Checked to lie in guest memory when its chain was popped.
            let address = GuestAddress(buffer.address.0 + u64::from(skip));
            let _ = self.mem.read_slice(part, address);
        }
    }
}

/// What came of asking for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// One of so many bytes, with its header (whose `num_buffers` is not set).
    Packet(usize),
    /// There is none; the source becomes readable when there is.
    Empty,
    /// The backend is gone for good.
    Gone,
}

/// What came of sending a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is sent, or lost, as packets may be.
    Done,
    /// There is no room for it; [`Event::Writable`] comes when there is.
    Full,
    /// The backend is gone for good.
    Gone,
}

/// What a source of a backend tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// There are packets for this pair of queues.
    Readable(u16),
    /// Packets may be sent again.
    Writable,
}

/// The host's end of a network device. No call blocks.
pub trait Backend: Send {
    /// What it can do.
    fn facts(&self) -> Facts;

    /// The driver took these features. One pair of queues is in use.
    fn start(&mut self, features: u64) -> std::io::Result<()>;

    /// From now on this many pairs of queues are in use, the first ones.
    fn set_pairs(&mut self, pairs: u16) -> std::io::Result<()>;

    /// The next packet for a pair that is in use.
    fn receive(&mut self, pair: u16, room: &mut Room) -> Received;

    /// Send a packet from a pair that is in use.
    fn send(&mut self, pair: u16, packet: &Packet) -> Sent;

    /// What to watch for input, edge-triggered. The same while the backend lives.
    fn sources(&self) -> Vec<(RawFd, Event)>;

    /// [`Event::Writable`] was reported.
    fn writable(&mut self) {}
}
