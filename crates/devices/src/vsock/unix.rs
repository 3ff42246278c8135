//! Unix sockets of the host, and what is waited for.

use super::Error;
use super::packet::{HEADER_SIZE, pieces};
use husk_virtio::{Buffer, GuestMemory};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vm_memory::{GuestMemoryBackend, ReadVolatile, VolatileMemoryError, WriteVolatile};

/// Length of a tick of [`Waiter::start_tick`].
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};
/// How soon [`Waiter::start_retry`] ends.
const RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};
/// Longest line that asks for a connection, with its end.
const LINE: usize = 32;

/// The socket that programs of the host connect to. Its file is removed when it is dropped.
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, for another may have taken its place.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listen at `path`, where nothing may be.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let socket = UnixListener::bind(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => in_the_way(path),
            _ => Error::Listen(path.into(), error),
        })?;
        socket
            .set_nonblocking(true)
            .map_err(|e| Error::Listen(path.into(), e))?;
        Ok(Self {
            socket,
            path: path.into(),
            file: identity(path),
        })
    }

    /// The next program that has connected; an error of kind WouldBlock when there is none.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// Connect to the program that listens for the guest's connections to `port`, at this path with `_` and the port behind.
    /// Does not wait: a program that is too slow to accept is an error of kind WouldBlock.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            // Nobody is left to tell.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Why nothing can be bound to `path`, where something is.
fn in_the_way(path: &Path) -> Error {
    match connect(path) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Error::Stale(path.into()),
        _ => Error::InUse(path.into()),
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// The line by which a program asks for a port of the guest's, `CONNECT <port>\n`, as far as it has come.
#[derive(Default)]
pub struct Greeting {
    line: [u8; LINE],
    length: usize,
}

impl Greeting {
    /// Read on, and not a byte behind the line: the port once it is whole. An error of kind WouldBlock: there is more to come.
    /// Any other error: nobody will say more, or it was something else.
    pub fn read(&mut self, stream: &UnixStream) -> io::Result<u32> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidData);
        loop {
            let rest = self.line.get_mut(self.length..).unwrap_or_default();
            if rest.is_empty() {
                return Err(wrong());
            }
            let (seen, _) = rustix::net::recv(stream, &mut *rest, RecvFlags::PEEK)?;
            let seen = rest.get_mut(..seen).unwrap_or_default();
            let end = seen.iter().position(|&byte| byte == b'\n');
            let own = end.map_or(seen.len(), |end| end + 1);
            let taken = seen.get_mut(..own).unwrap_or_default();
            let (count, _) = rustix::net::recv(stream, taken, RecvFlags::empty())?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.length += count;
            if end.is_some() && count == own {
                let line = self.line.get(..self.length - 1).unwrap_or_default();
                return port(line).ok_or_else(wrong);
            }
        }
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, port) = line.split_once(' ')?;
    // `+5` is a number to Rust.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let right = word.eq_ignore_ascii_case("connect") && digits;
    right.then(|| port.parse().ok()).flatten()
}

/// Read up to `most` bytes from `stream` into the buffers of a packet, behind its header. 0: the end.
pub fn read_packet(
    mut stream: &UnixStream,
    mem: &GuestMemory,
    buffers: &[Buffer],
    most: u32,
) -> io::Result<u32> {
    let mut done = 0;
    for (address, length) in pieces(buffers, HEADER_SIZE as u64, most) {
        let mut piece = mem.get_slice(address, length).map_err(io::Error::other)?;
        match retry(|| stream.read_volatile(&mut piece)) {
            Ok(count) => {
                done += count as u32;
                if count < length {
                    break;
                }
            }
            // What is wrong shows again when nothing was read.
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// Write a packet's `length` bytes behind its header to `stream`; how many it took. Fewer only when it would block.
pub fn write_packet(
    mut stream: &UnixStream,
    mem: &GuestMemory,
    buffers: &[Buffer],
    length: u32,
) -> io::Result<u32> {
    let mut done = 0;
    for (address, length) in pieces(buffers, HEADER_SIZE as u64, length) {
        let mut rest = mem.get_slice(address, length).map_err(io::Error::other)?;
        while !rest.is_empty() {
            match retry(|| stream.write_volatile(&rest)) {
                Ok(count) => {
                    done += count as u32;
                    rest = rest.offset(count).map_err(io::Error::other)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(done),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(done)
}

fn retry(mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(count) => return Ok(count),
            Err(VolatileMemoryError::IOError(error)) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

/// Wait until `stream` takes data, or is broken; false when that takes longer than `most`.
pub fn is_writable(stream: &UnixStream, most: Duration) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    let most = Timespec::try_from(most).ok();
    loop {
        match rustix::event::poll(&mut fds, most.as_ref()) {
            Err(Errno::INTR) => {}
            result => return matches!(result, Ok(1..)),
        }
    }
}

/// Who has an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The listener.
    Listener,
    /// [`Waiter::start_tick`].
    Tick,
    /// [`Waiter::start_retry`].
    Retry,
    /// [`Waiter::wake`].
    Wake,
    /// A connection, by the number that it was added with.
    Connection(u64),
}

/// Numbers of connections are below.
const OTHERS: u64 = 1 << 63;

/// All that a device waits for, behind one descriptor.
pub struct Waiter {
    epoll: OwnedFd,
    wake: OwnedFd,
    tick: OwnedFd,
    retry: OwnedFd,
}

impl Waiter {
    /// For the connections that come to `listener`.
    pub fn new(listener: &Listener) -> io::Result<Self> {
        let waiter = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            tick: timer()?,
            retry: timer()?,
        };
        let others = [
            listener.socket.as_fd(),
            waiter.wake.as_fd(),
            waiter.tick.as_fd(),
            waiter.retry.as_fd(),
        ];
        for (number, fd) in (OTHERS..).zip(others) {
            waiter.add_as(fd, number, epoll::EventFlags::IN)?;
        }
        Ok(waiter)
    }

    /// What becomes readable when there are events.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Watch a connection, edge-triggered, until it is closed.
    pub fn add(&self, stream: &UnixStream, number: u64) -> io::Result<()> {
        use epoll::EventFlags as Flags;
        self.add_as(stream, number, Flags::IN | Flags::OUT | Flags::RDHUP)
    }

    fn add_as(&self, fd: impl AsFd, number: u64, flags: epoll::EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(number);
        Ok(epoll::add(
            &self.epoll,
            fd,
            data,
            flags | epoll::EventFlags::ET,
        )?)
    }

    /// Fill `events` with events that are there; how many.
    pub fn events(&self, events: &mut [epoll::Event]) -> io::Result<usize> {
        let now = Timespec::default();
        match epoll::wait(&self.epoll, events, Some(&now)) {
            Err(Errno::INTR) => Ok(0),
            result => Ok(result?),
        }
    }

    /// Whose an event is.
    pub fn who(event: &epoll::Event) -> Who {
        match event.data.u64().checked_sub(OTHERS) {
            None => Who::Connection(event.data.u64()),
            Some(0) => Who::Listener,
            Some(1) => Who::Wake,
            Some(2) => Who::Tick,
            Some(_) => Who::Retry,
        }
    }

    /// Have an event soon.
    pub fn wake(&self) {
        // At its maximum the counter is an event already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Have an event in half a second, by which deadlines are counted.
    pub fn start_tick(&self) -> io::Result<()> {
        set_timer(&self.tick, TICK)
    }

    /// Have an event soon, but not at once.
    pub fn start_retry(&self) -> io::Result<()> {
        set_timer(&self.retry, RETRY)
    }
}

fn timer() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    Ok(timerfd_create(TimerfdClockId::Monotonic, flags)?)
}

fn set_timer(timer: &OwnedFd, it_value: Timespec) -> io::Result<()> {
    let once = Itimerspec {
        it_interval: Timespec::default(),
        it_value,
    };
    timerfd_settime(timer, TimerfdTimerFlags::empty(), &once)?;
    Ok(())
}
