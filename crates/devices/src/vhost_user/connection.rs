//! Messages of the vhost-user protocol over its socket.
//!
//! rust-vmm's `vhost` crate speaks it too, but tries a read again for as long as it would block: with it a server that says nothing, or
//! half a message, stops whoever asks for ever. Here a time by which all must be done goes through every call.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use std::fmt::{Display, Formatter};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long a server may take for whatever it is asked at once: a start, a stop. One that works answers in microseconds, but first
/// finishes what is in flight.
pub const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 5 });
/// How often one is called that has too many callers waiting.
const AGAIN: Duration = Duration::from_millis(10);

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
/// Flags: the protocol's version.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// Flags: an answer.
const REPLY: u32 = 1 << 2;
/// Flags: an answer is wanted to what has none otherwise.
const NEED_REPLY: u32 = 1 << 3;

/// A request, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

/// Why a server is of no use, or of no more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens there.
    #[error("nobody answers at the socket: start the vhost-user server first, or give its path")]
    Connect(#[source] io::Error),
    /// It has closed the connection.
    #[error(
        "the vhost-user server has closed the connection: look at what it says, and start it again"
    )]
    Closed,
    /// It does not answer.
    #[error(
        "the vhost-user server does not answer within {} s ({}): it hangs, or serves another VM already",
        PATIENCE.as_secs(), .0
    )]
    Late(Step),
    /// The connection fails.
    #[error("the connection to the vhost-user server fails ({0})")]
    Io(Step, #[source] io::Error),
    /// An answer that is none.
    #[error("the vhost-user server answers wrongly ({0}): is it one?")]
    Wrong(Step),
    /// It says no.
    #[error("the vhost-user server refuses ({0}): look at what it says")]
    Refused(Step),
    /// It does not do what is needed.
    #[error("the vhost-user server has no {0}, which is needed here")]
    Lacks(&'static str),
    /// It has fewer queues than were asked for.
    #[error("the vhost-user server has {has} queues, and {wanted} are asked for")]
    Queues {
        /// What it has.
        has: u64,
        /// What is configured.
        wanted: u16,
    },
    /// Its disk makes no sense.
    #[error("the vhost-user server's disk has {0}")]
    Disk(String),
    /// It came back as another.
    #[error(
        "the vhost-user server has not the features any more that the guest's driver uses: boot the guest anew"
    )]
    Changed,
    /// Memory that nobody else can map.
    #[error("the guest's memory cannot be shared with a vhost-user server")]
    Memory,
    /// Queues that cannot be described.
    #[error("the transport has no interrupt that a vhost-user server can raise")]
    Interrupt,
}

/// What was asked when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step(pub Request);

impl Display for Step {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "request {:?}", self.0)
    }
}

/// A connection to a server. After an error of a request nothing more can be said over it: answers would be taken for others.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The server answers whatever it is asked to (REPLY_ACK).
    pub answers_all: bool,
}

impl Connection {
    /// Call the server at `path`.
    pub fn open(path: &Path, until: Instant) -> Result<Self, Error> {
        let failed = |e: Errno| Error::Connect(e.into());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket: OwnedFd =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                // It has as many callers waiting as it wants.
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < until => {
                    std::thread::sleep(AGAIN);
                }
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(Self {
            stream: socket.into(),
            answers_all: false,
        })
    }

    /// The socket, to be watched.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Let the server know that nothing more comes. The descriptor stays open: somebody may watch it.
    pub fn shut(&self) {
        // It may have done so itself.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Whether the server is there, as far as it can be told without asking. It never speaks first.
    pub fn is_alive(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        matches!(
            recv(&self.stream, &mut [0; 1][..], flags),
            Err(Errno::AGAIN | Errno::INTR)
        )
    }

    /// Ask for something that has no answer of its own.
    pub fn tell(
        &self,
        request: Request,
        body: &[u8],
        fds: &[RawFd],
        until: Instant,
    ) -> Result<(), Error> {
        let wanted = if self.answers_all { NEED_REPLY } else { 0 };
        self.send(request, wanted, body, fds, until)?;
        if !self.answers_all {
            return Ok(());
        }
        match self.receive_number(request, until)? {
            0 => Ok(()),
            _ => Err(Error::Refused(Step(request))),
        }
    }

    /// Ask for a number.
    pub fn ask(&self, request: Request, until: Instant) -> Result<u64, Error> {
        self.send(request, 0, &[], &[], until)?;
        self.receive_number(request, until)
    }

    /// Ask with a body, for an answer of just the length of `answer`. A shorter one is what a server says that cannot.
    pub fn exchange(
        &self,
        request: Request,
        body: &[u8],
        answer: &mut [u8],
        until: Instant,
    ) -> Result<(), Error> {
        self.send(request, 0, body, &[], until)?;
        match self.receive(request, answer, until)? {
            length if length == answer.len() => Ok(()),
            _ => Err(Error::Refused(Step(request))),
        }
    }

    fn receive_number(&self, request: Request, until: Instant) -> Result<u64, Error> {
        let mut number = [0; 8];
        match self.receive(request, &mut number, until)? {
            8 => Ok(u64::from_le_bytes(number)),
            _ => Err(Error::Wrong(Step(request))),
        }
    }

    fn send(
        &self,
        request: Request,
        flags: u32,
        body: &[u8],
        fds: &[RawFd],
        until: Instant,
    ) -> Result<(), Error> {
        let size = u32::try_from(body.len()).map_err(|_| Error::Wrong(Step(request)))?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        for word in [request as u32, VERSION | flags, size] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        let (mut rest, mut fds) = (&message[..], fds);
        while !rest.is_empty() {
            match self.stream.send_with_fds(&[rest], fds) {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    // They went with the first byte.
                    fds = &[];
                }
                Err(e) => self.wait(request, e.into(), PollFlags::OUT, until)?,
            }
        }
        Ok(())
    }

    /// Receive the answer to `request` into `body`; its length, which is no more than that.
    fn receive(&self, request: Request, body: &mut [u8], until: Instant) -> Result<usize, Error> {
        let mut header = [0; HEADER];
        self.fill(request, &mut header, until)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = header;
        let [number, flags, size] =
            [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_le_bytes);
        let body = usize::try_from(size)
            .ok()
            .and_then(|size| body.get_mut(..size));
        let is_it =
            number == request as u32 && flags & VERSION_MASK == VERSION && flags & REPLY != 0;
        match body {
            Some(body) if is_it => {
                self.fill(request, body, until)?;
                Ok(body.len())
            }
            _ => Err(Error::Wrong(Step(request))),
        }
    }

    /// Descriptors that come along are not wanted, and the kernel closes them.
    fn fill(&self, request: Request, mut rest: &mut [u8], until: Instant) -> Result<(), Error> {
        while !rest.is_empty() {
            match recv(&self.stream, &mut *rest, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Error::Closed),
                Ok((count, _)) => rest = rest.get_mut(count..).unwrap_or_default(),
                Err(e) => self.wait(request, e.into(), PollFlags::IN, until)?,
            }
        }
        Ok(())
    }

    /// What to do about an error of the socket: wait, if that helps, until there is no more time.
    fn wait(
        &self,
        request: Request,
        error: io::Error,
        what: PollFlags,
        until: Instant,
    ) -> Result<(), Error> {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                return Err(Error::Closed);
            }
            _ => return Err(Error::Io(Step(request), error)),
        }
        let left = until.saturating_duration_since(Instant::now());
        let late = Err(Error::Late(Step(request)));
        if left.is_zero() {
            return late;
        }
        let left = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&self.stream, what)], left.as_ref()) {
            Ok(0) => late,
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(Error::Io(Step(request), e.into())),
        }
    }
}
