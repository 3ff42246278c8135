//! A disk that a server has, as its driver sees it, with servers that serve and servers that do not.

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

/// Why the disk of such a server is refused.
fn refused(change: fn(&mut Character), queues: u16) -> String {
    let mut character = Character::default();
    change(&mut character);
    let server = Server::start(character);
    let mut drive = drive(&server.path);
    drive.queues = queues;
    let asked = Instant::now();
    let error = VhostUserBlock::new(&drive).err().expect("it is refused");
    assert!(asked.elapsed() < Duration::from_secs(20));
    error.to_string()
}

#[test]
fn servers_that_lack_something_are_refused() {
    for (change, why) in [
        (
            (|c| c.features &= !(1 << 30)) as fn(&mut Character),
            "protocol features",
        ),
        (|c| c.features &= !(1 << 32), "virtio 1"),
        (|c| c.protocol &= !(1 << 9), "configuration space"),
        (|c| c.protocol &= !1, "1 queues, and 2"),
        (|c| c.queues = 1, "1 queues, and 2"),
        (|c| c.queues = 0, "0 queues, and 2"),
        (|c| c.config[20] = 1, "blocks of 513 bytes"),
        (|c| c.config[..8].fill(0xff), "sectors"),
    ] {
        let said = refused(change, 2);
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn wrong_answers_are_refused() {
    fn only(request: u32, own: u32, answer: Vec<u8>, change: fn(&mut Vec<u8>)) -> Option<Vec<u8>> {
        let mut answer = answer;
        if request == own {
            change(&mut answer);
        }
        Some(answer)
    }
    for (twist, why) in [
        // Another request's; another version; no answer at all; too long, wildly or not; too short.
        (
            (|r, a| only(r, 1, a, |a| a[0] = 2)) as fn(u32, Vec<u8>) -> Option<Vec<u8>>,
            "answers wrongly (request GetFeatures)",
        ),
        (|r, a| only(r, 15, a, |a| a[4] = 4 | 2), "answers wrongly"),
        (|r, a| only(r, 15, a, |a| a[4] = 1), "answers wrongly"),
        (
            |r, a| only(r, 1, a, |a| a[8..12].fill(0xff)),
            "answers wrongly",
        ),
        (|r, a| only(r, 1, a, |a| a[8] = 9), "answers wrongly"),
        (
            |r, a| {
                only(r, 1, a, |a| {
                    a[8] = 4;
                    a.truncate(16);
                })
            },
            "answers wrongly",
        ),
        (|r, a| only(r, 17, a, |a| a[8] = 0), "answers wrongly"),
        // A refusal of what has no answer else, and of the configuration space, as servers have it.
        (
            |r, a| only(r, 3, a, |a| a[12] = 1),
            "refuses (request SetOwner)",
        ),
        (
            |r, a| {
                only(r, 24, a, |a| {
                    a[8..12].fill(0);
                    a.truncate(12);
                })
            },
            "refuses (request GetConfig)",
        ),
        (
            |r, a| {
                only(r, 24, a, |a| {
                    a[8] = 20;
                    a.truncate(32);
                })
            },
            "refuses (request GetConfig)",
        ),
        // Nothing, or half of it, for ever.
        (|r, a| (r != 1).then_some(a), "does not answer within"),
        (
            |r, a| only(r, 24, a, |a| a.truncate(20)),
            "does not answer within",
        ),
    ] {
        let server = Server::start(Character {
            twist,
            ..Character::default()
        });
        let mut drive = drive(&server.path);
        drive.queues = 2;
        let asked = Instant::now();
        let said = VhostUserBlock::new(&drive).err().expect(why).to_string();
        assert!(said.contains(why), "{why}: {said}");
        assert!(asked.elapsed() < Duration::from_secs(20), "{why}");
    }
}

#[test]
fn a_server_that_stops_wrongly_or_not_at_all_is_left() {
    for twist in [
        // A wild position; another queue; silence; a refusal to start.
        (|r, mut a: Vec<u8>| {
            if r == 11 {
                a[18] = 1;
            }
            Some(a)
        }) as fn(u32, Vec<u8>) -> Option<Vec<u8>>,
        |r, mut a| {
            if r == 11 {
                a[12] = 7;
            }
            Some(a)
        },
        |r, a| (r != 11).then_some(a),
    ] {
        let mut guest = Guest::new(false, Character::default());
        guest.driver.start(u64::MAX, 64);
        use_disk(&mut guest.driver);
        guest.server.character.lock().unwrap().twist = twist;
        let asked = Instant::now();
        guest.driver.registers.set_status(0);
        assert!(asked.elapsed() < Duration::from_secs(20));
        // The next driver has the next connection.
        guest.driver.start(u64::MAX, 64);
        use_disk(&mut guest.driver);
        assert_eq!(guest.server.clients.load(Ordering::SeqCst), 2);
    }
    let mut guest = Guest::new(false, Character::default());
    guest.server.character.lock().unwrap().twist = |r, mut a| {
        if r == 9 {
            a[12] = 1;
        }
        Some(a)
    };
    guest.driver.set_up(u64::MAX, 64);
    guest.driver.registers.set_status(15);
    assert_ne!(guest.driver.registers.status() & 0x40, 0);
}

#[test]
fn what_is_no_socket_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let gone = folder.path().join("gone");
    drop(std::os::unix::net::UnixListener::bind(&gone).unwrap());
    for path in [&file, &gone, &folder.path().join("nothing")] {
        let error = VhostUserBlock::new(&drive(path)).err().unwrap();
        assert!(
            error.to_string().contains("start the vhost-user server"),
            "{error}"
        );
    }
    // One that takes no more callers.
    let full = folder.path().join("full");
    let _listener = std::os::unix::net::UnixListener::bind(&full).unwrap();
    let mut waiting = Vec::new();
    loop {
        let flags = rustix::net::SocketFlags::NONBLOCK;
        let kind = rustix::net::SocketType::STREAM;
        let family = rustix::net::AddressFamily::UNIX;
        let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
        let address = rustix::net::SocketAddrUnix::new(&full).unwrap();
        if rustix::net::connect(&socket, &address).is_err() || waiting.len() > 5000 {
            break;
        }
        waiting.push(socket);
    }
    let asked = Instant::now();
    assert!(VhostUserBlock::new(&drive(&full)).is_err());
    assert!(asked.elapsed() < Duration::from_secs(20));
}
