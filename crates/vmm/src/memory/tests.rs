//! Guest memory as its makers, its guest and the host see it.

use super::*;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read(memory: &GuestMemory, address: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory
        .memory()
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i % 251) as u8 + 1).collect()
}

#[test]
fn a_file_stands_in_memory_whatever_its_alignment() {
    let bytes = pattern(5 * 4096);
    let source = file(&bytes);
    for (offset, size, address) in [
        (0, 5 * 4096, 0x10_0000),      // whole pages
        (0, 4096 * 2 + 17, 0x10_0000), // a tail
        (100, 4096 * 3, 0x10_0064),    // head and tail, congruent
        (100, 4096 * 3, 0x10_0000),    // not congruent
        (5, 10, 0x10_0005),            // within a page
        (4090, 10, 0x10_0ffa),         // across two pages, none whole
    ] {
        let memory = GuestMemory::new(32 << 20, HugePages::None).unwrap();
        memory.place_file(&source, offset, size, address).unwrap();
        let expected = &bytes[offset as usize..(offset + size) as usize];
        assert_eq!(
            read(&memory, address, size as usize),
            expected,
            "{offset} {size} {address:#x}"
        );
        assert_eq!(read(&memory, address - 1, 1), [0]);
        assert_eq!(read(&memory, address + size, 4096), [0; 4096]);
    }
}

#[test]
fn a_guests_writes_do_not_reach_the_file() {
    let bytes = pattern(8192);
    let source = file(&bytes);
    let memory = GuestMemory::new(32 << 20, HugePages::None).unwrap();
    memory.place_file(&source, 0, 8192, 0x10_0000).unwrap();
    memory.write(0x10_0000, &[0; 8192]).unwrap();
    let other = GuestMemory::new(32 << 20, HugePages::None).unwrap();
    other.place_file(&source, 0, 8192, 0x10_0000).unwrap();
    assert_eq!(read(&other, 0x10_0000, 8192), bytes);
}

#[test]
fn addresses_outside_memory_are_refused() {
    let memory = GuestMemory::new(32 << 20, HugePages::None).unwrap();
    let source = file(&pattern(8192));
    for address in [(32 << 20) - 4096, 32 << 20, 0xc000_0000, u64::MAX - 4095] {
        assert!(memory.place_file(&source, 0, 8192, address).is_err());
        assert!(memory.write(address, &[1; 8192]).is_err());
    }
    assert_eq!(memory.read_u16(u64::MAX), None);
}

#[test]
fn a_file_shorter_than_promised_is_an_error() {
    let memory = GuestMemory::new(32 << 20, HugePages::None).unwrap();
    assert!(
        memory
            .place_file(&file(&[1, 2, 3]), 0, 100, 0x10_0000)
            .is_err()
    );
}

#[test]
fn hundreds_of_gib_cost_nothing_until_they_are_touched() {
    let size = 512 << 30;
    let memory = GuestMemory::new(size, HugePages::None).unwrap();
    let top = 0x1_0000_0000 + size - 0xc000_0000;
    memory.write(top - 4096, &[7; 4096]).unwrap();
    assert_eq!(read(&memory, top - 1, 1), [7]);
    assert!(memory.write(top, &[7]).is_err());
}

#[test]
fn memory_above_the_hole_is_at_4_gib() {
    let memory = GuestMemory::new(4 << 30, HugePages::None).unwrap();
    memory.write(0x1_0000_0000, &[1]).unwrap();
    memory.write(0xbfff_ffff, &[1]).unwrap();
    assert!(memory.write(0xc000_0000, &[1]).is_err());
    assert!(
        memory
            .slots()
            .iter()
            .all(|(range, host)| range.start % HUGE_PAGE == host % HUGE_PAGE)
    );
}

#[test]
fn transparent_huge_pages_are_memory_like_any() {
    let memory = GuestMemory::new(32 << 20, HugePages::Transparent).unwrap();
    let bytes = pattern(3 * 4096 + 100);
    memory
        .place_file(&file(&bytes), 0, bytes.len() as u64, 0x10_0000)
        .unwrap();
    assert_eq!(read(&memory, 0x10_0000, bytes.len()), bytes);
}

#[test]
fn a_host_without_enough_huge_pages_gets_told_what_to_do() {
    // 16 TiB: no pool has as much.
    let error = GuestMemory::new(16 << 40, HugePages::TwoMiB).unwrap_err();
    let said = error.to_string();
    match error {
        Error::HugePages { needed, enough, .. } => {
            assert_eq!(needed, 8 << 20);
            assert!(enough >= needed, "{said}");
            let command = format!("echo {enough} > /proc/sys/vm/nr_hugepages");
            assert!(said.contains(&command), "{said}");
        }
        Error::NoHugePages => assert!(said.contains("huge_pages None"), "{said}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn shared_memory_is_all_in_a_file_whose_size_nobody_changes() {
    // A hole below 4 GiB, and memory on both sides of it.
    let memory = GuestMemory::shared(4 << 30, HugePages::None).unwrap();
    let bytes = pattern(3 * 4096 + 100);
    let source = file(&bytes);
    let length = bytes.len() as u64;
    memory.place_file(&source, 0, length, 0x10_0000).unwrap();
    memory.write(0x1_0000_1000, b"above").unwrap();
    assert_eq!(read(&memory, 0x10_0000, bytes.len()), bytes);
    let offsets: Vec<u64> = memory
        .memory()
        .iter()
        .map(|region| region.file_offset().unwrap().start())
        .collect();
    assert_eq!(offsets, [0, 3 << 30]);
    let first = memory.memory().iter().next().unwrap();
    let own = first.file_offset().unwrap().file();
    let at = |offset: u64, length: usize| {
        let mut found = vec![0; length];
        own.read_exact_at(&mut found, offset).unwrap();
        found
    };
    assert_eq!(at(0x10_0000, bytes.len()), bytes);
    assert_eq!(at((3 << 30) + 0x1000, 5), b"above");
    // What another process writes there is the guest's.
    own.write_all_at(b"others", 0x20_0000).unwrap();
    assert_eq!(read(&memory, 0x20_0000, 6), b"others");
    for size in [0, 4 << 20, 8 << 30] {
        assert!(own.set_len(size).is_err(), "{size}");
    }
    assert_eq!(own.metadata().unwrap().len(), 4 << 30);
    // Nothing is there that was not touched.
    assert!(own.metadata().unwrap().blocks() < 1000);
}

#[test]
fn memory_that_is_not_shared_is_in_no_file() {
    let memory = GuestMemory::new(32 << 20, HugePages::None).unwrap();
    assert!(memory.memory().iter().all(|r| r.file_offset().is_none()));
}

#[test]
fn shared_memory_may_have_large_pages() {
    let memory = GuestMemory::shared(32 << 20, HugePages::Transparent).unwrap();
    memory.write(0x10_0000, &[7; 100]).unwrap();
    assert_eq!(read(&memory, 0x10_0000, 100), [7; 100]);
    // 16 TiB: no pool has as much.
    let error = GuestMemory::shared(16 << 40, HugePages::TwoMiB).unwrap_err();
    let known = matches!(error, Error::HugePages { .. } | Error::NoHugePages);
    assert!(known, "{error:?}");
}

#[test]
fn what_is_used_is_found_and_zeroes_are_not() {
    let memory = GuestMemory::new(4 << 30, HugePages::None).unwrap();
    let bytes = pattern(3 * 4096 + 100);
    memory.write(0x10_0000, &bytes).unwrap();
    // Touched, and zero all the same.
    memory.write(0x20_0000, &[0; 8192]).unwrap();
    // Not touched, but a file is behind it.
    let mapped = pattern(2 * 4096);
    memory
        .place_file(&file(&mapped), 0, 2 * 4096, 0x40_0000)
        .unwrap();
    // Above the hole, which no file has.
    memory.write(0x1_0000_0000 + 5 * 4096, &[7]).unwrap();
    let mut found = Vec::new();
    let take = |offset, bytes: &[u8]| -> Result<(), Error> {
        found.push((offset, bytes.to_vec()));
        Ok(())
    };
    memory.each_used(take).unwrap();
    let places: Vec<(u64, usize)> = found.iter().map(|(at, b)| (*at, b.len() / 4096)).collect();
    let high = 0xc000_0000 + 5 * 4096;
    assert_eq!(places, [(0x10_0000, 4), (0x40_0000, 2), (high, 1)]);
    assert_eq!(found[0].1[..bytes.len()], bytes);
    assert_eq!(found[1].1, mapped);
    assert_eq!(memory.size(), 4 << 30);
}

#[test]
fn pages_are_found_by_their_places_in_a_file() {
    let memory = GuestMemory::new(4 << 30, HugePages::None).unwrap();
    let high = 4u64 << 30;
    for (address, byte) in [
        (0x1000, 1),
        (0x3000, 3),
        (high - 0x4000_0000 - 0x1000, 8),
        (high, 9),
    ] {
        memory.write(address, &[byte; 4096]).unwrap();
    }
    let low = memory.slots()[0].0.size / 4096;
    // 1, 2 and 3, of which 2 is zero; and the last below with the first above.
    let bits: Vec<u64> = vec![0b1110];
    let regions = [(&bits[..], low - 1), (&[0b11][..], 2)];
    let pages = husk_snapshot::Pages::of_bits(regions);
    let mut found = Vec::new();
    let take = |offset: u64, bytes: &[u8]| -> Result<(), Error> {
        assert!(bytes.len().is_multiple_of(4096));
        found.push((offset / 4096, bytes.len() / 4096, bytes[0]));
        Ok(())
    };
    memory.each_of(&pages, take).unwrap();
    assert_eq!(found, [(1, 1, 1), (3, 1, 3), (low - 1, 1, 8), (low, 1, 9)]);
}

#[test]
fn what_the_monitor_writes_is_noted_if_wanted() {
    let mut memory = GuestMemory::new(64 << 20, HugePages::None).unwrap();
    memory.write(0, &[1]).unwrap();
    memory.track();
    memory.write(0x1fff, &[1, 2]).unwrap();
    assert_eq!(memory.log().unwrap().take()[0][0], 0b110);
}

#[test]
fn pages_that_are_not_the_files_any_more_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    let size = 64u64 << 20;
    let file = File::create_new(&path).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(&[7; 8 * 4096], 0).unwrap();
    let file = File::open(&path).unwrap();
    let memory = GuestMemory::new(size, HugePages::None).unwrap();
    assert!(!memory.is_one_file());
    memory.place_file(&file, 0, size, 0).unwrap();
    assert!(memory.is_one_file());
    let own = || {
        let log = memory.new_log();
        memory.note_own_pages(&log).unwrap();
        let bits = log.bits();
        let words = bits[0].iter().zip(0..).filter(|(word, _)| **word != 0);
        words
            .map(|(word, at)| (at, *word))
            .collect::<Vec<(usize, u64)>>()
    };
    // Reading makes no page one's own, be it a hole or data; writing does, even what is there already.
    for address in [0, 0x5000, 0x10_0000] {
        memory.read_u16(address).unwrap();
    }
    assert_eq!(own(), []);
    memory.write(0x1000, &[7]).unwrap();
    memory.write(0x10_0000, &[0]).unwrap();
    assert_eq!(own(), [(0, 0b10), (4, 1)]);
    // Something else was put over it: nothing is known any more.
    memory.place_file(&file, 0, 4096, 0x2000).unwrap();
    assert!(!memory.is_one_file());
}
