//! Decoders for the compressions that kernels and kernel modules come in.

use std::io::{self, Read, Write};

use crate::bytes::u32_at;

/// A compression of a kernel or a kernel module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// DEFLATE with gzip's header.
    Gzip,
    /// bzip2.
    Bzip2,
    /// The old `.lzma` format.
    Lzma,
    /// xz, with filters for machine code.
    Xz,
    /// LZO: recognised, not read.
    Lzo,
    /// LZ4 in the legacy frame that Linux uses.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// What went wrong on the way from packed to unpacked.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The compressed data do not decode.
    Damaged(io::Error),
    /// The compression is one that is not read.
    Unsupported,
    /// More than the given number of bytes came out.
    Limit,
    /// The output could not be written.
    Sink(io::Error),
}

impl Compression {
    /// By the first bytes, as Linux's own `lib/decompress.c` does it.
    pub(crate) fn detect(data: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 8] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\x1f\x9e", Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\0\0", Compression::Lzma),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x89LZO", Compression::Lzo),
            (&LZ4_LEGACY_MAGIC, Compression::Lz4),
            (&ZSTD_MAGIC, Compression::Zstd),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| data.starts_with(magic))
            .map(|(_, kind)| *kind)
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Xz => "xz",
            Compression::Lzo => "lzo",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

/// Decodes all of `packed` into `sink` and says how many bytes came out: at most `limit`, beyond
/// which nothing is written.
pub(crate) fn unpack(
    compression: Compression,
    packed: &[u8],
    limit: u64,
    sink: &mut dyn Write,
) -> Result<u64, Fault> {
    let mut decoder = decoder(compression, packed)?;
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0u64;
    loop {
        let count = match decoder.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Damaged(error)),
        };
        total = total.saturating_add(count as u64);
        if total > limit {
            return Err(Fault::Limit);
        }
        sink.write_all(buffer.get(..count).unwrap_or_default())
            .map_err(Fault::Sink)?;
    }
}

/// The first bytes that `packed` decodes to: at most 4096, fewer if there are no more.
pub(crate) fn unpack_head(compression: Compression, packed: &[u8]) -> Result<Vec<u8>, Fault> {
    let mut head = Vec::new();
    let decoder = decoder(compression, packed)?;
    decoder
        .take(4096)
        .read_to_end(&mut head)
        .map_err(Fault::Damaged)?;
    Ok(head)
}

/// Dictionaries of kernels are at most 128 MiB; a hostile header must not claim gigabytes.
const MAX_DICTIONARY: u64 = 1 << 30;
const MAX_DICTIONARY_KIB: u32 = (MAX_DICTIONARY >> 10) as u32;

const ZSTD_MAGIC: [u8; 4] = 0xfd2f_b528u32.to_le_bytes();
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102u32.to_le_bytes();
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

fn decoder(compression: Compression, packed: &[u8]) -> Result<Box<dyn Read + '_>, Fault> {
    Ok(match compression {
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(packed)),
        Compression::Bzip2 => Box::new(bzip2::read::BzDecoder::new(packed)),
        Compression::Lzma => Box::new(
            lzma_rust2::LzmaReader::new_mem_limit(packed, MAX_DICTIONARY_KIB, None)
                .map_err(Fault::Damaged)?,
        ),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
            packed,
            false,
            MAX_DICTIONARY_KIB,
        )),
        Compression::Lzo => return Err(Fault::Unsupported),
        Compression::Lz4 => Box::new(Lz4Legacy::new(packed)),
        Compression::Zstd => Box::new(Zstd::new(packed)?),
    })
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// One Zstandard frame, with its checksum verified, which ruzstd leaves to its caller.
struct Zstd<'a> {
    decoder: ruzstd::decoding::StreamingDecoder<&'a [u8], ruzstd::decoding::FrameDecoder>,
}

impl<'a> Zstd<'a> {
    fn new(packed: &'a [u8]) -> Result<Self, Fault> {
        let decoder =
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, MAX_DICTIONARY)
                .map_err(|error| Fault::Damaged(io::Error::other(error)))?;
        Ok(Self { decoder })
    }
}

impl Read for Zstd<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            let frame = &self.decoder.decoder;
            if let Some(stored) = frame.get_checksum_from_data()
                && frame.get_calculated_checksum() != Some(stored)
            {
                return Err(invalid("the checksum does not match"));
            }
        }
        Ok(count)
    }
}

/// LZ4's legacy frame: the magic number, then blocks that each unpack to at most 8 MiB, each after
/// its packed size as a 32-bit number. It has neither an end mark nor a checksum.
struct Lz4Legacy<'a> {
    packed: &'a [u8],
    block: Vec<u8>,
    position: usize,
}

impl<'a> Lz4Legacy<'a> {
    fn new(packed: &'a [u8]) -> Self {
        Self {
            packed,
            block: Vec::new(),
            position: 0,
        }
    }

    /// Unpacks the next block; `false` at the end of the data.
    fn next_block(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.packed.strip_prefix(&LZ4_LEGACY_MAGIC) {
            self.packed = rest;
        }
        self.position = 0;
        if self.packed.is_empty() {
            self.block.clear();
            return Ok(false);
        }
        let cut = || invalid("a block is cut off");
        let size = u32_at(self.packed, 0).ok_or_else(cut)?;
        let end = usize::try_from(size)
            .ok()
            .and_then(|size| size.checked_add(4))
            .ok_or_else(cut)?;
        let packed = self.packed.get(4..end).ok_or_else(cut)?;
        self.packed = self.packed.get(end..).unwrap_or_default();
        self.block.resize(LZ4_LEGACY_BLOCK, 0);
        let count = lz4_flex::block::decompress_into(packed, &mut self.block)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.block.truncate(count);
        Ok(true)
    }
}

impl Read for Lz4Legacy<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position >= self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let mut rest = self.block.get(self.position..).unwrap_or_default();
        let count = rest.read(buffer)?;
        self.position += count;
        Ok(count)
    }
}
