//! A socket that behaves like a tap device.

use super::super::backend::{Backend, Event, Facts, HEADER, Packet, Received, Room, Sent};
use super::super::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4};
use super::super::io::Vectors;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// The device's end.
pub struct Pipe {
    sockets: Vec<OwnedFd>,
    pairs: Arc<AtomicU16>,
    vectors: Vectors,
}

/// The test's end: a socket for each pair of queues.
pub struct Far {
    sockets: Vec<OwnedFd>,
    /// The device's ends, to look into.
    near: Vec<OwnedFd>,
    /// Pairs that the device has said are in use.
    pub pairs: Arc<AtomicU16>,
}

pub fn pipe(pairs: u16) -> (Pipe, Far) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (near, far): (Vec<OwnedFd>, _) = (0..pairs)
        .map(|_| {
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap()
        })
        .unzip();
    let pairs = Arc::new(AtomicU16::new(0));
    let far = Far {
        sockets: far,
        near: near.iter().map(|fd| fd.try_clone().unwrap()).collect(),
        pairs: Arc::clone(&pairs),
    };
    let pipe = Pipe {
        sockets: near,
        pairs,
        vectors: Vectors::default(),
    };
    (pipe, far)
}

impl Far {
    /// Send a frame to the device.
    pub fn send(&self, pair: usize, frame: &[u8]) {
        let packet = [&[0; HEADER], frame].concat();
        super::wait("the device does not read", || {
            let flags = SendFlags::NOSIGNAL;
            match rustix::net::send(&self.sockets[pair], &packet, flags) {
                Ok(count) => count == packet.len(),
                Err(rustix::io::Errno::AGAIN) => false,
                Err(e) => panic!("{e}"),
            }
        });
    }

    /// A packet that came out of the device, header and all.
    pub fn receive(&self, pair: usize) -> Option<Vec<u8>> {
        let mut data = vec![0; 70_000];
        let flags = RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.sockets[pair], &mut data[..], flags) {
            Ok((count, _)) => {
                data.truncate(count);
                Some(data)
            }
            Err(rustix::io::Errno::AGAIN) => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Bytes that the device has not read.
    pub fn unread(&self, pair: usize) -> u64 {
        rustix::io::ioctl_fionread(&self.near[pair]).unwrap()
    }

    /// The next frame that comes out.
    #[track_caller]
    pub fn wait(&self, pair: usize) -> Vec<u8> {
        let mut packet = None;
        let until = std::time::Instant::now() + super::PATIENCE;
        while packet.is_none() {
            packet = self.receive(pair);
            assert!(std::time::Instant::now() < until, "nothing comes");
        }
        packet.unwrap_or_default().split_off(HEADER)
    }
}

impl Backend for Pipe {
    fn facts(&self) -> Facts {
        Facts {
            features: 1 << CSUM | 1 << GUEST_CSUM | 1 << HOST_TSO4 | 1 << GUEST_TSO4,
            mtu: None,
        }
    }

    fn start(&mut self, _features: u64) -> io::Result<()> {
        self.set_pairs(1)
    }

    fn set_pairs(&mut self, pairs: u16) -> io::Result<()> {
        self.pairs.store(pairs, Ordering::SeqCst);
        Ok(())
    }

    fn receive(&mut self, pair: u16, room: &mut Room) -> Received {
        let socket = self.sockets[usize::from(pair)].as_fd();
        match self.vectors.read(socket, room) {
            Ok(0) => Received::Gone,
            Ok(count) => Received::Packet(count),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Received::Empty,
            Err(_) => Received::Gone,
        }
    }

    fn send(&mut self, pair: u16, packet: &Packet) -> Sent {
        let socket = self.sockets[usize::from(pair)].as_fd();
        match self.vectors.write(socket, packet) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Sent::Gone,
            _ => Sent::Done,
        }
    }

    fn sources(&self) -> Vec<(RawFd, Event)> {
        (0..)
            .zip(&self.sockets)
            .map(|(pair, socket)| (socket.as_raw_fd(), Event::Readable(pair)))
            .collect()
    }
}
