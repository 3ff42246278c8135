//! A diff over its base.

use crate::lineage::Lineage;
use crate::pages::{PAGE, Pages, Run};
use crate::sparse::{PIECE, copy, copy_file, each_extent};
use crate::{Error, identity, open_memory_of, read_state, write_state};
use rustix::fs::{
    FallocateFlags, FlockOperation, RenameFlags, fallocate, fdatasync, flock, fsync, renameat_with,
};
use rustix::io::Errno;
use serde_json::Value;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The files of a snapshot in its directory.
pub const STATE: &str = "state";
/// The same.
pub const MEMORY: &str = "memory";

/// What became of a merge.
#[derive(Debug, PartialEq, Eq)]
pub struct Merged {
    /// Pages that came from the diff.
    pub pages: u64,
    /// The base was a diff as well, and so is the result: to the base's parent.
    pub is_diff: bool,
}

/// Lay the diff in directory `diff` over the snapshot in directory `base`, to which it is the difference. The result takes the place of
/// `base`, at once and as a whole, or is a new directory `out`.
///
/// Where that fails, or ends at any moment, `base` is as it was. What was begun then lies beside it, in a directory that the next
/// merge takes away.
pub fn merge(base: &Path, diff: &Path, out: Option<&Path>) -> Result<Merged, Error> {
    let place = Place::new(base, out)?;
    let lower = Kept::open(base)?;
    let upper = Kept::open(diff)?;
    let Some(difference) = &upper.lineage.diff else {
        return Err(Error::NoDiff(diff.into()));
    };
    if lower.lineage.id() != Some(&difference.parent) || lower.size != upper.size {
        return Err(Error::OtherBase {
            diff: diff.into(),
            base: base.into(),
        });
    }
    let unsound = |path: &Path| Error::Lineage(path.join(STATE));
    let pages = difference.pages(upper.size).ok_or(unsound(diff))?;
    let id = upper.lineage.id.clone();
    let lineage = match &lower.lineage.diff {
        None => Lineage::full(id),
        Some(below) => {
            let all = below.pages(lower.size).ok_or(unsound(base))?.and(&pages);
            Lineage::diff(id, below.parent.clone(), &all)
        }
    };
    let merged = Merged {
        pages: pages.count(),
        is_diff: lineage.diff.is_some(),
    };
    let workshop = Workshop::new(&place)?;
    workshop.fill(&lower.memory, &upper.memory, &pages, upper.size)?;
    let mut state = upper.state;
    let lineage = serde_json::to_value(lineage).map_err(|e| place.fault(e.into()))?;
    if let Some(fields) = state.as_object_mut() {
        fields.insert("lineage".into(), lineage);
    }
    write_state(&workshop.dir.join(STATE), &state)?;
    workshop.deliver(&place)?;
    Ok(merged)
}

/// A snapshot in its directory.
struct Kept {
    state: Value,
    lineage: Lineage,
    size: u64,
    memory: File,
}

impl Kept {
    fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(STATE);
        let (header, state): (_, Value) = read_state(&path)?;
        let size = state.get("memory_size").and_then(Value::as_u64);
        let lineage = match state.get("lineage") {
            Some(lineage) => serde_json::from_value(lineage.clone()).ok(),
            None => Some(Lineage::default()),
        };
        let (Some(size), Some(lineage)) = (size, lineage) else {
            return Err(Error::Lineage(path));
        };
        if !lineage.is_sound(size) {
            return Err(Error::Lineage(path));
        }
        Ok(Self {
            memory: open_memory_of(&header, &dir.join(MEMORY), size)?,
            state,
            lineage,
            size,
        })
    }
}

/// Where the result goes.
struct Place {
    /// Without links.
    path: PathBuf,
    /// What is there and is replaced: locked, so that one merge at a time does.
    replaced: Option<File>,
}

impl Place {
    fn new(base: &Path, out: Option<&Path>) -> Result<Self, Error> {
        let path = out.unwrap_or(base);
        let fault = |source| Error::Write {
            path: path.into(),
            source,
        };
        if let Some(out) = out {
            let name = out.file_name();
            let name = name.ok_or_else(|| fault(io::ErrorKind::InvalidInput.into()))?;
            if fs::symlink_metadata(out).is_ok() {
                return Err(fault(io::ErrorKind::AlreadyExists.into()));
            }
            let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = fs::canonicalize(parent.unwrap_or(Path::new("."))).map_err(fault)?;
            return Ok(Self {
                path: parent.join(name),
                replaced: None,
            });
        }
        let unread = |source| Error::Read {
            path: base.into(),
            source,
        };
        let path = fs::canonicalize(base).map_err(unread)?;
        let place = Self {
            replaced: Some(lock(&path).map_err(unread)?),
            path,
        };
        // The directory is replaced, and what else is in it would be gone.
        for entry in fs::read_dir(&place.path).map_err(fault)? {
            let name = entry.map_err(fault)?.file_name();
            if !is_own(&name) {
                let what = format!("{} is in it, too; use -o", name.display());
                return Err(fault(io::Error::other(what)));
            }
        }
        Ok(place)
    }

    fn fault(&self, source: io::Error) -> Error {
        Error::Write {
            path: self.path.clone(),
            source,
        }
    }

    fn parent(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }
}

/// A file of a snapshot, or one that was to become it.
fn is_own(name: &std::ffi::OsStr) -> bool {
    let begun = |name: &str| name.starts_with(".state.") || name.starts_with(".memory.");
    name == STATE || name == MEMORY || name.to_str().is_some_and(begun)
}

/// A directory beside the place, in which the result is made. Dropped, it goes, with what is in it then.
struct Workshop {
    dir: PathBuf,
    /// Locked.
    handle: File,
    /// Something that is ours is at `dir`: the directory, or that which it has replaced, which is locked as well.
    remains: bool,
}

impl Workshop {
    fn new(place: &Place) -> Result<Self, Error> {
        let fault = |e| place.fault(e);
        let mut name = OsString::from(".");
        name.push(
            place
                .path
                .file_name()
                .ok_or(place.fault(io::ErrorKind::InvalidInput.into()))?,
        );
        name.push(".merge");
        let dir = place.parent().join(name);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fault(e)),
            _ => {}
        }
        let handle = lock(&dir).map_err(fault)?;
        let workshop = Self {
            dir,
            handle,
            remains: true,
        };
        workshop.clear().map_err(fault)?;
        if let Some(replaced) = &place.replaced {
            let permissions = replaced.metadata().map_err(fault)?.permissions();
            workshop
                .handle
                .set_permissions(permissions)
                .map_err(fault)?;
        }
        Ok(workshop)
    }

    /// Take away what is left of a merge that was ended.
    fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if is_own(&entry.file_name()) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Make the memory file.
    fn fill(&self, base: &File, diff: &File, pages: &Pages, size: u64) -> Result<(), Error> {
        let path = self.dir.join(MEMORY);
        let made = || -> io::Result<()> {
            let mut options = File::options();
            let memory = options
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            copy_file(base, &memory, size)?;
            for Run { first, count } in pages.runs() {
                let (start, end) = (first * PAGE, (first + count) * PAGE);
                let data = |at, length| copy(diff, &memory, at, length);
                each_extent(diff, start, end, data, |at, length| {
                    clear(&memory, at, length)
                })?;
            }
            Ok(fdatasync(&memory)?)
        };
        made().map_err(|source| Error::Write {
            path: path.clone(),
            source,
        })
    }

    /// The result takes its place.
    fn deliver(mut self, place: &Place) -> Result<(), Error> {
        let fault = |e: Errno| place.fault(e.into());
        fsync(&self.handle).map_err(fault)?;
        let parent = File::open(place.parent()).map_err(|e| place.fault(e))?;
        let (flags, advice) = match place.replaced {
            Some(_) => (
                RenameFlags::EXCHANGE,
                "the file system cannot exchange directories; use -o",
            ),
            None => (
                RenameFlags::NOREPLACE,
                "the file system cannot rename without replacing",
            ),
        };
        // The names are absolute.
        let renamed = renameat_with(&parent, &self.dir, &parent, &place.path, flags);
        renamed.map_err(|e| match e {
            Errno::INVAL | Errno::XDEV | Errno::NOSYS => place.fault(io::Error::other(advice)),
            e => fault(e),
        })?;
        self.remains = place.replaced.is_some();
        fsync(&parent).map_err(fault)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if self.remains {
            let _ = self.clear();
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Open a directory for this process alone, as far as merges go.
fn lock(path: &Path) -> io::Result<File> {
    let busy = || io::Error::other("another merge is at work there");
    let directory = File::open(path)?;
    let locked = flock(&directory, FlockOperation::NonBlockingLockExclusive);
    locked.map_err(|e| {
        if e == Errno::WOULDBLOCK {
            busy()
        } else {
            e.into()
        }
    })?;
    // Who had the lock before may have put the directory elsewhere.
    let (own, now) = (directory.metadata()?, fs::symlink_metadata(path)?);
    match now.is_dir() && identity(&own) == identity(&now) {
        true => Ok(directory),
        false if !now.is_dir() => Err(io::ErrorKind::NotADirectory.into()),
        false => Err(busy()),
    }
}

/// Make a part of a file zero.
fn clear(file: &File, start: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if fallocate(file, flags, start, length).is_ok() {
        return Ok(());
    }
    let zeros = vec![0; PIECE];
    let mut done = 0;
    while done < length {
        let count = (length - done).min(PIECE as u64);
        file.write_all_at(
            zeros.get(..count as usize).unwrap_or_default(),
            start + done,
        )?;
        done += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
