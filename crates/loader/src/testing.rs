//! Small kernels for the tests, made byte by byte.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{Cache, Compression, Error, Kernel};

/// A segment of a test ELF: type, physical address, virtual address, contents, memory size.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) kind: u32,
    pub(crate) physical: u64,
    pub(crate) virtual_: u64,
    pub(crate) data: Vec<u8>,
    pub(crate) memory: u64,
}

pub(crate) fn load(address: u64, data: &[u8], memory: u64) -> Part {
    Part {
        kind: 1,
        physical: address,
        virtual_: address,
        data: data.to_vec(),
        memory,
    }
}

pub(crate) fn notes(data: Vec<u8>) -> Part {
    let memory = data.len() as u64;
    Part {
        kind: 4,
        physical: 0,
        virtual_: 0,
        data,
        memory,
    }
}

/// A note with 4-byte padding.
pub(crate) fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for number in [name.len() as u32, descriptor.len() as u32, kind] {
        note.extend(number.to_le_bytes());
    }
    for part in [name, descriptor] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

pub(crate) fn elf(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for number in [entry, 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend([
        0,
        0,
        0,
        0,
        64,
        0,
        56,
        0,
        parts.len() as u8,
        0,
        64,
        0,
        0,
        0,
        0,
        0,
    ]);
    let mut offset = 64 + 56 * parts.len() as u64;
    for part in parts {
        file.extend(part.kind.to_le_bytes());
        file.extend([5, 0, 0, 0]);
        let size = part.data.len() as u64;
        for number in [offset, part.virtual_, part.physical, size, part.memory, 4] {
            file.extend(number.to_le_bytes());
        }
        offset += size;
    }
    for part in parts {
        file.extend(&part.data);
    }
    file
}

/// Two segments, a PVH note, and contents that look like code and like zeros to a compressor.
pub(crate) fn sample_elf() -> Vec<u8> {
    let mut text: Vec<u8> = Vec::new();
    for n in 0u32..4000 {
        // `call` with a displacement: what the x86 filter of xz rewrites.
        text.push(0xe8);
        text.extend((n * 37 % 5000).to_le_bytes());
        text.extend([0x48, 0x89, n as u8]);
    }
    elf(
        0x10_0010,
        &[
            load(0x10_0000, &text, 0x1_0000),
            load(0x20_0000, &[0; 5000], 9000),
            notes(note(b"Xen\0", 18, &0x10_0020u32.to_le_bytes())),
        ],
    )
}

pub(crate) const SETUP_SECTORS: usize = 3;

/// A bzImage around `payload`, with its unpacked size behind it unless it is gzip's.
pub(crate) fn bzimage(compression: Compression, mut payload: Vec<u8>, size: u32) -> Vec<u8> {
    if compression != Compression::Gzip {
        payload.extend(size.to_le_bytes());
    }
    let mut file = vec![0u8; (SETUP_SECTORS + 1) * 512 + 64];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x1f1, &[SETUP_SECTORS as u8]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x20e, &0x300u16.to_le_bytes());
    put(0x248, &64u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x500, b"6.1.0-test+1 (builder@host) #1 SMP\0");
    file.extend(payload);
    file.extend([0xcc; 100]);
    file
}

pub(crate) fn pack(compression: Compression, data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut packed = Vec::new();
    match compression {
        Compression::Gzip => {
            let mut writer = flate2::write::GzEncoder::new(packed, flate2::Compression::best());
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Compression::Bzip2 => {
            let mut writer = bzip2::write::BzEncoder::new(packed, bzip2::Compression::fast());
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Compression::Lzma => {
            // Linux's build pipes into lzma: the header's size is -1 and an end mark follows.
            let options = lzma_rust2::LzmaOptions::with_preset(0);
            let mut writer =
                lzma_rust2::LzmaWriter::new_use_header(packed, &options, None).unwrap();
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Compression::Xz => {
            let mut options = lzma_rust2::XzOptions::with_preset(0);
            options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut writer = lzma_rust2::XzWriter::new(packed, options).unwrap();
            writer.write_all(data).unwrap();
            writer.finish().unwrap()
        }
        Compression::Lz4 => {
            packed.extend(0x184c_2102u32.to_le_bytes());
            for block in data.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
            packed
        }
        Compression::Zstd => zstd_frame(data),
        Compression::Lzo => b"\x89LZO\0\r\n\x1a\n".to_vec(),
    }
}

/// A frame as `zstd --ultra -22` writes it from a pipe: a window of 128 MiB and no content size.
/// The blocks are raw and run-length ones.
fn zstd_frame(data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3];
    let blocks: Vec<&[u8]> = data.chunks(100_000).collect();
    for (index, block) in blocks.iter().enumerate() {
        let last = u32::from(index + 1 == blocks.len());
        let run = block.iter().all(|byte| *byte == block[0]);
        let header = (block.len() as u32) << 3 | u32::from(run) << 1 | last;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(if run { &block[..1] } else { block });
    }
    frame
}

/// Opens `bytes` as a kernel with no cache directory.
pub(crate) fn open(bytes: &[u8]) -> Result<Kernel, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "kernel", bytes);
    Kernel::open(&path, &Cache::disabled())
}

pub(crate) fn write(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// A small generator of pseudo-random numbers (xorshift64), for repeatable mutations.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
