//! The service's end of a virtual cable: Ethernet, ARP, IPv4 and TCP, by smoltcp.

#[cfg(test)]
mod tests;

use crate::connection::{Connection, socket};
use crate::server::Server;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken,
};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Instant as Time;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, IpListenEndpoint, Ipv4Cidr};
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The service's address on the cable, the one that Firecracker's has.
pub const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
/// Longest frame that is worth handing in: more than the window of a connection holds, plus headers.
pub const LONGEST_FRAME: usize = 8192;
/// Bytes at the beginning of a frame that tell whether it is for the service: of ARP over Ethernet, all.
const START: usize = 42;

const PORT: u16 = 80;
/// Connections at a time. Each has some 12 KiB of buffers, and a request and a response.
const MOST_CONNECTIONS: usize = 30;
/// With all connections taken, one that has not got on for so long makes room for a new one.
const EVICTABLE: Duration = Duration::from_secs(1);
/// Frames that wait for the guest to take them.
const MOST_FRAMES: usize = 32;
/// Of a frame with its Ethernet header. A guest with a smaller MTU says so when it connects.
const LONGEST_OUT: usize = 1514;
/// Shortest wait that is asked for.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

const ETHERTYPE: std::ops::Range<usize> = 12..14;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// Where an IPv4 packet says what is in it.
const PROTOCOL: usize = 23;
const TCP: u8 = 6;

/// A guest's interface to the service.
pub struct Stack {
    server: Arc<Server>,
    address: Ipv4Addr,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<(SocketHandle, Connection)>,
    out: Out,
    epoch: Instant,
}

impl Stack {
    /// One that answers at `address`. Fails when the host has no random numbers.
    pub fn new(server: Arc<Server>, address: Ipv4Addr) -> std::io::Result<Self> {
        let mut seed = [0; 8];
        crate::fill_random(&mut seed)?;
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        // Sequence numbers that a guest's program cannot guess of another one's connection.
        config.random_seed = u64::from_le_bytes(seed);
        let mut out = Out::default();
        let mut cable = Cable {
            frame: None,
            out: &mut out,
        };
        let mut interface = Interface::new(config, &mut cable, Time::ZERO);
        // Whoever is on the cable is a neighbour, whatever its address.
        let everywhere = Ipv4Cidr::new(address, 0);
        // There is room for the first address.
        interface.update_ip_addrs(|all| all.extend([IpCidr::Ipv4(everywhere)]));
        Ok(Self {
            server,
            address,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            out,
            epoch: Instant::now(),
        })
    }

    /// Whether a frame that begins with `start` is for the service: ARP about its address, or IPv4 to it. The Ethernet address
    /// does not count, as in Firecracker, so that a guest that has a default route needs no other.
    ///
    /// A frame of a guest costs this much, whatever it is; 42 bytes are enough.
    pub fn takes(&self, start: &[u8]) -> bool {
        let at = match start.get(ETHERTYPE).and_then(|kind| kind.try_into().ok()) {
            Some(IPV4) => 30..34,
            Some(ARP) => 38..START,
            _ => return false,
        };
        start.get(at) == Some(&self.address.octets())
    }

    /// Take in a frame that [`Stack::takes`]. Its Ethernet destination is changed to the service's. What is no sense, or too
    /// much, is lost.
    pub fn receive(&mut self, frame: &mut [u8], now: Instant) {
        let Some(destination) = frame.first_chunk_mut() else {
            return;
        };
        *destination = MAC;
        let metrics = self.server.metrics;
        if frame.len() > LONGEST_FRAME || self.out.is_full() {
            return self.refuse();
        }
        metrics.rx_accepted.inc();
        match frame.get(PROTOCOL) {
            Some(&TCP) => metrics.rx_count.inc(),
            _ if frame.get(ETHERTYPE) == Some(&ARP) => metrics.rx_count.inc(),
            _ => metrics.rx_accepted_unusual.inc(),
        }
        self.learn(frame, now);
        self.listen(now);
        self.take_in(frame, now);
        self.work(now);
    }

    /// A frame that [`Stack::takes`] is lost: it is longer than [`LONGEST_FRAME`], say.
    pub fn refuse(&self) {
        let metrics = self.server.metrics;
        metrics.rx_accepted.inc();
        metrics.rx_accepted_err.inc();
    }

    /// A deadline has passed, or frames were taken.
    pub fn poll(&mut self, now: Instant) {
        self.give_up(now);
        self.work(now);
    }

    /// When [`Stack::poll`] is to be called, if nothing happens before. It may be over already when there are more frames to
    /// come; then call it once [`Stack::frame`] is None.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        let time = self.time(now);
        let next = self.interface.poll_delay(time, &self.sockets).map(|wait| {
            let wait = Duration::from_micros(wait.total_micros());
            match self.out.is_full() {
                true => now,
                false => now + wait.max(SHORTEST_WAIT),
            }
        });
        let sockets = &self.sockets;
        let open = |(handle, _): &&(SocketHandle, _)| {
            sockets.get::<Socket>(*handle).state() != State::Listen
        };
        let given_up = self
            .connections
            .iter()
            .filter(open)
            .map(|(_, connection)| connection.deadline().max(now + SHORTEST_WAIT))
            .min();
        next.into_iter().chain(given_up).min()
    }

    /// The next frame for the guest.
    pub fn frame(&self) -> Option<&[u8]> {
        self.out.frames.front().map(Vec::as_slice)
    }

    /// The guest has taken [`Stack::frame`].
    pub fn taken(&mut self) {
        if let Some(frame) = self.out.frames.pop_front() {
            let metrics = self.server.metrics;
            metrics.tx_count.inc();
            metrics.tx_frames.inc();
            metrics.tx_bytes.add(frame.len() as u64);
            self.out.spare.push(frame);
        }
    }

    /// The guest's driver begins anew: what it was told and has not taken is lost, and its connections are.
    pub fn reset(&mut self) {
        while let Some(frame) = self.out.frames.pop_front() {
            self.server.metrics.tx_errors.inc();
            self.out.spare.push(frame);
        }
        for (handle, _) in self.connections.drain(..) {
            self.sockets.remove(handle);
        }
    }

    fn time(&self, now: Instant) -> Time {
        let passed = now.saturating_duration_since(self.epoch).as_micros();
        Time::from_micros(i64::try_from(passed).unwrap_or(i64::MAX))
    }

    fn take_in(&mut self, frame: &[u8], now: Instant) {
        let time = self.time(now);
        let mut cable = Cable {
            frame: Some(frame),
            out: &mut self.out,
        };
        self.interface
            .poll_ingress_single(time, &mut cable, &mut self.sockets);
    }

    /// Note where an IPv4 packet came from, as if its sender had told by ARP: it may have asked long ago, or never, and then it
    /// would have to be asked.
    fn learn(&mut self, frame: &[u8], now: Instant) {
        let (Some(&IPV4), Some(mac), Some(source)) = (
            frame.get(ETHERTYPE).and_then(|kind| kind.as_array()),
            frame.get(6..12),
            frame.get(26..30),
        ) else {
            return;
        };
        // Ethernet and IPv4 addresses, a reply.
        let about: &[u8] = &[0, 1, 8, 0, 6, 4, 0, 2];
        let parts = [&MAC, mac, &ARP, about, mac, source, &MAC];
        let mut reply = [0; START];
        let address = self.address.octets();
        let bytes = parts.into_iter().flatten().chain(&address);
        for (to, from) in reply.iter_mut().zip(bytes) {
            *to = *from;
        }
        self.take_in(&reply, now);
    }

    /// Have a socket for a connection to come, if there is room for one.
    fn listen(&mut self, now: Instant) {
        let sockets = &mut self.sockets;
        let listens = |(handle, _): &(SocketHandle, _)| {
            sockets.get::<Socket>(*handle).state() == State::Listen
        };
        if self.connections.iter().any(listens) {
            return;
        }
        if self.connections.len() >= MOST_CONNECTIONS {
            let all = self.connections.iter().enumerate();
            let oldest = all.min_by_key(|(_, (_, connection))| connection.since());
            let Some((index, _)) = oldest.filter(|(_, (_, connection))| {
                now.saturating_duration_since(connection.since()) >= EVICTABLE
            }) else {
                return;
            };
            // Should the other end go on, it is told by a reset.
            let (handle, _) = self.connections.swap_remove(index);
            sockets.remove(handle);
        }
        let mut socket = socket();
        let here = IpListenEndpoint {
            addr: Some(self.address.into()),
            port: PORT,
        };
        if socket.listen(here).is_ok() {
            let handle = sockets.add(socket);
            self.connections.push((handle, Connection::new(now)));
        }
    }

    /// End what takes too long.
    fn give_up(&mut self, now: Instant) {
        let sockets = &mut self.sockets;
        self.connections.retain_mut(|(handle, connection)| {
            let socket = sockets.get_mut::<Socket>(*handle);
            if socket.state() == State::Listen || now < connection.deadline() {
                return true;
            }
            if socket.state() == State::Closed {
                // Nor can it be told that it was ended.
                sockets.remove(*handle);
                return false;
            }
            socket.abort();
            connection.opened(now);
            true
        });
    }

    /// Answer what has come, and send what can be sent, until there is nothing left or no room.
    fn work(&mut self, now: Instant) {
        let time = self.time(now);
        loop {
            self.serve(now);
            let mut cable = Cable {
                frame: None,
                out: &mut self.out,
            };
            let polled = self
                .interface
                .poll_egress(time, &mut cable, &mut self.sockets);
            if polled == PollResult::None || self.out.is_full() {
                break;
            }
        }
        self.forget();
    }

    fn serve(&mut self, now: Instant) {
        for (handle, connection) in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket>(*handle);
            match socket.state() {
                // Whenever the connection comes, it comes now.
                State::Listen => connection.opened(now),
                _ => connection.work(socket, &self.server, now),
            }
        }
    }

    /// Let go of connections that are over.
    fn forget(&mut self) {
        let sockets = &mut self.sockets;
        self.connections.retain(|(handle, _)| {
            let socket = sockets.get::<Socket>(*handle);
            // An end that has to be told has a remote end still.
            let over = socket.state() == State::Closed && socket.remote_endpoint().is_none();
            if over {
                sockets.remove(*handle);
            }
            !over
        });
    }
}

/// Frames for the guest.
#[derive(Default)]
struct Out {
    frames: VecDeque<Vec<u8>>,
    /// Memory for more; with `frames`, never more than [`MOST_FRAMES`].
    spare: Vec<Vec<u8>>,
}

impl Out {
    fn is_full(&self) -> bool {
        self.frames.len() >= MOST_FRAMES
    }
}

/// The service's end of the cable, for one call of smoltcp.
struct Cable<'a> {
    /// What comes in.
    frame: Option<&'a [u8]>,
    out: &'a mut Out,
}

struct Incoming<'a>(&'a [u8]);

struct Outgoing<'a>(&'a mut Out);

impl Device for Cable<'_> {
    type RxToken<'a>
        = Incoming<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Outgoing<'a>
    where
        Self: 'a;

    fn receive(&mut self, _time: Time) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        if self.out.is_full() {
            return None;
        }
        let frame = self.frame.take()?;
        Some((Incoming(frame), Outgoing(self.out)))
    }

    fn transmit(&mut self, _time: Time) -> Option<Outgoing<'_>> {
        (!self.out.is_full()).then_some(Outgoing(self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        // A guest's driver leaves checksums to the device, and nothing can spoil a packet on the way here.
        let mut checksum = ChecksumCapabilities::default();
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = Checksum::Tx;
        checksum.icmpv4 = Checksum::Tx;
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ethernet;
        all.max_transmission_unit = LONGEST_OUT;
        all.checksum = checksum;
        all
    }
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = self.0.spare.pop().unwrap_or_default();
        frame.clear();
        frame.resize(len, 0);
        let result = f(&mut frame);
        self.0.frames.push_back(frame);
        result
    }
}
