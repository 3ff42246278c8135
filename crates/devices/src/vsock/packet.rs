//! Packets (5.10.6): a header of 44 bytes, and data, in descriptor chains of any layout.

use husk_virtio::{Buffer, Chain, GuestMemory, QueueError};
use vm_memory::GuestAddress;

/// Size of a header in bytes.
pub const HEADER_SIZE: usize = 44;
/// The host's context ID.
pub const HOST_CID: u64 = 2;
/// The type of a stream socket's packets (5.10.6.4).
pub const TYPE_STREAM: u16 = 1;
/// Flag of [`operation::SHUTDOWN`]: the sender of the packet receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`operation::SHUTDOWN`]: the sender of the packet sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet does (5.10.6, `enum virtio_vsock_op`).
pub mod operation {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends one.
    pub const RST: u16 = 3;
    /// Ends directions of one, see the flags.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells how much room there is.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a [`CREDIT_UPDATE`].
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr` (5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub src_cid: u64,
    /// Context ID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// See [`operation`].
    pub op: u16,
    /// Of the operation.
    pub flags: u32,
    /// The sender's buffer space for the connection in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// As it lies in memory.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let mut rest = bytes.as_mut_slice();
        let mut put = |field: &[u8]| {
            let (to, behind) = std::mem::take(&mut rest).split_at_mut(field.len());
            to.copy_from_slice(field);
            rest = behind;
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Any bytes are a header.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// The header at the beginning of a chain's readable bytes; None when there are too few of them.
    pub fn read(mem: &GuestMemory, chain: &Chain) -> Result<Option<Self>, QueueError> {
        let mut bytes = [0; HEADER_SIZE];
        let length = chain.read(mem, 0, &mut bytes)?;
        Ok((length == HEADER_SIZE).then(|| Self::from_bytes(&bytes)))
    }

    /// Write it to the beginning of a chain's writable bytes, which must have room for it.
    pub fn write(&self, mem: &GuestMemory, chain: &Chain) -> Result<(), QueueError> {
        chain.write(mem, 0, &self.to_bytes()).map(|_| ())
    }
}

/// What is left of a header to be read.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}

/// The pieces of guest memory that hold the `length` bytes behind the first `offset` bytes of `buffers`, as far as there are
/// that many. None is empty.
pub fn pieces(
    buffers: &[Buffer],
    offset: u64,
    length: u32,
) -> impl Iterator<Item = (GuestAddress, usize)> {
    let mut skip = offset;
    let mut left = length;
    buffers.iter().filter_map(move |buffer| {
        let own = skip.min(u64::from(buffer.length)) as u32;
        skip -= u64::from(own);
        let count = left.min(buffer.length - own);
        left -= count;
        let address = GuestAddress(buffer.address.0 + u64::from(own));
        (count > 0).then_some((address, count as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(lengths: &[u32]) -> Vec<Buffer> {
        let mut address = 0x1000;
        let buffer = |&length| {
            let buffer = Buffer {
                address: GuestAddress(address),
                length,
            };
            address += 0x1000;
            buffer
        };
        lengths.iter().map(buffer).collect()
    }

    #[test]
    fn a_header_is_what_it_was_and_lies_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 1,
            op: operation::RW,
            flags: 0x4142_4344,
            buf_alloc: 0x5152_5354,
            fwd_cnt: 0x6162_6364,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0x64, 0x63, 0x62, 0x61]);
    }

    #[test]
    fn data_is_found_in_any_layout() {
        let take = |lengths: &[u32], offset, length| {
            let found: Vec<_> = pieces(&buffers(lengths), offset, length)
                .map(|(address, count)| (address.0, count))
                .collect();
            found
        };
        assert_eq!(take(&[44, 100], 44, 100), [(0x2000, 100)]);
        assert_eq!(take(&[144], 44, 100), [(0x1000 + 44, 100)]);
        assert_eq!(
            take(&[1, 42, 3, 5, 7], 44, 10),
            [(0x3001, 2), (0x4000, 5), (0x5000, 3)]
        );
        assert_eq!(take(&[44, 5], 44, 100), [(0x2000, 5)]);
        assert_eq!(take(&[44, 5], 44, 0), []);
        assert_eq!(take(&[44], 44, 5), []);
    }
}
