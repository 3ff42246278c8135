//! userfaultfd(2): whoever has the descriptor hears which pages are touched first, and fills them.

use super::Error;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFDIO_API: u32 = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_WAKE: u32 = opcode::read::<Span>(0xaa, 2);
const UFFDIO_REGISTER: u32 = opcode::read_write::<Register>(0xaa, 0);

/// struct uffdio_api.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// struct uffdio_register.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// A userfaultfd. While one descriptor of it is open, a page of what is registered that nobody has filled keeps whoever
/// touches it waiting; when the last is closed, such pages are zero.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// One that hears of faults in this process, those of the kernel as well (KVM's, reads of files), and of memory that is given
    /// back.
    pub fn open() -> Result<Self, Error> {
        let userfault = Self(new()?);
        let mut api = Api {
            api: UFFD_API,
            features: UFFD_FEATURE_EVENT_REMOVE,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes a struct uffdio_api, which is what this is, and writes nothing else.
        unsafe { ioctl(&userfault.0, Updater::<UFFDIO_API, Api>::new(&mut api)) }
            .map_err(Error::Userfault)?;
        Ok(userfault)
    }

    /// From now on pages of `host..host + size` that are not there are waited for.
    pub fn register(&self, host: u64, size: u64) -> Result<(), Error> {
        let mut register = Register {
            start: host,
            length: size,
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes a struct uffdio_register, which is what this is, and writes nothing else. The bytes in
        // a range that is registered are the same as before, or not there yet.
        unsafe {
            ioctl(
                &self.0,
                Updater::<UFFDIO_REGISTER, Register>::new(&mut register),
            )
        }
        .map_err(Error::Userfault)
    }
}

/// struct uffdio_range.
#[repr(C)]
struct Span {
    start: u64,
    length: u64,
}

impl Userfault {
    /// Take `slots`, host addresses with their sizes, from everybody, and let those go on that wait for a page there: the host's kernel gets an
    /// error, and a thread of this process that still touches one never comes back. For a process that is about to end, which would wait for
    /// KVM's workers otherwise, as they for pages; nobody may look at memory any more who is to come back.
    pub fn abandon(&self, slots: &[(u64, u64)]) {
        // SAFETY: the handler is a function that is always there. It returns to nothing that could be wrong: it does not return.
        if unsafe { libc::signal(libc::SIGSEGV, never_again as *const () as usize) }
            == libc::SIG_ERR
        {
            log::debug!("a thread that touches lost memory ends the process by a signal");
        }
        for &(host, size) in slots {
            // SAFETY: the range is guest memory, which nobody has a reference to; that it cannot be accessed is what is wanted.
            let taken = unsafe {
                rustix::mm::mmap_anonymous(
                    host as *mut _,
                    size as usize,
                    rustix::mm::ProtFlags::empty(),
                    rustix::mm::MapFlags::PRIVATE
                        | rustix::mm::MapFlags::FIXED
                        | rustix::mm::MapFlags::NORESERVE,
                )
            };
            if let Err(e) = taken {
                log::debug!("lost memory cannot be taken away: {e}");
            }
        }
        self.wake(slots);
    }

    /// How many pages of `slots` are there.
    pub fn resident(&self, slots: &[(u64, u64)]) -> u64 {
        const PAGES: u64 = 1 << 18;
        const PAGE: u64 = 4096;
        let mut states = vec![0u8; PAGES as usize];
        let mut count = 0;
        for &(host, size) in slots {
            let pieces = (0..size).step_by((PAGES * PAGE) as usize);
            for (at, length) in pieces.map(|at| (host + at, (size - at).min(PAGES * PAGE))) {
                // SAFETY: mincore writes a byte for each page of the range, for which there is room, and reads nothing.
                let result = unsafe {
                    libc::mincore(at as *mut _, length as usize, states.as_mut_ptr().cast())
                };
                let told = states.iter().take(length.div_ceil(PAGE) as usize);
                if result == 0 {
                    count += told.filter(|&&state| state & 1 != 0).count() as u64;
                }
            }
        }
        count
    }

    /// Let those look again that wait for a page of `slots`: KVM's workers, for memory that is gone.
    pub fn wake(&self, slots: &[(u64, u64)]) {
        for &(start, length) in slots {
            let mut span = Span { start, length };
            // SAFETY: UFFDIO_WAKE takes a struct uffdio_range, which is what this is, and writes nothing.
            let woken = unsafe { ioctl(&self.0, Updater::<UFFDIO_WAKE, Span>::new(&mut span)) };
            if let Err(e) = woken {
                log::debug!("who waits for lost memory is not woken: {e}");
            }
        }
    }
}

/// The handler of SIGSEGV of a process that is about to end.
extern "C" fn never_again(_: libc::c_int) {
    let long = libc::timespec {
        tv_sec: 1 << 20,
        tv_nsec: 0,
    };
    loop {
        // SAFETY: a valid time, and nothing is wanted back.
        unsafe { libc::nanosleep(&raw const long, std::ptr::null_mut()) };
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// By the system call, or by the device, to which a user may be given access.
fn new() -> Result<OwnedFd, Error> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: nothing is registered with it yet.
    match unsafe { userfaultfd(flags) } {
        Ok(descriptor) => Ok(descriptor),
        Err(Errno::PERM) => of_device(flags).map_err(|_| Error::NoUserfault),
        Err(e) => Err(Error::Userfault(e)),
    }
}

fn of_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    let opening = OFlags::RDWR | OFlags::CLOEXEC;
    let device = open("/dev/userfaultfd", opening, Mode::empty())?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags.bits()) };
    if made < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    // SAFETY: the ioctl has made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// The process at the other end of a socket that it has listened on, as this process sees its number. None: it is in a PID namespace of its own.
pub fn peer(socket: BorrowedFd<'_>) -> Option<rustix::process::Pid> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: SO_PEERCRED writes at most `length` bytes, a struct ucred, to where one is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => rustix::process::Pid::from_raw(credentials.pid).filter(|_| credentials.pid > 0),
        _ => None,
    }
}
