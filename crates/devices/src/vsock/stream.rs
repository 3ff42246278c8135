//! A connection with the host's socket at its end.

use super::connection::{Connection, Reaction};
use super::packet::{HEADER_SIZE, HOST_CID, Header, TYPE_STREAM, operation};
use super::ring::{Ring, Rings};
use super::unix::{Waiter, is_writable, read_packet, write_packet};
use husk_metrics::METRICS;
use husk_virtio::{Chain, GuestMemory, QueueError};
use rustix::event::epoll::EventFlags;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Ticks that a program has to take some of what a guest has left behind: a minute.
const DELIVERY_TICKS: u8 = 120;
/// How long a VM that ends waits for a program that takes nothing of what the guest has left behind.
const STANDSTILL: Duration = Duration::from_secs(1);
/// Most data in one packet.
const MAX_DATA: u32 = 64 << 10;

/// What identifies a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

impl Ports {
    /// Those of a packet from the guest.
    pub fn of(header: &Header) -> Self {
        Self {
            host: header.dst_port,
            guest: header.src_port,
        }
    }
}

/// A connection with the host's socket at its end.
pub struct Stream {
    /// What identifies it to the guest.
    pub ports: Ports,
    /// It is in the list of those that have something to send.
    pub queued: bool,
    connection: Connection,
    /// Until neither side has more to do with it.
    socket: Option<UnixStream>,
    /// What the socket did not take yet. Never empty.
    ring: Option<Ring>,
    /// There may be something to read.
    readable: bool,
    /// There may be room to write.
    writable: bool,
    /// Our directions of the socket are shut down.
    shut_read: bool,
    shut_write: bool,
    /// Ticks since something was delivered that a guest has left behind.
    idle: u8,
}

impl Stream {
    /// `connection` has just begun, with `socket` at the host's end.
    pub fn new(ports: Ports, connection: Connection, socket: UnixStream) -> Self {
        Self {
            ports,
            queued: false,
            connection,
            socket: Some(socket),
            ring: None,
            readable: true,
            writable: true,
            shut_read: false,
            shut_write: false,
            idle: 0,
        }
    }

    /// Have `waiter` watch the socket under `number`.
    pub fn watch(&self, waiter: &Waiter, number: u64) -> io::Result<()> {
        match &self.socket {
            Some(socket) => waiter.add(socket, number),
            None => Ok(()),
        }
    }

    /// A packet from the guest, with its header; its data is there. The bytes of data that were taken.
    pub fn receive(
        &mut self,
        header: &Header,
        mem: &GuestMemory,
        chain: &Chain,
        rings: &mut Rings,
    ) -> Result<u32, QueueError> {
        let mut taken = 0;
        match self.connection.receive(header) {
            Reaction::Nothing => {}
            Reaction::Opened => self.greet(),
            Reaction::Data => {
                self.take(header.len, mem, chain, rings)?;
                taken = header.len;
            }
        }
        self.settle(rings);
        Ok(taken)
    }

    /// Tell the host's program that the guest has accepted. It is the first that is written, so there is room for it.
    fn greet(&mut self) {
        let mut line = [0; 16];
        let mut rest = line.as_mut_slice();
        // 4294967295 fits.
        let _ = writeln!(rest, "OK {}", self.ports.host);
        let left = rest.len();
        let line = line.get(..line.len() - left).unwrap_or_default();
        let took = self.socket.as_ref().map(|mut socket| socket.write(line));
        if !matches!(took, Some(Ok(count)) if count == line.len()) {
            self.connection.abort();
        }
    }

    /// Data from the guest.
    fn take(
        &mut self,
        length: u32,
        mem: &GuestMemory,
        chain: &Chain,
        rings: &mut Rings,
    ) -> Result<(), QueueError> {
        let mut done = 0;
        if let (Some(socket), None, true) = (&self.socket, &self.ring, self.writable) {
            match write_packet(socket, mem, &chain.readable, length) {
                Ok(count) => done = count,
                Err(error) => {
                    METRICS.vsock.member("").tx_write_fails.inc();
                    log::debug!("a vsock connection's socket takes no more: {error}");
                    self.connection.host_receives_no_more();
                    done = length;
                }
            }
            self.connection.forwarded(done);
            self.writable = done == length;
        }
        if done < length {
            let ring = self.ring.get_or_insert_with(|| rings.take());
            ring.push(mem, chain, done, length - done)?;
        }
        Ok(())
    }

    /// Something happened to the socket.
    pub fn event(&mut self, flags: EventFlags, rings: &mut Rings) {
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        self.readable |= gone || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        if gone {
            self.connection.host_receives_no_more();
        }
        if flags.contains(EventFlags::OUT) {
            self.writable = true;
            self.write_out();
        }
        self.settle(rings);
    }

    fn write_out(&mut self) {
        let (Some(ring), Some(socket)) = (&mut self.ring, &self.socket) else {
            return;
        };
        match ring.write_to(socket) {
            Ok(count) => {
                self.idle = if count > 0 { 0 } else { self.idle };
                self.connection.forwarded(count);
                self.writable = ring.len() == 0;
            }
            Err(error) => {
                METRICS.vsock.member("").tx_flush_fails.inc();
                log::debug!("a vsock connection's socket takes no more: {error}");
                self.connection.host_receives_no_more();
            }
        }
    }

    /// A tick of the clock has passed.
    pub fn tick(&mut self, rings: &mut Rings) {
        self.connection.tick();
        if self.connection.is_over() && self.ring.is_some() {
            self.idle = self.idle.saturating_add(1);
            if self.idle >= DELIVERY_TICKS {
                self.connection.abort();
            }
        }
        self.settle(rings);
    }

    /// Bring the socket to where the connection is.
    fn settle(&mut self, rings: &mut Rings) {
        let deliver = self.connection.delivers();
        if let Some(ring) = self.ring.take_if(|ring| !deliver || ring.len() == 0) {
            // Lost or not, it makes room.
            self.connection.forwarded(ring.len());
            rings.give(ring);
        }
        let empty = self.ring.is_none();
        let Some(socket) = &self.socket else {
            return;
        };
        if self.connection.is_over() && empty {
            self.socket = None;
            return;
        }
        // Fails when the other end is gone: as good.
        if self.connection.guest_receives_no_more() && !self.shut_read {
            self.shut_read = true;
            let _ = socket.shutdown(Shutdown::Read);
        }
        if self.connection.guest_sends_no_more() && empty && !self.shut_write {
            self.shut_write = true;
            let _ = socket.shutdown(Shutdown::Write);
        }
    }

    /// End it at once.
    pub fn abort(&mut self, rings: &mut Rings) {
        self.connection.abort();
        self.settle(rings);
    }

    /// The guest knows nothing of it any more; what it had sent still goes to the host's program.
    pub fn forget(&mut self, rings: &mut Rings) {
        self.queued = false;
        self.connection.forget();
        self.settle(rings);
    }

    /// Wait until the host's program has taken what the guest had sent, but not longer than `until`, nor for one that takes
    /// nothing for [`STANDSTILL`].
    pub fn deliver(&mut self, until: Instant) {
        while self.connection.delivers() && self.ring.is_some() {
            self.write_out();
            let left = until.saturating_duration_since(Instant::now());
            let (Some(socket), false) = (&self.socket, self.writable || left.is_zero()) else {
                return;
            };
            if !is_writable(socket, left.min(STANDSTILL)) {
                return;
            }
        }
    }

    /// Whether the guest has done with it, or has been told to.
    pub fn is_over(&self) -> bool {
        self.connection.is_over()
    }

    /// Whether [`Stream::send`] may have something.
    pub fn wants_to_send(&self) -> bool {
        self.connection.wants_to_send(self.readable)
    }

    /// Whether [`Stream::tick`] is wanted.
    pub fn has_deadline(&self) -> bool {
        let leftover = self.connection.is_over() && self.ring.is_some();
        leftover || self.connection.has_deadline()
    }

    /// Whether the guest knows nothing of it any more.
    pub fn is_forgotten(&self) -> bool {
        self.connection.is_finished()
    }

    /// Whether it is of no more use to anyone.
    pub fn is_finished(&self) -> bool {
        self.connection.is_finished() && self.socket.is_none()
    }

    /// Fill `chain`, which has room for more than a header, with the next packet for the guest with context ID `cid`; bytes
    /// written.
    pub fn send(
        &mut self,
        cid: u64,
        mem: &GuestMemory,
        chain: &Chain,
        rings: &mut Rings,
    ) -> Result<Option<u32>, QueueError> {
        let mut control = self.connection.next_control();
        let mut length = 0;
        if control.is_none() && self.readable && self.connection.takes_data() {
            length = self.read(mem, chain);
            control = match length {
                0 => self.connection.next_control(),
                _ => Some((operation::RW, 0)),
            };
        }
        self.settle(rings);
        let Some((op, flags)) = control else {
            return Ok(None);
        };
        let (buf_alloc, fwd_cnt) = self.connection.credit_fields();
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: length,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        };
        header.write(mem, chain)?;
        Ok(Some(HEADER_SIZE as u32 + length))
    }

    /// Read from the socket as much as the guest and `chain` have room for; 0 when that is nothing for now, or for ever.
    fn read(&mut self, mem: &GuestMemory, chain: &Chain) -> u32 {
        let most = self.connection.credit_or_ask().min(MAX_DATA);
        let (Some(socket), true) = (&self.socket, most > 0) else {
            return 0;
        };
        match read_packet(socket, mem, &chain.writable, most) {
            Ok(0) => {
                self.readable = false;
                self.connection.host_sends_no_more();
                0
            }
            Ok(count) => {
                self.connection.sent(count);
                count
            }
            Err(error) => {
                self.readable = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    METRICS.vsock.member("").rx_read_fails.inc();
                    log::debug!("a vsock connection's socket fails: {error}");
                    self.connection.host_sends_no_more();
                    self.connection.host_receives_no_more();
                }
                0
            }
        }
    }
}
