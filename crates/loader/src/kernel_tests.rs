use std::fs;
use std::io::{Read, Seek};
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::{ACPI, ACPI_WORD, Format, Kernel, contains, kernel_release};
use crate::cache::Identity;
use crate::testing::{Random, bzimage, elf, load, open, pack, sample_elf, write};
use crate::{Cache, Compression, Error};
use std::fs::File;
use std::os::unix::fs::FileExt;

const READABLE: [Compression; 6] = [
    Compression::Gzip,
    Compression::Bzip2,
    Compression::Lzma,
    Compression::Xz,
    Compression::Lz4,
    Compression::Zstd,
];

fn sample_bzimage(compression: Compression) -> Vec<u8> {
    let elf = sample_elf();
    bzimage(compression, pack(compression, &elf), elf.len() as u32)
}

fn contents(kernel: &Kernel) -> Vec<u8> {
    let mut file = &kernel.file;
    let mut data = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut data).unwrap();
    data
}

#[test]
fn a_bzimage_of_each_compression_is_its_elf() {
    for compression in READABLE {
        let image = sample_bzimage(compression);
        let kernel = open(&image).unwrap_or_else(|error| panic!("{compression}: {error:?}"));
        assert_eq!(contents(&kernel), sample_elf(), "{compression}");
        assert_eq!(kernel.format, Format::BzImage(compression));
        assert_eq!(
            (kernel.entry, kernel.pvh_entry),
            (0x10_0010, Some(0x10_0020))
        );
        assert_eq!(kernel.setup_header.as_deref(), Some(&image[0x1f1..0x26c]));
    }
}

#[test]
fn a_compressed_elf_of_each_compression_is_its_elf() {
    for compression in READABLE {
        let kernel = open(&pack(compression, &sample_elf())).unwrap();
        assert_eq!(contents(&kernel), sample_elf(), "{compression}");
        assert_eq!(
            (kernel.format, kernel.setup_header),
            (Format::Packed(compression), None)
        );
    }
}

#[test]
fn blocks_beyond_lz4s_first_are_unpacked_too() {
    let elf = elf(0x10_0000, &[load(0x10_0000, &vec![7; 17 << 20], 17 << 20)]);
    let packed = pack(Compression::Lz4, &elf);
    let kernel = open(&bzimage(Compression::Lz4, packed, elf.len() as u32)).unwrap();
    assert_eq!(contents(&kernel), elf);
}

#[test]
fn lzo_and_unknown_payloads_say_how_to_unpack() {
    let error = open(&sample_bzimage(Compression::Lzo)).unwrap_err();
    assert!(matches!(
        error,
        Error::Unsupported {
            compression: Compression::Lzo,
            ..
        }
    ));
    assert!(error.to_string().contains("extract-vmlinux"));
    let error = open(&bzimage(Compression::Xz, b"nothing known".to_vec(), 1)).unwrap_err();
    assert!(matches!(error, Error::UnknownPayload { .. }));
}

#[test]
fn a_size_that_does_not_match_the_trailer_is_damage() {
    let elf = sample_elf();
    for size in [0, elf.len() as u32 - 1, elf.len() as u32 + 1, u32::MAX] {
        let image = bzimage(Compression::Xz, pack(Compression::Xz, &elf), size);
        let error = open(&image).unwrap_err();
        assert!(
            matches!(error, Error::UnpackedSize { .. } | Error::TooLarge { .. }),
            "{size}: {error}"
        );
    }
}

#[test]
fn damaged_data_are_errors() {
    // zstd's and lz4's test frames hold the data without a checksum.
    for compression in [Compression::Gzip, Compression::Bzip2, Compression::Xz] {
        let mut image = sample_bzimage(compression);
        let middle = image.len() - 400;
        image[middle] ^= 0x55;
        assert!(
            matches!(open(&image), Err(Error::Damaged { .. })),
            "{compression}"
        );
    }
}

#[test]
fn what_unpacks_to_something_else_says_what() {
    let text = b"just text, and more of it".repeat(10);
    let image = bzimage(Compression::Gzip, pack(Compression::Gzip, &text), 0);
    assert!(
        open(&image)
            .unwrap_err()
            .to_string()
            .contains("looks like text")
    );
}

#[test]
fn header_numbers_at_their_extremes_are_errors() {
    for at in [0x248, 0x24c] {
        for value in [0u32, 3, 0x7fff_ffff, u32::MAX] {
            let mut image = sample_bzimage(Compression::Xz);
            image[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert!(open(&image).is_err(), "{at:#x} {value:#x}");
        }
    }
    let mut image = sample_bzimage(Compression::Xz);
    image[0x206] = 7;
    assert!(matches!(
        open(&image),
        Err(Error::OldProtocol {
            major: 2,
            minor: 7,
            ..
        })
    ));
}

#[test]
fn every_shorter_bzimage_is_an_error() {
    for compression in READABLE {
        let tiny = elf(0x1000, &[load(0x1000, &[0xf4; 100], 100)]);
        let image = bzimage(compression, pack(compression, &tiny), tiny.len() as u32);
        assert!(open(&image).is_ok());
        // Behind the payload lie 100 bytes that belong to no one.
        for end in 0..image.len() - 100 {
            assert!(open(&image[..end]).is_err(), "{compression} {end}");
        }
        let packed = pack(compression, &sample_elf());
        for end in (0..packed.len() - 12).step_by(97) {
            assert!(open(&packed[..end]).is_err(), "{compression} {end}");
        }
    }
}

#[test]
fn mutated_bzimages_never_panic() {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for compression in READABLE {
        let tiny = elf(
            0x1000,
            &[load(0x1000, &b"all kinds of code".repeat(20), 4000)],
        );
        let image = bzimage(compression, pack(compression, &tiny), tiny.len() as u32);
        let headers = 0x1f1..0x270;
        let payload = 2048 + 64..image.len() - 100;
        for round in 0..150 {
            let mut mutated = image.clone();
            let range = if round % 3 == 0 {
                headers.clone()
            } else {
                payload.clone()
            };
            for _ in 0..=random.below(3) {
                let at = range.start + random.below(range.len());
                mutated[at] = [0, 1, 0x80, 0xff, random.below(256) as u8][random.below(5)];
            }
            let _ = open(&mutated);
        }
    }
}

#[test]
fn files_that_are_no_kernels_say_what_they_look_like() {
    let mut arm64 = vec![0; 0x100];
    arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let cases: [(&[u8], &str); 6] = [
        (&arm64, "arm64"),
        (b"MZ\x90\0 and so on", "EFI"),
        (b"#!/bin/sh\n", "script"),
        (b"0707010000", "initramfs"),
        (b"hello\n", "text"),
        (&[0; 600], "zeros"),
    ];
    for (bytes, expected) in cases {
        let message = open(bytes).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn paths_that_are_no_files_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let open = |path: &Path| Kernel::open(path, &Cache::disabled()).unwrap_err();
    assert!(matches!(open(directory.path()), Error::Directory { .. }));
    assert!(matches!(
        open(&directory.path().join("none")),
        Error::NotFound { .. }
    ));
    assert!(matches!(
        open(Path::new("/dev/null")),
        Error::NotRegular { .. }
    ));
    let empty = write(directory.path(), "empty", b"");
    assert!(matches!(open(&empty), Error::Empty { .. }));
    assert!(matches!(open(&empty.join("below")), Error::Read { .. }));
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(matches!(open(&socket), Error::Read { .. }));
}

#[test]
fn messages_are_one_line_even_for_strange_names() {
    let directory = tempfile::tempdir().unwrap();
    let path = write(directory.path(), "a\n\x1b[31mb", b"hello");
    let message = Kernel::open(&path, &Cache::disabled())
        .unwrap_err()
        .to_string();
    assert!(!message.contains(['\n', '\x1b']), "{message}");
}

#[test]
fn the_release_is_read_from_a_bzimage() {
    let directory = tempfile::tempdir().unwrap();
    let release = |bytes: &[u8]| kernel_release(&write(directory.path(), "kernel", bytes));
    let image = sample_bzimage(Compression::Gzip);
    assert_eq!(release(&image).as_deref(), Some("6.1.0-test+1"));
    assert_eq!(release(&sample_elf()), None);
    assert_eq!(release(&image[..0x504]), None);
    for bad in [
        &b"../../etc #1\0"[..],
        b" #1\0",
        b".. #1\0",
        b"\xff\xfe #1\0",
    ] {
        let mut image = image.clone();
        image[0x500..0x500 + bad.len()].copy_from_slice(bad);
        assert_eq!(release(&image), None, "{bad:?}");
    }
    for pointer in [0u16, 0x600, u16::MAX] {
        let mut image = image.clone();
        image[0x20e..0x210].copy_from_slice(&pointer.to_le_bytes());
        assert_eq!(release(&image), None, "{pointer:#x}");
    }
}

#[test]
fn a_second_open_uses_the_cached_kernel_and_a_damaged_one_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let path = write(directory.path(), "kernel", &sample_bzimage(Compression::Xz));
    let inode = |kernel: &Kernel| {
        use std::os::unix::fs::MetadataExt;
        kernel.file.metadata().unwrap().ino()
    };
    let first = Kernel::open(&path, &cache).unwrap();
    let second = Kernel::open(&path, &cache).unwrap();
    assert_eq!(inode(&first), inode(&second));
    assert_eq!(second.setup_header, first.setup_header);

    let entry = fs::read_dir(directory.path().join("cache"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .find(|entry| entry.metadata().unwrap().is_file())
        .unwrap();
    let size = entry.metadata().unwrap().len() as usize;
    for damage in [vec![], vec![1; 100], vec![0; size]] {
        fs::write(entry.path(), damage).unwrap();
        let kernel = Kernel::open(&path, &cache).unwrap();
        assert_eq!(contents(&kernel), sample_elf());
        assert_eq!(fs::read(entry.path()).unwrap(), sample_elf());
    }
}

#[test]
fn a_word_is_found_wherever_it_lies() {
    let mut file = tempfile::tempfile().unwrap();
    let chunk = 1 << 20;
    for at in [0, chunk - 10, chunk - 1, chunk, 2 * chunk + 5] {
        use std::io::{Seek, Write};
        let mut bytes = vec![b'x'; 3 * chunk];
        bytes[at..at + ACPI_WORD.len()].copy_from_slice(ACPI_WORD);
        file.rewind().unwrap();
        file.write_all(&bytes).unwrap();
        assert!(contains(&file, ACPI_WORD).unwrap(), "{at}");
        file.write_all_at(b"!", at as u64 + 3).unwrap();
        assert!(!contains(&file, ACPI_WORD).unwrap(), "{at}");
    }
}

#[test]
fn what_was_found_out_of_a_kernel_is_remembered() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::new(directory.path().join("cache"));
    let identity = |size| {
        let path = directory.path().join("f");
        std::fs::write(&path, vec![0; size]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH;
        file.set_modified(old).unwrap();
        Identity::of(&file.metadata().unwrap())
    };
    let one = identity(1);
    assert_eq!(cache.fact(ACPI, &one), None);
    cache.remember(ACPI, &one, true, false);
    // It has just been written, and may change without a trace.
    assert_eq!(cache.fact(ACPI, &one), None);
    let own = identity(3);
    cache.remember(ACPI, &own, true, true);
    assert_eq!(cache.fact(ACPI, &own), Some(true));
    let one = identity(1);
    std::thread::sleep(std::time::Duration::from_secs(4));
    cache.remember(ACPI, &one, true, false);
    assert_eq!(cache.fact(ACPI, &one), Some(true));
    assert_eq!(cache.fact("other", &one), None);
    cache.remember(ACPI, &one, false, false);
    assert_eq!(cache.fact(ACPI, &one), Some(false));
    assert_eq!(cache.fact(ACPI, &identity(2)), None);
}
