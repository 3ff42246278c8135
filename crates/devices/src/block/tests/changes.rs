//! Opening, locking, limits, and what changes while the VM runs.

use super::*;
use crate::block::Error;
use husk_config::{RateLimiter, TokenBucket};
use std::time::{Duration, Instant};

fn drive(path: &Path, read_only: bool) -> Drive {
    let mut drive = Drive::new("disk0", path);
    drive.is_read_only = Some(read_only);
    drive
}

#[test]
fn one_vm_writes_or_many_read() {
    let folder = folder();
    let path = image(folder.path(), "disk", SIZE);
    let first = Block::new(&drive(&path, true)).unwrap();
    let second = Block::new(&drive(&path, true)).unwrap();
    let refused = Block::new(&drive(&path, false)).err().unwrap();
    assert!(matches!(refused, Error::Used(_)), "{refused}");
    let text = refused.to_string();
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains("read-only"), "{text}");
    drop((first, second));
    let writer = Block::new(&drive(&path, false)).unwrap();
    for read_only in [true, false] {
        let refused = Block::new(&drive(&path, read_only)).err().unwrap();
        assert!(refused.to_string().contains("another VM"), "{refused}");
    }
    drop(writer);
    Block::new(&drive(&path, false)).unwrap();
}

#[test]
fn what_is_no_disk_is_refused_at_once() {
    let folder = folder();
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    for path in [folder.path(), &fifo, Path::new("/dev/null")] {
        let refused = Block::new(&drive(path, true)).err().unwrap();
        assert!(matches!(refused, Error::NotADisk(_)), "{refused}");
    }
    let absent = folder.path().join("absent");
    let refused = Block::new(&drive(&absent, false)).err().unwrap();
    assert!(matches!(refused, Error::OpenToWrite(..)), "{refused}");
}

#[test]
fn what_is_no_whole_sector_is_not_seen() {
    let folder = folder();
    let path = image(folder.path(), "disk", SIZE);
    let guest = &mut Guest::new(|drive| drive.path_on_host = Some(path.clone()));
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1500).unwrap();
    guest.update(Some(&path), None).unwrap();
    assert_eq!(guest.capacity(), 2);
    guest.read(1, 512);
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 2, &[], 512).0, IOERR);
}

#[test]
fn a_disk_that_grows_or_shrinks_tells_its_driver() {
    for engine in ENGINES {
        for name_it in [false, true] {
            let guest = &mut Guest::new(|drive| drive.io_engine = Some(engine));
            guest.read(0, 512);
            guest.driver.registers.take_interrupt();
            let path = guest.path.clone();
            let path = name_it.then_some(path.as_path());
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&guest.path)
                .unwrap();
            for size in [2 * SIZE, SIZE / 2] {
                file.set_len(size).unwrap();
                guest.update(path, None).unwrap();
                assert_eq!(guest.capacity(), size / 512);
                assert!(guest.driver.registers.take_interrupt());
                guest.write(size / 512 - 1, &[3; 512]);
                let (status, _) = guest.request(VIRTIO_BLK_T_IN, size / 512, &[], 512);
                assert_eq!(status, IOERR);
                guest.driver.registers.take_interrupt();
                guest.update(path, None).unwrap();
                assert!(!guest.driver.registers.take_interrupt(), "nothing changed");
            }
        }
    }
}

#[test]
fn another_file_takes_the_place_of_the_first() {
    for engine in ENGINES {
        let guest = &mut Guest::new(|drive| drive.io_engine = Some(engine));
        let folder = folder();
        let other = folder.path().join("other");
        std::fs::write(&other, vec![9; 1 << 20]).unwrap();
        guest.read(0, 512);
        guest.driver.registers.take_interrupt();
        guest.update(Some(&other), None).unwrap();
        assert!(guest.driver.registers.take_interrupt());
        assert_eq!(guest.capacity(), 2048);
        assert!(guest.read(7, 512) == [9; 512]);
        guest.write(7, &[8; 512]);
        assert!(std::fs::read(&other).unwrap()[7 * 512..8 * 512] == [8; 512]);
        assert!(guest.file() == pattern(0, SIZE as usize));
        // The lock went along.
        drop(Block::new(&drive(&guest.path, false)).unwrap());
        assert!(Block::new(&drive(&other, false)).is_err());
        // And after a reset it is still the new one.
        guest.start(u64::MAX);
        assert!(guest.read(7, 512) == [8; 512]);
    }
}

#[test]
fn an_update_that_cannot_be_changes_nothing() {
    let guest = &mut Guest::new(|_| ());
    let folder = folder();
    let locked = image(folder.path(), "locked", SIZE / 2);
    let _lock = Block::new(&drive(&locked, true)).unwrap();
    for (path, word) in [
        (folder.path().join("absent"), "absent"),
        (locked, "in use"),
        (folder.path().into(), "cannot be opened"),
    ] {
        let refused = guest
            .update(Some(&path), Some(limit(1)))
            .unwrap_err()
            .to_string();
        assert!(refused.contains(word), "{refused}");
        assert_eq!(guest.capacity(), SECTORS);
        assert!(guest.read(9, 8192) == pattern(9 * 512, 8192));
    }
    let wrong = DeviceUpdate::Balloon {
        amount_mib: None,
        stats_polling_interval_s: None,
        hinting: None,
    };
    let answer = guest
        .transport
        .with_core(|core| core.with_device(move |d| d.update(&wrong)));
    assert!(answer.unwrap().is_err());
}

/// So many operations in the first place, and each second.
fn limit(ops: u64) -> RateLimiter {
    RateLimiter {
        bandwidth: None,
        ops: Some(TokenBucket {
            size: ops,
            one_time_burst: None,
            refill_time: 1000,
        }),
    }
}

/// Make `count` reads of a sector available at once.
fn queue_reads(guest: &mut Guest, count: u64) {
    for n in 0..count {
        let place = guest.buffers + n * 4096;
        let head = header(VIRTIO_BLK_T_IN, n);
        let (buffers, _) = lay_out(&guest.driver, (place, &head), &[], 512, (512, 0));
        guest.driver.queues[0].add(&buffers, Layout::Indirect, place + 2048);
    }
    guest.driver.registers.notify(0);
}

#[test]
fn a_limit_stops_requests_and_lets_them_go_on() {
    for engine in ENGINES {
        let guest = &mut Guest::new(|drive| {
            drive.io_engine = Some(engine);
            drive.rate_limiter = Some(limit(100));
        });
        let began = Instant::now();
        queue_reads(guest, 120);
        (0..120).for_each(|_| {
            guest.driver.wait_used(0);
        });
        // 100 are there at first, and 20 come with 100 a second.
        assert!(
            began.elapsed() >= Duration::from_millis(180),
            "{:?}",
            began.elapsed()
        );
    }
}

#[test]
fn a_limit_on_bytes_counts_data_both_ways_and_lets_large_requests_pass() {
    let guest = &mut Guest::new(|drive| {
        let size = 64 << 10;
        let bucket = TokenBucket {
            size,
            one_time_burst: None,
            refill_time: 100,
        };
        drive.rate_limiter = Some(RateLimiter {
            bandwidth: Some(bucket),
            ops: None,
        });
    });
    let began = Instant::now();
    // The first is a debt of 100 ms, the second waits for it and for a full bucket.
    guest.read(0, 128 << 10);
    guest.write(0, &[0; 128 << 10]);
    assert!(
        began.elapsed() >= Duration::from_millis(190),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_limit_is_lifted_while_requests_wait_for_it() {
    let guest = &mut Guest::new(|drive| drive.rate_limiter = Some(limit(1)));
    queue_reads(guest, 200);
    guest.driver.wait_used(0);
    guest.update(None, Some(limit(0))).unwrap();
    (0..199).for_each(|_| {
        guest.driver.wait_used(0);
    });
    guest.update(None, Some(limit(2))).unwrap();
    queue_reads(guest, 3);
    (0..2).for_each(|_| {
        guest.driver.wait_used(0);
    });
    // One waits; a reset does not.
    guest.start(u64::MAX);
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    for direct in [false, true] {
        let guest = &mut Guest::new(|drive| {
            drive.io_engine = Some(IoEngine::Async);
            drive.direct = direct;
        });
        for turn in 0..30_u8 {
            for n in 0..60 {
                let place = guest.buffers + n * (64 << 10);
                let head = header(VIRTIO_BLK_T_IN, n * 100);
                let (buffers, _) =
                    lay_out(&guest.driver, (place, &head), &[], 32 << 10, (32 << 10, 0));
                let table = place + (60 << 10);
                guest.driver.queues[0].add(&buffers, Layout::Indirect, table);
            }
            guest.driver.registers.notify(0);
            guest.driver.registers.set_status(0);
            assert_eq!(guest.driver.registers.status(), 0);
            // The memory is the guest's again: nothing is written into it any more.
            let fill = vec![turn; 60 * (64 << 10)];
            let place = GuestAddress(guest.buffers);
            guest.driver.mem.write_slice(&fill, place).unwrap();
            std::thread::sleep(Duration::from_millis(1));
            let mut now = vec![0; fill.len()];
            guest.driver.mem.read_slice(&mut now, place).unwrap();
            assert!(now == fill, "written after the reset");
            guest.start(u64::MAX);
        }
        assert!(guest.read(5, 4096) == pattern(5 * 512, 4096));
    }
}
