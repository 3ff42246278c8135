//! Section headers of an ELF kernel: which of its bytes it changes while it boots.
//!
//! They are a hint. A kernel boots the same without them, so nothing that is wrong with them is an error.

use crate::bytes::{u16_at, u32_at, u64_at};
use crate::elf::read;
use crate::kernel::{Image, Segment, Written};

const SECTION_HEADER_SIZE: usize = 64;
/// Linux has about fifty. The limit keeps the table to a few pages.
const MAX_SECTIONS: u16 = 512;
const MAX_NAMES: u64 = 64 << 10;

const PAGE: u64 = 4096;
/// What fills the space behind x86 code.
const INT3: u8 = 0xcc;

const SHT_PROGBITS: u32 = 1;
const SHF_WRITE: u64 = 1;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;

/// Code and writable data in `segments`. Code counts because Linux patches it all over (alternatives, static calls,
/// returns, ftrace) before init runs. Its `.rodata` is marked writable and is left out all the same: few of its pages
/// are ever touched.
pub(crate) fn written(image: &Image<'_>, segments: &[Segment]) -> Vec<Written> {
    let mut found = sections(image, segments).unwrap_or_default();
    found.sort_by_key(|written| written.address);
    found
}

fn sections(image: &Image<'_>, segments: &[Segment]) -> Option<Vec<Written>> {
    let table = u64_at(&image.head, 40).filter(|offset| *offset > 0)?;
    let size = u16_at(&image.head, 58)?;
    let count = u16_at(&image.head, 60)?;
    let names = usize::from(u16_at(&image.head, 62)?);
    if usize::from(size) != SECTION_HEADER_SIZE || count > MAX_SECTIONS {
        return None;
    }
    let table_size = usize::from(count) * SECTION_HEADER_SIZE;
    let table = read(image, table, table_size as u64, "the section header table").ok()?;
    let headers = || table.chunks_exact(SECTION_HEADER_SIZE);
    let names = headers().nth(names)?;
    let names_size = u64_at(names, 32).filter(|size| *size <= MAX_NAMES)?;
    let names = read(image, u64_at(names, 24)?, names_size, "the section names").ok()?;
    let written = headers().filter_map(|header| {
        let mut written = section(header, &names, segments)?;
        if u64_at(header, 8)? & SHF_EXECINSTR != 0 {
            written.size = without_filling(image, written.file_offset, written.size);
        }
        Some(written)
    });
    Some(written.collect())
}

/// The size of code up to the filling that a linker puts behind it to reach the next huge page: with Linux up to 2 MiB of
/// INT3, which nobody patches. A few pages are looked at, in a binary search for the first that is filling.
fn without_filling(image: &Image<'_>, start: u64, size: u64) -> u64 {
    let is_filling = |page: u64| {
        let offset = start.saturating_add(page.saturating_mul(PAGE));
        read(image, offset, PAGE, "code").is_ok_and(|bytes| bytes.iter().all(|&byte| byte == INT3))
    };
    let pages = size / PAGE;
    if pages == 0 || !is_filling(pages - 1) {
        return size;
    }
    let (mut low, mut high) = (0, pages - 1);
    while low < high {
        let middle = low + (high - low) / 2;
        match is_filling(middle) {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    low * PAGE
}

fn section(header: &[u8], names: &[u8], segments: &[Segment]) -> Option<Written> {
    let name = names.get(usize::try_from(u32_at(header, 0)?).ok()?..)?;
    let flags = u64_at(header, 8)?;
    let (offset, size) = (u64_at(header, 24)?, u64_at(header, 32)?);
    let changes = flags & SHF_ALLOC != 0 && flags & (SHF_WRITE | SHF_EXECINSTR) != 0;
    if u32_at(header, 4)? != SHT_PROGBITS || !changes || name.starts_with(b".rodata") || size == 0 {
        return None;
    }
    let segment = segments.iter().find(|segment| {
        offset
            .checked_sub(segment.file_offset)
            .and_then(|within| within.checked_add(size))
            .is_some_and(|end| end <= segment.file_size)
    })?;
    Some(Written {
        file_offset: offset,
        address: segment.address + (offset - segment.file_offset),
        size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::Path;

    /// What is left of code with as many pages of filling behind it.
    fn left(code: &[u8], filling: u64) -> u64 {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let bytes = [code, &vec![INT3; (filling * PAGE) as usize]].concat();
        file.write_all(&bytes).expect("a file that can be written");
        let image = Image {
            file: &file,
            path: Path::new("kernel"),
            length: bytes.len() as u64,
            head: Vec::new(),
        };
        without_filling(&image, 0, bytes.len() as u64)
    }

    #[test]
    fn filling_behind_code_is_no_code() {
        for pages in [1, 2, 3, 7, 64, 1537] {
            let code = vec![0x90; pages * PAGE as usize];
            for filling in [0, 1, 2, 511] {
                assert_eq!(left(&code, filling), code.len() as u64, "{pages} {filling}");
            }
        }
        assert_eq!(left(&[], 8), 0);
        // Its last page begins with code.
        let code = [0x90; PAGE as usize + 3];
        let end = [INT3; PAGE as usize - 3];
        assert_eq!(left(&[&code[..], &end].concat(), 3), 2 * PAGE);
        assert_eq!(left(&[0x90; 100], 0), 100);
    }
}
