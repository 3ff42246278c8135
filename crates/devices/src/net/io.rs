//! System calls straight on guest memory.
#![allow(unsafe_code)]

use super::backend::{Packet, Room};
use husk_virtio::{Buffer, GuestMemory};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::GuestMemoryBackend;

/// Lists of buffers for the kernel. Kept, it allocates nothing after a while.
#[derive(Default)]
pub struct Vectors {
    /// Empty between calls.
    list: Vec<libc::iovec>,
}

// SAFETY: the list of pointers is cleared at the end of every call that fills it (and filled only after it was cleared), so
// what is sent to another thread holds no pointer that is ever used.
unsafe impl Send for Vectors {}

impl Vectors {
    /// readv into the whole of `room`.
    pub fn read(&mut self, fd: BorrowedFd, room: &mut Room) -> io::Result<usize> {
        self.list.clear();
        self.add_guest(room.mem, room.buffers, 0)?;
        self.list.push(libc::iovec {
            iov_base: room.rest.as_mut_ptr().cast(),
            iov_len: room.rest.len(),
        });
        // SAFETY: as many entries as is said, which are all that is written to: guest memory, mapped while `room.mem` is
        // borrowed and of which Rust has no reference, and `room.rest`, which is borrowed exclusively.
        let done =
            unsafe { libc::readv(fd.as_raw_fd(), self.list.as_ptr(), self.list.len() as i32) };
        self.finish(done)
    }

    /// writev of the whole of `packet`.
    pub fn write(&mut self, fd: BorrowedFd, packet: &Packet) -> io::Result<usize> {
        self.list.clear();
        self.add_guest(packet.mem, packet.buffers, 0)?;
        // SAFETY: the list has as many entries as is said, all of them guest memory, which stays mapped while `packet.mem` is
        // borrowed; the kernel only reads it.
        let done =
            unsafe { libc::writev(fd.as_raw_fd(), self.list.as_ptr(), self.list.len() as i32) };
        self.finish(done)
    }

    /// Send `prefix` and then `packet` without its first `skip` bytes to a socket, without waiting and without SIGPIPE.
    pub fn send(
        &mut self,
        socket: BorrowedFd,
        prefix: &[u8],
        packet: &Packet,
        skip: usize,
    ) -> io::Result<usize> {
        self.list.clear();
        self.list.push(libc::iovec {
            iov_base: prefix.as_ptr().cast_mut().cast(),
            iov_len: prefix.len(),
        });
        self.add_guest(packet.mem, packet.buffers, skip)?;
        // SAFETY: `msghdr` is plain numbers and pointers, of which zero is a valid value: no name, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.list.as_mut_ptr();
        message.msg_iovlen = self.list.len() as _;
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the message holds the list with as many entries as is said: `prefix`, which is borrowed, and guest memory,
        // which stays mapped while `packet.mem` is borrowed; the kernel only reads them.
        let done = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) };
        self.finish(done)
    }

    fn add_guest(&mut self, mem: &GuestMemory, buffers: &[Buffer], skip: usize) -> io::Result<()> {
        let mut skip = skip;
        for buffer in buffers {
            let length = buffer.length as usize;
            let own = skip.min(length);
            skip -= own;
            if own == length {
                continue;
            }
            // A slice is checked to lie in one region, whole; what is skipped is less than it.
            let slice = mem
                .get_slice(buffer.address, length)
                .map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            self.list.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().wrapping_add(own).cast(),
                iov_len: length - own,
            });
        }
        Ok(())
    }

    fn finish(&mut self, done: isize) -> io::Result<usize> {
        // Before anything else can change it.
        let error = io::Error::last_os_error();
        self.list.clear();
        usize::try_from(done).map_err(|_| error)
    }
}
