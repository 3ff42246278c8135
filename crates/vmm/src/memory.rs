//! Guest memory: one reservation of host address space, in which files stand where the guest finds their bytes.

mod freeze;
mod handler;
mod reservation;
mod userfault;

use handler::PageHandler;
use husk_arch::memory_map::{Range, memory_ranges};
use husk_config::HugePages;
use husk_snapshot::{Pages, Run};
use husk_virtio::WriteLog;
use reservation::{Reservation, memory_file};
use rustix::fs::{SealFlags, fcntl_add_seals, seek};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const PAGE: u64 = 4096;
/// Size of a huge page: host and guest addresses agree modulo this, so that KVM can map one as a whole.
const HUGE_PAGE: u64 = 2 << 20;

/// Why guest memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gave no address space.
    #[error("the host cannot give {} MiB of address space for guest memory; use a smaller --memory", .0 >> 20)]
    Reserve(u64, #[source] rustix::io::Errno),
    /// The host's pool of huge pages is too small.
    #[error(
        "the VM needs {needed} huge pages of 2 MiB and the host has {free} to spare; `echo {enough} > /proc/sys/vm/nr_hugepages` makes enough, while it has so much memory in one piece"
    )]
    HugePages {
        /// What the VM takes.
        needed: u64,
        /// What is in the pool and promised to nobody.
        free: u64,
        /// Size of a pool that is large enough.
        enough: u64,
    },
    /// The host has no huge pages.
    #[error(
        "the VM needs huge pages of 2 MiB, which this host's kernel does not have; use huge_pages None"
    )]
    NoHugePages,
    /// No file to share.
    #[error(
        "the host gives no memory that other processes can share, which a vhost-user device needs"
    )]
    Share(#[source] rustix::io::Errno),
    /// vm-memory refused the reservation.
    #[error("guest memory of {} MiB cannot be described; use another --memory", .0 >> 20)]
    Describe(u64),
    /// Mapping or reading a file into guest memory.
    #[error("cannot put {size:#x} bytes of a file into guest memory at {address:#x}")]
    File {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Why.
        source: std::io::Error,
    },
    /// Memory cannot be made a template.
    #[error("guest memory cannot be moved to where clones see it")]
    Freeze(#[source] std::io::Error),
    /// Which pages are used.
    #[error("cannot find out which pages of guest memory are used: /proc/self/pagemap")]
    Pagemap(#[source] std::io::Error),
    /// This user may not handle page faults.
    #[error(
        "this host lets only root handle page faults of the kernel: give the user access to /dev/userfaultfd, or `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    NoUserfault,
    /// The host's kernel refuses.
    #[error("this host's kernel does not let page faults be handled (userfaultfd)")]
    Userfault(#[source] rustix::io::Errno),
    /// Nobody there, or nobody who takes the message.
    #[error("the handler of page faults at {} cannot be told of memory", path.display())]
    Handler {
        /// Its socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It was there.
    #[error("the handler of page faults at {} has gone", .0.display())]
    HandlerLost(PathBuf),
    /// Alive or not, it does not do its work.
    #[error("the handler of page faults at {} has not given a page for {} s", .0.display(), .1)]
    NoPages(PathBuf, u64),
    /// An address outside memory.
    #[error("{size:#x} bytes at {address:#x} are outside guest memory")]
    Outside {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
}

/// Bits of an entry of /proc/PID/pagemap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page is a file's, or shared.
const OF_FILE: u64 = 1 << 61;
/// Entries that are read at once, and bytes of memory that are looked at at once.
const PAGES_AT_ONCE: usize = 1 << 15;
const PIECE: u64 = 1 << 20;

/// The runs of pages in `piece` that are not all zero, each with its offset.
fn nonzero_runs(piece: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let page = PAGE as usize;
    let is_zero = move |at: usize| {
        let bytes = piece
            .get(at..(at + page).min(piece.len()))
            .unwrap_or_default();
        // Compared as a whole, which is as fast as memory.
        bytes == ZERO.get(..bytes.len()).unwrap_or_default()
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < piece.len() && is_zero(at) {
            at += page;
        }
        let start = at;
        while at < piece.len() && !is_zero(at) {
            at += page;
        }
        let run = piece.get(start..at.min(piece.len()))?;
        (!run.is_empty()).then_some((start as u64, run))
    })
}

static ZERO: [u8; PAGE as usize] = [0; PAGE as usize];

/// The memory of one VM. Dropped after its VM and vCPUs: KVM must not keep addresses that mean something else.
#[derive(Debug)]
pub struct GuestMemory {
    memory: GuestMemoryMmap,
    slots: Vec<(Range, u64)>,
    /// Files are copied: the pages are huge ones, or others see memory only as it is in its own file.
    copies: bool,
    /// Where files are mapped: guest-physical addresses.
    mapped: Mutex<Vec<Range>>,
    /// What all of memory is mapped from, ranges one behind the other, if it is one file: its holes are zero.
    source: Mutex<Option<File>>,
    /// Hears what the monitor writes, where somebody wants to know.
    log: Option<Arc<WriteLog>>,
    /// Who fills memory when it is touched.
    handler: OnceLock<PageHandler>,
    page_size: u64,
    // Last, so that everything above that points into it is gone before it.
    _reservation: Reservation,
}

impl GuestMemory {
    /// Reserve `size` bytes (a multiple of the page size, of 2 MiB with [`HugePages::TwoMiB`]); none of them is touched.
    pub fn new(size: u64, pages: HugePages) -> Result<Self, Error> {
        let reservation = match pages {
            HugePages::TwoMiB => Reservation::of_huge_pages(size)?,
            HugePages::None | HugePages::Transparent => Reservation::new(size)?,
        };
        Self::over(reservation, size, pages, None)
    }

    /// The same in a file that other processes can map, with each region's place in it: for devices that they serve. Nobody who
    /// has the file can change its size, and so make this process fault.
    pub fn shared(size: u64, pages: HugePages) -> Result<Self, Error> {
        let file = memory_file(size, pages)?;
        fcntl_add_seals(&file, SealFlags::SEAL).map_err(Error::Share)?;
        let reservation = match pages {
            HugePages::TwoMiB => Reservation::of_file_of_huge_pages(size, &file)?,
            HugePages::None | HugePages::Transparent => Reservation::of_file(size, &file)?,
        };
        Self::over(reservation, size, pages, Some(Arc::new(file)))
    }

    fn over(
        reservation: Reservation,
        size: u64,
        pages: HugePages,
        file: Option<Arc<File>>,
    ) -> Result<Self, Error> {
        let (low, high) = memory_ranges(size).ok_or(Error::Describe(size))?;
        if pages == HugePages::Transparent {
            reservation.advise_huge_pages(size);
        }
        let mut slots = vec![(low, reservation.aligned)];
        slots.extend(high.map(|high| (high, reservation.aligned + low.size)));
        let regions = slots
            .iter()
            .map(|&(range, host)| {
                let offset = host - reservation.aligned;
                let file = file.as_ref();
                let file = file.map(|file| FileOffset::from_arc(Arc::clone(file), offset));
                region(range, host, file)
            })
            .collect::<Option<Vec<_>>>();
        let memory = regions
            .and_then(|regions| GuestMemoryMmap::from_arc_regions(regions).ok())
            .ok_or(Error::Describe(size))?;
        Ok(Self {
            memory,
            slots,
            copies: pages == HugePages::TwoMiB || file.is_some(),
            mapped: Mutex::default(),
            source: Mutex::default(),
            log: None,
            handler: OnceLock::new(),
            page_size: match pages {
                HugePages::TwoMiB => HUGE_PAGE,
                HugePages::None | HugePages::Transparent => PAGE,
            },
            _reservation: reservation,
        })
    }

    /// The memory as devices read and write it. A clone must be gone before this is dropped.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// From now on note what the monitor writes.
    pub fn track(&mut self) {
        self.log = Some(Arc::new(self.new_log()));
    }

    /// What the monitor writes, for devices to add what they do; None unless it is tracked.
    pub fn log(&self) -> Option<&Arc<WriteLog>> {
        self.log.as_ref()
    }

    /// An empty log for this memory; its regions are the slots.
    pub fn new_log(&self) -> WriteLog {
        WriteLog::new(
            self.slots
                .iter()
                .map(|(range, _)| (range.start, range.size)),
        )
    }

    /// Other processes can map it, and write to it.
    pub fn is_shared(&self) -> bool {
        let mut regions = vm_memory::GuestMemoryBackend::iter(&self.memory);
        regions.any(|region| vm_memory::GuestMemoryRegion::file_offset(region).is_some())
    }

    /// All of it is the private mapping of one file after the other that was placed, and nothing was placed over that.
    pub fn is_one_file(&self) -> bool {
        let mapped = self.lock_mapped();
        let slots = self.slots.iter().map(|(range, _)| range);
        !self.copies && mapped.len() == self.slots.len() && mapped.iter().eq(slots)
    }

    /// Guest-physical ranges, and the host address behind each.
    pub fn slots(&self) -> &[(Range, u64)] {
        &self.slots
    }

    /// Copy `bytes` to `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        if let Some(log) = &self.log {
            log.note(address, bytes.len() as u64);
        }
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| Error::Outside {
                address,
                size: bytes.len() as u64,
            })
    }

    /// The little-endian 16-bit number at `address`.
    pub fn read_u16(&self, address: u64) -> Option<u16> {
        let mut bytes = [0; 2];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .ok()?;
        Some(u16::from_le_bytes(bytes))
    }

    /// Let the guest find `size` bytes of `file` from `offset` at `address`. `file` must be that long.
    ///
    /// Whole pages are mapped, privately, unless memory is shared or made of huge pages: VMs that boot the same file share its pages in the host's page cache, and
    /// bytes that the guest never looks at are never read. What does not fill a page, or lies in the file at another
    /// place within its page than in memory, is copied.
    pub fn place_file(
        &self,
        file: &File,
        offset: u64,
        size: u64,
        address: u64,
    ) -> Result<(), Error> {
        if size == 0 {
            return Ok(());
        }
        let host = self.host_address(address, size)?;
        let end = address + size;
        let first_page = address.next_multiple_of(PAGE).min(end);
        let last_page = (end & !(PAGE - 1)).max(first_page);
        if self.copies || offset % PAGE != address % PAGE || first_page == last_page {
            return self.copy_file(file, offset, size, address);
        }
        let head = first_page - address;
        let mapped = last_page - first_page;
        let file_error = |source: std::io::Error| Error::File {
            address,
            size,
            source,
        };
        // SAFETY: `host_address` has checked that address..end lies within one slot of our own reservation, and
        // MAP_FIXED replaces nothing but whole pages of it. Nobody holds a reference into guest memory: all access is
        // through vm-memory's volatile copies and by KVM.
        unsafe {
            mmap(
                (host + head) as *mut _,
                mapped as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                offset + head,
            )
        }
        .map_err(|e| file_error(e.into()))?;
        let range = Range {
            start: first_page,
            size: mapped,
        };
        self.lock_mapped().push(range);
        self.copy_file(file, offset, head, address)?;
        self.copy_file(file, offset + head + mapped, end - last_page, last_page)
    }

    /// Let the process that listens at `path` fill memory, page by page as it is touched. Nothing may have touched it before.
    pub fn fill_by(&self, path: &Path) -> Result<(), Error> {
        let handler = PageHandler::connect(path, &self.slots, self.page_size)?;
        // There is one call for each memory.
        let _ = self.handler.set(handler);
        Ok(())
    }

    /// Be sure that the page at `address` is there: who touches it then waits for nobody. For the main thread, before it does.
    pub fn fetch(&self, address: u64) -> Result<(), Error> {
        let page = Range {
            start: address & !(PAGE - 1),
            size: PAGE,
        };
        let handler = self.handler();
        handler.map_or(Ok(()), |handler| handler.fetch(&self.memory, vec![page]))
    }

    /// Who fills memory when it is touched.
    pub fn handler(&self) -> Option<&PageHandler> {
        self.handler.get()
    }

    /// Copy what is not a hole in `size` bytes of `file` from `offset` to `address`. Memory there must be untouched.
    pub fn copy_data(
        &self,
        file: &File,
        offset: u64,
        size: u64,
        address: u64,
    ) -> Result<(), Error> {
        let fault = |e: rustix::io::Errno| Error::File {
            address,
            size,
            source: e.into(),
        };
        let end = offset.saturating_add(size);
        let mut at = offset;
        while at < end {
            let start = match seek(file, rustix::fs::SeekFrom::Data(at)) {
                Err(rustix::io::Errno::NXIO) => break,
                found => found.map_err(fault)?.min(end),
            };
            let hole = seek(file, rustix::fs::SeekFrom::Hole(start)).map_err(fault)?;
            let hole = hole.clamp(start, end);
            self.copy_file(file, start, hole - start, address + (start - offset))?;
            at = hole;
        }
        Ok(())
    }

    /// Have the host allocate the pages of `size` bytes from `address` now, in one go, instead of one by one as the guest
    /// comes to them. Only advice: a host that does not know it changes nothing.
    pub fn populate(&self, address: u64, size: u64) {
        let end = address.saturating_add(size);
        let address = address & !(PAGE - 1);
        let size = end.saturating_sub(address);
        if let Ok(host) = self.host_address(address, size) {
            // SAFETY: the range is ours; populating writes no contents.
            let result =
                unsafe { madvise(host as *mut _, size as usize, Advice::LinuxPopulateWrite) };
            if let Err(e) = result {
                log::debug!("guest memory is not populated ahead: {e}");
            }
        }
    }

    /// All ranges, one behind the other.
    pub fn size(&self) -> u64 {
        self.slots.iter().map(|(range, _)| range.size).sum()
    }

    /// Give `take` all of memory that is not zero, in pieces of whole pages: the place in memory as it is in a file, ranges one
    /// behind the other, and the bytes. What nobody has touched is not looked at. Nothing may write to memory meanwhile.
    pub fn each_used<E: From<Error>>(
        &self,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let pagemap = File::open("/proc/self/pagemap").map_err(Error::Pagemap)?;
        if let Some(handler) = self.handler() {
            let all = self.slots.iter().map(|(range, _)| *range);
            handler.fetch(&self.memory, all.collect())?;
        }
        let mut buffer = Buffer::new(0)?;
        let mut before = 0;
        for &(range, host) in &self.slots {
            for used in self.used(&pagemap, range, host)? {
                let offset = before + (used.start - range.start);
                self.each_piece(used, offset, &mut buffer, &mut take)?;
            }
            before += range.size;
        }
        Ok(())
    }

    /// As [`GuestMemory::each_used`], of these pages, which are counted as in a file.
    pub fn each_of<E: From<Error>>(
        &self,
        pages: &Pages,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = Buffer::new(pages.count() * PAGE)?;
        let mut before = 0;
        let mut runs = pages.runs().iter().copied().peekable();
        for &(range, _) in &self.slots {
            let behind = before + range.size;
            // A run may go on in the next range.
            while let Some(Run { first, .. }) =
                runs.peek().copied().filter(|run| run.first * PAGE < behind)
            {
                let end = runs.peek().map_or(first, Run::end) * PAGE;
                let offset = (first * PAGE).max(before);
                let part = Range {
                    start: range.start + (offset - before),
                    size: end.min(behind).saturating_sub(offset),
                };
                self.each_piece(part, offset, &mut buffer, &mut take)?;
                if end > behind {
                    break;
                }
                runs.next();
            }
            before = behind;
        }
        Ok(())
    }

    /// Give `take` what is not zero in `range`, which is at `offset` in a file.
    fn each_piece<E: From<Error>>(
        &self,
        range: Range,
        offset: u64,
        buffer: &mut Buffer,
        take: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        while done < range.size {
            let (address, size) = (range.start + done, (range.size - done).min(PIECE));
            let piece = buffer.first(size as usize);
            self.memory
                .read_slice(piece, GuestAddress(address))
                .map_err(|_| Error::Outside { address, size })?;
            for (start, run) in nonzero_runs(piece) {
                take(offset + done + start, run)?;
            }
            done += size;
        }
        Ok(())
    }

    /// Note in `log` each page that is not that of a mapped file any more, because somebody has written to it.
    pub fn note_own_pages(&self, log: &WriteLog) -> Result<(), Error> {
        let pagemap = File::open("/proc/self/pagemap").map_err(Error::Pagemap)?;
        for &(range, host) in &self.slots {
            each_entry(&pagemap, range, host, |address, entry| {
                let is_own = entry & (PRESENT | OF_FILE) == PRESENT || entry & SWAPPED != 0;
                if is_own {
                    log.note(address, PAGE);
                }
            })?;
        }
        Ok(())
    }

    /// The parts of a range that were touched, or that files or somebody who fills them are behind.
    fn used(&self, pagemap: &File, range: Range, host: u64) -> Result<Vec<Range>, Error> {
        if self.handler().is_some() {
            return Ok(vec![range]);
        }
        let files = match self.data(range)? {
            Some(data) => data,
            None => self.lock_mapped().clone(),
        };
        touched(pagemap, range, host, &files)
    }

    /// The runs of pages that were touched since files were placed, by their place in memory as it is in a file: number of the first
    /// page, and how many. Pages that lay beside one that was touched, in the host's cache, may count as well.
    pub fn touched(&self) -> Result<Vec<(u64, u64)>, Error> {
        let pagemap = File::open("/proc/self/pagemap").map_err(Error::Pagemap)?;
        let mut runs = Vec::new();
        let mut before = 0;
        for &(range, host) in &self.slots {
            for run in touched(&pagemap, range, host, &[])? {
                let start = before + (run.start - range.start);
                runs.push((start / PAGE, run.size / PAGE));
            }
            before += range.size;
        }
        Ok(runs)
    }

    /// All of memory is mapped from `file`, which does not change.
    pub fn set_source(&self, file: &File) {
        let source = file
            .try_clone()
            .inspect_err(|e| log::debug!("a memory file is read as a whole: {e}"));
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = source.ok();
    }

    /// Where the file behind a range has data; None: that is not known. To read a hole would fill it where files are memory.
    fn data(&self, range: Range) -> Result<Option<Vec<Range>>, Error> {
        let source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = source.as_ref() else {
            return Ok(None);
        };
        let below = self
            .slots
            .iter()
            .take_while(|(slot, _)| slot.start < range.start);
        let offset: u64 = below.map(|(slot, _)| slot.size).sum();
        let (mut at, end) = (offset, offset + range.size);
        let mut data = Vec::new();
        while at < end {
            let start = match seek(file, rustix::fs::SeekFrom::Data(at)) {
                Ok(start) if start < end => start & !(PAGE - 1),
                Ok(_) | Err(rustix::io::Errno::NXIO) => break,
                Err(_) => return Ok(None),
            };
            let Ok(hole) = seek(file, rustix::fs::SeekFrom::Hole(start)) else {
                return Ok(None);
            };
            let stop = hole.next_multiple_of(PAGE).clamp(start + PAGE, end);
            data.push(Range {
                start: range.start + (start - offset),
                size: stop - start,
            });
            at = stop;
        }
        Ok(Some(data))
    }

    fn lock_mapped(&self) -> MutexGuard<'_, Vec<Range>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copy_file(
        &self,
        mut file: &File,
        offset: u64,
        size: u64,
        address: u64,
    ) -> Result<(), Error> {
        if size == 0 {
            return Ok(());
        }
        let file_error = |source| Error::File {
            address,
            size,
            source,
        };
        file.seek(SeekFrom::Start(offset)).map_err(file_error)?;
        let count = usize::try_from(size).map_err(|_| Error::Outside { address, size })?;
        let mut owned = file.try_clone().map_err(file_error)?;
        self.memory
            .read_exact_volatile_from(GuestAddress(address), &mut owned, count)
            .map_err(|e| file_error(std::io::Error::other(e)))
    }

    /// The host address of `address`, when `size` bytes from there lie in one slot.
    fn host_address(&self, address: u64, size: u64) -> Result<u64, Error> {
        let outside = Error::Outside { address, size };
        let Some(end) = address.checked_add(size) else {
            return Err(outside);
        };
        self.slots
            .iter()
            .find(|(range, _)| range.start <= address && end <= range.end())
            .map(|(range, host)| host + (address - range.start))
            .ok_or(outside)
    }
}

/// The parts of a range that were touched, and those `files`.
fn touched(pagemap: &File, range: Range, host: u64, files: &[Range]) -> Result<Vec<Range>, Error> {
    let mut used: Vec<Range> = Vec::new();
    // In order, as the entries are.
    let mut files = files.to_vec();
    files.sort_by_key(|file| file.start);
    let mut files = files.iter().peekable();
    each_entry(pagemap, range, host, |address, entry| {
        while files.next_if(|file| file.end() <= address).is_some() {}
        let in_file = files.peek().is_some_and(|file| file.start <= address);
        if entry & (PRESENT | SWAPPED) == 0 && !in_file {
            return;
        }
        match used.last_mut().filter(|last| last.end() == address) {
            Some(last) => last.size += PAGE,
            None => used.push(Range {
                start: address,
                size: PAGE,
            }),
        }
    })?;
    Ok(used)
}

/// Call `take` with the address and the entry of /proc/self/pagemap of each page of a range that is at `host`.
fn each_entry(
    pagemap: &File,
    range: Range,
    host: u64,
    mut take: impl FnMut(u64, u64),
) -> Result<(), Error> {
    let mut entries = vec![0; 8 * PAGES_AT_ONCE];
    let mut page = 0;
    let pages = range.size / PAGE;
    while page < pages {
        let count = (pages - page).min(PAGES_AT_ONCE as u64);
        let entries = entries.get_mut(..8 * count as usize).unwrap_or_default();
        let offset = (host / PAGE + page) * 8;
        pagemap
            .read_exact_at(entries, offset)
            .map_err(Error::Pagemap)?;
        for (entry, number) in entries.chunks_exact(8).zip(page..) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            take(range.start + number * PAGE, entry);
        }
        page += count;
    }
    Ok(())
}

/// Room for a piece of memory, aligned to pages, as files want it that are written past the page cache.
struct Buffer(Reservation);

impl Buffer {
    /// For so many bytes in all. Many are worth a huge page: a disk that is told of one place takes half as long as with one for each page.
    fn new(all: u64) -> Result<Self, Error> {
        let room = Reservation::new(HUGE_PAGE)?;
        if all >= PIECE {
            // Otherwise it takes longer.
            let _ = room.prefer_huge_pages(HUGE_PAGE);
        }
        Ok(Self(room))
    }

    /// At most a [`PIECE`].
    fn first(&mut self, length: usize) -> &mut [u8] {
        let length = length.min(PIECE as usize);
        // SAFETY: the reservation has a huge page from there, which is larger than a piece; it is nobody else's, and borrowed with it.
        unsafe { std::slice::from_raw_parts_mut(self.0.aligned as *mut u8, length) }
    }
}

fn region(range: Range, host: u64, file: Option<FileOffset>) -> Option<Arc<GuestRegionMmap>> {
    let size = usize::try_from(range.size).ok()?;
    let builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = match file {
        None => {
            builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        }
        Some(file) => builder
            .with_file_offset(file)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE),
    };
    // SAFETY: `host..host + size` lies in the reservation of the GuestMemory that keeps the result, and that drops the
    // reservation last. The region does not own the mapping, so it is unmapped once.
    let mapping = unsafe { builder.with_raw_mmap_pointer(host as *mut u8) }
        .build()
        .ok()?;
    GuestRegionMmap::new(mapping, GuestAddress(range.start)).map(Arc::new)
}

#[cfg(test)]
mod tests;
