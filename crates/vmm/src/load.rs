//! The kernel and the initrd, from their files into guest memory.

use crate::devices;
use crate::error::Error;
use crate::memory::GuestMemory;
use husk_arch::acpi::MmioSlot;
use husk_arch::boot::{BootInfo, BootState, linux, pvh};
use husk_arch::layout::HIGH_MEMORY;
use husk_arch::memory_map::Range;
use husk_config::{BootProtocol, BootSource, VmConfig};
use husk_loader::{Cache, Kernel};
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::io::Read;
use std::path::Path;

const PAGE: u64 = 4096;

/// Put kernel and initrd into `memory`; the result says how the boot vCPU enters the kernel. Tables that the result names
/// are written too.
pub fn load(
    config: &VmConfig,
    kernel: &Kernel,
    (slots, root_is_read_only): (&[MmioSlot], bool),
    memory: &GuestMemory,
    cache: &Cache,
) -> Result<BootState, Error> {
    let source = &config.boot_source;
    // A kernel with ACPI would find each device twice, and complain.
    let by_acpi = slots.is_empty() || (uses_acpi(source) && kernel.has_acpi(cache));
    let told = if by_acpi { &[] } else { slots };
    let command_line = devices::command_line(config, told, root_is_read_only)?;
    let kernel_end = place_kernel(kernel, memory)?;
    let pvh_entry = choose(source, kernel)?;
    let initrd = source
        .initrd_path
        .as_deref()
        .map(|path| place_initrd(path, kernel_end, memory, pvh_entry.is_none()))
        .transpose()?;
    let mut random_seed = [0; 32];
    crate::fill_random(&mut random_seed)?;
    let info = BootInfo {
        memory_size: memory.slots().iter().map(|(range, _)| range.size).sum(),
        cmdline: &command_line,
        initrd,
        setup_header: kernel.setup_header.as_deref(),
        kernel_end,
        random_seed,
    };
    let state = match pvh_entry {
        Some(entry) => pvh(&info, entry),
        None => linux(&info, kernel.entry),
    };
    for (address, bytes) in &state.writes {
        memory.write(*address, bytes)?;
    }
    Ok(state)
}

/// The command line does not turn ACPI off.
fn uses_acpi(source: &BootSource) -> bool {
    let mut words = source.command_line().split_ascii_whitespace();
    !words.any(|word| matches!(word, "acpi=off" | "acpi=ht"))
}

/// The PVH entry, when the kernel is to be entered there.
///
/// An ELF file that has the note need not be Linux, so the note decides. A bzImage is Linux for certain, and its 64-bit
/// entry takes a random seed, which PVH cannot pass.
fn choose(source: &BootSource, kernel: &Kernel) -> Result<Option<u32>, Error> {
    match (source.boot_protocol, kernel.pvh_entry) {
        (BootProtocol::Linux, _) => Ok(None),
        (BootProtocol::Auto, entry) => Ok(entry.filter(|_| kernel.setup_header.is_none())),
        (BootProtocol::Pvh, Some(entry)) => Ok(Some(entry)),
        (BootProtocol::Pvh, None) => Err(Error::NoPvh(source.kernel_image_path.clone())),
    }
}

/// Returns the first address behind the kernel.
fn place_kernel(kernel: &Kernel, memory: &GuestMemory) -> Result<u64, Error> {
    let mut kernel_end = HIGH_MEMORY;
    for segment in &kernel.segments {
        let outside = || Error::SegmentOutside {
            path: kernel.path.clone(),
            address: segment.address,
            size: segment.memory_size,
            memory_mib: memory
                .slots()
                .iter()
                .map(|(range, _)| range.size)
                .sum::<u64>()
                >> 20,
        };
        let end = segment
            .address
            .checked_add(segment.memory_size)
            .ok_or_else(outside)?;
        let inside = memory.slots().iter().any(|(range, _)| {
            range.start.max(HIGH_MEMORY) <= segment.address && end <= range.end()
        });
        if !inside {
            return Err(outside());
        }
        memory.place_file(
            &kernel.file,
            segment.file_offset,
            segment.file_size,
            segment.address,
        )?;
        kernel_end = kernel_end.max(end);
    }
    for part in &kernel.written {
        for (offset, size) in data_extents(&kernel.file, part.file_offset, part.size) {
            memory.populate(part.address + (offset - part.file_offset), size);
        }
    }
    Ok(kernel_end)
}

/// The parts of `size` bytes of `file` from `start` that are not holes. Padding is not worth a page of memory.
fn data_extents(file: &File, start: u64, size: u64) -> Vec<(u64, u64)> {
    let end = start.saturating_add(size);
    let mut extents = Vec::new();
    let mut at = start;
    while at < end {
        let Ok(data) = seek(file, SeekFrom::Data(at)) else {
            break; // nothing but a hole up to the end, or a file system that cannot tell
        };
        let hole = seek(file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
        if data >= hole {
            break;
        }
        extents.push((data, hole - data));
        at = hole;
    }
    extents
}

/// Whether the initrd can be read.
pub fn check_initrd(path: &Path) -> Result<(), Error> {
    let fail = |source| Error::Initrd {
        path: path.into(),
        source,
    };
    let metadata = File::open(path).and_then(|file| file.metadata());
    match metadata.map_err(fail)?.is_dir() {
        true => Err(Error::InitrdDirectory(path.into())),
        false => Ok(()),
    }
}

/// The initrd goes to the end of the memory below the hole, or, if it does not fit there and the protocol can say so
/// (`above_4g`), to the end of the memory above it.
fn place_initrd(
    path: &Path,
    kernel_end: u64,
    memory: &GuestMemory,
    above_4g: bool,
) -> Result<Range, Error> {
    let fail = |source| Error::Initrd {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if metadata.is_dir() {
        return Err(Error::InitrdDirectory(path.into()));
    }
    if metadata.is_file() {
        let size = metadata.len();
        let range = initrd_range(path, size, kernel_end, memory, above_4g)?;
        memory.place_file(&file, 0, size, range.start)?;
        return Ok(range);
    }
    // A pipe, as of `--initrd <(…)`. What does not fit into memory need not be read.
    let most: u64 = memory.slots().iter().map(|(range, _)| range.size).sum();
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(fail)?;
    let range = initrd_range(path, bytes.len() as u64, kernel_end, memory, above_4g)?;
    memory.write(range.start, &bytes)?;
    Ok(range)
}

fn initrd_range(
    path: &Path,
    size: u64,
    kernel_end: u64,
    memory: &GuestMemory,
    above_4g: bool,
) -> Result<Range, Error> {
    if size == 0 {
        return Err(Error::InitrdEmpty(path.into()));
    }
    let usable = if above_4g { 2 } else { 1 };
    memory
        .slots()
        .iter()
        .take(usable)
        .find_map(|(range, _)| {
            let start = range.end().checked_sub(size)? & !(PAGE - 1);
            let free = start >= range.start && start >= kernel_end;
            free.then_some(Range { start, size })
        })
        .ok_or_else(|| Error::InitrdTooLarge {
            path: path.into(),
            size,
            room: memory
                .slots()
                .first()
                .map_or(0, |(range, _)| range.end().saturating_sub(kernel_end)),
        })
}
