//! Buffers for what guests have sent and the host's programs do not take yet.

use super::connection::BUFFER_SIZE;
use super::packet::HEADER_SIZE;
use husk_virtio::{Chain, GuestMemory, QueueError};
use std::io::{self, Write};

/// Rings that are kept for the next connection that needs one.
const SPARE: usize = 8;

/// Rings of [`BUFFER_SIZE`] bytes that are not in use. Each connection has one only while something is in it.
#[derive(Default)]
pub struct Rings(Vec<Ring>);

impl Rings {
    /// An empty ring.
    pub fn take(&mut self) -> Ring {
        self.0.pop().unwrap_or_else(|| Ring {
            // Zeroed by the kernel, page by page, as it is used.
            bytes: vec![0; BUFFER_SIZE as usize],
            start: 0,
            length: 0,
        })
    }

    /// `ring` is not needed any more.
    pub fn give(&mut self, ring: Ring) {
        if self.0.len() < SPARE {
            self.0.push(Ring {
                start: 0,
                length: 0,
                ..ring
            });
        }
    }

    /// Give the memory back.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// A queue of bytes.
pub struct Ring {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Ring {
    /// Bytes in it.
    pub fn len(&self) -> u32 {
        self.length as u32
    }

    /// Append a packet's data behind its first `skip` bytes, `length` of them, which must have room.
    pub fn push(
        &mut self,
        mem: &GuestMemory,
        chain: &Chain,
        skip: u32,
        length: u32,
    ) -> Result<(), QueueError> {
        let mut offset = HEADER_SIZE as u64 + u64::from(skip);
        let mut left = (length as usize).min(self.bytes.len() - self.length);
        while left > 0 {
            let end = (self.start + self.length) % self.bytes.len();
            let count = left.min(self.bytes.len() - end);
            let free = self.bytes.get_mut(end..end + count).unwrap_or_default();
            chain.read(mem, offset, free)?;
            self.length += count;
            left -= count;
            offset += count as u64;
        }
        Ok(())
    }

    /// Write out what `to` takes; the bytes that it took. Fewer than there are only when it would block.
    pub fn write_to(&mut self, mut to: impl Write) -> io::Result<u32> {
        let mut done = 0;
        while self.length > 0 {
            let end = (self.start + self.length).min(self.bytes.len());
            let part = self.bytes.get(self.start..end).unwrap_or_default();
            match to.write(part) {
                Ok(count) => {
                    done += count as u32;
                    self.length -= count;
                    self.start = (self.start + count) % self.bytes.len();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}
