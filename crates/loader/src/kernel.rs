//! Opening a kernel: which kind of file it is, and the way from each kind to ELF segments.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::cache::{Identity, Key, StoreFault};
use crate::sparse::Sparse;
use crate::unpack::{Fault, unpack, unpack_head};
use crate::{Cache, Compression, Error, bzimage, elf};

/// A kernel that is ready to be put into guest memory.
#[derive(Debug)]
pub struct Kernel {
    /// Holds the segments: the file itself, or its unpacked form. Opened for reading only, or an
    /// anonymous file in memory; not at any particular position.
    pub file: File,
    /// The path as given, for messages.
    pub path: PathBuf,
    /// What the file at `path` was.
    pub format: Format,
    /// What to load where: at least one, sorted by address, disjoint, within `file` and below 2^52.
    pub segments: Vec<Segment>,
    /// The guest-physical address of the 64-bit entry; inside a segment.
    pub entry: u64,
    /// The guest-physical address of the 32-bit PVH entry, if the kernel has one; inside a segment.
    pub pvh_entry: Option<u32>,
    /// What the kernel changes while it boots, and so is certain to touch: its data, and its code, which it patches for
    /// the processor that it finds. Sorted by address, within the segments' parts that are in `file`. A hint: it may be
    /// empty.
    pub written: Vec<Written>,
    /// A bzImage's setup header, from file offset 0x1f1 on. Its length is what the image says: from
    /// 17 to 272 bytes.
    pub setup_header: Option<Vec<u8>>,
}

/// What kind of file a kernel came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An ELF vmlinux, used in place.
    Elf,
    /// A bzImage, unpacked on the host.
    BzImage(Compression),
    /// A compressed ELF vmlinux, unpacked on the host.
    Packed(Compression),
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Format::Elf => f.write_str("ELF"),
            Format::BzImage(compression) => write!(f, "bzImage, {compression}"),
            Format::Packed(compression) => write!(f, "ELF, {compression}"),
        }
    }
}

/// A loadable segment. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where its contents begin in the file.
    pub file_offset: u64,
    /// How many bytes of it are in the file; the rest up to `memory_size` is zero.
    pub file_size: u64,
    /// The guest-physical address (`p_paddr`).
    pub address: u64,
    /// How much guest memory it takes; at least 1 and at least `file_size`.
    pub memory_size: u64,
}

/// A part of a segment that the kernel writes to. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Where it begins in the file.
    pub file_offset: u64,
    /// The guest-physical address.
    pub address: u64,
    /// Its length.
    pub size: u64,
}

impl Kernel {
    /// Opens and checks the kernel at `path`, unpacking it into `cache` if it is compressed.
    ///
    /// An ELF file costs four system calls and is not read beyond its headers. A compressed one is
    /// read, hashed and unpacked the first time; after that the cache is found by the file's inode
    /// and times. A cache that cannot be written is not an error: the kernel is then unpacked into
    /// memory.
    ///
    /// # Errors
    /// Anything wrong with the file; see [`Error`].
    pub fn open(path: &Path, cache: &Cache) -> Result<Self, Error> {
        let (file, metadata) = open_regular(path)?;
        let image = Image::read(&file, path, &metadata)?;
        if image.head.starts_with(elf::MAGIC) {
            let elf = elf::parse(&image)?;
            return Ok(Self::new(file, path, Format::Elf, elf, None));
        }
        let packed = packed(&image)?;
        let setup_header = packed
            .bzimage
            .then(|| bzimage::setup_header(&image))
            .transpose()?;
        let (unpacked, elf) = unpacked(&image, &packed, &metadata, cache)?;
        Ok(Self::new(
            unpacked,
            path,
            packed.format(),
            elf,
            setup_header,
        ))
    }

    /// Whether the kernel knows ACPI, and so finds its devices by it. It is searched for a word that only such a kernel has,
    /// once: the cache remembers. When that fails, it is taken for one that does not.
    pub fn has_acpi(&self, cache: &Cache) -> bool {
        let Ok(metadata) = self.file.metadata() else {
            return false;
        };
        let identity = Identity::of(&metadata);
        if let Some(known) = cache.fact(ACPI, &identity) {
            return known;
        }
        let found = contains(&self.file, ACPI_WORD);
        if let Ok(found) = found {
            // What was unpacked is nobody's to write.
            let is_own = self.format != Format::Elf;
            cache.remember(ACPI, &identity, found, is_own);
        }
        found.unwrap_or(false)
    }

    fn new(
        file: File,
        path: &Path,
        format: Format,
        elf: elf::Elf,
        setup_header: Option<Vec<u8>>,
    ) -> Self {
        let elf::Elf {
            segments,
            entry,
            pvh_entry,
            written,
        } = elf;
        Self {
            file,
            path: path.to_owned(),
            format,
            segments,
            entry,
            pvh_entry,
            written,
            setup_header,
        }
    }
}

/// A part of what Linux prints when its ACPI interpreter is up.
const ACPI_WORD: &[u8] = b"Interpreter enabled";
const ACPI: &str = "acpi";

/// Whether `word` is in `file`.
fn contains(file: &File, word: &[u8]) -> io::Result<bool> {
    let finder = memchr::memmem::Finder::new(word);
    let mut buffer = vec![0; 1 << 20];
    let (mut kept, mut offset) = (0, 0);
    loop {
        let count = file.read_at(buffer.get_mut(kept..).unwrap_or_default(), offset)?;
        let end = kept + count;
        if finder.find(buffer.get(..end).unwrap_or_default()).is_some() {
            return Ok(true);
        }
        if count == 0 {
            return Ok(false);
        }
        offset += count as u64;
        // A word may lie across the end.
        let keep = end.min(word.len() - 1);
        buffer.copy_within(end - keep..end, 0);
        kept = keep;
    }
}

/// The release (`uname -r`) that a bzImage was built as, to find its modules by.
///
/// `None` if the file cannot be read, is no bzImage, or tells nothing that could be the name of a
/// directory under `/lib/modules`.
pub fn kernel_release(kernel: &Path) -> Option<String> {
    let (file, metadata) = open_regular(kernel).ok()?;
    let image = Image::read(&file, kernel, &metadata).ok()?;
    if !bzimage::is_bzimage(&image.head) {
        return None;
    }
    let mut text = [0; 128];
    let count = file
        .read_at(&mut text, bzimage::version_offset(&image.head)?)
        .ok()?;
    let text = text.get(..count)?;
    let end = text.iter().position(|byte| matches!(byte, b' ' | b'\0'))?;
    let release = std::str::from_utf8(text.get(..end)?).ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+~-".contains(c);
    (release.starts_with(|c: char| c.is_ascii_alphanumeric()) && release.chars().all(plain))
        .then(|| release.to_owned())
}

/// A file with its first page, which holds all headers of a usual kernel.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    pub(crate) length: u64,
    pub(crate) head: Vec<u8>,
}

impl<'a> Image<'a> {
    pub(crate) fn read(file: &'a File, path: &'a Path, metadata: &Metadata) -> Result<Self, Error> {
        let length = metadata.len();
        if length == 0 {
            return Err(Error::Empty { path: path.into() });
        }
        let mut head = vec![0; usize::try_from(length.min(HEAD_SIZE)).unwrap_or(0)];
        file.read_exact_at(&mut head, 0)
            .map_err(|source| Error::Read {
                path: path.into(),
                source,
            })?;
        Ok(Self {
            file,
            path,
            length,
            head,
        })
    }

    pub(crate) fn truncated(&self, what: &'static str, end: u64) -> Error {
        Error::Truncated {
            path: self.path.into(),
            what,
            end,
            length: self.length,
        }
    }
}

/// Opens a regular file for reading. A pipe does not block it.
pub(crate) fn open_regular(path: &Path) -> Result<(File, Metadata), Error> {
    let opened = File::options()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = opened.map_err(|source| {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Error::NotFound { path },
            io::ErrorKind::PermissionDenied => Error::Permission { path },
            _ => Error::Read { path, source },
        }
    })?;
    if metadata.is_dir() {
        return Err(Error::Directory { path: path.into() });
    }
    if !metadata.is_file() {
        return Err(Error::NotRegular { path: path.into() });
    }
    Ok((file, metadata))
}

const HEAD_SIZE: u64 = 4096;
/// The most that is read of a compressed kernel; Debian's largest has 13 MB.
const MAX_PACKED: u64 = 512 << 20;
/// The most that a kernel may unpack to; Debian's largest has 70 MB.
const MAX_UNPACKED: u64 = 1 << 30;

/// Where the compressed data are and what is known of them.
struct Packed {
    /// Not only compressed, but in a bzImage.
    bzimage: bool,
    compression: Compression,
    offset: u64,
    size: u64,
}

impl Packed {
    fn format(&self) -> Format {
        match self.bzimage {
            true => Format::BzImage(self.compression),
            false => Format::Packed(self.compression),
        }
    }
}

fn packed(image: &Image<'_>) -> Result<Packed, Error> {
    let path = image.path;
    let bzimage = bzimage::is_bzimage(&image.head);
    let (offset, size, compression) = if bzimage {
        let bzimage::Payload { offset, size } = bzimage::payload(image)?;
        let mut magic = [0; 8];
        let count = image
            .file
            .read_at(&mut magic, offset)
            .map_err(|source| Error::Read {
                path: path.into(),
                source,
            })?;
        let magic = magic.get(..count).unwrap_or_default();
        let compression = Compression::detect(magic)
            .ok_or_else(|| Error::UnknownPayload { path: path.into() })?;
        (offset, size, compression)
    } else {
        let looks_like = looks_like(&image.head);
        let compression = Compression::detect(&image.head).ok_or_else(|| Error::NotKernel {
            path: path.into(),
            looks_like,
        })?;
        (0, image.length, compression)
    };
    if compression == Compression::Lzo {
        return Err(Error::Unsupported {
            path: path.into(),
            compression,
        });
    }
    if size > MAX_PACKED {
        let what = "a compressed kernel";
        return Err(Error::TooLarge {
            path: path.into(),
            what,
            limit: MAX_PACKED,
        });
    }
    Ok(Packed {
        bzimage,
        compression,
        offset,
        size,
    })
}

fn looks_like(head: &[u8]) -> &'static str {
    let at = |offset: usize, magic: &[u8]| {
        head.get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    match () {
        () if at(0x38, b"ARM\x64") => "a kernel for arm64",
        () if at(0x30, b"RISC") || at(0x38, b"RSC\x05") => "a kernel for RISC-V",
        () if at(0, b"MZ") => "an EFI program (perhaps a unified kernel image)",
        () if at(0, b"070701") || at(0, b"070702") => "an initramfs (cpio)",
        () if at(0, b"\x04\x22\x4d\x18") => "an lz4 file",
        () if at(0, b"!<arch>") => "a Debian package or an archive",
        () if at(0, b"PK\x03\x04") => "a zip archive",
        () if at(0, b"QFI\xfb") => "a qcow2 disk image",
        () if at(0, b"#!") => "a script",
        () if at(0x1fe, b"\x55\xaa") => "a disk image or a boot sector",
        () if head.iter().all(|byte| *byte == 0) => "nothing but zeros",
        () if head
            .iter()
            .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()) =>
        {
            "text"
        }
        () => "unknown data",
    }
}

/// The unpacked kernel: from the cache by the file's identity, else by its content, else unpacked.
fn unpacked(
    image: &Image<'_>,
    packed: &Packed,
    metadata: &Metadata,
    cache: &Cache,
) -> Result<(File, elf::Elf), Error> {
    let identity = Identity::of(metadata);
    if let Some(found) = cache
        .find(&identity.name())
        .and_then(|file| sane(file, image.path))
    {
        return Ok(found);
    }
    let mut data = vec![0; usize::try_from(packed.size).unwrap_or(0)];
    image
        .file
        .read_exact_at(&mut data, packed.offset)
        .map_err(|source| Error::Read {
            path: image.path.into(),
            source,
        })?;
    let key = Key::new("kernel", &[&data]);
    if let Some(found) = cache
        .find(&key.name())
        .and_then(|file| sane(file, image.path))
    {
        cache.link(&identity, &key);
        return Ok(found);
    }
    let file = cache.store(&key, image.path, &|sink: &File| {
        let mut sink = Sparse::new(sink);
        let size = unpack_kernel(image.path, packed, &data, &mut sink)?;
        sink.finish().map_err(StoreFault::Sink)?;
        Ok(size)
    })?;
    cache.link(&identity, &key);
    let metadata = file.metadata().map_err(|source| Error::Read {
        path: image.path.into(),
        source,
    })?;
    let unpacked = Image::read(&file, image.path, &metadata)?;
    if !unpacked.head.starts_with(elf::MAGIC) {
        return Err(Error::NotKernel {
            path: image.path.into(),
            looks_like: looks_like(&unpacked.head),
        });
    }
    let elf = elf::parse(&unpacked)?;
    Ok((file, elf))
}

/// A cached kernel, if it is one: a file that a crash tore is `None`, and built anew.
fn sane(file: File, path: &Path) -> Option<(File, elf::Elf)> {
    let metadata = file.metadata().ok()?;
    let image = Image::read(&file, path, &metadata).ok()?;
    let elf = image
        .head
        .starts_with(elf::MAGIC)
        .then(|| elf::parse(&image).ok())??;
    Some((file, elf))
}

fn unpack_kernel(
    path: &Path,
    packed: &Packed,
    data: &[u8],
    sink: &mut dyn io::Write,
) -> Result<u64, StoreFault> {
    let compression = packed.compression;
    let fault = |error| Err(StoreFault::Source(error));
    let path = path.to_owned();
    let too_large = |path| Error::TooLarge {
        path,
        what: "an unpacked kernel",
        limit: MAX_UNPACKED,
    };
    // Linux's build ends each payload with its unpacked size. gzip has that in its format.
    let (stream, expected) = match data.split_last_chunk::<4>() {
        Some((stream, size)) if packed.bzimage => {
            let stream = if compression == Compression::Gzip {
                data
            } else {
                stream
            };
            (stream, Some(u64::from(u32::from_le_bytes(*size))))
        }
        _ => (data, None),
    };
    if expected.is_some_and(|size| size > MAX_UNPACKED) {
        return fault(too_large(path));
    }
    // An initrd is a compressed file as well: it must not fill the cache before it is refused.
    if !packed.bzimage
        && let Ok(head) = unpack_head(compression, stream)
        && !head.starts_with(elf::MAGIC)
    {
        return fault(Error::NotKernel {
            path,
            looks_like: looks_like(&head),
        });
    }
    let limit = expected.unwrap_or(MAX_UNPACKED);
    match (unpack(compression, stream, limit, sink), expected) {
        (Ok(actual), Some(expected)) if expected != actual => fault(Error::UnpackedSize {
            path,
            actual,
            expected,
        }),
        (Ok(actual), _) => Ok(actual),
        (Err(Fault::Sink(error)), _) => Err(StoreFault::Sink(error)),
        (Err(Fault::Damaged(source)), _) => fault(Error::Damaged {
            path,
            compression,
            source,
        }),
        (Err(Fault::Unsupported), _) => fault(Error::Unsupported { path, compression }),
        (Err(Fault::Limit), Some(expected)) => fault(Error::UnpackedSize {
            path,
            actual: limit.saturating_add(1),
            expected,
        }),
        (Err(Fault::Limit), None) => fault(too_large(path)),
    }
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
