//! Block devices of the host: loop devices, which root can make.

use super::requests::segment;
use super::*;
use std::process::Command;

/// A loop device with sectors of `sector` bytes over a patterned file; it goes away in the end.
struct Loop {
    device: PathBuf,
    file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Loop {
    fn new(sector: u32) -> Self {
        let folder = folder();
        let file = image(folder.path(), "disk", SIZE);
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(&file)
            .output()
            .expect("losetup, of the package mount");
        assert!(made.status.success(), "{made:?}");
        let device = String::from_utf8(made.stdout).unwrap();
        Self {
            device: device.trim().into(),
            file,
            _folder: folder,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn a_block_device_is_a_disk_like_a_file() {
    for engine in ENGINES {
        for direct in [false, true] {
            let device = Loop::new(512);
            let guest = &mut Guest::new(|drive| {
                drive.path_on_host = Some(device.device.clone());
                drive.io_engine = Some(engine);
                drive.direct = direct;
                drive.cache_type = husk_config::CacheType::Writeback;
            });
            assert_eq!(guest.capacity(), SECTORS);
            assert!(guest.read(5, 8192) == pattern(5 * 512, 8192));
            guest.write(5, &[1; 8192]);
            assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
            let file = std::fs::read(&device.file).unwrap();
            assert!(file[5 * 512..][..8192] == [1; 8192]);
            let zeroes = segment(64, 128, 0);
            assert_eq!(
                guest.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &zeroes, 0).0,
                OK
            );
            assert!(guest.read(64, 65536) == [0; 65536]);
            let discard = segment(4096, 4096, 0);
            let before = std::os::unix::fs::MetadataExt::blocks(&device.file.metadata().unwrap());
            assert_eq!(guest.request(VIRTIO_BLK_T_DISCARD, 0, &discard, 0).0, OK);
            let after = std::os::unix::fs::MetadataExt::blocks(&device.file.metadata().unwrap());
            assert!(after < before, "{before} blocks, then {after}");
            assert!(guest.read(0, 512) == pattern(0, 512));
        }
    }
}

#[test]
fn a_device_with_large_sectors_is_presented_so_where_the_page_cache_does_not_hide_them() {
    for engine in ENGINES {
        let device = Loop::new(4096);
        let change = |direct| {
            let device = &device;
            move |drive: &mut Drive| {
                drive.path_on_host = Some(device.device.clone());
                drive.io_engine = Some(engine);
                drive.direct = direct;
            }
        };
        let mut guest = Guest::new(change(false));
        assert_eq!(u32::from_le_bytes(guest.config(20)), 512);
        assert!(guest.read(3, 512) == pattern(3 * 512, 512));
        drop(guest);
        let guest = &mut Guest::new(change(true));
        assert_eq!(u32::from_le_bytes(guest.config(20)), 4096);
        assert!(guest.read(8, 8192) == pattern(8 * 512, 8192));
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, 3, &[], 512).0, IOERR);
        // Memory that is split where no block ends.
        let read = header(VIRTIO_BLK_T_IN, 16);
        let (buffers, status) = lay_out(
            &guest.driver,
            (guest.buffers, &read),
            &[],
            8192,
            (1024, 512),
        );
        let (status, data) = send(&mut guest.driver, 0, &buffers, status);
        assert_eq!(status, OK);
        assert!(data == pattern(16 * 512, 8192));
    }
}

#[test]
fn a_block_device_under_an_overlay_stays_as_it_is() {
    for engine in ENGINES {
        let (device, overlays) = (Loop::new(512), folder());
        let guest = &mut Guest::new(|drive| {
            drive.path_on_host = Some(device.device.clone());
            drive.io_engine = Some(engine);
            drive.overlay = Some(husk_config::Overlay {
                directory: Some(overlays.path().into()),
            });
        });
        assert_eq!(guest.capacity(), SECTORS);
        guest.write(5, &[1; 8192]);
        for (kind, sector) in [(VIRTIO_BLK_T_WRITE_ZEROES, 64), (VIRTIO_BLK_T_DISCARD, 0)] {
            let part = segment(sector, 128, 0);
            assert_eq!(guest.request(kind, 0, &part, 0).0, OK);
        }
        assert!(guest.read(64, 65536) == [0; 65536]);
        assert!(guest.read(200, 4096) == pattern(200 * 512, 4096));
        let file = std::fs::read(&device.file).unwrap();
        assert!(file == pattern(0, SIZE as usize));
    }
}
