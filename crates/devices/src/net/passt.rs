//! Networking without privileges: `passt` turns the guest's packets into the host's sockets. It is a process of its own at the
//! other end of a stream socket, over which each frame goes behind its length, a big-endian u32.
//!
//! The socket is passt's standard input, so no descriptor has to be inherited by number; when Husk ends, however it does, the
//! socket ends, and so does passt.

use super::Error;
use super::backend::{Backend, Event, Facts, HEADER, LEAST, MOST, Packet, Received, Room, Sent};
use super::features::GUEST_CSUM;
use super::io::Vectors;
use super::launcher;
use husk_config::{Forward, NetworkInterface, UserNetwork};
use rustix::event::epoll;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_HDR_F_DATA_VALID;

/// The MTU that passt announces: the largest that fits an 802.3 frame of 65535 bytes, in whole words. It merges what it
/// receives up to that.
const MTU: u16 = 65520;
/// Bytes of the length before a frame.
const PREFIX: usize = 4;
/// Room for some frames of full size, so that one call takes in many small ones.
const BUFFER: usize = 256 << 10;

/// A passt process and our end of its socket.
pub struct Passt {
    socket: OwnedFd,
    /// Becomes readable when the socket becomes writable, which the event loop does not watch.
    writable: OwnedFd,
    child: Child,
    /// The same as a descriptor, by which alone a thread under a seccomp filter may end it. None: the host has none.
    process: Option<OwnedFd>,
    /// What it has to say.
    stderr: OwnedFd,
    mtu: u16,
    /// `flags` of the header in front of what is received.
    flags: u8,
    /// Received and not handed on yet is `buffer[start..end]`; a frame or its length may be incomplete.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The end of a frame that the socket took only in part.
    unsent: Vec<u8>,
    vectors: Vectors,
}

impl Passt {
    /// Start one for the interface `config`. It is not awaited: what passt finds out later shows as a link that is down.
    pub fn start(config: &NetworkInterface, user: &UserNetwork) -> Result<Self, Error> {
        Self::start_as(Command::new("passt"), config, user)
    }

    /// As [`Passt::start`], by a command that lacks only passt's arguments.
    pub fn start_as(
        mut command: Command,
        config: &NetworkInterface,
        user: &UserNetwork,
    ) -> Result<Self, Error> {
        check_ports(&user.forwards)?;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                .map_err(|e| Error::Socket(e.into()))?;
        let writable = watch_writable(&ours).map_err(|e| Error::Socket(e.into()))?;
        // Whatever the guest makes passt say, it never waits for someone to read it.
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (stderr, said) = pipe_with(flags).map_err(|e| Error::Socket(e.into()))?;
        let mtu = config.mtu.unwrap_or(MTU).min(MTU);
        command
            .args(arguments(&user.forwards, mtu))
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(said);
        let child = launcher::spawn(command).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::NoPasst,
            _ => Error::StartPasst(e),
        })?;
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).ok();
        Ok(Self {
            socket: ours,
            writable,
            child,
            process,
            stderr,
            mtu,
            flags: 0,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            unsent: Vec::new(),
            vectors: Vectors::default(),
        })
    }

    /// The process, for tests that are unkind to it.
    #[cfg(test)]
    pub fn process(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// The length of the next frame, when all of it is there.
    fn complete(&self) -> Result<Option<usize>, BadLength> {
        let there = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix) as usize;
        if !(LEAST - HEADER..=MOST - HEADER).contains(&length) {
            return Err(BadLength(length));
        }
        Ok((length <= rest.len()).then_some(length))
    }

    /// Take in what the socket has; None when it has nothing.
    fn fill(&mut self) -> io::Result<Option<()>> {
        if self.buffer.is_empty() {
            // Its pages come into being when they are needed.
            self.buffer = vec![0; BUFFER];
        }
        // What is left is less than a frame.
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let free = self.buffer.get_mut(self.end..).unwrap_or_default();
        match rustix::net::recv(&self.socket, free, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((count, _)) => {
                self.end += count;
                Ok(Some(()))
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Send what is left of the frame before; true when nothing is left.
    fn send_unsent(&mut self) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.socket, &self.unsent, flags) {
                Ok(count) => drop(self.unsent.drain(..count.min(self.unsent.len()))),
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn try_send(&mut self, packet: &Packet) -> io::Result<Sent> {
        if !self.send_unsent()? {
            return Ok(Sent::Full);
        }
        let length = packet.length - HEADER;
        let prefix = (length as u32).to_be_bytes();
        let socket = self.socket.as_fd();
        let done = match self.vectors.send(socket, &prefix, packet, HEADER) {
            Ok(done) => done,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Sent::Full),
            // More buffers than Linux takes.
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => return Ok(Sent::Done),
            Err(e) => return Err(e),
        };
        // The frames behind would be lost without the rest of this one.
        if done < PREFIX + length {
            self.unsent
                .extend(prefix.get(done..).into_iter().flatten().copied());
            let skip = HEADER + done.saturating_sub(PREFIX);
            packet.copy(skip, &mut self.unsent);
        }
        Ok(Sent::Done)
    }

    /// End the process, which may have ended already, and collect it.
    fn end(&mut self) -> io::Result<ExitStatus> {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        // Where this may not be done, passt may take its time to see the socket end; it is not waited for.
        let process = self.process.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        pidfd_send_signal(process, Signal::KILL)?;
        self.child.wait()
    }

    /// Say once what became of passt.
    fn lost(&mut self, why: &dyn std::fmt::Display) {
        let status = match self.end() {
            Ok(status) => status.to_string(),
            Err(e) => e.to_string(),
        };
        let mut text = [0; 4096];
        let count = rustix::io::read(&self.stderr, &mut text[..]).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        let said = text.lines().rfind(|line| {
            !line.is_empty() && !line.starts_with("Failed to send") && !line.starts_with("Don't")
        });
        log::error!(
            "passt has ended ({status}; {why}), and with it the guest's network: {}",
            said.unwrap_or("it does not say why")
        );
    }
}

/// passt says what it cannot mean.
#[derive(Debug, thiserror::Error)]
#[error("a frame of {0} bytes")]
struct BadLength(usize);

impl Backend for Passt {
    fn facts(&self) -> Facts {
        Facts {
            // A checksum for the guest to leave out would be ours to make; none is offered.
            features: 1 << GUEST_CSUM,
            mtu: Some(self.mtu),
        }
    }

    fn start(&mut self, features: u64) -> io::Result<()> {
        // passt makes sound checksums, and nothing can spoil them between it and the guest (5.1.6.4.1).
        self.flags = match features & 1 << GUEST_CSUM {
            0 => 0,
            _ => VIRTIO_NET_HDR_F_DATA_VALID as u8,
        };
        Ok(())
    }

    fn set_pairs(&mut self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, _pair: u16, room: &mut Room) -> Received {
        loop {
            match self.complete() {
                Ok(Some(length)) => {
                    let mut header = [0; HEADER];
                    header[0] = self.flags;
                    room.put(0, &header);
                    let from = self.start + PREFIX;
                    let to = from + length;
                    room.put(HEADER, self.buffer.get(from..to).unwrap_or_default());
                    self.start = to;
                    return Received::Packet(HEADER + length);
                }
                Ok(None) => {}
                Err(e) => {
                    self.lost(&e);
                    return Received::Gone;
                }
            }
            match self.fill() {
                Ok(Some(())) => {}
                Ok(None) => return Received::Empty,
                Err(e) => {
                    self.lost(&e);
                    return Received::Gone;
                }
            }
        }
    }

    fn send(&mut self, _pair: u16, packet: &Packet) -> Sent {
        self.try_send(packet).unwrap_or_else(|e| {
            self.lost(&e);
            Sent::Gone
        })
    }

    fn sources(&self) -> Vec<(RawFd, Event)> {
        vec![
            (self.socket.as_raw_fd(), Event::Readable(0)),
            (self.writable.as_raw_fd(), Event::Writable),
        ]
    }

    fn writable(&mut self) {
        // Edge-triggered, too: asked once, it stays quiet until the socket has room again.
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let _ = epoll::wait(&self.writable, &mut events[..], Some(&now));
    }
}

impl Drop for Passt {
    /// It would end by itself, with the socket, but as a zombie.
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn arguments(forwards: &[Forward], mtu: u16) -> Vec<String> {
    let mut arguments: Vec<String> = ["--foreground", "--one-off", "--quiet", "--stderr"]
        .map(String::from)
        .to_vec();
    arguments.extend(["--fd".into(), "0".into(), "--mtu".into(), mtu.to_string()]);
    for Forward { host, guest } in forwards {
        arguments.extend(["--tcp-ports".into(), format!("{host}:{guest}")]);
    }
    arguments
}

/// passt would end when it cannot have a port, too late to tell whoever asked for it.
fn check_ports(forwards: &[Forward]) -> Result<(), Error> {
    // Kept until all are there: the same port twice does not work either.
    let mut listeners = Vec::new();
    for &Forward { host: port, .. } in forwards {
        let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            // No IPv6 on this host; else this takes both.
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            }
            other => other,
        };
        match listener {
            Ok(listener) => listeners.push(listener),
            Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                return Err(Error::PortInUse { port, source });
            }
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Error::PortNotAllowed { port, source });
            }
            // What this is, passt will say.
            Err(_) => {}
        }
    }
    Ok(())
}

/// An epoll descriptor that is readable when `socket` becomes writable.
fn watch_writable(socket: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let writable = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let flags = epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&writable, socket, epoll::EventData::new_u64(0), flags)?;
    Ok(writable)
}
