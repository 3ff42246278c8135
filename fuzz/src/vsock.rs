//! The vsock device, with programs of the host at its Unix sockets.

use crate::bytes::{Bytes, Few, Number, Rare};
use crate::guest::{Chain, Guest, Subject};
use arbitrary::Arbitrary;
use husk_devices::vsock::packet::{HOST_CID, Header, TYPE_STREAM, operation};
use husk_virtio::VirtioDevice;
use husk_virtio::testing::Driver;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

const CID: u32 = 3;
/// Someone listens at guest's connections to this one.
const OPEN_PORT: u32 = 1;
/// And nobody at this one.
const CLOSED_PORT: u32 = 9;
/// Programs of the host at a time.
const MOST_PEERS: usize = 16;

/// The host's side.
pub struct Vsock {
    listener: &'static UnixListener,
    peers: Vec<UnixStream>,
}

/// What a driver asks for.
#[derive(Debug, Arbitrary)]
pub enum Request {
    /// To receive packets into these.
    Receive(Few<Number, 4>),
    /// To hear of events in these.
    Event(Few<Number, 4>),
    /// To send a packet.
    Send {
        /// What it says.
        packet: Packet,
        /// Its data: the beginning and the length of the rest.
        data: (Bytes, u16),
        /// Where the first buffer ends.
        cut: u8,
    },
}

/// The header of a packet.
#[derive(Debug, Arbitrary)]
pub struct Packet {
    op: Operation,
    guest_port: Port,
    host_port: Port,
    /// What `len` is too large by.
    excess: Rare<Number>,
    flags: u8,
    buf_alloc: Number,
    fwd_cnt: Number,
    /// From or to someone else.
    strange: Rare<(u8, u8)>,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Operation {
    Request,
    Response,
    Rst,
    Shutdown,
    Rw,
    CreditUpdate,
    CreditRequest,
    Any(u16),
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Port {
    /// Few, so that packets meet.
    Small(u8),
    /// One that the device gives out.
    Device(u8),
    Any(u32),
}

/// What programs of the host do.
#[derive(Debug, Arbitrary)]
pub enum Host {
    /// One asks for a port.
    Connect(u8),
    /// One connects and says something.
    Mumble(Bytes),
    /// One takes what the guest wants.
    Accept,
    /// One says something, so often.
    Say {
        /// Which.
        peer: u8,
        /// What.
        bytes: Bytes,
        /// How often.
        times: u8,
    },
    /// One reads.
    Hear {
        /// Which.
        peer: u8,
        /// How much at most.
        length: u16,
    },
    /// One ends a direction, or both.
    ShutDown {
        /// Which.
        peer: u8,
        /// How.
        how: u8,
    },
    /// One goes.
    Close(u8),
}

/// The device's socket. Its folder stays: nothing is called when a fuzzer ends.
fn path() -> &'static PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("husk-fuzz-{}", std::process::id()));
        std::fs::create_dir(&folder).expect("a folder of our own");
        folder.join("vsock")
    })
}

fn listener() -> &'static UnixListener {
    static LISTENER: OnceLock<UnixListener> = OnceLock::new();
    LISTENER.get_or_init(|| {
        let path = format!("{}_{OPEN_PORT}", path().display());
        let listener = UnixListener::bind(path).expect("a socket");
        listener
            .set_nonblocking(true)
            .expect("a socket that does not wait");
        listener
    })
}

impl Port {
    fn get(self) -> u32 {
        match self {
            Port::Small(port) => u32::from(port % 4),
            Port::Device(port) => (1 << 30) + u32::from(port % 4),
            Port::Any(port) => port,
        }
    }
}

impl Packet {
    fn header(&self, length: u32) -> Header {
        let op = match self.op {
            Operation::Request => operation::REQUEST,
            Operation::Response => operation::RESPONSE,
            Operation::Rst => operation::RST,
            Operation::Shutdown => operation::SHUTDOWN,
            Operation::Rw => operation::RW,
            Operation::CreditUpdate => operation::CREDIT_UPDATE,
            Operation::CreditRequest => operation::CREDIT_REQUEST,
            Operation::Any(op) => op,
        };
        let excess = self.excess.0.map_or(0, Number::get);
        let (from, to) = self.strange.0.unwrap_or_default();
        Header {
            src_cid: u64::from(CID) + u64::from(from),
            dst_cid: HOST_CID + u64::from(to),
            src_port: self.guest_port.get(),
            dst_port: self.host_port.get(),
            len: length.wrapping_add(excess),
            kind: TYPE_STREAM,
            op,
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.get(),
            fwd_cnt: self.fwd_cnt.get(),
        }
    }
}

impl Vsock {
    fn add(&mut self, stream: UnixStream) -> Option<&mut UnixStream> {
        if self.peers.len() >= MOST_PEERS {
            return None;
        }
        stream.set_nonblocking(true).ok()?;
        self.peers.push(stream);
        self.peers.last_mut()
    }

    fn peer(&self, number: u8) -> Option<&UnixStream> {
        self.peers
            .get(usize::from(number) % self.peers.len().max(1))
    }
}

impl Subject for Vsock {
    type Request = Request;
    type Host = Host;

    fn new(_variant: u8) -> (Self, Box<dyn VirtioDevice>) {
        let config = husk_config::Vsock {
            guest_cid: CID,
            uds_path: path().clone(),
            vsock_id: None,
        };
        let listener = listener();
        // Those that an input before has left.
        while listener.accept().is_ok() {}
        let device = husk_devices::vsock::Vsock::new(&config).expect("a device");
        let host = Self {
            listener,
            peers: Vec::new(),
        };
        (host, Box::new(device))
    }

    fn chain(&self, request: Request) -> Chain {
        let to_write = |queue, lengths: Few<Number, 4>| Chain {
            queue,
            writable: lengths.0.iter().map(|number| number.get()).collect(),
            ..Chain::default()
        };
        match request {
            Request::Receive(lengths) => to_write(0, lengths),
            Request::Event(lengths) => to_write(2, lengths),
            Request::Send {
                packet,
                data: (start, rest),
                cut,
            } => {
                let length = start.0.len() + usize::from(rest);
                let mut all = packet.header(length as u32).to_bytes().to_vec();
                all.extend(start.0);
                all.resize(all.len() + usize::from(rest), 0x55);
                let behind = all.split_off(usize::from(cut).min(all.len()));
                Chain {
                    queue: 1,
                    readable: vec![all, behind],
                    ..Chain::default()
                }
            }
        }
    }

    fn host(&mut self, action: Host, _guest: &mut Guest) {
        match action {
            Host::Connect(port) => self.host_connects(format!("CONNECT {}\n", port % 4).as_bytes()),
            Host::Mumble(bytes) => self.host_connects(&bytes.0),
            Host::Accept => {
                if let Ok((stream, _)) = self.listener.accept() {
                    self.add(stream);
                }
            }
            Host::Say { peer, bytes, times } => {
                if let Some(mut peer) = self.peer(peer) {
                    let _ = peer.write(&bytes.0.repeat(times.into()));
                }
            }
            Host::Hear { peer, length } => {
                if let Some(mut peer) = self.peer(peer) {
                    let _ = peer.read(&mut vec![0; length.into()]);
                }
            }
            Host::ShutDown { peer, how } => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(how) % 3];
                if let Some(peer) = self.peer(peer) {
                    let _ = peer.shutdown(how);
                }
            }
            Host::Close(peer) => {
                let at = usize::from(peer) % self.peers.len().max(1);
                if at < self.peers.len() {
                    self.peers.remove(at);
                }
            }
        }
    }

    /// A connection that nobody wants is refused, though others of the host's may be asked for before.
    fn check(&mut self, driver: &mut Driver) {
        self.peers.clear();
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: 77,
            dst_port: CLOSED_PORT,
            kind: TYPE_STREAM,
            op: operation::REQUEST,
            ..Header::default()
        };
        driver.request(1, &[&header.to_bytes()], &[]);
        loop {
            let answer = driver.request(0, &[], &[44, 4096]);
            let answer = answer
                .first_chunk()
                .map(Header::from_bytes)
                .expect("a header");
            if (answer.op, answer.dst_port) == (operation::RST, 77) {
                return;
            }
        }
    }
}

impl Vsock {
    fn host_connects(&mut self, line: &[u8]) {
        // The backlog is larger than there are peers, so this does not wait.
        if self.peers.len() < MOST_PEERS
            && let Ok(stream) = UnixStream::connect(path())
            && let Some(stream) = self.add(stream)
        {
            let _ = stream.write(line);
        }
    }
}
