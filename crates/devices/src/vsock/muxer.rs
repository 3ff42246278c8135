//! All connections of a device: packets on one side, sockets on the other.

use super::Error;
use super::connection::{ANSWER_TICKS, Connection};
use super::packet::{HEADER_SIZE, HOST_CID, Header, TYPE_STREAM, operation};
use super::ring::Rings;
use super::slots::Slots;
use super::stream::{Ports, Stream};
use super::unix::{Greeting, Listener, Waiter, Who};
use husk_metrics::VsockMetrics;
use husk_virtio::{Chain, GuestMemory, QueueError};
use rustix::event::epoll;
use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections at a time, with those that programs of the host have not asked for yet.
pub const MAX_CONNECTIONS: usize = 1024;
/// Programs of the host that have connected and not yet said to which port. More wait in the listener's backlog.
const MAX_GREETINGS: usize = 128;
/// Answers to packets that belong to no connection. When there are so many, the guest has to take them first.
pub const MAX_ANSWERS: usize = 256;
/// Events taken from the kernel at a time, and how often before other devices have a turn.
const EVENTS: usize = 64;
const ROUNDS: usize = 4;
/// Connections that are tried again at a time.
const RETRIES: usize = 32;
/// How long a VM that ends waits for all programs of the host together.
const DELIVERY: Duration = Duration::from_secs(5);
/// Ports of the host for connections that its programs ask for: so many, from as many on.
const PORTS: u32 = 1 << 30;

/// A program of the host's that connects, or is connected.
enum Peer {
    /// It is to say where it wants to go, in so many ticks.
    Greeting(UnixStream, Greeting, u8),
    /// It listens, but is slow to accept what the guest has asked for with this packet. It has so many ticks.
    Dialled(Header, u8),
    /// It is connected, or the guest is being asked.
    Stream(Stream),
}

/// All connections of a device.
pub struct Muxer {
    cid: u64,
    listener: Listener,
    waiter: Waiter,
    peers: Slots<Peer>,
    /// Those that the guest knows of.
    numbers: HashMap<Ports, u64>,
    /// Those that may have a packet for the guest, each once; they take turns.
    ready: VecDeque<u64>,
    answers: VecDeque<Header>,
    /// Those that are [`Peer::Dialled`].
    dialled: VecDeque<u64>,
    rings: Rings,
    greetings: usize,
    next_port: u32,
    /// More may be waiting at the listener.
    accepting: bool,
    /// A tick is coming.
    ticking: bool,
    metrics: Arc<VsockMetrics>,
}

impl Muxer {
    /// For the guest with context ID `cid`, and programs of the host that connect to `path`.
    pub fn new(cid: u64, path: &Path, metrics: Arc<VsockMetrics>) -> Result<Self, Error> {
        let listener = Listener::bind(path)?;
        let waiter = Waiter::new(&listener).map_err(|e| Error::Wait(path.into(), e))?;
        Ok(Self {
            cid,
            listener,
            waiter,
            peers: Slots::default(),
            numbers: HashMap::new(),
            ready: VecDeque::new(),
            answers: VecDeque::with_capacity(MAX_ANSWERS),
            dialled: VecDeque::new(),
            rings: Rings::default(),
            greetings: 0,
            next_port: 0,
            accepting: true,
            ticking: false,
            metrics,
        })
    }

    /// What becomes readable when [`Muxer::poll`] is to be called.
    pub fn fd(&self) -> RawFd {
        self.waiter.fd()
    }

    /// Have [`Muxer::fd`] become readable.
    pub fn wake(&self) {
        self.waiter.wake();
    }

    /// End all connections: the guest knows of none any more. What it had sent before stays until the host's programs have
    /// it. True when the guest knew of any.
    pub fn clear(&mut self) -> bool {
        let known = !self.numbers.is_empty();
        self.numbers.clear();
        self.ready.clear();
        self.answers.clear();
        self.dialled.clear();
        self.greetings = 0;
        self.accepting = true;
        for index in 0.. {
            let Some(number) = self.peers.at(index) else {
                break;
            };
            if let Some(Peer::Stream(stream)) = self.peers.get_mut(number) {
                stream.forget(&mut self.rings);
                if !stream.is_finished() {
                    self.settle(number);
                    continue;
                }
                self.metrics.conns_removed.inc();
            }
            self.peers.remove(number);
        }
        self.rings.clear();
        known
    }

    /// The VM ends: wait, a bounded time, until the host's programs have what the guest had sent.
    pub fn deliver(&mut self) {
        let until = Instant::now() + DELIVERY;
        for index in 0.. {
            let Some(number) = self.peers.at(index) else {
                break;
            };
            if let Some(Peer::Stream(stream)) = self.peers.get_mut(number) {
                stream.deliver(until);
            }
        }
    }

    /// Take events. A bounded number: if there are more, [`Muxer::fd`] becomes readable again.
    pub fn poll(&mut self) -> std::io::Result<()> {
        let nothing = epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        };
        let mut events = [nothing; EVENTS];
        for _ in 0..ROUNDS {
            let count = self.waiter.events(&mut events)?;
            for &event in events.iter().take(count) {
                self.event(event);
            }
            self.accept();
            if count == 0 {
                return Ok(());
            }
        }
        self.wake();
        Ok(())
    }

    fn event(&mut self, event: epoll::Event) {
        match Waiter::who(&event) {
            Who::Listener => self.accepting = true,
            Who::Tick => self.tick(),
            Who::Retry => self.dial_again(),
            Who::Wake => {}
            Who::Connection(number) => match self.peers.get_mut(number) {
                Some(Peer::Stream(stream)) => {
                    stream.event(event.flags, &mut self.rings);
                    self.settle(number);
                }
                Some(Peer::Greeting(..)) => self.greet(number),
                Some(Peer::Dialled(..)) | None => {}
            },
        }
    }

    fn tick(&mut self) {
        self.ticking = false;
        for index in 0.. {
            let Some(number) = self.peers.at(index) else {
                break;
            };
            match self.peers.get_mut(number) {
                Some(Peer::Stream(stream)) if stream.has_deadline() => {
                    let was_over = stream.is_over();
                    stream.tick(&mut self.rings);
                    if stream.is_over() && !was_over {
                        self.metrics.conns_killed.inc();
                    }
                    self.settle(number);
                }
                Some(Peer::Greeting(_, _, 0)) => self.remove(number),
                Some(Peer::Dialled(header, 0)) => {
                    let header = *header;
                    self.remove(number);
                    self.refuse(&header);
                }
                Some(Peer::Greeting(_, _, ticks) | Peer::Dialled(_, ticks)) => {
                    *ticks -= 1;
                    self.start_tick();
                }
                _ => {}
            }
        }
    }

    fn start_tick(&mut self) {
        if !self.ticking {
            match self.waiter.start_tick() {
                Ok(()) => self.ticking = true,
                Err(e) => log::debug!("vsock has no timer: {e}"),
            }
        }
    }

    /// Take programs of the host's that connect.
    fn accept(&mut self) {
        while self.accepting && self.greetings < MAX_GREETINGS {
            match self.listener.accept() {
                Ok(stream) if self.peers.len() < MAX_CONNECTIONS => {
                    let peer = Peer::Greeting(stream, Greeting::default(), ANSWER_TICKS);
                    if self.insert(peer).is_some() {
                        self.greetings += 1;
                        self.start_tick();
                    }
                }
                // Dropped: better than to let it wait.
                Ok(_) => log::debug!("vsock has {MAX_CONNECTIONS} connections: one is refused"),
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.accepting = false,
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    // No descriptors, say. There may be some later.
                    log::debug!("vsock cannot accept a connection: {e}");
                    return self.start_tick();
                }
            }
        }
    }

    /// Take in a peer and watch its socket.
    fn insert(&mut self, peer: Peer) -> Option<u64> {
        let number = self.peers.insert(peer);
        let watched = match self.peers.get_mut(number)? {
            Peer::Greeting(stream, ..) => self.waiter.add(stream, number),
            Peer::Dialled(..) => Ok(()),
            Peer::Stream(stream) => stream
                .watch(&self.waiter, number)
                .inspect(|()| self.metrics.conns_added.inc()),
        };
        if let Err(e) = watched {
            log::debug!("vsock cannot wait for one more connection: {e}");
            self.peers.remove(number);
            return None;
        }
        Some(number)
    }

    /// A program may have said where it wants to go.
    fn greet(&mut self, number: u64) {
        let Some(Peer::Greeting(stream, greeting, _)) = self.peers.get_mut(number) else {
            return;
        };
        match greeting.read(stream) {
            Ok(port) => self.request(number, port),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => {
                self.metrics.conn_event_fails.inc();
                log::debug!("a program did not say to which vsock port it wants: {e}");
                self.remove(number);
            }
        }
    }

    /// The program with this number wants to connect to the guest's `port`.
    fn request(&mut self, number: u64, port: u32) {
        let ports = self.fresh_ports(port);
        self.peers.change(number, |peer| match peer {
            Peer::Greeting(socket, ..) => {
                Peer::Stream(Stream::new(ports, Connection::requested(), socket))
            }
            other => other,
        });
        self.greetings -= 1;
        self.metrics.conns_added.inc();
        self.numbers.insert(ports, number);
        self.settle(number);
    }

    /// Ports of a connection to the guest's port `guest` that is not there yet.
    fn fresh_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = PORTS + self.next_port;
            self.next_port = (self.next_port + 1) % PORTS;
            let ports = Ports { host, guest };
            // There are far fewer connections than ports.
            if !self.numbers.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// After anything that may have changed a stream.
    fn settle(&mut self, number: u64) {
        let Some(Peer::Stream(stream)) = self.peers.get_mut(number) else {
            return;
        };
        let ports = stream.ports;
        let (forgotten, finished) = (stream.is_forgotten(), stream.is_finished());
        if stream.wants_to_send() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(number);
        }
        let ticks = stream.has_deadline();
        if forgotten && self.numbers.get(&ports) == Some(&number) {
            self.numbers.remove(&ports);
        }
        if finished {
            self.remove(number);
        } else if ticks {
            self.start_tick();
        }
    }

    fn remove(&mut self, number: u64) {
        match self.peers.remove(number) {
            Some(Peer::Greeting(..)) => self.greetings -= 1,
            Some(Peer::Stream(stream)) => {
                self.metrics.conns_removed.inc();
                // Without this, a guest that opens and resets connections and takes no packets lets the list grow.
                if stream.queued {
                    self.ready.retain(|&n| n != number);
                }
            }
            Some(Peer::Dialled(header, _)) => {
                self.numbers.remove(&Ports::of(&header));
                self.dialled.retain(|&n| n != number);
            }
            _ => {}
        }
    }

    /// Whether [`Muxer::receive`] may be called.
    pub fn has_room(&self) -> bool {
        self.answers.len() < MAX_ANSWERS
    }

    /// A packet from the guest.
    pub fn receive(&mut self, mem: &GuestMemory, chain: &Chain) -> Result<(), ReceiveError> {
        let header = Header::read(mem, chain)?.ok_or(ReceiveError::NoHeader)?;
        if header.src_cid != self.cid {
            // It is not for the guest to answer for another.
            log::debug!("a guest sends vsock packets for {}", header.src_cid);
            return Ok(());
        }
        self.metrics.tx_packets_count.inc();
        let ports = Ports::of(&header);
        let whole = u64::from(header.len) <= chain.readable_length() - HEADER_SIZE as u64;
        let known = self.numbers.get(&ports).copied();
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(&header);
        } else if let Some(number) = known {
            match self.peers.get_mut(number) {
                Some(Peer::Stream(stream)) if whole => {
                    let taken = stream.receive(&header, mem, chain, &mut self.rings)?;
                    self.metrics.tx_bytes_count.add(taken.into());
                }
                Some(Peer::Stream(stream)) => stream.abort(&mut self.rings),
                // Whatever the guest wants, it does not wait any more.
                _ => {
                    self.remove(number);
                    self.refuse(&header);
                }
            }
            self.settle(number);
        } else if header.op == operation::REQUEST && whole {
            self.dial(&header);
        } else {
            self.refuse(&header);
        }
        Ok(())
    }

    /// The guest wants to connect to a program of the host's.
    fn dial(&mut self, header: &Header) {
        if self.peers.len() >= MAX_CONNECTIONS {
            log::debug!("a guest wants more than {MAX_CONNECTIONS} vsock connections");
            return self.refuse(header);
        }
        let peer = match self.listener.connect(header.dst_port) {
            Ok(socket) => accepted(header, socket),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Peer::Dialled(*header, ANSWER_TICKS),
            Err(e) => {
                let port = header.dst_port;
                log::debug!("nobody takes a guest's connection to vsock port {port}: {e}");
                return self.refuse(header);
            }
        };
        let waits = matches!(peer, Peer::Dialled(..));
        let Some(number) = self.insert(peer) else {
            return self.refuse(header);
        };
        self.numbers.insert(Ports::of(header), number);
        if waits {
            self.dialled.push_back(number);
            self.start_tick();
            self.start_retry();
        }
        self.settle(number);
    }

    /// Programs that were slow to accept may have done so: nothing tells.
    fn dial_again(&mut self) {
        for _ in 0..RETRIES.min(self.dialled.len()) {
            let Some(number) = self.dialled.pop_front() else {
                break;
            };
            let Some(Peer::Dialled(header, _)) = self.peers.get_mut(number) else {
                continue;
            };
            let header = *header;
            match self.listener.connect(header.dst_port) {
                Ok(socket) if self.waiter.add(&socket, number).is_ok() => {
                    self.peers.change(number, |_| accepted(&header, socket));
                    self.metrics.conns_added.inc();
                    self.settle(number);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.dialled.push_back(number),
                _ => {
                    self.remove(number);
                    self.refuse(&header);
                }
            }
        }
        if !self.dialled.is_empty() {
            self.start_retry();
        }
    }

    fn start_retry(&self) {
        if let Err(e) = self.waiter.start_retry() {
            log::debug!("vsock has no timer: {e}");
        }
    }

    /// Answer a packet with an RST, but for an RST.
    fn refuse(&mut self, header: &Header) {
        if header.op == operation::RST {
            return;
        }
        self.answers.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: self.cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: operation::RST,
            ..Header::default()
        });
    }

    /// Whether [`Muxer::send`] may have a packet.
    pub fn has_packets(&self) -> bool {
        !self.answers.is_empty() || !self.ready.is_empty()
    }

    /// Fill `chain`, which has room for more than a header, with the next packet for the guest; the bytes written.
    pub fn send(&mut self, mem: &GuestMemory, chain: &Chain) -> Result<Option<u32>, QueueError> {
        if let Some(header) = self.answers.pop_front() {
            header.write(mem, chain)?;
            self.metrics.rx_packets_count.inc();
            return Ok(Some(HEADER_SIZE as u32));
        }
        while let Some(number) = self.ready.pop_front() {
            let Some(Peer::Stream(stream)) = self.peers.get_mut(number) else {
                continue;
            };
            stream.queued = false;
            let sent = stream.send(self.cid, mem, chain, &mut self.rings)?;
            self.settle(number);
            if let Some(written) = sent {
                let data = u64::from(written).saturating_sub(HEADER_SIZE as u64);
                self.metrics.rx_packets_count.inc();
                self.metrics.rx_bytes_count.add(data);
                return Ok(sent);
            }
        }
        Ok(None)
    }
}

/// The guest's request `header` has led to `socket`.
fn accepted(header: &Header, socket: UnixStream) -> Peer {
    let connection = Connection::accepted(header);
    Peer::Stream(Stream::new(Ports::of(header), connection, socket))
}

/// Why a packet of the guest's cannot be taken.
#[derive(Debug)]
pub enum ReceiveError {
    /// It is too short.
    NoHeader,
    /// Its memory is not there.
    Memory(QueueError),
}

impl From<QueueError> for ReceiveError {
    fn from(error: QueueError) -> Self {
        ReceiveError::Memory(error)
    }
}
