//! What a guest writes to a disk whose file is to stay as it is: in a file beside.
//!
//! The disk is divided into clusters. One that was never written is read from the base, which nobody writes to; all of another
//! one is in the overlay. A cluster changes sides once, on the I/O thread, which waits for that, and only when all of it is in the
//! overlay: so neither a request in flight nor one that fails in the middle ever shows what belongs to neither side. All else
//! goes the ways of an ordinary disk.

use super::Error;
use super::io::{self, Step};
use super::request::Request;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error as IoError, ErrorKind, Result as IoResult};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of a cluster: a block of most file systems, so that hardly any write has the rest of its cluster copied first.
pub const CLUSTER: u64 = 4096;
/// Bytes of the largest disk with an overlay. To note what is written takes a byte for each 32 KiB of it, at the most.
pub const LARGEST: u64 = 16 << 40;
/// Clusters that are noted together.
const LEAF: u64 = 64 * WORDS as u64;
const WORDS: usize = 64;

/// Clusters of a disk.
#[derive(Clone, Debug, Default)]
struct Clusters {
    /// Bits, by the number of their first one divided by [`LEAF`].
    leaves: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl Clusters {
    fn contains(&self, cluster: u64) -> bool {
        let leaf = self.leaves.get(&(cluster / LEAF));
        leaf.is_some_and(|leaf| has(leaf, cluster))
    }

    /// Add some.
    fn insert(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            let leaf = self.leaves.entry(cluster / LEAF);
            let leaf = leaf.or_insert_with(|| Box::new([0; WORDS]));
            if let Some(word) = leaf.get_mut(word_of(cluster)) {
                *word |= 1 << (cluster % 64);
            }
        }
    }

    /// Whether `range.start` is among them, and where in `range` it is otherwise for the first time, or ends.
    fn run(&self, range: Range<u64>) -> (bool, u64) {
        let is_in = self.contains(range.start);
        let mut at = range.start;
        while at < range.end {
            let end = (at / LEAF + 1).saturating_mul(LEAF).min(range.end);
            match self.leaves.get(&(at / LEAF)) {
                None if is_in => return (is_in, at),
                None => at = end,
                Some(leaf) => match (at..end).find(|&cluster| has(leaf, cluster) != is_in) {
                    Some(other) => return (is_in, other),
                    None => at = end,
                },
            }
        }
        (is_in, range.end)
    }

    /// All of them, in order.
    fn ranges(&self) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> = Vec::new();
        for (&number, leaf) in &self.leaves {
            let first = number * LEAF;
            for cluster in (first..first + LEAF).filter(|&cluster| has(leaf, cluster)) {
                match all.last_mut() {
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => all.push(cluster..cluster + 1),
                }
            }
        }
        all
    }
}

fn has(leaf: &[u64; WORDS], cluster: u64) -> bool {
    leaf.get(word_of(cluster))
        .is_some_and(|word| word >> (cluster % 64) & 1 != 0)
}

fn word_of(cluster: u64) -> usize {
    (cluster % LEAF / 64) as usize
}

/// The file that takes what is written, and which clusters are in it.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    written: Clusters,
    /// Bytes of the disk.
    capacity: u64,
}

/// Where the next step of a request is made.
pub(super) enum Way {
    /// In the base.
    Base,
    /// In the overlay.
    Overlay,
    /// By [`Overlay::fill`].
    Fill,
}

impl Overlay {
    /// An overlay of a disk of `capacity` bytes, at most [`LARGEST`], in which nothing is written. Its file has no name, and is gone
    /// with the last process that has it open.
    ///
    /// # Errors
    /// No file can be made in `directory`, or none of that size.
    pub fn create(directory: &Path, capacity: u64) -> IoResult<Self> {
        let file = unnamed(directory)?;
        Self::from_file(file, &[], capacity)
    }

    /// An overlay of a disk of `capacity` bytes, of whose clusters those in `written` (as of [`Overlay::written`]) are in `file`, which
    /// is open for reading and writing, and which nobody else writes to.
    ///
    /// # Errors
    /// The file cannot have that size, the disk is larger than [`LARGEST`], or does not have these clusters, in order.
    pub fn from_file(file: File, written: &[Range<u64>], capacity: u64) -> IoResult<Self> {
        let ends = written.iter().map(|range| range.end);
        let starts = written.iter().skip(1).map(|range| range.start);
        let are_in_order = written.iter().all(|range| range.start < range.end)
            && ends.zip(starts).all(|(end, start)| end <= start);
        let end = written.last().map_or(0, |range| range.end);
        if capacity > LARGEST || !are_in_order || end > capacity.div_ceil(CLUSTER) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let mut clusters = Clusters::default();
        for range in written {
            clusters.insert(range.clone());
        }
        file.set_len(capacity)?;
        Ok(Self {
            file,
            written: clusters,
            capacity,
        })
    }

    /// Another one with the same contents, as [`Overlay::create`]. Nothing may write to this one meanwhile. File systems that can
    /// share blocks of files do.
    ///
    /// # Errors
    /// As of [`Overlay::create`], or copying.
    pub fn copy(&self, directory: &Path) -> IoResult<Self> {
        let copy = Self::create(directory, self.capacity)?;
        for range in self.written.ranges() {
            let (mut at, end) = (range.start * CLUSTER, self.cluster_end(range.end - 1));
            let mut to = at;
            while at < end {
                let left = usize::try_from(end - at).unwrap_or(usize::MAX);
                let (from, into) = (Some(&mut at), Some(&mut to));
                match rustix::fs::copy_file_range(&self.file, from, &copy.file, into, left) {
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(Self {
            written: self.written.clone(),
            ..copy
        })
    }

    /// The file, with the clusters that are written at their places.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The clusters that are written, by their numbers, in order.
    pub fn written(&self) -> Vec<Range<u64>> {
        self.written.ranges()
    }

    /// Bytes of the disk.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Cut the next step of `request` so that it can be made in one place, and say where.
    pub(super) fn prepare(&mut self, base: &File, request: &mut Request) -> IoResult<Way> {
        match request.step() {
            Step::Read(vecs, offset) => {
                let (is_written, end) = self.run(offset, offset + vecs.left());
                request.limit(end - offset);
                Ok(match is_written {
                    true => Way::Overlay,
                    false => Way::Base,
                })
            }
            Step::Write(vecs, offset) => {
                let end = offset + vecs.left();
                self.copy_edges(base, offset, end)?;
                let (is_written, end) = self.run(offset, end);
                request.limit(end - offset);
                Ok(match is_written {
                    true => Way::Overlay,
                    false => Way::Fill,
                })
            }
            Step::Allocate { offset, length, .. } if request.makes_zeroes() => {
                self.copy_edges(base, offset, offset + length)?;
                Ok(Way::Fill)
            }
            // A discard frees what is written and leaves the rest, which may lie in no cluster: nobody reads that.
            Step::Allocate { .. } | Step::Discard { .. } | Step::Sync => Ok(Way::Overlay),
        }
    }

    /// Make a step that writes to clusters of which none was written, or makes zeroes, but for parts of clusters; and wait for it.
    pub(super) fn fill(&mut self, step: &Step) -> IoResult<u32> {
        let done = io::run(&self.file, step)?;
        let (offset, end) = match *step {
            Step::Write(_, offset) => (offset, offset + u64::from(done)),
            Step::Allocate { offset, length, .. } => (offset, offset + length),
            Step::Read(..) | Step::Discard { .. } | Step::Sync => return Ok(done),
        };
        // A last cluster of which only a part was written is not in yet, and is written again.
        let whole = match end >= self.capacity {
            true => self.capacity.div_ceil(CLUSTER),
            false => end / CLUSTER,
        };
        self.written.insert(offset.div_ceil(CLUSTER)..whole);
        match *step {
            Step::Write(..) => match end.min(whole * CLUSTER).saturating_sub(offset) {
                0 => Err(ErrorKind::StorageFull.into()),
                counted => Ok(counted as u32),
            },
            _ => Ok(done),
        }
    }

    /// Whether the byte at `offset` is written, and where before `end` that changes, or `end`.
    fn run(&self, offset: u64, end: u64) -> (bool, u64) {
        let clusters = offset / CLUSTER..end.div_ceil(CLUSTER);
        let (is_written, until) = self.written.run(clusters);
        (is_written, (until * CLUSTER).min(end))
    }

    /// Bring those clusters in of which only a part is between `offset` and `end`.
    fn copy_edges(&mut self, base: &File, offset: u64, end: u64) -> IoResult<()> {
        let (first, last) = (offset / CLUSTER, end.saturating_sub(1) / CLUSTER);
        let cuts_first = !offset.is_multiple_of(CLUSTER) || end < self.cluster_end(first);
        let cuts_last = end < self.cluster_end(last);
        if cuts_first {
            self.copy_up(base, first)?;
        }
        if cuts_last {
            self.copy_up(base, last)?;
        }
        Ok(())
    }

    /// Copy a cluster from the base unless it is written.
    fn copy_up(&mut self, base: &File, cluster: u64) -> IoResult<()> {
        if self.written.contains(cluster) {
            return Ok(());
        }
        let start = cluster * CLUSTER;
        let mut bytes = [0; CLUSTER as usize];
        let length = self.cluster_end(cluster).saturating_sub(start) as usize;
        let bytes = bytes.get_mut(..length).unwrap_or_default();
        base.read_exact_at(bytes, start)?;
        self.file.write_all_at(bytes, start)?;
        self.written.insert(cluster..cluster + 1);
        Ok(())
    }

    /// Where a cluster ends; the last one may be shorter.
    fn cluster_end(&self, cluster: u64) -> u64 {
        ((cluster + 1) * CLUSTER).min(self.capacity)
    }
}

/// An overlay for the disk at `path`, as its configuration has it.
pub(super) fn create(
    overlay: &husk_config::Overlay,
    path: &Path,
    capacity: u64,
) -> Result<Overlay, Error> {
    if capacity > LARGEST {
        return Err(Error::OverlayTooLarge(path.into()));
    }
    let directory = overlay.directory.clone().unwrap_or_else(usual_directory);
    Overlay::create(&directory, capacity).map_err(|e| Error::Overlay(path.into(), directory, e))
}

/// Where large files go for a while: $TMPDIR, or /var/tmp.
pub fn usual_directory() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|directory| !directory.is_empty())
        .map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// A file in `directory` that has no name, and goes with the last process that has it open. For reading and writing.
pub fn unnamed(directory: &Path) -> IoResult<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(fd) => return Ok(fd.into()),
        Err(e) if !matches!(e, Errno::OPNOTSUPP | Errno::ISDIR) => {
            return Err(e.into());
        }
        Err(_) => {}
    }
    // Some file systems make none without a name, which is taken away at once.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!(".husk-overlay-{}-{next}", std::process::id()));
    let flags = flags | OFlags::CREATE | OFlags::EXCL;
    let file = rustix::fs::open(&path, flags, mode)?;
    rustix::fs::unlink(&path).map_err(IoError::from)?;
    Ok(file.into())
}
