//! ELF64 kernels: the program headers and the Xen note that names the PVH entry.

use std::os::unix::fs::FileExt;

use crate::Error;
use crate::bytes::{u16_at, u32_at, u64_at};
use crate::kernel::{Image, Segment, Written};
use crate::sections;

/// What the headers say, all of it checked.
#[derive(Debug)]
pub(crate) struct Elf {
    pub(crate) segments: Vec<Segment>,
    pub(crate) entry: u64,
    pub(crate) pvh_entry: Option<u32>,
    pub(crate) written: Vec<Written>,
}

pub(crate) const MAGIC: &[u8] = b"\x7fELF";

const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// Linux has five. The limit keeps the table to a few pages.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// x86-64 processors have at most 52 bits of physical address.
const ADDRESS_LIMIT: u64 = 1 << 52;

const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Linux's notes take about 500 bytes. What lies beyond this much of a segment is not searched.
const MAX_NOTE_BYTES: u64 = 16 << 10;
const MAX_NOTE_SEGMENTS: usize = 4;

struct ProgramHeader {
    index: usize,
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// Checks an ELF kernel. Reads no more than its headers and notes.
pub(crate) fn parse(image: &Image<'_>) -> Result<Elf, Error> {
    let headers = program_headers(image)?;
    let mut loads = Vec::new();
    for header in headers
        .iter()
        .filter(|h| h.kind == PT_LOAD && h.memory_size > 0)
    {
        loads.push((header.virtual_address, segment(image, header)?));
    }
    if loads.is_empty() {
        return Err(bad(image, "it has no loadable segment"));
    }
    loads.sort_by_key(|(_, segment)| segment.address);
    for pair in loads.windows(2) {
        if let [(_, low), (_, high)] = pair
            && high.address - low.address < low.memory_size
        {
            return Err(Error::Overlap {
                path: image.path.into(),
                address: high.address,
            });
        }
    }
    let entry = u64_at(&image.head, 24).ok_or_else(|| short_header(image))?;
    let entry = physical_entry(entry, &loads)
        .ok_or_else(|| bad(image, "its entry point lies outside its segments"))?;
    let segments: Vec<Segment> = loads.into_iter().map(|(_, segment)| segment).collect();
    let pvh_entry = pvh_entry(image, &headers)?.filter(|entry| {
        segments
            .iter()
            .any(|s| u64::from(*entry).wrapping_sub(s.address) < s.memory_size)
    });
    let written = sections::written(image, &segments);
    Ok(Elf {
        segments,
        entry,
        pvh_entry,
        written,
    })
}

/// Whether a program asks for a dynamic linker. `image` is any x86-64 ELF file.
pub(crate) fn has_interpreter(image: &Image<'_>) -> Result<bool, Error> {
    Ok(program_headers(image)?
        .iter()
        .any(|header| header.kind == PT_INTERP))
}

fn bad(image: &Image<'_>, reason: &'static str) -> Error {
    Error::Elf {
        path: image.path.into(),
        reason,
    }
}

fn short_header(image: &Image<'_>) -> Error {
    image.truncated("the ELF header", HEADER_SIZE)
}

fn program_headers(image: &Image<'_>) -> Result<Vec<ProgramHeader>, Error> {
    let head = &image.head;
    match head.get(4) {
        None => return Err(short_header(image)),
        Some(1) => {
            return Err(Error::Elf32 {
                path: image.path.into(),
            });
        }
        Some(2) => {}
        Some(_) => return Err(bad(image, "its ELF class is unknown")),
    }
    if head.get(5) == Some(&2) {
        return Err(bad(image, "it is big-endian, so not for x86-64"));
    }
    let (Some(kind), Some(machine), Some(table), Some(size), Some(count), true) = (
        u16_at(head, 16),
        u16_at(head, 18),
        u64_at(head, 32),
        u16_at(head, 54),
        u16_at(head, 56),
        image.length >= HEADER_SIZE,
    ) else {
        return Err(short_header(image));
    };
    if machine != EM_X86_64 {
        return Err(Error::Machine {
            path: image.path.into(),
            machine,
        });
    }
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(bad(
            image,
            "it is an object file or a core dump, not an executable",
        ));
    }
    if count == 0 {
        return Err(bad(image, "it has no program headers"));
    }
    if usize::from(size) != PROGRAM_HEADER_SIZE {
        return Err(bad(image, "its program headers are not 56 bytes each"));
    }
    if count > MAX_PROGRAM_HEADERS {
        return Err(bad(image, "it has more than 256 program headers"));
    }
    let table_size = usize::from(count) * PROGRAM_HEADER_SIZE;
    let table = read(image, table, table_size as u64, "the program header table")?;
    Ok(table
        .chunks_exact(PROGRAM_HEADER_SIZE)
        .enumerate()
        .filter_map(program_header)
        .collect())
}

fn program_header((index, raw): (usize, &[u8])) -> Option<ProgramHeader> {
    Some(ProgramHeader {
        index,
        kind: u32_at(raw, 0)?,
        offset: u64_at(raw, 8)?,
        virtual_address: u64_at(raw, 16)?,
        physical_address: u64_at(raw, 24)?,
        file_size: u64_at(raw, 32)?,
        memory_size: u64_at(raw, 40)?,
        align: u64_at(raw, 48)?,
    })
}

fn segment(image: &Image<'_>, header: &ProgramHeader) -> Result<Segment, Error> {
    let fault = |reason| Error::ProgramHeader {
        path: image.path.into(),
        index: header.index,
        reason,
    };
    if header.file_size > header.memory_size {
        return Err(fault("it is larger in the file than in memory"));
    }
    let end = header
        .offset
        .checked_add(header.file_size)
        .ok_or_else(|| fault("its place in the file is beyond 2^64"))?;
    if header.file_size > 0 && end > image.length {
        return Err(image.truncated("an ELF segment", end));
    }
    match header.physical_address.checked_add(header.memory_size) {
        Some(end) if end <= ADDRESS_LIMIT => {}
        _ => return Err(fault("its physical address is beyond 2^52")),
    }
    Ok(Segment {
        file_offset: header.offset,
        file_size: header.file_size,
        address: header.physical_address,
        memory_size: header.memory_size,
    })
}

/// Linux writes a physical `e_entry`; kernels linked in the ordinary way have a virtual one.
fn physical_entry(entry: u64, loads: &[(u64, Segment)]) -> Option<u64> {
    let within = |start: u64, size: u64| entry.checked_sub(start).filter(|offset| *offset < size);
    if loads
        .iter()
        .any(|(_, s)| within(s.address, s.memory_size).is_some())
    {
        return Some(entry);
    }
    loads
        .iter()
        .find_map(|(start, s)| within(*start, s.memory_size).map(|offset| s.address + offset))
}

fn pvh_entry(image: &Image<'_>, headers: &[ProgramHeader]) -> Result<Option<u32>, Error> {
    for header in headers
        .iter()
        .filter(|h| h.kind == PT_NOTE)
        .take(MAX_NOTE_SEGMENTS)
    {
        let size = header.file_size.min(MAX_NOTE_BYTES);
        let notes = read(image, header.offset, size, "the ELF notes")?;
        let align = if header.align == 8 { 8 } else { 4 };
        if let Some(entry) = find_phys32_entry(&notes, align) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Walks notes: `namesz`, `descsz`, `type`, then name and descriptor, each padded to `align`.
/// Malformed notes end the walk: a kernel without the note still boots by the other protocol.
fn find_phys32_entry(mut notes: &[u8], align: usize) -> Option<u32> {
    loop {
        let name_size = usize::try_from(u32_at(notes, 0)?).ok()?;
        let descriptor_size = usize::try_from(u32_at(notes, 4)?).ok()?;
        let kind = u32_at(notes, 8)?;
        let descriptor_at = 12usize
            .checked_add(name_size)?
            .checked_next_multiple_of(align)?;
        let descriptor_end = descriptor_at.checked_add(descriptor_size)?;
        let name = notes.get(12..12usize.checked_add(name_size)?)?;
        let descriptor = notes.get(descriptor_at..descriptor_end)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match descriptor_size {
                4 => u32_at(descriptor, 0),
                8 => u64_at(descriptor, 0).and_then(|entry| u32::try_from(entry).ok()),
                _ => None,
            };
        }
        notes = notes.get(descriptor_end.checked_next_multiple_of(align)?..)?;
    }
}

/// `size` bytes at `offset`, out of what was read already where it holds them. `size` is at most a
/// few pages (checked by the callers), so it is safe to allocate.
pub(crate) fn read(
    image: &Image<'_>,
    offset: u64,
    size: u64,
    what: &'static str,
) -> Result<Vec<u8>, Error> {
    let end = offset.saturating_add(size);
    if end > image.length {
        return Err(image.truncated(what, end));
    }
    if let (Ok(start), Ok(end)) = (usize::try_from(offset), usize::try_from(end))
        && let Some(bytes) = image.head.get(start..end)
    {
        return Ok(bytes.to_vec());
    }
    let mut buffer = vec![0; usize::try_from(size).unwrap_or(0)];
    image
        .file
        .read_exact_at(&mut buffer, offset)
        .map_err(|source| Error::Read {
            path: image.path.into(),
            source,
        })?;
    Ok(buffer)
}

#[cfg(test)]
#[path = "elf_tests.rs"]
mod tests;
