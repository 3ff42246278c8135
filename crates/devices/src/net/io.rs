//! System calls straight on guest memory.
#![allow(unsafe_code)]

use super::backend::{Packet, Room};
use husk_virtio::{Buffer, Extent, GuestMemory};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// The region of guest memory that was looked up last: buffers mostly lie in the same.
struct Region {
    extent: Extent,
    host: *mut u8,
}

impl Default for Region {
    fn default() -> Self {
        Self {
            extent: Extent::default(),
            host: std::ptr::null_mut(),
        }
    }
}

impl Region {
    /// Where `length` bytes at `address` are, all of them in one region of `mem`.
    fn find(&mut self, mem: &GuestMemory, address: GuestAddress, length: usize) -> Option<*mut u8> {
        if let Some(place) = self.place(address, length) {
            return Some(place);
        }
        let region = mem.find_region(address)?;
        *self = Self {
            extent: Extent::of(region),
            host: region.as_volatile_slice().ok()?.ptr_guard_mut().as_ptr(),
        };
        self.place(address, length)
    }

    fn place(&self, address: GuestAddress, length: usize) -> Option<*mut u8> {
        let offset = self.extent.offset(address, length as u64)?;
        Some(self.host.wrapping_add(offset as usize))
    }
}

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

    /// List `buffers` but for their first `skip` bytes. Buffers that are neighbours in memory, as those of a driver often are, are
    /// one for the kernel, which spends as much on each as on copying some hundred bytes.
    fn add_guest(&mut self, mem: &GuestMemory, buffers: &[Buffer], skip: usize) -> io::Result<()> {
        let mut skip = skip;
        let mut region = Region::default();
        let mut last: Option<&mut libc::iovec> = None;
        for buffer in buffers {
            let length = buffer.length as usize;
            let own = skip.min(length);
            skip -= own;
            if own == length {
                continue;
            }
            let start = region
                .find(mem, buffer.address, length)
                .ok_or(io::Error::from_raw_os_error(libc::EFAULT))?;
            let (base, length) = (start.wrapping_add(own), length - own);
            match last {
                Some(ref mut last) if last.iov_base.wrapping_add(last.iov_len) == base.cast() => {
                    last.iov_len += length;
                }
                _ => {
                    self.list.push(libc::iovec {
                        iov_base: base.cast(),
                        iov_len: length,
                    });
                    last = self.list.last_mut();
                }
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_in_memory_are_one_vector() {
        let ranges = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x10_0000), 0x1000),
        ];
        let mem = GuestMemory::from_ranges(&ranges).unwrap();
        let host = |address: u64| mem.get_host_address(GuestAddress(address)).unwrap();
        let buffers = [
            (0x1000, 0x1000),
            (0x2000, 0x800),
            (0x2800, 1),
            // A gap, then backwards, then the other region.
            (0x2802, 0x100),
            (0x2000, 2),
            (0x10_0000, 0x1000),
        ]
        .map(|(address, length)| Buffer {
            address: GuestAddress(address),
            length,
        });
        let list = |skip| {
            let mut vectors = Vectors::default();
            vectors.add_guest(&mem, &buffers, skip).unwrap();
            let parts = vectors.list.iter();
            let parts = parts.map(|part| (part.iov_base.cast::<u8>(), part.iov_len));
            parts.collect::<Vec<_>>()
        };
        let rest = [
            (host(0x2802), 0x100),
            (host(0x2000), 2),
            (host(0x10_0000), 0x1000),
        ];
        let with = |first| [&[first], &rest[..]].concat();
        assert_eq!(list(0), with((host(0x1000), 0x1801)));
        assert_eq!(list(0xfff), with((host(0x1fff), 0x802)));
        assert_eq!(list(0x1800), with((host(0x2800), 1)));
        assert_eq!(list(0x1801), rest);
        assert_eq!(list(0x1801 + 0x102 + 0x1000), []);
    }

    #[test]
    fn what_is_not_all_in_one_region_is_refused() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x1000)]).unwrap();
        let mut vectors = Vectors::default();
        for (address, length) in [(0xfff, 2), (0x1fff, 2), (0x2000, 1), (u64::MAX, 1)] {
            let buffers = [(0x1000, 1), (address, length)].map(|(address, length)| Buffer {
                address: GuestAddress(address),
                length,
            });
            let result = vectors.add_guest(&mem, &buffers, 0);
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFAULT));
        }
    }
}
