//! A disk that a server has, as its driver sees it, with servers that serve and servers that do not.

mod hostile;
mod server;

use super::{QUEUE_SIZE, VhostUserBlock};
use crate::test_support::shared_memory;
use husk_config::{DeviceUpdate, Drive};
use husk_virtio::testing::{Driver, Mmio, Pci, Registers, Subject, check_device, memory};
use husk_virtio::{DeviceError, DeviceThread, F_EVENT_IDX, RING_FEATURES};
use server::{Character, SECTORS, Server};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_bindings::bindings::virtio_blk::*;

fn drive(path: &Path) -> Drive {
    let mut drive = Drive::new("data", "");
    (drive.path_on_host, drive.socket) = (None, Some(path.into()));
    drive
}

fn request(
    driver: &mut Driver,
    queue: usize,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: usize,
) -> Vec<u8> {
    let header = u128::from(kind) | u128::from(sector) << 64;
    driver.request(queue, &[&header.to_le_bytes(), data], &[room, 1])
}

fn use_disk(driver: &mut Driver) {
    for queue in 0..driver.queues.len() {
        let sector = 5 + 8 * queue as u64;
        let data: Vec<u8> = (0..4096_usize).map(|at| (at * 7 + queue) as u8).collect();
        let status = request(driver, queue, VIRTIO_BLK_T_OUT, sector, &data, 0);
        assert_eq!(status, [VIRTIO_BLK_S_OK as u8]);
        let read = request(driver, queue, VIRTIO_BLK_T_IN, sector, &[], 4096);
        assert!(read[..4096] == data && read[4096] == VIRTIO_BLK_S_OK as u8);
        let far = request(driver, queue, VIRTIO_BLK_T_IN, SECTORS, &[], 512);
        assert_eq!(far.last(), Some(&(VIRTIO_BLK_S_IOERR as u8)));
    }
}

/// The same, and the server has interrupted.
fn use_and_hear(driver: &mut Driver) {
    driver.registers.take_interrupt();
    use_disk(driver);
    assert!(driver.registers.take_interrupt());
}

#[test]
fn the_kit_is_served() {
    for (queues, protocol) in [(2, 1 | 1 << 3 | 1 << 9), (1, 1 << 9)] {
        let server = Server::start(Character {
            protocol,
            ..Character::default()
        });
        let make = || -> Box<dyn husk_virtio::VirtioDevice> {
            let mut drive = drive(&server.path);
            drive.queues = queues;
            Box::new(VhostUserBlock::new(&drive).unwrap())
        };
        check_device(&Subject {
            make: &make,
            memory: shared_memory,
            use_it: &use_and_hear,
            // The kit gives a device that was loaded no vectors.
            use_again: Some(&use_disk),
            eager: &[0],
        });
    }
}

/// A guest with such a disk over PCI or MMIO.
struct Guest {
    server: Server,
    driver: Driver,
}

impl Guest {
    fn new(pci: bool, character: Character) -> Self {
        let server = Server::start(character);
        let device = Box::new(VhostUserBlock::new(&drive(&server.path)).unwrap());
        let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
        let mem = shared_memory();
        let registers: Box<dyn Registers> = match pci {
            true => Box::new(Pci::new(device, &thread, &mem)),
            false => Box::new(Mmio::new(device, &thread, &mem)),
        };
        Self {
            server,
            driver: Driver::new(registers, mem),
        }
    }

    fn update(&self) -> Result<(), String> {
        let mut result = None;
        self.driver.registers.with_core(&mut |core| {
            result = core.with_device(|device| {
                let change = DeviceUpdate::Disk {
                    path: None,
                    rate_limiter: None,
                };
                device
                    .update(&change)
                    .map_err(|e: DeviceError| e.to_string())
            });
        });
        result.unwrap()
    }

    fn capacity(&self) -> u64 {
        let mut data = [0; 8];
        self.driver.registers.read_config(0, &mut data);
        u64::from_le_bytes(data)
    }

    /// Wait until the device says that it needs a reset.
    fn needs_reset(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        while self.driver.registers.status() & 0x40 == 0 {
            assert!(Instant::now() < until, "the loss is not seen");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_lost_server_is_seen_and_called_again_by_the_next_driver() {
    for pci in [false, true] {
        let mut guest = Guest::new(pci, Character::default());
        guest.driver.start(u64::MAX, 64);
        use_and_hear(&mut guest.driver);
        guest.server.leave();
        guest.needs_reset();
        assert!(
            guest.driver.registers.take_interrupt(),
            "the driver is told"
        );
        assert!(guest.update().unwrap_err().contains("closed"));
        guest.driver.start(u64::MAX, 64);
        use_disk(&mut guest.driver);
        // Also while no driver looks.
        guest.driver.registers.set_status(0);
        guest.server.leave();
        guest.driver.start(u64::MAX, 64);
        use_disk(&mut guest.driver);
        assert_eq!(guest.server.clients.load(Ordering::SeqCst), 3);
    }
}

#[test]
fn a_server_that_comes_back_with_less_does_not_start() {
    let mut guest = Guest::new(false, Character::default());
    guest.driver.start(u64::MAX, 64);
    guest.server.character.lock().unwrap().features &= !F_EVENT_IDX;
    guest.server.leave();
    guest.needs_reset();
    guest.driver.set_up(u64::MAX, 64);
    guest.driver.registers.set_status(15);
    assert_ne!(guest.driver.registers.status() & 0x40, 0);
    guest.driver.start(!F_EVENT_IDX, 64);
    use_disk(&mut guest.driver);
}

#[test]
fn a_disk_that_grows_is_seen_when_it_is_asked_for() {
    for pci in [false, true] {
        let mut guest = Guest::new(pci, Character::default());
        assert_eq!(guest.capacity(), SECTORS);
        let say = |guest: &Guest, sectors: u64| {
            let mut character = guest.server.character.lock().unwrap();
            character.config[..8].copy_from_slice(&sectors.to_le_bytes());
        };
        // Before a driver is there, and with one, which is told.
        say(&guest, 4096);
        guest.update().unwrap();
        assert_eq!(guest.capacity(), 4096);
        guest.driver.start(u64::MAX, 64);
        guest.driver.registers.take_interrupt();
        say(&guest, 8192);
        guest.update().unwrap();
        assert_eq!(guest.capacity(), 8192);
        assert!(guest.driver.registers.take_interrupt());
        // Nonsense changes nothing, and the disk goes on.
        say(&guest, u64::MAX);
        assert!(guest.update().unwrap_err().contains("sectors"));
        assert_eq!(guest.capacity(), 8192);
        use_disk(&mut guest.driver);
    }
}

#[test]
fn rings_have_what_the_server_knows() {
    let guest = Guest::new(
        true,
        Character {
            features: Character::default().features & !(F_EVENT_IDX | 1 << 28),
            ..Character::default()
        },
    );
    let offered = guest.driver.registers.device_features();
    assert_eq!(offered & RING_FEATURES, husk_virtio::F_VERSION_1);
    assert_eq!(guest.driver.registers.queue_max_size(0), QUEUE_SIZE);
}

#[test]
fn memory_that_is_not_shared_starts_nothing() {
    let server = Server::start(Character::default());
    let device = Box::new(VhostUserBlock::new(&drive(&server.path)).unwrap());
    let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
    let mem = memory();
    let mut driver = Driver::new(Box::new(Mmio::new(device, &thread, &mem)), mem);
    driver.set_up(u64::MAX, 64);
    driver.registers.set_status(15);
    assert_ne!(driver.registers.status() & 0x40, 0);
}
