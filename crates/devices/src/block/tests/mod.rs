//! Disks as a driver sees them.

mod changes;
mod devices;
mod overlay;
mod requests;
mod rounds;

use super::Block;
use husk_config::{DeviceUpdate, Drive, IoEngine};
use husk_virtio::testing::{Buffers, Driver, Layout, Mmio, Subject, check_device, memory};
use husk_virtio::transport::mmio::MmioTransport;
use husk_virtio::{DeviceError, DeviceThread};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virtio_bindings::bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;
/// Bytes of a disk here.
const SIZE: u64 = 8 << 20;
const SECTORS: u64 = SIZE / 512;
const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

/// A folder that goes away, on a file system with holes and O_DIRECT, which /tmp may not be.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

/// A file whose byte at any offset tells the offset.
fn image(folder: &Path, name: &str, size: u64) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, pattern(0, size as usize)).unwrap();
    path
}

fn pattern(offset: u64, length: usize) -> Vec<u8> {
    let at = |at: u64| (at / 512 * 7 + at % 251) as u8;
    (offset..offset + length as u64).map(at).collect()
}

/// A guest with one disk.
struct Guest {
    driver: Driver,
    transport: Arc<MmioTransport>,
    path: PathBuf,
    _folder: tempfile::TempDir,
    /// For buffers: the kit's allocator never frees.
    buffers: u64,
}

/// Guest memory for buffers.
const BUFFERS: u64 = 4 << 20;

impl Guest {
    /// A started guest with a patterned disk, changed by `change`.
    fn new(change: impl Fn(&mut Drive)) -> Self {
        let folder = folder();
        let path = image(folder.path(), "disk", SIZE);
        let mut drive = Drive::new("disk0", &path);
        change(&mut drive);
        let device = Block::new(&drive).unwrap();
        let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
        let mem = memory();
        let mmio = Mmio::new(Box::new(device), &thread, &mem);
        let transport = Arc::clone(&mmio.transport);
        let mut guest = Self {
            driver: Driver::new(Box::new(mmio), mem),
            transport,
            path,
            _folder: folder,
            buffers: 0,
        };
        guest.start(u64::MAX);
        guest
    }

    fn start(&mut self, features: u64) {
        self.driver.start(features, 256);
        self.buffers = self.driver.allocate(BUFFERS);
    }

    fn update(
        &self,
        path: Option<&Path>,
        limits: Option<husk_config::RateLimiter>,
    ) -> Result<(), DeviceError> {
        let change = DeviceUpdate::Disk {
            path: path.map(Into::into),
            rate_limiter: limits,
        };
        let updated = self
            .transport
            .with_core(|core| core.with_device(move |device| device.update(&change)));
        updated.expect("the device is there")
    }

    /// Make one request in queue 0 and wait for it: its status, and what was read.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, Vec<u8>) {
        request(
            &mut self.driver,
            (0, self.buffers),
            (kind, sector),
            data,
            room,
        )
    }

    fn read(&mut self, sector: u64, length: usize) -> Vec<u8> {
        let (status, data) = self.request(VIRTIO_BLK_T_IN, sector, &[], length);
        assert_eq!(status, OK, "reading {length} bytes at sector {sector}");
        data
    }

    fn write(&mut self, sector: u64, data: &[u8]) {
        let (status, _) = self.request(VIRTIO_BLK_T_OUT, sector, data, 0);
        assert_eq!(
            status,
            OK,
            "writing {} bytes at sector {sector}",
            data.len()
        );
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.driver.registers.read_config(offset, &mut data);
        data
    }

    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config(0))
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let all = u128::from(kind) | u128::from(sector) << 64;
    all.to_le_bytes()
}

/// Buffers for a request at `place`, in parts of at most `part` bytes that lie `gap` bytes apart; also where the status is.
fn lay_out(
    driver: &Driver,
    (place, head): (u64, &[u8; 16]),
    data: &[u8],
    room: usize,
    (part, gap): (usize, u64),
) -> (Buffers, u64) {
    let mut at = place;
    let mut buffers = Buffers::default();
    let mut put = |to: &mut Vec<(u64, u32)>, bytes: &[u8], gap: u64| {
        driver.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        to.push((at, bytes.len() as u32));
        at += bytes.len() as u64 + gap;
        at - bytes.len() as u64 - gap
    };
    // Header and status leave the data aligned, unless `gap` is odd.
    put(&mut buffers.readable, head, 496);
    for piece in data.chunks(part) {
        put(&mut buffers.readable, piece, gap);
    }
    let blank = vec![0xee; room];
    for piece in blank.chunks(part) {
        put(&mut buffers.writable, piece, gap);
    }
    let status = put(&mut buffers.writable, &[0xff], 0);
    assert!(at <= place + BUFFERS);
    (buffers, status)
}

/// Make one request, wait for it: its status, and what was read.
fn request(
    driver: &mut Driver,
    (queue, place): (usize, u64),
    (kind, sector): (u32, u64),
    data: &[u8],
    room: usize,
) -> (u8, Vec<u8>) {
    let head = header(kind, sector);
    let (buffers, status) = lay_out(driver, (place, &head), data, room, (1 << 20, 0));
    send(driver, queue, &buffers, status)
}

/// Send prepared buffers, wait for the answer.
fn send(driver: &mut Driver, queue: usize, buffers: &Buffers, status: u64) -> (u8, Vec<u8>) {
    let table = status.next_multiple_of(4096);
    let layout = match driver.features & husk_virtio::F_INDIRECT_DESC {
        0 => Layout::Direct,
        _ => Layout::Indirect,
    };
    driver.queues[queue].add(buffers, layout, table);
    driver.registers.notify(queue as u16);
    let (_, written) = driver.wait_used(queue);
    let status: u8 = driver.mem.read_obj(GuestAddress(status)).unwrap();
    let room: u32 = buffers.writable.iter().map(|&(_, length)| length).sum();
    if status == OK {
        assert_eq!(written, room, "all that can be written was");
    }
    assert!(written <= room);
    (status, buffers.written(&driver.mem, room as usize - 1))
}

/// What every disk does, in the order of queues.
fn use_disk(driver: &mut Driver, read_only: bool) {
    let place = driver.allocate(BUFFERS);
    for queue in 0..driver.queues.len() {
        let sector = 8 + 16 * queue as u64;
        let wanted = match read_only {
            true => pattern(sector * 512, 8192),
            false => vec![queue as u8 + 1; 8192],
        };
        let way = (queue, place);
        let write = (VIRTIO_BLK_T_OUT, sector);
        let (status, _) = request(driver, way, write, &wanted, 0);
        assert_eq!(status, if read_only { IOERR } else { OK });
        let (status, data) = request(driver, way, (VIRTIO_BLK_T_IN, sector), &[], 8192);
        assert_eq!(status, OK);
        assert!(data == wanted, "queue {queue} reads something else");
        let past = (VIRTIO_BLK_T_IN, SECTORS);
        assert_eq!(request(driver, way, past, &[], 512).0, IOERR);
    }
}

#[test]
fn disks_of_all_kinds_survive_every_driver() {
    for engine in ENGINES {
        for read_only in [false, true] {
            let folder = folder();
            let path = image(folder.path(), "disk", SIZE);
            let mut drive = Drive::new("disk0", path);
            drive.io_engine = Some(engine);
            drive.is_read_only = Some(read_only);
            drive.queues = 2;
            eprintln!("--- {engine:?}, read-only: {read_only}");
            check_device(&Subject {
                memory: husk_virtio::testing::memory,
                make: &|| Box::new(open_again(&drive)),
                use_it: &|driver| use_disk(driver, read_only),
                use_again: None,
                eager: &[0, 1],
            });
        }
    }
}

/// The kit makes the next device when the one before has just gone. The image may still be locked then: a program that another
/// test starts has all descriptors between its fork and its exec.
fn open_again(drive: &Drive) -> Block {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        match Block::new(drive) {
            Ok(block) => return block,
            Err(e) if std::time::Instant::now() > until => panic!("{e}"),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
}

#[test]
fn requests_bytes_and_failures_are_counted() {
    for engine in ENGINES {
        let folder = folder();
        let mut drive = Drive::new("disk0", image(folder.path(), "disk", SIZE));
        drive.io_engine = Some(engine);
        drive.cache_type = husk_config::CacheType::Writeback;
        let mut device = Block::new(&drive).unwrap();
        let m = Arc::new(husk_metrics::BlockMetrics::default());
        device.metrics = Arc::clone(&m);
        let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
        let mem = memory();
        let mut driver = Driver::new(Box::new(Mmio::new(Box::new(device), &thread, &mem)), mem);
        driver.start(u64::MAX, 256);
        let place = (0, driver.allocate(BUFFERS));
        let mut ask = |kind, sector, data: &[u8], room| {
            request(&mut driver, place, (kind, sector), data, room).0
        };
        for sector in [0, 8] {
            assert_eq!(ask(VIRTIO_BLK_T_IN, sector, &[], 4096), OK);
        }
        assert_eq!(ask(VIRTIO_BLK_T_OUT, 1, &[7; 512], 0), OK);
        assert_eq!(ask(VIRTIO_BLK_T_FLUSH, 0, &[], 0), OK);
        assert_eq!(ask(VIRTIO_BLK_T_IN, SECTORS, &[], 512), IOERR);
        assert_eq!(ask(99, 0, &[], 0), UNSUPP);
        // The file has become shorter: the host fails what is behind its end.
        let file = std::fs::File::options().write(true).open(drive.path());
        file.unwrap().set_len(512).unwrap();
        assert_eq!(ask(VIRTIO_BLK_T_IN, 8, &[], 512), IOERR);
        assert_eq!((m.read_count.total(), m.read_bytes.total()), (2, 8192));
        assert_eq!((m.write_count.total(), m.write_bytes.total()), (1, 512));
        assert_eq!((m.flush_count.total(), m.execute_fails.total()), (1, 1));
        assert_eq!(m.invalid_reqs_count.total(), 2);
        assert_eq!((m.read_agg.count(), m.write_agg.count()), (2, 1));
        assert!(m.queue_event_count.total() >= 7);
        assert_eq!(m.event_fails.total(), 0);
    }
}

#[test]
fn starts_and_changes_that_fail_are_counted() {
    let folder = folder();
    let drive = Drive::new("disk0", image(folder.path(), "disk", SIZE));
    let mut device = Block::new(&drive).unwrap();
    let m = Arc::new(husk_metrics::BlockMetrics::default());
    device.metrics = Arc::clone(&m);
    let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
    let mem = memory();
    let mut driver = Driver::new(Box::new(Mmio::new(Box::new(device), &thread, &mem)), mem);
    driver.start_badly();
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (1, 0));
    driver.registers.write_config(0, &[9; 4]);
    driver.start(u64::MAX, 64);
    driver.registers.write_config(0, &[9; 4]);
    assert_eq!((m.activate_fails.total(), m.cfg_fails.total()), (1, 2));
}
