//! A tap device of the host: Ethernet frames by read and write, each with a virtio header in front that Linux itself reads
//! and writes, so that checksums and segmentation are left to it.
#![allow(unsafe_code)]

use super::Error;
use super::backend::{Backend, Event, Facts, HEADER, Packet, Received, Room, Sent};
use super::features::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN,
    HOST_TSO4, HOST_TSO6, HOST_USO,
};
use super::io::Vectors;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What the host can do since Linux 2.6: checksums, and segments of TCP.
const TCP: u64 = 1 << CSUM
    | 1 << GUEST_CSUM
    | 1 << GUEST_TSO4
    | 1 << GUEST_TSO6
    | 1 << GUEST_ECN
    | 1 << HOST_TSO4
    | 1 << HOST_TSO6
    | 1 << HOST_ECN;
/// Since Linux 6.2: segments of UDP.
const UDP: u64 = 1 << GUEST_USO4 | 1 << GUEST_USO6 | 1 << HOST_USO;

/// A tap device that is open, once for each pair of queues.
pub struct Tap {
    queues: Vec<Queue>,
    features: u64,
    vectors: Vectors,
}

struct Queue {
    fd: OwnedFd,
    /// The kernel gives packets to those that are.
    attached: bool,
}

impl Tap {
    /// Open the device called `name`, which must exist, with `pairs` queues.
    pub fn open(name: &str, pairs: u16) -> Result<Self, Error> {
        check_exists(name)?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if pairs > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let first = match attach(name, flags) {
            // A device that was made for many queues takes no one who says nothing of them.
            Err(Error::Kind { .. }) if pairs == 1 => attach(name, flags | libc::IFF_MULTI_QUEUE)?,
            other => other?,
        };
        let mut fds = vec![first];
        for _ in 1..pairs {
            fds.push(attach(name, flags)?);
        }
        Self::set_up(fds).map_err(|source| Error::SetUp {
            name: name.into(),
            source,
        })
    }

    /// Take the device that is open as descriptor `number` of this process. The descriptor itself stays open.
    pub fn adopt(number: RawFd) -> Result<Self, Error> {
        let failed = |source: io::Error| Error::Descriptor { number, source };
        if number < 0 {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        // SAFETY: it is not -1. If nothing is open there, the only use of it fails with EBADF; nobody closes it meanwhile,
        // for it was given to this process for this.
        let given = unsafe { BorrowedFd::borrow_raw(number) };
        let fd = rustix::io::fcntl_dupfd_cloexec(given, 3).map_err(|e| failed(e.into()))?;
        let mut request = request("");
        interface_ioctl(fd.as_fd(), libc::TUNGETIFF, &mut request).map_err(failed)?;
        // SAFETY: the kernel has set the flags, and any value is a number.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(Error::DescriptorKind(number));
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| failed(e.into()))?;
        Self::set_up(vec![fd]).map_err(failed)
    }

    fn set_up(fds: Vec<OwnedFd>) -> io::Result<Self> {
        let mut features = TCP;
        for fd in &fds {
            int_ioctl(fd.as_fd(), libc::TUNSETVNETHDRSZ, HEADER as i32)?;
        }
        if let Some(fd) = fds.first() {
            // Linux says EINVAL to what it does not know.
            if set_offloads(fd.as_fd(), offloads(TCP | UDP)).is_ok() {
                features |= UDP;
            }
            set_offloads(fd.as_fd(), 0)?;
        }
        let queue = |fd| Queue { fd, attached: true };
        Ok(Self {
            queues: fds.into_iter().map(queue).collect(),
            features,
            vectors: Vectors::default(),
        })
    }
}

impl Backend for Tap {
    fn facts(&self) -> Facts {
        Facts {
            features: self.features,
            mtu: None,
        }
    }

    fn start(&mut self, features: u64) -> io::Result<()> {
        if let Some(queue) = self.queues.first() {
            match set_offloads(queue.fd.as_fd(), offloads(features)) {
                // The device is gone; reading tells it once more, and the driver sees the link go down.
                Err(e) if is_gone(&e) => return Ok(()),
                other => other?,
            }
        }
        self.set_pairs(1)
    }

    fn set_pairs(&mut self, pairs: u16) -> io::Result<()> {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let wanted = index < usize::from(pairs);
            if wanted != queue.attached {
                let flags = match wanted {
                    true => libc::IFF_ATTACH_QUEUE,
                    false => libc::IFF_DETACH_QUEUE,
                };
                let mut request = request("");
                request.ifr_ifru.ifru_flags = flags as i16;
                interface_ioctl(queue.fd.as_fd(), libc::TUNSETQUEUE, &mut request)?;
                queue.attached = wanted;
            }
        }
        Ok(())
    }

    fn receive(&mut self, pair: u16, room: &mut Room) -> Received {
        let Some(queue) = self.queues.get(usize::from(pair)).filter(|q| q.attached) else {
            return Received::Empty;
        };
        match self.vectors.read(queue.fd.as_fd(), room) {
            Ok(length) => Received::Packet(length),
            Err(e) if is_gone(&e) => Received::Gone,
            Err(e) => {
                if e.kind() != io::ErrorKind::WouldBlock {
                    log::debug!("a tap device cannot be read: {e}");
                }
                Received::Empty
            }
        }
    }

    fn send(&mut self, pair: u16, packet: &Packet) -> Sent {
        let Some(queue) = self.queues.get(usize::from(pair)).filter(|q| q.attached) else {
            return Sent::Done;
        };
        match self.vectors.write(queue.fd.as_fd(), packet) {
            Ok(_) => Sent::Done,
            Err(e) if is_gone(&e) => Sent::Gone,
            Err(e) => {
                // A frame that Linux finds no sense in, or the interface is down.
                log::debug!("a packet to a tap device is lost: {e}");
                Sent::Done
            }
        }
    }

    fn sources(&self) -> Vec<(RawFd, Event)> {
        (0..)
            .zip(&self.queues)
            .map(|(pair, queue)| (queue.fd.as_raw_fd(), Event::Readable(pair)))
            .collect()
    }
}

/// What tells of a device that was deleted: of a queue that is attached, nothing else does.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADFD | libc::ENODEV | libc::EFAULT)
    )
}

/// What Linux may do to packets *for* the guest (TUNSETOFFLOAD), by what the driver took. A bit that needs another is of no
/// meaning without (5.1.3.1).
fn offloads(features: u64) -> libc::c_uint {
    let has = |bit: u32| features & 1 << bit != 0;
    if !has(GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    for (bit, flag) in [
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
    ] {
        if has(bit) {
            flags |= flag;
        }
    }
    if has(GUEST_ECN) && (has(GUEST_TSO4) || has(GUEST_TSO6)) {
        flags |= libc::TUN_F_TSO_ECN;
    }
    // Linux takes both or none.
    if has(GUEST_USO4) && has(GUEST_USO6) {
        flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    flags
}

/// Linux would make a device that does not exist, without an address and gone with this process: of no use to anyone.
fn check_exists(name: &str) -> Result<(), Error> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
    let socket = socket_with(family, SocketType::DGRAM, flags, None);
    match socket.and_then(|socket| netdevice::name_to_index(socket, name)) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::NODEV) => Err(Error::NoTap(name.into())),
        Err(e) => Err(Error::SetUp {
            name: name.into(),
            source: e.into(),
        }),
    }
}

/// A new queue of the device.
fn attach(name: &str, flags: i32) -> Result<OwnedFd, Error> {
    let how = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd =
        rustix::fs::open("/dev/net/tun", how, Mode::empty()).map_err(|e| Error::Tun(e.into()))?;
    let mut request = request(name);
    // IFF_MULTI_QUEUE and its like are bits of an unsigned 16-bit number that libc takes for a signed one.
    request.ifr_ifru.ifru_flags = flags as i16;
    let name = name.to_owned();
    match interface_ioctl(fd.as_fd(), libc::TUNSETIFF, &mut request) {
        Ok(()) => Ok(fd),
        Err(source) => Err(match source.raw_os_error() {
            Some(libc::EPERM) => Error::NotAllowed { name, source },
            Some(libc::EBUSY | libc::E2BIG) => Error::Busy { name, source },
            Some(libc::EINVAL) => Error::Kind { name, source },
            _ => Error::SetUp { name, source },
        }),
    }
}

/// A request about the interface `name`, which is cut at 15 bytes.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is an array of characters and a union of numbers, arrays of such, and pointers: zero is a value of all.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let all_but_nul = libc::IFNAMSIZ - 1;
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(all_but_nul)
        .zip(name.bytes())
    {
        *to = from as libc::c_char;
    }
    request
}

fn interface_ioctl(fd: BorrowedFd, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: TUNSETIFF, TUNGETIFF and TUNSETQUEUE, for which this is called, read and write one `ifreq`, which is borrowed
    // exclusively. A descriptor that is no tap answers ENOTTY, or takes an `ifreq` too.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, request as *mut libc::ifreq) })
}

fn int_ioctl(fd: BorrowedFd, code: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ, for which this is called, reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, &value as *const libc::c_int) })
}

fn set_offloads(fd: BorrowedFd, flags: libc::c_uint) -> io::Result<()> {
    let flags = libc::c_ulong::from(flags);
    // SAFETY: TUNSETOFFLOAD takes a number and touches no memory of ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, flags) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
