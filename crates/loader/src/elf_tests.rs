use crate::Error;
use crate::kernel::{Format, Segment};
use crate::testing::{Part, Random, elf, load, note, notes, open, sample_elf};

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn segments_come_sorted_with_places_in_the_file() {
    let file = elf(
        0x3001,
        &[load(0x3000, b"high", 100), load(0x1000, b"low", 3)],
    );
    let kernel = open(&file).unwrap();
    assert_eq!(kernel.format, Format::Elf);
    assert_eq!(
        (kernel.entry, kernel.pvh_entry, kernel.setup_header),
        (0x3001, None, None)
    );
    let at = 64 + 2 * 56;
    let low = Segment {
        file_offset: at + 4,
        file_size: 3,
        address: 0x1000,
        memory_size: 3,
    };
    let high = Segment {
        file_offset: at,
        file_size: 4,
        address: 0x3000,
        memory_size: 100,
    };
    assert_eq!(kernel.segments, [low, high]);
}

#[test]
fn a_virtual_entry_becomes_physical() {
    let part = Part {
        virtual_: 0xffff_ffff_8100_0000,
        ..load(0x100_0000, &[0; 64], 0x1000)
    };
    assert_eq!(
        open(&elf(0xffff_ffff_8100_0040, std::slice::from_ref(&part)))
            .unwrap()
            .entry,
        0x100_0040
    );
    assert_eq!(open(&elf(0x100_0040, &[part])).unwrap().entry, 0x100_0040);
}

#[test]
fn an_entry_outside_all_segments_is_refused() {
    for entry in [0, 0x2000, u64::MAX] {
        let error = open(&elf(entry, &[load(0x1000, b"code", 0x1000)])).unwrap_err();
        assert!(error.to_string().contains("entry point"), "{error}");
    }
}

#[test]
fn the_pvh_entry_is_found_behind_other_notes() {
    for descriptor in [&0x1008u32.to_le_bytes()[..], &0x1008u64.to_le_bytes()[..]] {
        let mut all = note(b"Linux\0", 0x101, b"\0");
        all.extend(note(b"GNU\0", 18, &[1, 2, 3, 4]));
        all.extend(note(b"Xen\0", 18, descriptor));
        let kernel = open(&elf(0x1000, &[load(0x1000, &[0; 16], 16), notes(all)])).unwrap();
        assert_eq!(kernel.pvh_entry, Some(0x1008));
    }
}

#[test]
fn notes_far_into_the_file_are_read_too() {
    let parts = [
        load(0x1000, &[0x90; 100_000], 100_000),
        notes(note(b"Xen\0", 18, &[0, 0x20, 0, 0])),
    ];
    assert_eq!(open(&elf(0x1000, &parts)).unwrap().pvh_entry, Some(0x2000));
}

#[test]
fn malformed_notes_are_no_pvh_entry_and_no_error() {
    let good = note(b"Xen\0", 18, &0x1008u32.to_le_bytes());
    let mut cases: Vec<Vec<u8>> = (0..good.len()).map(|end| good[..end].to_vec()).collect();
    for at in [0, 4] {
        for size in [1u32, 0x7fff_ffff, 0xffff_fffc, u32::MAX] {
            let mut bad = good.clone();
            put(&mut bad, at, &size.to_le_bytes());
            cases.push(bad);
        }
    }
    // An entry where the kernel has no code, and one that no 32-bit processor mode reaches.
    cases.push(note(b"Xen\0", 18, &0x9000u32.to_le_bytes()));
    cases.push(note(b"Xen\0", 18, &0x1_0000_1000u64.to_le_bytes()));
    for case in cases {
        let kernel = open(&elf(
            0x1000,
            &[load(0x1000, &[0; 16], 16), notes(case.clone())],
        ));
        assert_eq!(kernel.unwrap().pvh_entry, None, "{case:x?}");
    }
}

#[test]
fn notes_beyond_the_file_are_truncation() {
    let mut file = sample_elf();
    put(&mut file, 64 + 2 * 56 + 32, &u64::MAX.to_le_bytes());
    // Of a note segment that claims 2^64 bytes, the part that is read must be in the file.
    assert!(matches!(open(&file), Err(Error::Truncated { .. })));
}

#[test]
fn overlapping_segments_are_refused_and_touching_ones_are_not() {
    let pair = |second| {
        elf(
            0x1000,
            &[load(0x1000, b"a", 0x1000), load(second, b"b", 0x1000)],
        )
    };
    assert!(open(&pair(0x2000)).is_ok());
    for second in [0x1fff, 0x1000, 0x800] {
        assert!(
            matches!(open(&pair(second)), Err(Error::Overlap { .. })),
            "{second:#x}"
        );
    }
}

#[test]
fn files_for_other_machines_say_so() {
    let mut file = sample_elf();
    put(&mut file, 18, &183u16.to_le_bytes());
    assert!(matches!(
        open(&file),
        Err(Error::Machine { machine: 183, .. })
    ));
    put(&mut file, 4, &[1]);
    assert!(matches!(open(&file), Err(Error::Elf32 { .. })));
    let mut file = sample_elf();
    put(&mut file, 5, &[2]);
    assert!(open(&file).unwrap_err().to_string().contains("big-endian"));
}

#[test]
fn files_without_anything_to_load_say_so() {
    for parts in [&[][..], &[notes(Vec::new())], &[load(0x1000, b"", 0)]] {
        assert!(matches!(open(&elf(0x1000, parts)), Err(Error::Elf { .. })));
    }
    let mut file = sample_elf();
    put(&mut file, 16, &1u16.to_le_bytes());
    assert!(open(&file).unwrap_err().to_string().contains("object file"));
}

#[test]
fn program_header_fields_at_their_extremes_are_errors() {
    // Offset, physical address, file size and memory size of the first header.
    for (field, name) in [
        (8, "offset"),
        (24, "address"),
        (32, "file size"),
        (40, "memory size"),
    ] {
        for value in [u64::MAX, u64::MAX - 1, 1 << 63, 1 << 52] {
            let mut file = sample_elf();
            put(&mut file, 64 + field, &value.to_le_bytes());
            assert!(open(&file).is_err(), "{name} {value:#x}");
        }
    }
    let mut file = sample_elf();
    put(&mut file, 64 + 40, &1u64.to_le_bytes());
    assert!(matches!(
        open(&file),
        Err(Error::ProgramHeader { index: 0, .. })
    ));
}

#[test]
fn header_fields_at_their_extremes_are_errors() {
    for (at, bytes) in [
        (32, &[0xff; 8][..]),
        (54, &[0xff; 2]),
        (56, &[0xff; 2]),
        (54, &[0; 2]),
    ] {
        let mut file = sample_elf();
        put(&mut file, at, bytes);
        assert!(open(&file).is_err(), "{at}");
    }
}

#[test]
fn every_shorter_file_is_an_error() {
    let file = elf(
        0x1000,
        &[
            load(0x1000, b"some code", 16),
            notes(note(b"Xen\0", 18, &[0; 4])),
        ],
    );
    assert!(open(&file).is_ok());
    for end in 0..file.len() {
        let error = open(&file[..end]).unwrap_err();
        assert!(
            end < 64 || matches!(error, Error::Truncated { .. }),
            "{end}: {error}"
        );
    }
}

#[test]
fn mutated_files_never_panic() {
    let file = elf(
        0x1000,
        &[
            load(0x1000, b"some code", 16),
            load(0x3000, b"data", 0x100),
            notes(note(b"Xen\0", 18, &0x1008u32.to_le_bytes())),
        ],
    );
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut opened = 0;
    for _ in 0..3000 {
        let mut mutated = file.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(mutated.len());
            mutated[at] = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6)];
        }
        if let Ok(kernel) = open(&mutated) {
            opened += 1;
            assert!(kernel.segments.iter().all(|s| {
                s.file_size <= s.memory_size
                    && (s.file_size == 0 || s.file_offset + s.file_size <= file.len() as u64)
                    && s.address + s.memory_size <= 1 << 52
            }));
        }
    }
    assert!(
        opened > 0,
        "the mutations are too harsh to test what comes after the header"
    );
}
