//! Disks. Their files are in memory: nothing is left over, whatever happens.

use crate::bytes::{Bytes, Few, Number, Rare};
use crate::entropy::limits;
use crate::guest::{Chain, Guest, Subject};
use arbitrary::Arbitrary;
use husk_config::{CacheType, DeviceUpdate, Drive, IoEngine};
use husk_virtio::VirtioDevice;
use husk_virtio::testing::Driver;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

/// Bytes of a disk.
const SIZE: u64 = 256 << 10;
/// A request that reads.
const IN: u32 = 0;

/// Requests one by one.
pub struct Sync(Disk);
/// io_uring.
pub struct Uring(Disk);

/// A disk with its files.
struct Disk {
    files: [OwnedFd; 2],
}

/// A request of the driver's.
#[derive(Debug, Arbitrary)]
pub struct Request {
    queue: bool,
    kind: Kind,
    sector: Number,
    readable: Few<Data, 4>,
    writable: Few<Room, 8>,
    /// Without a buffer of its own for the status.
    no_status: Rare<()>,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
enum Kind {
    In,
    Out,
    Flush,
    Id,
    Discard,
    WriteZeroes,
    Any(u32),
}

/// Something to write.
#[derive(Debug, Arbitrary)]
enum Data {
    Bytes(Bytes),
    Sectors(u8),
    /// For discards and zeroes.
    Segment {
        sector: Number,
        count: Number,
        unmap: bool,
        flags: Rare<u32>,
    },
}

/// Something to read into.
#[derive(Clone, Copy, Debug, Arbitrary)]
enum Room {
    Sectors(u8),
    Any(Number),
}

/// What the host does.
#[derive(Debug, Arbitrary)]
pub enum Host {
    /// The other file takes this one's place, or this one its own.
    Swap(bool),
    /// A file's size changes; the device learns of it, or not.
    Resize {
        /// Which.
        second: bool,
        /// To so many KiB.
        kib: u8,
        /// Whether it learns.
        told: bool,
    },
    /// Limits come and go.
    Limit(bool),
}

fn path(file: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn update(path: Option<PathBuf>) -> DeviceUpdate {
    DeviceUpdate::Disk {
        path,
        rate_limiter: None,
    }
}

impl Disk {
    fn new(variant: u8, io_engine: IoEngine) -> (Self, Box<dyn VirtioDevice>) {
        let files = [(); 2].map(|()| {
            let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file");
            ftruncate(&file, SIZE).expect("a file's size");
            file
        });
        let mut drive = Drive::new("disk0", path(&files[0]));
        drive.io_engine = Some(io_engine);
        drive.queues = 2;
        drive.is_read_only = Some(variant & 1 != 0);
        if variant & 2 != 0 {
            drive.cache_type = CacheType::Writeback;
        }
        drive.rate_limiter = (variant & 4 != 0).then(|| limits(Some(SIZE)));
        let device = husk_devices::block::Block::new(&drive).expect("a disk");
        (Self { files }, Box::new(device))
    }

    fn chain(&self, request: Request) -> Chain {
        let kind = match request.kind {
            Kind::In => IN,
            Kind::Out => 1,
            Kind::Flush => 4,
            Kind::Id => 8,
            Kind::Discard => 11,
            Kind::WriteZeroes => 13,
            Kind::Any(kind) => kind,
        };
        let mut head = u64::from(kind).to_le_bytes().to_vec();
        head.extend(u64::from(request.sector.get()).to_le_bytes());
        let mut readable = vec![head];
        readable.extend(request.readable.0.into_iter().map(|data| match data {
            Data::Bytes(bytes) => bytes.0,
            Data::Sectors(count) => vec![count; usize::from(count) * 512],
            Data::Segment {
                sector,
                count,
                unmap,
                flags,
            } => {
                let flags = u32::from(unmap) | flags.0.unwrap_or(0);
                let all = u128::from(sector.get())
                    | u128::from(count.get()) << 64
                    | u128::from(flags) << 96;
                all.to_le_bytes().to_vec()
            }
        }));
        let room = |room: &Room| match *room {
            Room::Sectors(count) => u32::from(count) * 512,
            Room::Any(length) => length.get(),
        };
        let mut writable: Vec<u32> = request.writable.0.iter().map(room).collect();
        if request.no_status.0.is_none() {
            writable.push(1);
        }
        Chain {
            queue: request.queue.into(),
            readable,
            writable,
        }
    }

    fn host(&mut self, action: Host, guest: &mut Guest) {
        match action {
            Host::Swap(second) => {
                guest.update(update(Some(path(&self.files[usize::from(second)]))))
            }
            Host::Resize { second, kib, told } => {
                let size = u64::from(kib) << 10;
                ftruncate(&self.files[usize::from(second)], size).expect("a file's size");
                if told {
                    guest.update(update(None));
                }
            }
            Host::Limit(on) => guest.update(DeviceUpdate::Disk {
                path: None,
                rate_limiter: Some(limits(on.then_some(SIZE))),
            }),
        }
    }

    fn check(&mut self, driver: &mut Driver) {
        for file in &self.files {
            ftruncate(file, SIZE).expect("a file's size");
        }
        let path = path(&self.files[0]);
        driver.registers.with_core(&mut |core| {
            let change = update(Some(path.clone()));
            let done = core.with_device(move |device| device.update(&change).is_ok());
            assert_eq!(done, Some(true), "the disk does not take its own file");
        });
        for queue in 0..2 {
            let answer = driver.request(queue, &[&[0; 16]], &[512, 1]);
            assert_eq!(
                (answer.len(), answer.last()),
                (513, Some(&0)),
                "a sector is not read"
            );
        }
    }
}

macro_rules! subject {
    ($name:ident, $engine:expr) => {
        impl Subject for $name {
            type Request = Request;
            type Host = Host;

            fn new(variant: u8) -> (Self, Box<dyn VirtioDevice>) {
                let (disk, device) = Disk::new(variant, $engine);
                (Self(disk), device)
            }

            fn chain(&self, request: Request) -> Chain {
                self.0.chain(request)
            }

            fn host(&mut self, action: Host, guest: &mut Guest) {
                self.0.host(action, guest);
            }

            fn check(&mut self, driver: &mut Driver) {
                self.0.check(driver);
            }
        }
    };
}

subject!(Sync, IoEngine::Sync);
subject!(Uring, IoEngine::Async);
