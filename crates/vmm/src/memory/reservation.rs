//! Host address space for guest memory, and the file behind it where others map it, too.

use super::{Error, HUGE_PAGE};
use husk_config::HugePages;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::fs::File;
use std::ptr::null_mut;

/// A file in memory of `size` bytes, none of them there yet, whose size nobody can change.
pub(super) fn memory_file(size: u64, pages: HugePages) -> Result<File, Error> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if pages == HugePages::TwoMiB {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = memfd_create("guest-memory", flags).map_err(|e| match pages {
        HugePages::TwoMiB => no_huge_pages(size, e),
        HugePages::None | HugePages::Transparent => Error::Share(e),
    })?;
    ftruncate(&file, size).map_err(Error::Share)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(Error::Share)?;
    Ok(file.into())
}

/// Host address space with zeroed memory behind it: private and unreserved, or that of a file.
#[derive(Debug)]
pub(super) struct Reservation {
    start: u64,
    size: usize,
    /// First multiple of [`HUGE_PAGE`] in it; the memory begins there.
    pub(super) aligned: u64,
}

impl Reservation {
    pub(super) fn new(memory: u64) -> Result<Self, Error> {
        let size = memory
            .checked_add(HUGE_PAGE)
            .and_then(|size| usize::try_from(size).ok())
            .ok_or(Error::Describe(memory))?;
        // SAFETY: a new mapping, placed by the kernel, replaces nothing.
        let start = unsafe {
            mmap_anonymous(
                null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|e| Error::Reserve(memory, e))? as u64;
        let aligned = start.next_multiple_of(HUGE_PAGE);
        Ok(Self {
            start,
            size,
            aligned,
        })
    }

    /// Of pages of 2 MiB, which are set aside in the host's pool: touching them cannot fail later.
    pub(super) fn of_huge_pages(memory: u64) -> Result<Self, Error> {
        let size = usize::try_from(memory).map_err(|_| Error::Describe(memory))?;
        // SAFETY: as in `new`.
        let start = unsafe {
            mmap_anonymous(
                null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB,
            )
        }
        .map_err(|e| no_huge_pages(memory, e))? as u64;
        Ok(Self {
            start,
            size,
            aligned: start,
        })
    }

    /// With `file` behind all of the memory.
    pub(super) fn of_file(memory: u64, file: &File) -> Result<Self, Error> {
        let reservation = Self::new(memory)?;
        // SAFETY: the range from `aligned` lies within the reservation, which is a multiple of 2 MiB longer than `memory`;
        // nobody has been told of it yet.
        unsafe {
            mmap(
                reservation.aligned as *mut _,
                memory as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                0,
            )
        }
        .map_err(|e| Error::Reserve(memory, e))?;
        Ok(reservation)
    }

    /// The same with a file of pages of 2 MiB, which are set aside as in [`Reservation::of_huge_pages`].
    pub(super) fn of_file_of_huge_pages(memory: u64, file: &File) -> Result<Self, Error> {
        let size = usize::try_from(memory).map_err(|_| Error::Describe(memory))?;
        // SAFETY: as in `new`.
        let start = unsafe {
            mmap(
                null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        }
        .map_err(|e| no_huge_pages(memory, e))? as u64;
        Ok(Self {
            start,
            size,
            aligned: start,
        })
    }

    /// Have the host make the memory of huge pages where it can.
    pub(super) fn prefer_huge_pages(&self, memory: u64) -> rustix::io::Result<()> {
        // SAFETY: the range is ours; the advice changes no contents.
        unsafe {
            madvise(
                self.aligned as *mut _,
                memory as usize,
                Advice::LinuxHugepage,
            )
        }
    }

    pub(super) fn advise_huge_pages(&self, memory: u64) {
        if let Err(e) = self.prefer_huge_pages(memory) {
            log::warn!(
                "the host's kernel has no transparent huge pages ({e}); memory is made of small ones"
            );
        }
    }
}

/// Why the host gave no huge pages for `memory` bytes.
fn no_huge_pages(memory: u64, error: rustix::io::Errno) -> Error {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let read = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("{POOL}/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let (Some(all), Some(free), Some(promised)) = (
        read("nr_hugepages"),
        read("free_hugepages"),
        read("resv_hugepages"),
    ) else {
        return Error::NoHugePages;
    };
    let needed = memory.div_ceil(HUGE_PAGE);
    let free = free.saturating_sub(promised);
    match free < needed {
        true => Error::HugePages {
            needed,
            free,
            enough: all.saturating_add(needed - free),
        },
        false => Error::Reserve(memory, error),
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone; GuestMemory drops all that points into it first, and `Vm` drops KVM's
        // descriptors before GuestMemory.
        if let Err(e) = unsafe { munmap(self.start as *mut _, self.size) } {
            log::error!("guest memory cannot be unmapped: {e}");
        }
    }
}
