use std::io;
use std::path::PathBuf;

use crate::Compression;

/// Why a kernel or an initramfs cannot be used.
///
/// Each message is one line that names the file and says what to do. Paths are shown as Rust string
/// literals, so that a strange file name cannot write to the terminal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such file.
    #[error("{path:?} does not exist; check the path")]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// The file exists and this user may not read it.
    #[error(
        "{path:?} is not readable by this user; make a readable copy (sudo install -m 644 FILE COPY) and give that"
    )]
    Permission {
        /// The path as given.
        path: PathBuf,
    },
    /// The path names a directory.
    #[error(
        "{path:?} is a directory; give the path of a kernel file, such as a vmlinux or a bzImage"
    )]
    Directory {
        /// The path as given.
        path: PathBuf,
    },
    /// The path names a device, a pipe or a socket.
    #[error("{path:?} is not a regular file; copy it to one and give that")]
    NotRegular {
        /// The path as given.
        path: PathBuf,
    },
    /// Opening or reading failed for another reason, which is the source.
    #[error("cannot read {path:?}; check the file and the disk it is on")]
    Read {
        /// The path as given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file has no bytes.
    #[error("{path:?} is empty; copy or build it again")]
    Empty {
        /// The path as given.
        path: PathBuf,
    },
    /// The file ends before something its headers promise.
    #[error(
        "{path:?} is truncated: {what} ends at byte {end} and the file has {length}; copy or build it again"
    )]
    Truncated {
        /// The path as given.
        path: PathBuf,
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// The length of the file (unpacked, if it was compressed) in bytes.
        length: u64,
    },
    /// Neither an ELF kernel nor a bzImage, nor one of those compressed.
    #[error(
        "{path:?} is not a kernel: it looks like {looks_like}; give an x86-64 ELF vmlinux or a bzImage"
    )]
    NotKernel {
        /// The path as given.
        path: PathBuf,
        /// What the first bytes say.
        looks_like: &'static str,
    },
    /// An ELF file for 32-bit processors.
    #[error("{path:?} is a 32-bit ELF file; give a kernel built for x86-64")]
    Elf32 {
        /// The path as given.
        path: PathBuf,
    },
    /// An ELF file for another processor.
    #[error(
        "{path:?} is for another processor (ELF machine {machine}); give a kernel built for x86-64"
    )]
    Machine {
        /// The path as given.
        path: PathBuf,
        /// `e_machine`.
        machine: u16,
    },
    /// An ELF file that cannot be booted as it is.
    #[error(
        "{path:?} is not a bootable ELF kernel: {reason}; give a vmlinux as the linker made it"
    )]
    Elf {
        /// The path as given.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// A program header that cannot be loaded.
    #[error(
        "{path:?} has a bad ELF program header {index}: {reason}; copy or build the kernel again"
    )]
    ProgramHeader {
        /// The path as given.
        path: PathBuf,
        /// The index in the program header table.
        index: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// Two loadable segments claim the same guest memory.
    #[error(
        "{path:?} has ELF segments that overlap at address {address:#x}; copy or build the kernel again"
    )]
    Overlap {
        /// The path as given.
        path: PathBuf,
        /// The first address that both claim.
        address: u64,
    },
    /// A bzImage with a boot protocol too old to say where its payload is.
    #[error(
        "{path:?} uses boot protocol {major}.{minor:02}; give a kernel with 2.08 or later (Linux 2.6.26)"
    )]
    OldProtocol {
        /// The path as given.
        path: PathBuf,
        /// The major version.
        major: u8,
        /// The minor version.
        minor: u8,
    },
    /// A bzImage whose payload is not in a known compression.
    #[error(
        "{path:?} is a bzImage with an unknown compression; unpack it with Linux's scripts/extract-vmlinux"
    )]
    UnknownPayload {
        /// The path as given.
        path: PathBuf,
    },
    /// A compression that Husk recognises and does not read.
    #[error(
        "{path:?} is compressed with {compression}, which is not supported; unpack it with Linux's scripts/extract-vmlinux"
    )]
    Unsupported {
        /// The path as given.
        path: PathBuf,
        /// Which compression.
        compression: Compression,
    },
    /// The compressed data do not decode. The source says where.
    #[error("{path:?} has damaged {compression} data; copy or build it again")]
    Damaged {
        /// The path as given.
        path: PathBuf,
        /// Which compression.
        compression: Compression,
        /// What the decoder said.
        source: io::Error,
    },
    /// The compressed data decode, but not to as many bytes as the file says.
    #[error(
        "{path:?} unpacks to {actual} bytes where its trailer says {expected}; copy or build it again"
    )]
    UnpackedSize {
        /// The path as given.
        path: PathBuf,
        /// How many bytes came out.
        actual: u64,
        /// How many the last four bytes of the payload promise.
        expected: u64,
    },
    /// More bytes than Husk is ready to read or unpack.
    #[error("{path:?} is too large: {what} may have at most {limit} bytes; give a smaller file")]
    TooLarge {
        /// The path as given.
        path: PathBuf,
        /// What is too large.
        what: &'static str,
        /// The limit in bytes.
        limit: u64,
    },
    /// Neither the cache directory nor memory took the data.
    #[error("no room in memory for the unpacked form of {path:?}; free some memory or disk space")]
    NoRoom {
        /// What was being unpacked or built.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The program for the initramfs needs libraries that the initramfs does not have.
    #[error(
        "{path:?} is dynamically linked; give a static busybox (Debian's package is busybox-static)"
    )]
    Dynamic {
        /// The path as given.
        path: PathBuf,
    },
    /// The program for the initramfs is not an x86-64 ELF program.
    #[error(
        "{path:?} is not an x86-64 ELF program; give a static busybox (Debian's package is busybox-static)"
    )]
    NotProgram {
        /// The path as given.
        path: PathBuf,
    },
    /// A name that cannot be in an initramfs.
    #[error(
        "{name:?} cannot be a file name in an initramfs; use a path of at most 4095 bytes without `..`, empty parts or NUL"
    )]
    Name {
        /// The name as given.
        name: String,
    },
    /// A file too large for the archive's 32-bit sizes.
    #[error("{name:?} has {size} bytes, too many for an initramfs; keep each file below 4 GiB")]
    FileTooLarge {
        /// The name in the archive.
        name: String,
        /// Its size in bytes.
        size: u64,
    },
}
