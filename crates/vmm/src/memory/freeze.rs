//! Memory that many VMs go on from, each with what it writes for itself.

use super::{Error, GuestMemory, memory_file};
use husk_config::HugePages;
use rustix::fs::{SealFlags, fcntl_add_seals};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use std::fs::File;
use std::os::unix::fs::FileExt;

impl GuestMemory {
    /// Move what memory holds to a file in memory that nobody can change any more, and see it through a private mapping of that file
    /// from now on, as other VMs may. Nothing may write to memory meanwhile. An error leaves its contents as they were.
    pub fn freeze(&self) -> Result<File, Error> {
        let file = memory_file(self.size(), HugePages::None)?;
        self.each_used(|offset, bytes| file.write_all_at(bytes, offset).map_err(Error::Freeze))?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(Error::Share)?;
        let mut offset = 0;
        for &(range, host) in self.slots() {
            // SAFETY: the range is one slot of our own reservation, which is replaced as a whole by what it holds already; KVM follows,
            // and nobody has a reference into guest memory: all access is through vm-memory's volatile copies and by KVM.
            unsafe {
                mmap(
                    host as *mut _,
                    range.size as usize,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                    &file,
                    offset,
                )
            }
            .map_err(|e| Error::Freeze(e.into()))?;
            // SAFETY: the same range; the advice changes nothing in this process. Clones map the file anew.
            unsafe { madvise(host as *mut _, range.size as usize, Advice::LinuxDontFork) }
                .map_err(|e| Error::Freeze(e.into()))?;
            offset += range.size;
        }
        *self.lock_mapped() = self.slots().iter().map(|(range, _)| *range).collect();
        self.set_source(&file);
        Ok(file)
    }
}
