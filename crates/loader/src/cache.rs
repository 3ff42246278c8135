//! A directory of what is costly to make: unpacked kernels and built initramfs images.
//!
//! It holds files `KEY-SIZE`, where KEY is a hash of what the file was made from, and symbolic links
//! to them: `KEY`, and one for each source file's identity, so that neither reading nor hashing is
//! needed to find what was made from it. A size that differs from the name's tells a torn file.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{MemfdFlags, OFlags};
use sha2::{Digest, Sha256};

use crate::Error;

/// A cache directory, used only if this user owns it and nobody else can write to it.
///
/// Nothing is touched until something compressed is opened or an initramfs is made. Several
/// processes may use it at once. What was not used for 30 days is removed when something is added.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: Option<PathBuf>,
}

impl Cache {
    /// A cache in `directory`, which is created (mode 0700) when it is first needed.
    pub fn new(directory: PathBuf) -> Self {
        Self {
            directory: Some(directory),
        }
    }

    /// No cache: everything is made anew, in memory.
    pub fn disabled() -> Self {
        Self { directory: None }
    }

    /// A cache in the default directory; with none, everything is made anew, in memory.
    pub fn from_environment() -> Self {
        Self {
            directory: Self::default_dir(),
        }
    }

    /// `$HUSK_CACHE`, else `$XDG_CACHE_HOME/husk`, else `$HOME/.cache/husk`. A variable that is
    /// empty counts as unset, and so do the last two if they are relative.
    pub fn default_dir() -> Option<PathBuf> {
        default_dir(|name| std::env::var_os(name).map(PathBuf::from))
    }

    /// What the link `name` leads to, if it is as long as it was when it was written.
    pub(crate) fn find(&self, name: &str) -> Option<File> {
        let directory = self.directory.as_deref()?;
        trusted(directory).ok()?;
        let target = fs::read_link(directory.join(name)).ok()?;
        let size = entry_size(target.to_str()?)?;
        let file = File::options()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(directory.join(&target))
            .ok()?;
        let metadata = file.metadata().ok()?;
        if !metadata.is_file() || metadata.len() != size || metadata.uid() != own_uid() {
            log::debug!("the cache's {target:?} is damaged and will be made anew");
            return None;
        }
        // Use is told by the modification time. Once a day is enough.
        if age(&metadata) > DAY {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(file)
    }

    /// Makes what `key` stands for by `fill` and keeps it. `source` names it in messages.
    ///
    /// Where it cannot be kept, it is made in memory: `fill` then runs a second time.
    pub(crate) fn store(
        &self,
        key: &Key,
        source: &Path,
        fill: &dyn Fn(&File) -> Result<u64, StoreFault>,
    ) -> Result<File, Error> {
        if let Some(directory) = self.directory.as_deref() {
            match store_in(directory, key, fill) {
                Ok(file) => return Ok(file),
                Err(StoreFault::Source(error)) => return Err(error),
                Err(StoreFault::Sink(error)) => log::warn!(
                    "cannot write to the cache {directory:?} ({error}): {source:?} is unpacked in memory at each start; set HUSK_CACHE to a directory of yours with room"
                ),
            }
        }
        in_memory(fill).map_err(|fault| match fault {
            StoreFault::Source(error) => error,
            StoreFault::Sink(error) => Error::NoRoom {
                path: source.into(),
                source: error,
            },
        })
    }

    /// Notes that the file with `identity` is the source of `key`, which is kept. A failure only
    /// costs time at the next start.
    pub(crate) fn link(&self, identity: &Identity, key: &Key) {
        let Some(directory) = self.directory.as_deref() else {
            return;
        };
        // A file changed a moment ago may change again without its times telling.
        if trusted(directory).is_ok()
            && identity.settled(SystemTime::now())
            && let Ok(target) = fs::read_link(directory.join(key.name()))
            && let Some(target) = target.to_str()
            && let Err(error) = replace_link(directory, &identity.name(), target)
        {
            log::debug!("cannot write to the cache {directory:?}: {error}");
        }
    }
}

impl Cache {
    /// What was remembered of the file with `identity`.
    pub(crate) fn fact(&self, fact: &str, identity: &Identity) -> Option<bool> {
        let directory = self.directory.as_deref()?;
        trusted(directory).ok()?;
        let link = fs::read_link(directory.join(fact_name(fact, identity))).ok()?;
        match link.to_str()? {
            YES => Some(true),
            NO => Some(false),
            _ => None,
        }
    }

    /// Remember something of the file with `identity`; `is_own` says that it is the cache's, and will not change. A failure only costs time at the next start.
    pub(crate) fn remember(&self, fact: &str, identity: &Identity, value: bool, is_own: bool) {
        let Some(directory) = self.directory.as_deref() else {
            return;
        };
        let made = directory.exists()
            || DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .is_ok();
        let lasts = is_own || identity.settled(SystemTime::now());
        if made && trusted(directory).is_ok() && lasts {
            let target = if value { YES } else { NO };
            if let Err(error) = replace_link(directory, &fact_name(fact, identity), target) {
                log::debug!("cannot write to the cache {directory:?}: {error}");
            }
        }
    }
}

/// Where the links lead that remember a fact. There are no such files.
const YES: &str = "yes";
const NO: &str = "no";

fn fact_name(fact: &str, identity: &Identity) -> String {
    format!("{FACT}{fact}-{}", identity.name())
}

/// Why something could not be made: its source is bad, or there is no room for it.
#[derive(Debug)]
pub(crate) enum StoreFault {
    Source(Error),
    Sink(io::Error),
}

impl From<io::Error> for StoreFault {
    fn from(error: io::Error) -> Self {
        StoreFault::Sink(error)
    }
}

/// A hash of all that decides a cached file's content.
#[derive(Debug)]
pub(crate) struct Key(String);

impl Key {
    /// `kind` keeps apart what is made in different ways. Change it when the way changes.
    pub(crate) fn new(kind: &str, parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in std::iter::once(&kind.as_bytes()).chain(parts) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let mut name = format!("{kind}-");
        for byte in hash.finalize() {
            name.push_str(&format!("{byte:02x}"));
        }
        Self(name)
    }

    pub(crate) fn name(&self) -> String {
        self.0.clone()
    }
}

/// Tells a file from every other and from its own earlier states, without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    pub(crate) fn name(&self) -> String {
        let Self {
            device,
            inode,
            size,
            modified,
            changed,
        } = self;
        let ((m, mn), (c, cn)) = (modified, changed);
        format!("file-{device:x}-{inode:x}-{size:x}-{m:x}.{mn:x}-{c:x}.{cn:x}")
    }

    /// Whether the times are far enough in the past to show any later change. File systems' clocks
    /// are coarse: up to 2 seconds.
    fn settled(&self, now: SystemTime) -> bool {
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        self.changed.0.max(self.modified.0) < i64::try_from(now).unwrap_or(i64::MAX) - 2
    }
}

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const KEPT: Duration = DAY.saturating_mul(30);
const TEMPORARY: &str = "tmp-";
const FACT: &str = "fact-";

fn default_dir(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.as_os_str().is_empty());
    let absolute = |name| set(name).filter(|value| value.is_absolute());
    set("HUSK_CACHE")
        .or_else(|| absolute("XDG_CACHE_HOME").map(|path| path.join("husk")))
        .or_else(|| absolute("HOME").map(|path| path.join(".cache/husk")))
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// How long ago a file was written or marked as used. A time in the future counts as now.
fn age(metadata: &Metadata) -> Duration {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    SystemTime::now()
        .duration_since(modified)
        .unwrap_or_default()
}

/// Another user who can write here could have us boot a kernel of theirs.
fn trusted(directory: &Path) -> io::Result<()> {
    let metadata = fs::metadata(directory)?;
    if !metadata.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    if metadata.uid() != own_uid() || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "another user owns it or can write to it",
        ));
    }
    Ok(())
}

/// The size in an entry's name; `None` for a name that no entry has.
fn entry_size(name: &str) -> Option<u64> {
    let (key, size) = name.rsplit_once('-')?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if !key.bytes().all(plain) {
        return None;
    }
    size.parse().ok()
}

/// A name in the directory that nothing has yet; what it names is removed unless it was renamed.
struct Temporary(PathBuf);

impl Temporary {
    fn new(directory: &Path) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let time = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let name = format!(
            "{TEMPORARY}{}-{count}-{}",
            std::process::id(),
            time.as_nanos()
        );
        Self(directory.join(name))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn store_in(
    directory: &Path,
    key: &Key,
    fill: &dyn Fn(&File) -> Result<u64, StoreFault>,
) -> Result<File, StoreFault> {
    if !directory.exists() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    trusted(directory)?;
    prune(directory);
    let temporary = Temporary::new(directory);
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary.0)?;
    let size = fill(&file)?;
    // Without this, a power cut could leave a file of the right length with holes in it.
    file.sync_data()?;
    drop(file);
    let file = File::open(&temporary.0)?;
    let name = format!("{}-{size}", key.name());
    fs::rename(&temporary.0, directory.join(&name))?;
    replace_link(directory, &key.name(), &name)?;
    Ok(file)
}

fn replace_link(directory: &Path, name: &str, target: &str) -> io::Result<()> {
    let temporary = Temporary::new(directory);
    symlink(target, &temporary.0)?;
    fs::rename(&temporary.0, directory.join(name))
}

fn in_memory(fill: &dyn Fn(&File) -> Result<u64, StoreFault>) -> Result<File, StoreFault> {
    let descriptor = rustix::fs::memfd_create("husk", MemfdFlags::CLOEXEC)
        .map_err(|error| StoreFault::Sink(error.into()))?;
    let file = File::from(descriptor);
    fill(&file)?;
    file.set_permissions(Permissions::from_mode(0o400))?;
    Ok(file)
}

/// Removes what nobody used for long. Failures leave things as they are.
fn prune(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        let limit = match () {
            () if name.starts_with(TEMPORARY) => DAY,
            // Only what this cache writes is removed: the user may have named a directory in use.
            () if ["kernel-", "initramfs-", "file-", FACT]
                .iter()
                .any(|p| name.starts_with(p)) =>
            {
                KEPT
            }
            () => continue,
        };
        let leads = !name.starts_with(FACT);
        let dangling = leads && metadata.is_symlink() && !entry.path().exists();
        if !metadata.is_dir() && (dangling || age(&metadata) > limit) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
