//! Where guest memory is handed to the host's kernel, and system calls that have no safe wrapper.
#![allow(unsafe_code)]

use super::request::Request;
use husk_virtio::{Buffer, GuestMemory};
use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Zeroes to write from, aligned for O_DIRECT.
#[repr(align(4096))]
struct Page([u8; 4096]);
static ZEROES: Page = Page([0; 4096]);

/// `_IO(0x12, 119)`: discard {offset, length}.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Parts of guest memory that a system call is to fill or to read, in order.
pub(super) struct IoVecs {
    /// Everything in `all` points into it, or to [`ZEROES`].
    mem: Arc<GuestMemory>,
    all: Vec<libc::iovec>,
    /// Those before are done with.
    first: u32,
    /// The next call is for those before; all, unless [`IoVecs::limit`] says less.
    until: u32,
}

// SAFETY: the pointers are into memory that is mapped for the whole process for as long as `mem` lives, and are only given to
// the kernel, never dereferenced here; no thread owns them.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Nothing yet, of `mem`.
    pub(super) fn new(mem: Arc<GuestMemory>) -> Self {
        Self {
            mem,
            all: Vec::new(),
            first: 0,
            until: u32::MAX,
        }
    }

    /// The memory that it is of.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// Forget all parts; their place is kept.
    pub(super) fn clear(&mut self) {
        self.all.clear();
        self.first = 0;
        self.until = u32::MAX;
    }

    /// Add what lies in a buffer behind `skip` bytes, at most `most`; the number of bytes that these are.
    pub(super) fn push(
        &mut self,
        buffer: Buffer,
        skip: u64,
        most: u64,
    ) -> Result<u64, GuestMemoryError> {
        let length = u64::from(buffer.length).saturating_sub(skip).min(most);
        if length > 0 {
            // A slice is checked to lie in one region, whole; what is skipped is less than it.
            let whole = buffer.length as usize;
            let slice = self.mem.get_slice(buffer.address, whole)?;
            let start = slice.ptr_guard_mut().as_ptr().wrapping_add(skip as usize);
            self.all.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: length as usize,
            });
        }
        Ok(length)
    }

    /// Add `length` bytes of zeroes, for writing only.
    pub(super) fn push_zeroes(&mut self, length: u64) {
        let page = ZEROES.0.len() as u64;
        let mut left = length;
        while left > 0 {
            let part = left.min(page);
            self.all.push(libc::iovec {
                iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
                iov_len: part as usize,
            });
            left -= part;
        }
    }

    /// Bytes that are left.
    pub(super) fn left(&self) -> u64 {
        let rest = self.all.get(self.first as usize..).unwrap_or_default();
        rest.iter().map(|part| part.iov_len as u64).sum()
    }

    /// Let the next call be for the first `count` bytes of what is left, which are not 0, and no longer for less.
    pub(super) fn limit(&mut self, count: u64) {
        self.until = u32::MAX;
        let mut left = usize::try_from(count).unwrap_or(usize::MAX);
        let mut at = self.first as usize;
        while let Some(part) = self.all.get_mut(at).filter(|_| left > 0) {
            if left < part.iov_len {
                let rest = libc::iovec {
                    iov_base: part.iov_base.wrapping_byte_add(left),
                    iov_len: part.iov_len - left,
                };
                part.iov_len = left;
                self.all.insert(at + 1, rest);
            }
            left -= self.all.get(at).map_or(left, |part| part.iov_len);
            at += 1;
        }
        self.until = at as u32;
    }

    /// The first `count` bytes are done with.
    pub(super) fn advance(&mut self, count: u32) {
        let mut left = count as usize;
        while let Some(part) = self.all.get_mut(self.first as usize) {
            if left < part.iov_len {
                part.iov_base = part.iov_base.wrapping_byte_add(left);
                part.iov_len -= left;
                return;
            }
            left -= part.iov_len;
            self.first += 1;
        }
    }

    /// Nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.first as usize >= self.all.len()
    }

    /// Whether each part begins at a multiple of `address` bytes, and is a multiple of `length` bytes long.
    pub(super) fn are_aligned(&self, address: usize, length: usize) -> bool {
        let (address, length) = (address.max(1), length.max(1));
        // Everything is; that is so for each request without O_DIRECT.
        if address == 1 && length == 1 {
            return true;
        }
        self.rest().iter().all(|part| {
            part.iov_base.addr().is_multiple_of(address) && part.iov_len.is_multiple_of(length)
        })
    }

    fn rest(&self) -> &[libc::iovec] {
        let until = self.all.len().min(self.until as usize);
        self.all.get(self.first as usize..until).unwrap_or_default()
    }
}

/// One call to the host's kernel.
pub(super) enum Step<'a> {
    /// Read at an offset.
    Read(&'a IoVecs, u64),
    /// Write at an offset.
    Write(&'a IoVecs, u64),
    /// Bring data to the disk.
    Sync,
    /// fallocate.
    Allocate { mode: i32, offset: u64, length: u64 },
    /// Discard a part of a block device.
    Discard { offset: u64, length: u64 },
}

/// Make the call and wait for it; the number of bytes that were moved.
pub(super) fn run(file: &File, step: &Step) -> io::Result<u32> {
    let fd = file.as_raw_fd();
    let result = match *step {
        Step::Read(vecs, offset) => {
            let rest = vecs.rest();
            // SAFETY: each part is guest memory that stays mapped while `vecs` lives (or zeroes, which the kernel refuses to
            // write to); the guest, which the memory belongs to, may see any bytes there at any time.
            unsafe { libc::preadv(fd, rest.as_ptr(), rest.len() as i32, offset as i64) }
        }
        Step::Write(vecs, offset) => {
            let rest = vecs.rest();
            // SAFETY: as for reading; the kernel only reads from the parts.
            unsafe { libc::pwritev(fd, rest.as_ptr(), rest.len() as i32, offset as i64) }
        }
        Step::Sync => return Ok(rustix::fs::fdatasync(file).map(|()| 0)?),
        Step::Allocate {
            mode,
            offset,
            length,
        } => {
            // SAFETY: no memory is passed.
            unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) as isize }
        }
        Step::Discard { offset, length } => {
            let range = [offset, length];
            // SAFETY: the kernel reads two u64 from `range`, which lives until it returns.
            unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize }
        }
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Try to lock all of a file against other processes, and other opens in this one; false when one of them has it. The lock
/// ends with `file`.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let kind = match exclusive {
        true => libc::F_WRLCK,
        false => libc::F_RDLCK,
    };
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0, // to the end, wherever that comes to be
        l_pid: 0,
    };
    // SAFETY: the kernel reads one `flock`, which lives until it returns.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// An io_uring with the requests that are in it.
pub(super) struct Ring {
    ring: IoUring,
    ready: EventFd,
    /// By the number that completions carry. While it is here, a request is not touched: the kernel uses its parts.
    flying: Vec<Option<Request>>,
    free: Vec<u32>,
}

impl Ring {
    /// With room for `size` requests. Fails where the host has no io_uring, does not allow it, or lacks what is needed here.
    ///
    /// A ring makes system calls that no seccomp filter sees. So before it runs it is restricted, for good, to what a disk needs:
    /// it opens no file and no socket.
    pub(super) fn new(size: u16) -> io::Result<Self> {
        // The newer flags: no interrupt of this thread for each completion, and one bad entry does not hold up the others.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_r_disabled()
            .dontfork()
            .build(size.into())
            .or_else(|_| {
                let mut builder = IoUring::builder();
                builder.setup_r_disabled().dontfork().build(size.into())
            })?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(ready.as_raw_fd())?;
        let mut allowed = needed.map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            ready,
            flying: (0..size).map(|_| None).collect(),
            free: (0..u32::from(size)).collect(),
        })
    }

    /// Becomes readable with each completion.
    pub(super) fn source(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    /// Make the source readable.
    pub(super) fn wake(&self) {
        let _ = self.ready.write(1);
    }

    /// Put the next step of a request in, for [`Ring::submit`]. It comes back when there is no room, or it has no step that
    /// io_uring does.
    pub(super) fn push(&mut self, request: Request, file: &File) -> Result<(), Request> {
        let Some(&slot) = self.free.last() else {
            return Err(request);
        };
        let Some(entry) = entry(&request.step(), file) else {
            return Err(request);
        };
        let Some(place) = self.flying.get_mut(slot as usize) else {
            return Err(request);
        };
        let entry = entry.user_data(slot.into());
        // SAFETY: the entry points to the array of parts of `request` and to what they point to. The request is kept
        // unchanged in `flying` until the kernel has completed it (or for ever, see `drop`), moving it does not move the
        // array, and it keeps its guest memory mapped. There is one entry for each slot at most, so the queue has room.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(request);
        }
        *place = Some(request);
        self.free.pop();
        Ok(())
    }

    /// Tell the kernel of what was pushed. Where it has no memory for that at the moment, the source becomes readable, to try
    /// again.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        match self.ring.submit() {
            Ok(_) if self.ring.submission().is_empty() => Ok(()),
            Ok(_) => {
                self.wake();
                Ok(())
            }
            Err(e) if is_transient(&e) => {
                self.wake();
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// A request that is done, with what [`run`] would have returned.
    pub(super) fn completed(&mut self) -> Option<(Request, io::Result<u32>)> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = entry.user_data() as u32;
            let place = self.flying.get_mut(slot as usize);
            if let Some(request) = place.and_then(Option::take) {
                self.free.push(slot);
                let result = entry.result();
                let result = u32::try_from(result)
                    .map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()));
                return Some((request, result));
            }
        }
    }

    /// Wait until a request is done; false when none is in it. After an error nothing can be said about those in it, and the
    /// ring is of no more use.
    pub(super) fn wait(&mut self) -> io::Result<bool> {
        const TRIES: u32 = 1000;
        if self.free.len() == self.flying.len() {
            return Ok(false);
        }
        let mut tries = 0;
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(true),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_transient(&e) && tries < TRIES => {
                    tries += 1;
                    if !self.ring.completion().is_empty() {
                        return Ok(true);
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => return Err(e),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        loop {
            match self.wait() {
                Ok(false) => return,
                Ok(true) => while self.completed().is_some() {},
                Err(_) => {
                    // What the kernel may still use must never be freed.
                    std::mem::forget(std::mem::take(&mut self.flying));
                    return;
                }
            }
        }
    }
}

/// The kernel lacks something that it may have again soon.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

/// A step as io_uring takes it, if it does.
fn entry(step: &Step, file: &File) -> Option<squeue::Entry> {
    let fd = types::Fd(file.as_raw_fd());
    Some(match *step {
        Step::Read(vecs, offset) => match vecs.rest() {
            [one] => opcode::Read::new(fd, one.iov_base.cast(), short(one.iov_len))
                .offset(offset)
                .build(),
            rest => opcode::Readv::new(fd, rest.as_ptr(), rest.len() as u32)
                .offset(offset)
                .build(),
        },
        Step::Write(vecs, offset) => match vecs.rest() {
            [one] => opcode::Write::new(fd, one.iov_base.cast(), short(one.iov_len))
                .offset(offset)
                .build(),
            rest => opcode::Writev::new(fd, rest.as_ptr(), rest.len() as u32)
                .offset(offset)
                .build(),
        },
        Step::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Step::Allocate {
            mode,
            offset,
            length,
        } => opcode::Fallocate::new(fd, length)
            .offset(offset)
            .mode(mode)
            .build(),
        Step::Discard { .. } => return None,
    })
}

/// As much of a length as the kernel moves at once.
fn short(length: usize) -> u32 {
    const MAX_RW_COUNT: usize = 0x7fff_f000;
    length.min(MAX_RW_COUNT) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_opens_nothing() {
        let mut ring = Ring::new(8).expect("the tests need io_uring");
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr());
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0);
        for entry in [open.build(), socket.build()] {
            // SAFETY: the path lives for ever, and the other entry points to nothing.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            let done = ring.ring.completion().next().unwrap();
            assert_eq!(done.result(), -libc::EACCES);
        }
    }
}
