//! Disks whose file stays as it is.

use super::requests::segment;
use super::*;
use crate::block::{CLUSTER, Error, Overlay};
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// The last cluster is not whole, and neither is the last page of the file.
const ODD: u64 = SIZE - CLUSTER + 3 * 512;

/// A base with a pattern, and a drive with an overlay beside it.
struct Overlaid {
    folder: tempfile::TempDir,
    drive: Drive,
    size: u64,
}

impl Overlaid {
    fn new(engine: IoEngine, size: u64) -> Self {
        let folder = folder();
        let mut drive = Drive::new("disk0", image(folder.path(), "base", size));
        drive.io_engine = Some(engine);
        drive.overlay = Some(husk_config::Overlay {
            directory: Some(folder.path().into()),
        });
        drive.cache_type = husk_config::CacheType::Writeback;
        Self {
            folder,
            drive,
            size,
        }
    }

    fn guest(&self) -> Guest {
        self.guest_of(Block::new(&self.drive).unwrap())
    }

    fn guest_of(&self, device: Block) -> Guest {
        let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
        let mem = memory();
        let mmio = Mmio::new(Box::new(device), &thread, &mem);
        let transport = Arc::clone(&mmio.transport);
        let mut guest = Guest {
            driver: Driver::new(Box::new(mmio), mem),
            transport,
            path: self.drive.path().into(),
            _folder: folder(),
            buffers: 0,
        };
        guest.start(u64::MAX);
        guest
    }

    /// The base is as it was, and nothing lies beside it.
    fn assert_untouched(&self) {
        let now = std::fs::read(self.drive.path()).unwrap();
        assert!(
            now == pattern(0, self.size as usize),
            "the base has changed"
        );
        assert_eq!(std::fs::read_dir(self.folder.path()).unwrap().count(), 1);
    }
}

fn ranges(ends: &[(u64, u64)]) -> Vec<Range<u64>> {
    ends.iter().map(|&(start, end)| start..end).collect()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

#[test]
fn an_overlaid_disk_survives_every_driver() {
    for engine in ENGINES {
        let mut overlaid = Overlaid::new(engine, SIZE);
        overlaid.drive.queues = 2;
        check_device(&Subject {
            memory: husk_virtio::testing::memory,
            make: &|| Box::new(open_again(&overlaid.drive)),
            use_it: &|driver| use_disk(driver, false),
            use_again: None,
            eager: &[0, 1],
        });
        overlaid.assert_untouched();
    }
}

/// Against a disk that is a vector.
#[test]
fn whatever_is_done_the_guest_reads_what_it_wrote_over_the_base() {
    for (engine, seed) in [(0, 1), (1, 2), (0, 3), (1, 4)] {
        let overlaid = Overlaid::new(ENGINES[engine], ODD);
        let mut guest = overlaid.guest();
        let mut random = Random(seed);
        let mut model = pattern(0, ODD as usize);
        let sectors = ODD / 512;
        assert_eq!(guest.capacity(), sectors);
        for step in 0..600_u64 {
            // Near each other, so that they overlap; now and then at the very end.
            let most = if step % 7 == 0 { 300 } else { 20 };
            let count = 1 + random.below(most);
            let sector = match step % 11 {
                0 => sectors - count,
                1 => random.below(sectors - count),
                _ => random.below(400),
            };
            let bytes = (sector * 512) as usize..((sector + count) * 512) as usize;
            let what = format!("seed {seed}, step {step}: {count} sectors at {sector}");
            match random.below(8) {
                0..=2 => {
                    let data = vec![step as u8 | 1; bytes.len()];
                    guest.write(sector, &data);
                    model[bytes].copy_from_slice(&data);
                }
                3 => {
                    let data = segment(sector, count as u32, (step % 2) as u32);
                    let done = guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &data, 0);
                    assert_eq!(done.0, OK, "{what}");
                    model[bytes].fill(0);
                }
                4 => {
                    let data = segment(sector, count as u32, 0);
                    let done = guest.request(VIRTIO_BLK_T_DISCARD, 0, &data, 0);
                    assert_eq!(done.0, OK, "{what}");
                    // Nobody knows what is there then, but nothing that was never the guest's.
                    let now = guest.read(sector, bytes.len());
                    for (now, was) in now.iter().zip(&mut model[bytes]) {
                        assert!(*now == *was || *now == 0, "{what}");
                        *was = *now;
                    }
                }
                5 => assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK),
                _ => assert!(guest.read(sector, bytes.len()) == model[bytes], "{what}"),
            }
        }
        for sector in (0..sectors).step_by(1024) {
            let count = 1024.min(sectors - sector) as usize * 512;
            let wanted = &model[sector as usize * 512..][..count];
            assert!(guest.read(sector, count) == wanted, "at sector {sector}");
        }
        drop(guest);
        overlaid.assert_untouched();
    }
}

/// All of them begin before one is done.
#[test]
fn writes_to_parts_of_a_cluster_at_once_lose_nothing() {
    for engine in ENGINES {
        let overlaid = Overlaid::new(engine, SIZE);
        let mut guest = overlaid.guest();
        let mut model = pattern(0, SIZE as usize);
        let (place, driver) = (guest.buffers, &mut guest.driver);
        let mut statuses = Vec::new();
        // One sector of each two, of which each cluster has four; the last one of a cluster begins a longer write.
        for number in 0..64_u64 {
            let sector = 3 + 2 * number;
            let count = if number % 4 == 3 { 20 } else { 1 };
            let data = vec![number as u8 + 1; count * 512];
            let at = place + number * (48 << 10);
            let head = header(VIRTIO_BLK_T_OUT, sector + 1000 * (number % 4 / 3));
            let (buffers, status) = lay_out(driver, (at, &head), &data, 0, (1 << 20, 0));
            let first = (sector + 1000 * (number % 4 / 3)) as usize * 512;
            model[first..first + data.len()].copy_from_slice(&data);
            statuses.push(status);
            driver.queues[0].add(&buffers, Layout::Indirect, status.next_multiple_of(4096));
            if number % 4 == 3 {
                // Those that overlap come one after the other.
                driver.registers.notify(0);
                for _ in 0..4 {
                    driver.wait_used(0);
                }
            }
        }
        for status in statuses {
            let status: u8 = guest.driver.mem.read_obj(GuestAddress(status)).unwrap();
            assert_eq!(status, OK);
        }
        assert!(guest.read(0, 2 << 20) == model[..2 << 20]);
        drop(guest);
        overlaid.assert_untouched();
    }
}

#[test]
fn the_overlay_takes_as_much_as_was_written_and_gives_back_what_is_discarded() {
    for engine in ENGINES {
        let overlaid = Overlaid::new(engine, SIZE);
        let overlay = Overlay::create(overlaid.folder.path(), SIZE).unwrap();
        let file = overlay.file().try_clone().unwrap();
        let used = || file.metadata().unwrap().blocks() * 512;
        let device = Block::with_overlay(&overlaid.drive, None, overlay).unwrap();
        let mut guest = overlaid.guest_of(device);
        guest.read(0, 1 << 20);
        assert_eq!(used(), 0);
        guest.write(1024, &[7; 64 << 10]);
        guest.write(4097, &[8; 512]);
        assert!((68 << 10..=80 << 10).contains(&used()), "{}", used());
        // Also of what was never written.
        let all = segment(0, SECTORS as u32, 0);
        assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &all, 0).0, OK);
        assert!(used() <= 8 << 10, "{}", used());
        assert!(guest.read(1024, 64 << 10).iter().all(|&byte| byte == 0));
        assert!(guest.read(0, 4096) == pattern(0, 4096));
        // It waits for no other place than its own.
        let zeroes = segment(2048, 2048, 1);
        assert_eq!(
            guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroes, 0).0,
            OK
        );
        assert!(guest.read(2048, 1 << 20).iter().all(|&byte| byte == 0));
        assert!(used() <= 8 << 10, "{}", used());
    }
}

/// A host that takes nothing more fails what would be written, and what the guest had is still there.
#[test]
fn a_write_that_the_host_does_not_take_changes_nothing() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    for engine in ENGINES {
        let overlaid = Overlaid::new(engine, SIZE);
        let file = memfd_create("overlay", MemfdFlags::ALLOW_SEALING).unwrap();
        let file = File::from(file);
        let overlay = Overlay::from_file(file.try_clone().unwrap(), &[], SIZE).unwrap();
        let device = Block::with_overlay(&overlaid.drive, None, overlay).unwrap();
        let mut guest = overlaid.guest_of(device);
        let mut model = pattern(0, SIZE as usize);
        guest.write(8, &[5; 4096]);
        model[4096..8192].fill(5);
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        for (sector, length) in [(0, 512), (8, 4096), (9, 512), (64, 8192), (0, 1 << 20)] {
            let data = vec![9; length];
            let (status, _) = guest.request(VIRTIO_BLK_T_OUT, sector, &data, 0);
            assert_eq!(status, IOERR, "{length} bytes at {sector}");
        }
        for sector in [1, 80] {
            let zeroes = segment(sector, 16, 1);
            let (status, _) = guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroes, 0);
            assert_eq!(status, IOERR);
        }
        assert!(guest.read(0, 2 << 20) == model[..2 << 20]);
    }
}

#[test]
fn many_vms_share_a_base_while_nobody_writes_to_it() {
    let overlaid = Overlaid::new(IoEngine::Auto, SIZE);
    let (mut a, mut b) = (overlaid.guest(), overlaid.guest());
    a.write(0, &[1; 4096]);
    b.write(1, &[2; 512]);
    assert!(a.read(0, 4096) == [1; 4096]);
    let mut wanted = pattern(0, 4096);
    wanted[512..1024].fill(2);
    assert!(b.read(0, 4096) == wanted);
    let plain = Drive::new("disk0", overlaid.drive.path());
    let refused = Block::new(&plain).err().unwrap();
    assert!(matches!(refused, Error::Used(_)), "{refused}");
    drop((a, b));
    let _writer = open_again(&plain);
    let refused = Block::new(&overlaid.drive).err().unwrap();
    assert!(matches!(refused, Error::Written(_)), "{refused}");
}

#[test]
fn a_clone_goes_on_from_a_copy() {
    for engine in ENGINES {
        let overlaid = Overlaid::new(engine, ODD);
        let overlay = Overlay::create(overlaid.folder.path(), ODD).unwrap();
        let file = overlay.file().try_clone().unwrap();
        let base = File::open(overlaid.drive.path()).unwrap();
        let device = Block::with_overlay(&overlaid.drive, Some(base), overlay).unwrap();
        let mut first = overlaid.guest_of(device);
        let last = ODD / 512 - 1;
        first.write(16, &[1; 8192]);
        first.write(last, &[2; 512]);
        let end = ODD.div_ceil(CLUSTER);
        let written = [2..4, end - 1..end];
        let same = Overlay::from_file(file, &written, ODD).unwrap();
        assert_eq!(same.written(), written);
        let copy = same.copy(overlaid.folder.path()).unwrap();
        assert_eq!(copy.written(), written);
        let device = Block::with_overlay(&overlaid.drive, None, copy).unwrap();
        assert_eq!(device.overlay().unwrap().written(), written);
        let mut second = overlaid.guest_of(device);
        first.write(16, &[3; 512]);
        second.write(17, &[4; 512]);
        let mut wanted = [1; 8192];
        wanted[..512].fill(3);
        assert!(first.read(16, 8192) == wanted);
        wanted[..1024].copy_from_slice(&[[1; 512], [4; 512]].concat());
        assert!(second.read(16, 8192) == wanted);
        assert!(second.read(last, 512) == [2; 512]);
        assert!(second.read(last - 2, 1024) == pattern((last - 2) * 512, 1024));
        drop((first, second));
        overlaid.assert_untouched();
    }
}

#[test]
fn what_cannot_be_an_overlay_is_refused() {
    let mut overlaid = Overlaid::new(IoEngine::Sync, SIZE);
    let folder = overlaid.folder.path();
    let file = || tempfile::tempfile_in(folder).unwrap();
    for written in [
        &[(0, 2049)][..],
        &[(3, 3)],
        &[(3, 2)],
        &[(4, 6), (5, 7)],
        &[(4, 6), (1, 2)],
    ] {
        let written = ranges(written);
        let refused = Overlay::from_file(file(), &written, SIZE).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{written:?}");
    }
    assert!(Overlay::from_file(file(), &ranges(&[(0, 1 << 50)]), u64::MAX).is_err());
    let other = Overlay::create(folder, SIZE - 512).unwrap();
    let refused = Block::with_overlay(&overlaid.drive, None, other);
    let refused = refused.err().unwrap();
    assert!(matches!(refused, Error::ForeignOverlay(_)), "{refused}");

    // Nothing of it changes but its limits.
    let guest = overlaid.guest();
    let refused = guest.update(Some(overlaid.drive.path()), None).unwrap_err();
    assert!(refused.to_string().contains("overlay"), "{refused}");
    guest.update(None, None).unwrap();
    assert_eq!(guest.capacity(), SECTORS);
    drop(guest);

    let large = rustix::fs::memfd_create("large", rustix::fs::MemfdFlags::empty()).unwrap();
    rustix::fs::ftruncate(&large, (16 << 40) + 512).unwrap();
    let path = format!("/proc/self/fd/{}", large.as_raw_fd());
    overlaid.drive.path_on_host = Some(path.into());
    let refused = Block::new(&overlaid.drive).err().unwrap();
    assert!(matches!(refused, Error::OverlayTooLarge(_)), "{refused}");
    let nowhere = folder.join("nowhere");
    overlaid.drive.overlay = Some(husk_config::Overlay {
        directory: Some(nowhere.clone()),
    });
    overlaid.drive.path_on_host = Some(folder.join("base"));
    let refused = Block::new(&overlaid.drive).err().unwrap().to_string();
    assert!(refused.contains(nowhere.to_str().unwrap()), "{refused}");
}
