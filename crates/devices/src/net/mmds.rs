//! The metadata service on a guest's cable, beside whatever its other end is: a backend in front of another one, which takes
//! what is for the service out of the guest's packets and puts its answers among those for the guest.
//!
//! So neither queues nor other backends know of it, and an interface without the service does not pay for it. With it, a packet
//! of the guest costs a look at its first bytes.

use super::Error;
use super::backend::{Backend, Event, Facts, HEADER, Packet, Received, Room, Sent};
use super::features::GUEST_CSUM;
use husk_mmds::{LONGEST_FRAME, Stack};
use husk_virtio::buffers_from;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_HDR_F_DATA_VALID;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a frame that [`Stack::takes`] wants to see.
const START: usize = 42;
/// The pair of queues that answers go to; it is always in use.
const PAIR: u16 = 0;

/// A backend with the service in front of it.
pub struct Detour {
    name: String,
    backend: Box<dyn Backend>,
    /// The backend is gone; the service goes on.
    lost: bool,
    stack: Stack,
    /// The device's cue to look for answers.
    timer: OwnedFd,
    /// When the timer goes off, or did.
    wake: Option<Instant>,
    /// A packet of the guest.
    frame: Vec<u8>,
    /// `flags` of the header in front of answers.
    flags: u8,
}

impl Detour {
    /// The service behind `stack`, in front of the backend of the interface called `name`.
    pub fn new(name: &str, backend: Box<dyn Backend>, stack: Stack) -> Result<Self, Error> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags);
        Ok(Self {
            name: name.into(),
            backend,
            lost: false,
            stack,
            timer: timer.map_err(|e| Error::MmdsTimer(e.into()))?,
            wake: None,
            frame: Vec::new(),
            flags: 0,
        })
    }

    /// Take a packet that is for the service; true when it is.
    fn take(&mut self, packet: &Packet) -> bool {
        let mut start = [0; START];
        let length = read(packet, HEADER, &mut start);
        if !self.stack.takes(start.get(..length).unwrap_or_default()) {
            return false;
        }
        // A guest that keeps to the window it was given sends nothing longer.
        if packet.length <= HEADER + LONGEST_FRAME {
            self.frame.clear();
            packet.copy(HEADER, &mut self.frame);
            let now = Instant::now();
            self.stack.receive(&mut self.frame, now);
            match self.stack.frame() {
                Some(_) => self.set_timer(now, Some(now)),
                None => self.plan(now),
            }
        } else {
            self.stack.refuse();
        }
        true
    }

    /// The next answer, if there is one.
    fn answer(&mut self, room: &mut Room) -> Option<usize> {
        if self.stack.frame().is_none() {
            // Without a connection there is nothing to wait for, and no clock is read.
            let wake = self.wake?;
            let now = Instant::now();
            if now < wake {
                return None;
            }
            self.stack.poll(now);
            if self.stack.frame().is_none() {
                self.plan(now);
                return None;
            }
        }
        let frame = self.stack.frame()?;
        let mut header = [0; HEADER];
        // Nothing can have spoilt it (5.1.6.4.1).
        header[0] = self.flags;
        room.put(0, &header);
        room.put(HEADER, frame);
        let length = HEADER + frame.len();
        self.stack.taken();
        if self.stack.frame().is_none() {
            // There may be more where this came from; it is asked for before the backend is.
            self.wake = Some(Instant::now());
        }
        Some(length)
    }

    /// Be called when the service has to do something.
    fn plan(&mut self, now: Instant) {
        let wake = self.stack.deadline(now);
        self.set_timer(now, wake);
    }

    fn set_timer(&mut self, now: Instant, wake: Option<Instant>) {
        if self.wake == wake {
            return;
        }
        self.wake = wake;
        // One that is not wanted any more does no harm.
        let Some(wake) = wake else {
            return;
        };
        // 0 would disarm it.
        let wait = wake
            .saturating_duration_since(now)
            .max(Duration::from_nanos(1));
        let never = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let time = Itimerspec {
            it_interval: never,
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        if let Err(e) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time) {
            log::debug!("the metadata service's timer cannot be set: {e}");
        }
    }

    fn lose(&mut self) {
        self.lost = true;
        log::warn!(
            "the network interface {} has lost its other end: only the metadata service answers",
            self.name
        );
    }
}

/// Fill `to` with what is behind the first `skip` bytes of a packet; how much that is.
fn read(packet: &Packet, skip: usize, to: &mut [u8]) -> usize {
    let mut done = 0;
    for (buffer, skip) in buffers_from(packet.buffers, skip as u64) {
        let rest = to.get_mut(done..).unwrap_or_default();
        let count = rest.len().min((buffer.length - skip) as usize);
        let (part, _) = rest.split_at_mut(count);
        if part.is_empty() {
            break;
        }
        // Checked to lie in guest memory when its chain was popped.
        let address = GuestAddress(buffer.address.0 + u64::from(skip));
        let _ = packet.mem.read_slice(part, address);
        done += count;
    }
    done
}

impl Backend for Detour {
    fn facts(&self) -> Facts {
        self.backend.facts()
    }

    fn start(&mut self, features: u64) -> io::Result<()> {
        self.flags = match features & 1 << GUEST_CSUM {
            0 => 0,
            _ => VIRTIO_NET_HDR_F_DATA_VALID as u8,
        };
        self.stack.reset();
        self.wake = None;
        self.backend.start(features)
    }

    fn set_pairs(&mut self, pairs: u16) -> io::Result<()> {
        match self.lost {
            true => Ok(()),
            false => self.backend.set_pairs(pairs),
        }
    }

    fn receive(&mut self, pair: u16, room: &mut Room) -> Received {
        if pair == PAIR
            && let Some(length) = self.answer(room)
        {
            return Received::Packet(length);
        }
        if self.lost {
            return Received::Empty;
        }
        match self.backend.receive(pair, room) {
            Received::Gone => {
                self.lose();
                Received::Empty
            }
            other => other,
        }
    }

    fn send(&mut self, pair: u16, packet: &Packet) -> Sent {
        if self.take(packet) || self.lost {
            return Sent::Done;
        }
        match self.backend.send(pair, packet) {
            Sent::Gone => {
                self.lose();
                Sent::Done
            }
            other => other,
        }
    }

    fn sources(&self) -> Vec<(RawFd, Event)> {
        let mut sources = self.backend.sources();
        sources.push((self.timer.as_raw_fd(), Event::Readable(PAIR)));
        sources
    }

    fn writable(&mut self) {
        self.backend.writable();
    }
}
