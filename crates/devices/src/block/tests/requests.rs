//! Requests and their answers.

use super::*;
use husk_config::CacheType;
use std::os::unix::fs::MetadataExt;

/// For each engine, with and without O_DIRECT.
fn everywhere(test: impl Fn(&mut Guest), change: impl Fn(&mut Drive)) {
    for engine in ENGINES {
        for direct in [false, true] {
            eprintln!("--- {engine:?}, direct: {direct}");
            test(&mut Guest::new(|drive| {
                drive.io_engine = Some(engine);
                drive.direct = direct;
                change(drive);
            }));
        }
    }
}

#[test]
fn what_is_written_is_read_again_and_is_in_the_file() {
    everywhere(
        |guest| {
            assert!(guest.read(3, 5 * 512) == pattern(3 * 512, 5 * 512));
            let data = pattern(77, 1 << 20);
            guest.write(1000, &data);
            assert!(guest.read(1000, 1 << 20) == data);
            guest.write(SECTORS - 1, &data[..512]);
            let file = guest.file();
            assert!(file[1000 * 512..][..1 << 20] == data);
            assert!(file[SIZE as usize - 512..] == data[..512]);
            assert!(file[..1000 * 512] == pattern(0, 1000 * 512));
        },
        |_| (),
    );
}

#[test]
fn buffers_may_be_split_and_placed_anyhow() {
    everywhere(
        |guest| {
            for (part, gap, skew) in [(512, 512, 0), (512, 7, 1), (100, 3, 5), (4096, 1, 0)] {
                let driver = &mut guest.driver;
                let place = guest.buffers + skew;
                let data = pattern(part as u64, 24 * 512);
                let write = header(VIRTIO_BLK_T_OUT, 64);
                let (buffers, status) = lay_out(driver, (place, &write), &data, 0, (part, gap));
                assert_eq!(send(driver, 0, &buffers, status).0, OK);
                let read = header(VIRTIO_BLK_T_IN, 64);
                let (buffers, status) =
                    lay_out(driver, (place, &read), &[], data.len(), (part, gap));
                let (status, back) = send(driver, 0, &buffers, status);
                assert_eq!(status, OK);
                assert!(back == data, "{part} {gap} {skew}");
                assert!(guest.file()[64 * 512..][..data.len()] == data);
            }
        },
        |_| (),
    );
}

#[test]
fn header_data_and_status_may_share_a_descriptor() {
    // 2.7.4.1: a device makes no assumptions about where descriptors end.
    let mut guest = Guest::new(|_| ());
    let place = guest.buffers;
    let mut all = header(VIRTIO_BLK_T_OUT, 5).to_vec();
    all.extend([0x5a; 512]);
    guest
        .driver
        .mem
        .write_slice(&all, GuestAddress(place))
        .unwrap();
    let readable = vec![(place, 9), (place + 9, 519)];
    let buffers = Buffers {
        readable,
        writable: vec![(place + 8192, 1)],
    };
    assert_eq!(send(&mut guest.driver, 0, &buffers, place + 8192).0, OK);
    let head = header(VIRTIO_BLK_T_IN, 5);
    guest
        .driver
        .mem
        .write_slice(&head, GuestAddress(place))
        .unwrap();
    let buffers = Buffers {
        readable: vec![(place, 16)],
        writable: vec![(place + 4096, 513)],
    };
    let (status, data) = send(&mut guest.driver, 0, &buffers, place + 4096 + 512);
    assert_eq!((status, data), (OK, vec![0x5a; 512]));
}

#[test]
fn requests_that_cannot_be_are_answered_with_an_error_and_change_nothing() {
    everywhere(
        |guest| {
            let before = guest.file();
            let max = u64::MAX;
            for (kind, sector, length) in [
                (VIRTIO_BLK_T_IN, SECTORS, 512),
                (VIRTIO_BLK_T_IN, SECTORS - 1, 1024),
                (VIRTIO_BLK_T_IN, max, 512),
                (VIRTIO_BLK_T_IN, max / 512, 512),
                (VIRTIO_BLK_T_IN, max / 512 + 2, 512),
                (VIRTIO_BLK_T_IN, 0, 511),
                (VIRTIO_BLK_T_IN, 0, 1),
            ] {
                let (status, data) = guest.request(kind, sector, &[], length);
                assert_eq!(status, IOERR, "reading {length} at {sector}");
                assert!(data.iter().all(|&byte| byte == 0xee), "memory was written");
                let (status, _) = guest.request(VIRTIO_BLK_T_OUT, sector, &vec![1; length], 0);
                assert_eq!(status, IOERR, "writing {length} at {sector}");
            }
            for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 26, 1 << 31, u32::MAX] {
                assert_eq!(guest.request(kind, 0, &[0; 512], 512).0, UNSUPP, "{kind}");
            }
            assert!(guest.file() == before);
        },
        |_| (),
    );
}

#[test]
fn a_request_without_room_for_an_answer_needs_a_reset_and_one_without_header_does_not() {
    let mut guest = Guest::new(|_| ());
    let place = guest.buffers;
    let short = Buffers {
        readable: vec![(place, 15)],
        writable: vec![(place + 64, 1)],
    };
    assert_eq!(send(&mut guest.driver, 0, &short, place + 64).0, IOERR);
    let mute = Buffers {
        readable: vec![(place, 16)],
        writable: vec![],
    };
    guest.driver.queues[0].add(&mute, Layout::Direct, 0);
    guest.driver.registers.notify(0);
    let until = std::time::Instant::now() + husk_virtio::testing::PATIENCE;
    while guest.driver.registers.status() & 0x40 == 0 {
        assert!(std::time::Instant::now() < until, "no reset is asked for");
        std::thread::yield_now();
    }
    guest.start(u64::MAX);
    guest.read(0, 512);
}

#[test]
fn a_file_that_was_cut_gives_errors_and_no_other_data() {
    everywhere(
        |guest| {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&guest.path)
                .unwrap();
            file.set_len(SIZE / 2).unwrap();
            let (status, _) = guest.request(VIRTIO_BLK_T_IN, SECTORS / 2, &[], 4096);
            assert_eq!(status, IOERR);
            let (status, _) = guest.request(VIRTIO_BLK_T_IN, SECTORS / 2 - 8, &[], 8192);
            assert_eq!(status, IOERR, "half of it is there");
            assert!(guest.read(0, 4096) == pattern(0, 4096));
            std::fs::remove_file(&guest.path).unwrap();
            assert!(
                guest.read(0, 4096) == pattern(0, 4096),
                "the open file lives on"
            );
            std::fs::write(&guest.path, b"").unwrap();
        },
        |drive| drive.is_read_only = Some(true),
    );
}

#[test]
fn the_id_is_the_drives() {
    let mut guest = Guest::new(|drive| drive.drive_id = "a_name_of_more_than_20_bytes".into());
    let (status, id) = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, id), (OK, b"a_name_of_more_than_".to_vec()));
    let mut guest = Guest::new(|drive| drive.drive_id = "root".into());
    let (status, id) = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..5]), (OK, &b"root\0"[..]));
    let (_, id) = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[], 2);
    assert_eq!(id, b"ro");
}

#[test]
fn flushes_are_offered_with_the_writeback_cache_only() {
    everywhere(
        |guest| {
            guest.write(0, &[1; 512]);
            assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
            // A driver that knows no flush: its writes are flushed for it.
            guest.start(!(1 << VIRTIO_BLK_F_FLUSH));
            guest.write(9, &[2; 1024]);
            assert!(guest.read(9, 1024) == [2; 1024]);
            assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, UNSUPP);
        },
        |drive| drive.cache_type = CacheType::Writeback,
    );
    let mut guest = Guest::new(|_| ());
    assert_eq!(guest.driver.features & 1 << VIRTIO_BLK_F_FLUSH, 0);
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, UNSUPP);
}

/// virtio_blk_discard_write_zeroes.
pub(super) fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let all = u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96;
    all.to_le_bytes().to_vec()
}

fn blocks(guest: &Guest) -> u64 {
    std::fs::metadata(&guest.path).unwrap().blocks()
}

#[test]
fn a_discard_gives_the_hosts_disk_back() {
    everywhere(
        |guest| {
            let before = blocks(guest);
            let two = [segment(0, 2048, 0), segment(4096, 4096, 0)].concat();
            assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &two, 0).0, OK);
            assert!(
                blocks(guest) <= before - 6000,
                "{before} to {}",
                blocks(guest)
            );
            assert!(guest.read(0, 4096) == [0; 4096]);
            assert!(guest.read(2048, 4096) == pattern(1 << 20, 4096));
            assert_eq!(guest.file().len() as u64, SIZE);
        },
        |_| (),
    );
}

#[test]
fn zeroes_are_written_with_or_without_a_hole() {
    everywhere(
        |guest| {
            let before = blocks(guest);
            let keep = segment(16, 1024, 0);
            assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &keep, 0).0, OK);
            assert!(blocks(guest) >= before);
            let file = guest.file();
            assert!(file[16 * 512..1040 * 512].iter().all(|&byte| byte == 0));
            assert!(file[..16 * 512] == pattern(0, 16 * 512));
            assert!(file[1040 * 512..] == pattern(1040 * 512, file.len() - 1040 * 512));
            let unmap = segment(2048, 4096, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
            assert_eq!(guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &unmap, 0).0, OK);
            assert!(blocks(guest) < before - 4000);
            assert!(guest.read(2048, 4096) == [0; 4096]);
        },
        |_| (),
    );
}

#[test]
fn zeroes_are_written_where_the_host_cannot_make_them() {
    // tmpfs has no FALLOC_FL_ZERO_RANGE.
    for engine in ENGINES {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = image(folder.path(), "disk", SIZE);
        let guest = &mut Guest::new(|drive| {
            drive.io_engine = Some(engine);
            drive.path_on_host = Some(path.clone());
        });
        let segment = segment(1, 8001, 0);
        assert_eq!(
            guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &segment, 0).0,
            OK
        );
        let file = std::fs::read(&path).unwrap();
        assert!(file[512..8002 * 512].iter().all(|&byte| byte == 0));
        assert!(file[..512] == pattern(0, 512));
        assert!(file[8002 * 512..] == pattern(8002 * 512, file.len() - 8002 * 512));
    }
}

#[test]
fn segments_of_discards_and_zeroes_are_checked() {
    let guest = &mut Guest::new(|_| ());
    let before = guest.file();
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    for kind in [discard, zeroes] {
        for (data, status) in [
            (segment(SECTORS, 1, 0), IOERR),
            (segment(SECTORS - 1, 2, 0), IOERR),
            (segment(u64::MAX, u32::MAX, 0), IOERR),
            (segment(u64::MAX / 512, 8, 0), IOERR),
            (segment(0, 8, 2), UNSUPP),
            (segment(0, 8, 1 << 31), UNSUPP),
            (Vec::new(), IOERR),
            (vec![0; 15], IOERR),
            (vec![0; 17], IOERR),
            (segment(0, 0, 0).repeat(65), IOERR),
            (segment(0, 0, 0).repeat(64), OK),
            ([segment(0, 8, 0), segment(SECTORS, 1, 0)].concat(), IOERR),
        ] {
            let (answer, _) = guest.request(kind, 0, &data, 0);
            assert_eq!(answer, status, "{kind}: {data:?}");
        }
    }
    assert_eq!(guest.request(discard, 0, &segment(0, 8, 1), 0).0, UNSUPP);
    assert!(guest.file() == before);
}

#[test]
fn the_driver_is_told_what_the_disk_is_like() {
    let guest = Guest::new(|drive| drive.queues = 4);
    assert_eq!(guest.capacity(), SECTORS);
    assert_eq!(u32::from_le_bytes(guest.config(12)), 510);
    assert_eq!(u32::from_le_bytes(guest.config(20)), 512);
    assert_eq!(
        guest.config(24),
        [3, 0],
        "eight logical blocks in a physical one"
    );
    assert_eq!(u16::from_le_bytes(guest.config(34)), 4);
    assert_eq!(guest.driver.queues.len(), 4);
    let offered = guest.driver.features;
    for bit in [
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        assert_ne!(offered & 1 << bit, 0, "{bit}");
    }
    let guest = Guest::new(|drive| drive.is_read_only = Some(true));
    let offered = guest.driver.features;
    assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
    for bit in [
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        assert_eq!(offered & 1 << bit, 0, "{bit}");
    }
}

#[test]
fn nothing_can_be_changed_on_a_read_only_disk() {
    everywhere(
        |guest| {
            let before = guest.file();
            assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0).0, IOERR);
            for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
                assert_eq!(guest.request(kind, 0, &segment(0, 8, 0), 0).0, UNSUPP);
            }
            assert!(guest.read(0, 512) == pattern(0, 512));
            assert!(guest.file() == before);
        },
        |drive| drive.is_read_only = Some(true),
    );
}

#[test]
fn many_requests_on_many_queues_are_all_answered_with_their_own_data() {
    for engine in ENGINES {
        let guest = &mut Guest::new(|drive| {
            drive.io_engine = Some(engine);
            drive.queues = 3;
        });
        // More than the ring takes at once, by far.
        for turn in 0..6 {
            let mut wanted = Vec::new();
            for n in 0..600_u64 {
                let queue = n as usize % 3;
                let sector = (n * 37 + turn) % (SECTORS - 4);
                let place = guest.buffers + n * 6144;
                let head = header(VIRTIO_BLK_T_IN, sector);
                let (buffers, status) =
                    lay_out(&guest.driver, (place, &head), &[], 2048, (1024, 1024));
                let table = place + 5632;
                let head = guest.driver.queues[queue].add(&buffers, Layout::Indirect, table);
                wanted.push((queue, head, sector, buffers, status));
                if n % 50 == 49 {
                    (0..3).for_each(|queue| guest.driver.registers.notify(queue));
                }
            }
            (0..600).for_each(|n| {
                guest.driver.wait_used(n % 3);
            });
            for (_, _, sector, buffers, status) in wanted {
                let status: u8 = guest.driver.mem.read_obj(GuestAddress(status)).unwrap();
                assert_eq!(status, OK);
                let data = buffers.written(&guest.driver.mem, 2048);
                assert!(data == pattern(sector * 512, 2048), "sector {sector}");
            }
        }
    }
}
