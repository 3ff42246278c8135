//! The pages that a guest touches first after a restore: recorded once, and read ahead of the guest from then on.

use crate::error::Error;
use crate::memory::GuestMemory;
use husk_snapshot::WorkingSet;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a guest is watched.
const RECORDED: Duration = Duration::from_secs(5);
const PAGE: u64 = 4096;

/// Have the host read the pages of `memory`, a file of `size` bytes, that the file at `path` names, on a thread of its own.
///
/// They are only brought into the host's page cache, all at once, instead of mapped or copied: the disk is then as busy as it can be,
/// and a guest that comes to a page finds it, or waits for it alone. Where all is in the cache already this costs next to nothing, and
/// mapping pages ahead would have the guest's own faults wait.
pub fn read_ahead(path: &Path, memory: &File, size: u64) -> Result<(), Error> {
    let set = WorkingSet::read(path, size)?;
    let file = memory.try_clone();
    let file = file.map_err(|e| Error::Host("a second descriptor of the memory file", e))?;
    let body = move || {
        for &(first, count) in set.runs() {
            let length = NonZeroU64::new(count * PAGE);
            if let Err(e) = fadvise(&file, first * PAGE, length, Advice::WillNeed) {
                log::debug!("the working set is not read ahead: {e}");
                return;
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("prefetch".into())
        .stack_size(64 << 10);
    if let Err(e) = thread.spawn(body) {
        log::warn!("the working set is not read ahead: {e}");
    }
    Ok(())
}

/// A working set that is to be written.
pub struct Recording {
    path: PathBuf,
    /// When; None: the guest has not run yet.
    due: Option<Instant>,
}

impl Recording {
    /// One of a guest that is about to run, or that is paused yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, due: None }
    }

    /// The guest runs.
    pub fn begin(&mut self) {
        self.due.get_or_insert_with(|| Instant::now() + RECORDED);
    }

    /// When it is to be written, if the VM lives on till then.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Write what the guest has touched till now.
    pub fn write(self, memory: &GuestMemory) -> Result<(), Error> {
        let set = WorkingSet::new(memory.size(), memory.touched()?);
        Ok(set.write(&self.path)?)
    }
}
