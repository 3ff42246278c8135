//! Snapshots as files: the state, and the memory beside it.
//!
//! A state file begins with a line of JSON, [`Header`], that says what it is, of which version, how long what follows is, and its
//! checksum. What follows is JSON as well, and the last. Fields may be added to it without a new version: a reader passes over what it does not know,
//! and gives what is missing its default.
//!
//! A memory file has each byte of guest memory at its place, ranges one behind the other; what is zero is a hole. That of a diff is as
//! large, and has only some pages: those that the state lists ([`Diff`]). Of these, too, what is zero is a hole. Extents decide nothing:
//! file systems may have data where nothing was written.
//!
//! A working set has the first line of a state file, and says in plain lines which pages of a memory file to read ahead.
//!
//! All are written beside their place and synchronised. Then the state is renamed, with which the new snapshot is there, and the
//! memory after it; whoever comes in between finds it by [`Header::memory`]. So there is the old snapshot or the new one, whole,
//! whenever the process is killed. What others that were killed have left goes when the next one is complete.
//!
//! **Architecture Invariant:** a leaf. Nothing here knows KVM, devices or guest memory. Files are hostile: what is read is
//! bounded and checked before it is believed.
#![forbid(unsafe_code)]

mod lineage;
mod merge;
mod pages;
mod sparse;
mod working_set;

pub use lineage::{Diff, Lineage};
pub use merge::{MEMORY, Merged, STATE, merge};
pub use pages::{PAGE, Pages, Run};
pub use sparse::copy_file;
pub use working_set::WorkingSet;

use rustix::fs::{FlockOperation, Mode, OFlags, fdatasync, flock, ftruncate, open};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use twox_hash::XxHash64;

/// What the first line says.
pub const MAGIC: &str = "husk snapshot";
/// The version that is written, and the newest that is read. A field whose meaning changes makes a new one.
pub const VERSION: u32 = 1;

/// Longest first line, and longest state: far more than 64 vCPUs and all devices have.
const MOST_HEADER: u64 = 4096;
const MOST_STATE: u64 = 64 << 20;
/// Most values in a state, which take up to forty times the memory of their text; texts take no more than that. A state of 64 vCPUs has
/// less than a tenth of it.
const MOST_VALUES: usize = 1 << 20;

/// Why a snapshot's file could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Creating, writing or renaming.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Opening or reading.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else.
    #[error("{} is no snapshot of Husk's", .0.display())]
    Foreign(PathBuf),
    /// Of a Husk that is newer.
    #[error("{} is a snapshot of version {version}; this Husk reads up to version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
    /// Its end is missing, or something is behind it.
    #[error("{} is not whole: {expected} bytes of state were written, and {found} are there", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// What the first line says.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// It was changed, or the disk has.
    #[error("{} is damaged: its checksum is wrong", .0.display())]
    Checksum(PathBuf),
    /// Whole, and not what it should be.
    #[error("{} is a snapshot that this Husk does not understand", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// What it says of itself and of its parent makes no sense.
    #[error("{} lists names or pages that no snapshot has", .0.display())]
    Lineage(PathBuf),
    /// Nothing to be laid over another.
    #[error("{} is no diff: it is complete", .0.display())]
    NoDiff(PathBuf),
    /// Only some of the pages.
    #[error("{} is a diff of another snapshot; lay it over that first: husk snapshot merge", .0.display())]
    IsDiff(PathBuf),
    /// Not the parent.
    #[error("{} is not the difference to {}, but to another snapshot", diff.display(), base.display())]
    OtherBase {
        /// The diff.
        diff: PathBuf,
        /// What it was to be laid over.
        base: PathBuf,
    },
    /// It would be gone, and with it what the diff is worth.
    #[error("{} is the snapshot to which this would be the difference; write the diff to another place", .0.display())]
    OverBase(PathBuf),
    /// A working set that is not that of the memory file.
    #[error("{} is not the working set of this memory: {}", .0.display(), .1)]
    WorkingSet(PathBuf, &'static str),
    /// Memory of another size.
    #[error("{} has {found} bytes, and the snapshot's memory {expected}", path.display())]
    MemorySize {
        /// The file.
        path: PathBuf,
        /// What the state says.
        expected: u64,
        /// What is there.
        found: u64,
    },
}

/// The first line of a state file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`MAGIC`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// The version of Husk that wrote it.
    pub husk: String,
    /// Bytes behind the line.
    pub length: u64,
    /// Of these bytes: XXH64 with seed 0, in hexadecimal.
    pub xxh64: String,
    /// The name, beside its place, of the memory file until that has been put there. Where there is one of this name, it is this
    /// state's, and what is in its place is an older one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
}

/// Write a state file.
pub fn write_state(path: &Path, state: &impl Serialize) -> Result<(), Error> {
    write_fresh(path, state, None)?.finish()
}

/// Write the state that goes with `memory`, which is complete, and put both in their places.
pub fn keep(path: &Path, state: &impl Serialize, memory: MemoryFile) -> Result<(), Error> {
    let memory = memory.fresh;
    let place = memory.path.clone();
    let name = memory.beside.file_name();
    let name = name.map(|name| name.to_string_lossy().into_owned());
    let state = write_fresh(path, state, name)?;
    // To the disk they go at the same time.
    std::thread::scope(|scope| {
        let other = std::thread::Builder::new().stack_size(64 << 10);
        let other = other.spawn_scoped(scope, || memory.sync());
        let synced = state.sync();
        match other {
            Ok(other) => other
                .join()
                .unwrap_or_else(|_| Err(state.fault(io::ErrorKind::Other.into())))?,
            Err(_) => memory.sync()?,
        }
        synced
    })?;
    let replaced = [state.place()?, memory.place()?];
    sweep(&place);
    sweep(path);
    let thread = std::thread::Builder::new().stack_size(64 << 10);
    // Where there is none, it is done here.
    let _ = thread.spawn(move || drop(replaced));
    Ok(())
}

fn write_fresh(
    path: &Path,
    state: &impl Serialize,
    memory: Option<String>,
) -> Result<Fresh, Error> {
    let fault = |source| Error::Write {
        path: path.into(),
        source,
    };
    let body = serde_json::to_vec(state).map_err(|e| fault(e.into()))?;
    write_body(path, &body, memory)
}

/// Write a first line, and `body` behind it.
fn write_body(path: &Path, body: &[u8], memory: Option<String>) -> Result<Fresh, Error> {
    let fault = |source| Error::Write {
        path: path.into(),
        source,
    };
    let line = line_for(body, memory).map_err(|e| fault(e.into()))?;
    let mut file = Fresh::create(path)?;
    file.file
        .write_all(&line)
        .and_then(|()| file.file.write_all(body))
        .map_err(fault)?;
    Ok(file)
}

/// The first line of a state file, for what follows it.
pub fn first_line(body: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
    line_for(body, None)
}

fn line_for(body: &[u8], memory: Option<String>) -> Result<Vec<u8>, serde_json::Error> {
    let header = Header {
        format: MAGIC.into(),
        version: VERSION,
        husk: env!("CARGO_PKG_VERSION").into(),
        length: body.len() as u64,
        xxh64: checksum(body),
        memory,
    };
    let mut line = serde_json::to_vec(&header)?;
    line.push(b'\n');
    Ok(line)
}

/// Read a state file.
pub fn read_state<T: DeserializeOwned>(path: &Path) -> Result<(Header, T), Error> {
    let (header, body) = read_parts(path)?;
    let content = |source| Error::Content {
        path: path.into(),
        source,
    };
    // Each takes a byte at least, so that there is nothing to count in what is as small as mostly.
    if body.len() > MOST_VALUES && has_more_values(&body, MOST_VALUES) {
        let why = format!("it has more than {MOST_VALUES} values");
        return Err(content(serde::de::Error::custom(why)));
    }
    let state = serde_json::from_slice(&body).map_err(content)?;
    Ok((header, state))
}

/// Whether JSON has more values than `most`, as far as it is JSON: each but the first is behind a comma or a bracket.
fn has_more_values(json: &[u8], most: usize) -> bool {
    let mut count = 0;
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b',' | b'[' | b'{' => count += 1,
            b'"' => {
                // To the end of the text; behind a backslash any byte belongs to it.
                while let Some(byte) = bytes.next().filter(|byte| **byte != b'"') {
                    if *byte == b'\\' {
                        bytes.next();
                    }
                }
            }
            _ => {}
        }
    }
    count > most
}

/// The first line of a state file, and what follows, which is whole.
pub fn read_parts(path: &Path) -> Result<(Header, Vec<u8>), Error> {
    let fault = |source| Error::Read {
        path: path.into(),
        source,
    };
    let mut file = open_regular(path).map_err(fault)?;
    let mut start = Vec::with_capacity(MOST_HEADER as usize);
    (&mut file)
        .take(MOST_HEADER)
        .read_to_end(&mut start)
        .map_err(fault)?;
    let end = start.iter().position(|&byte| byte == b'\n');
    let line = end.and_then(|end| start.get(..end));
    let header: Option<Header> = line.and_then(|line| serde_json::from_slice(line).ok());
    let header = header.filter(|header| header.format == MAGIC);
    let (Some(header), Some(end)) = (header, end) else {
        return Err(Error::Foreign(path.into()));
    };
    if header.version > VERSION || header.version == 0 {
        return Err(Error::Version {
            path: path.into(),
            version: header.version,
        });
    }
    let mut body = start.split_off(end + 1);
    let found = file.metadata().map_err(fault)?.len();
    let found = found.saturating_sub(end as u64 + 1);
    if found != header.length || found > MOST_STATE {
        return Err(Error::Length {
            path: path.into(),
            expected: header.length,
            found,
        });
    }
    let rest = found.saturating_sub(body.len() as u64);
    // At most MOST_STATE. One byte more, with which the end is seen at once.
    body.reserve_exact(rest as usize + 1);
    file.take(rest).read_to_end(&mut body).map_err(fault)?;
    if checksum(&body) != header.xxh64 {
        return Err(Error::Checksum(path.into()));
    }
    Ok((header, body))
}

fn checksum(bytes: &[u8]) -> String {
    let mut hash = XxHash64::with_seed(0);
    hash.write(bytes);
    format!("{:016x}", hash.finish())
}

/// Open the memory file of `size` bytes that goes with a state.
pub fn open_memory_of(header: &Header, path: &Path, size: u64) -> Result<File, Error> {
    let is_plain = |name: &&str| !name.contains('/') && name.starts_with('.') && name.len() > 2;
    if let Some(name) = header.memory.as_deref().filter(is_plain) {
        let beside = path.with_file_name(name);
        if fs::symlink_metadata(&beside).is_ok_and(|about| about.is_file()) {
            return open_memory(&beside, size);
        }
    }
    open_memory(path, size)
}

/// Open a memory file of `size` bytes.
pub fn open_memory(path: &Path, size: u64) -> Result<File, Error> {
    let fault = |source| Error::Read {
        path: path.into(),
        source,
    };
    let file = open_regular(path).map_err(fault)?;
    let found = file.metadata().map_err(fault)?.len();
    match found == size {
        true => Ok(file),
        false => Err(Error::MemorySize {
            path: path.into(),
            expected: size,
            found,
        }),
    }
}

/// A FIFO would block, a directory be strange.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(open(path, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// Device and number of a file: which one it is, whatever it is called.
pub fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// A memory file in the making.
pub struct MemoryFile {
    fresh: Fresh,
    /// The same file, past the page cache.
    direct: Option<File>,
}

impl MemoryFile {
    /// One of `size` bytes, all zero.
    pub fn create(path: &Path, size: u64) -> Result<Self, Error> {
        let fresh = Fresh::create(path)?;
        ftruncate(&fresh.file, size).map_err(|e| fresh.fault(e.into()))?;
        Ok(Self {
            fresh,
            direct: None,
        })
    }

    /// As [`MemoryFile::create`], but what is large goes past the page cache, where the file system can: it is on the disk sooner, and
    /// nobody is about to read it.
    pub fn create_direct(path: &Path, size: u64) -> Result<Self, Error> {
        let mut file = Self::create(path, size)?;
        file.direct = {
            use std::os::unix::fs::OpenOptionsExt;
            let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
            let mut options = File::options();
            options.write(true).custom_flags(flags);
            options.open(&file.fresh.beside).ok()
        };
        Ok(file)
    }

    /// Put `bytes` at `offset`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let is_large = bytes.len() >= LARGE && bytes.as_ptr().align_offset(PAGE as usize) == 0;
        let written = match &self.direct {
            Some(direct) if is_large => match direct.write_all_at(bytes, offset) {
                // It wants larger blocks.
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                    self.fresh.file.write_all_at(bytes, offset)
                }
                written => written,
            },
            _ => self.fresh.file.write_all_at(bytes, offset),
        };
        written.map_err(|e| self.fresh.fault(e))
    }

    /// It is complete.
    pub fn finish(self) -> Result<(), Error> {
        self.fresh.finish()
    }
}

/// From how many bytes on a write past the page cache is faster.
const LARGE: usize = 128 << 10;

fn beside_start(name: &OsStr) -> OsString {
    let mut start = OsString::from(".");
    start.push(name);
    start.push(".");
    start
}

/// Remove what processes that were killed have left beside a place. Only what is named as [`Fresh`] names it, and nobody holds.
fn sweep(path: &Path) {
    let (Some(name), Some(dir)) = (path.file_name(), path.parent()) else {
        return;
    };
    let dir = match dir.as_os_str().is_empty() {
        true => Path::new("."),
        false => dir,
    };
    let start = beside_start(name);
    let is_ours = |name: &OsStr| {
        let rest = name
            .as_encoded_bytes()
            .strip_prefix(start.as_encoded_bytes());
        let rest = rest.and_then(|rest| std::str::from_utf8(rest).ok());
        let parts = rest.and_then(|rest| rest.split_once('-'));
        parts.is_some_and(|(pid, time)| {
            let is_hex = |c: char| c.is_ascii_hexdigit();
            !pid.is_empty() && pid.chars().all(|c| c.is_ascii_digit()) && time.chars().all(is_hex)
        })
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !is_ours(&entry.file_name()) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
        let Ok(file) = open(entry.path(), flags, Mode::empty()) else {
            continue;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // One that somebody else removes at the same time is gone as well.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A file that is written beside its place. Dropped before it is complete, it goes.
struct Fresh {
    path: PathBuf,
    beside: PathBuf,
    file: File,
    done: bool,
}

impl Fresh {
    fn create(path: &Path) -> Result<Self, Error> {
        let fault = |source| Error::Write {
            path: path.into(),
            source,
        };
        let name = path.file_name().ok_or(io::ErrorKind::IsADirectory);
        let name = name.map_err(|e| fault(e.into()))?;
        let mut own = beside_start(name);
        // Never the same again: a state names its memory by it.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_nanos();
        own.push(format!("{}-{now:x}", std::process::id()));
        let beside = path.with_file_name(own);
        let file = {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = File::options();
            // It holds all that the guest knows.
            options.write(true).create_new(true).mode(0o600);
            options.open(&beside).map_err(fault)?
        };
        // Who sweeps sees by it that somebody writes. Where a file system has no locks, nothing is swept either.
        let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(Self {
            path: path.into(),
            beside,
            file,
            done: false,
        })
    }

    fn fault(&self, source: io::Error) -> Error {
        Error::Write {
            path: self.path.clone(),
            source,
        }
    }

    fn finish(self) -> Result<(), Error> {
        self.sync()?;
        self.place().map(drop)
    }

    fn sync(&self) -> Result<(), Error> {
        fdatasync(&self.file).map_err(|e| self.fault(e.into()))
    }

    /// Returns what was in its place before. A file system takes a millisecond to forget a file, or several while it writes its journal,
    /// and whoever drops the last descriptor waits for that.
    fn place(mut self) -> Result<Option<OwnedFd>, Error> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let before = open(&self.path, flags, Mode::empty()).ok();
        fs::rename(&self.beside, &self.path).map_err(|e| self.fault(e))?;
        self.done = true;
        Ok(before)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.beside);
        }
    }
}

#[cfg(test)]
mod tests;
