//! O_DIRECT for buffers of a guest that are not aligned as the host needs it: by way of a buffer that is.

use husk_virtio::{Chain, GuestMemory, QueueError};
use std::fs::File;
use std::io;

/// Bytes that are moved at once.
const SIZE: usize = 256 << 10;
/// Enough for every device.
const ALIGN: usize = 4096;

/// The buffer; made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Bounce {
    bytes: Vec<u8>,
}

/// Data of a request.
pub(super) struct Transfer<'a> {
    pub mem: &'a GuestMemory,
    pub chain: &'a Chain,
    /// From the file to memory.
    pub read: bool,
    /// Where in the file.
    pub offset: u64,
    /// Where in the chain's readable or writable bytes.
    pub at: u64,
    pub length: u64,
}

impl Bounce {
    /// Move the data, and wait for it. The outer error is the guest's, the inner one the host's.
    pub(super) fn run(
        &mut self,
        file: &File,
        transfer: &Transfer,
    ) -> Result<io::Result<()>, QueueError> {
        let Transfer { mem, chain, .. } = *transfer;
        let buffer = self.buffer();
        let mut done = 0;
        while done < transfer.length {
            let count = (transfer.length - done).min(SIZE as u64) as usize;
            let part = buffer.get_mut(..count).unwrap_or_default();
            let (offset, at) = (transfer.offset + done, transfer.at + done);
            let moved = match transfer.read {
                true => rustix::io::pread(file, &mut *part, offset),
                false => {
                    chain.read(mem, at, part)?;
                    rustix::io::pwrite(file, part, offset)
                }
            };
            let moved = match moved {
                Ok(0) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(moved) => moved,
                Err(rustix::io::Errno::INTR) => 0,
                Err(e) => return Ok(Err(e.into())),
            };
            if transfer.read {
                chain.write(mem, at, part.get(..moved).unwrap_or_default())?;
            }
            done += moved as u64;
        }
        Ok(Ok(()))
    }

    fn buffer(&mut self) -> &mut [u8] {
        self.bytes.resize(SIZE + ALIGN, 0);
        let start = self.bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        self.bytes.get_mut(start..start + SIZE).unwrap_or_default()
    }
}
