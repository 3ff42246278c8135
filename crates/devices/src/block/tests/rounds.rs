//! Disks whose guest is suspended, saved and gone on from, again and again, with requests under way.

use super::*;
use husk_virtio::GuestMemory;
use husk_virtio::testing::{PATIENCE, Pci, Registers};
use std::time::Instant;

const ROUNDS: u64 = 200;
/// Requests under way at once.
const DEPTH: u64 = 6;
/// Bytes that each writes.
const BLOCK: usize = 4096;

type Attach = fn(Block, &Arc<DeviceThread>, &GuestMemory) -> Box<dyn Registers>;

/// One after the other writes what tells its number, to the next place of the disk, around and around.
struct Writer {
    driver: Driver,
    /// The request's number and where its status comes, by its first descriptor.
    under_way: Vec<(u16, u64, u64)>,
    begun: u64,
    done: u64,
}

impl Writer {
    fn begin(&mut self) {
        let (number, slot) = (self.begun, self.begun % DEPTH);
        let at = BUFFERS + slot * 3 * BLOCK as u64;
        let (data, status) = (at + BLOCK as u64, at + 2 * BLOCK as u64);
        let mem = &self.driver.mem;
        let sector = number * BLOCK as u64 % SIZE / 512;
        let header = header(VIRTIO_BLK_T_OUT, sector);
        mem.write_slice(&header, GuestAddress(at)).unwrap();
        mem.write_slice(&content(number), GuestAddress(data))
            .unwrap();
        mem.write_slice(&[0xff], GuestAddress(status)).unwrap();
        let buffers = Buffers {
            readable: vec![(at, 16), (data, BLOCK as u32)],
            writable: vec![(status, 1)],
        };
        let head = self.driver.queues[0].add(&buffers, Layout::Direct, 0);
        self.under_way.push((head, number, status));
        self.begun += 1;
    }

    /// The first that is not done: later ones may be.
    fn oldest(&self) -> u64 {
        let numbers = self.under_way.iter().map(|&(_, number, _)| number);
        numbers.min().unwrap_or(self.begun)
    }

    /// Take what is done; each must have been begun and be done once, and well.
    fn take(&mut self) {
        while let Some((head, written)) = self.driver.queues[0].take_used() {
            let at = self.under_way.iter().position(|&(own, ..)| own == head);
            let (_, _, status) = self.under_way.remove(at.expect("done twice"));
            let mut answer = [0];
            let place = GuestAddress(status);
            self.driver.mem.read_slice(&mut answer, place).unwrap();
            assert_eq!((answer, written), ([OK], 1));
            self.done += 1;
        }
    }
}

fn content(number: u64) -> Vec<u8> {
    let words = (0..BLOCK as u64 / 8)
        .map(|word| ((number + 1) * 1000 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

#[test]
fn nothing_is_lost_or_doubled_in_many_rounds() {
    let attaches: [Attach; 2] = [
        |disk, thread, mem| Box::new(Mmio::new(Box::new(disk), thread, mem)),
        |disk, thread, mem| Box::new(Pci::new(Box::new(disk), thread, mem)),
    ];
    for attach in attaches {
        for engine in ENGINES {
            many_rounds(attach, engine);
        }
    }
}

fn many_rounds(attach: Attach, engine: IoEngine) {
    let folder = folder();
    let path = image(folder.path(), "disk", SIZE);
    let mut drive = Drive::new("disk0", &path);
    drive.io_engine = Some(engine);
    let thread = Arc::new(DeviceThread::start("test", || ()).unwrap());
    let mem = memory();
    let registers = attach(Block::new(&drive).unwrap(), &thread, &mem);
    let mut driver = Driver::new(registers, mem.clone());
    driver.start(u64::MAX, 64);
    let mut writer = Writer {
        driver,
        under_way: Vec::new(),
        begun: 0,
        done: 0,
    };
    for round in 0..ROUNDS {
        while writer.begun < writer.oldest() + DEPTH {
            writer.begin();
        }
        writer.driver.registers.notify(0);
        // Sooner or later: with all under way, some, or none.
        (0..round % 7 * 40).for_each(|_| std::thread::yield_now());
        writer.driver.registers.suspend();
        match round % 2 {
            0 => writer.driver.registers.resume(),
            _ => {
                let state = writer.driver.registers.save();
                // The disk is locked until its device is gone.
                writer.driver.registers = Box::new(Mmio::new(
                    Box::new(crate::entropy::Entropy::new(&Default::default()).unwrap()),
                    &thread,
                    &mem,
                ));
                let next = attach(open_again(&drive), &thread, &mem);
                next.load(state).unwrap();
                next.resume();
                writer.driver.registers = next;
            }
        }
        writer.take();
    }
    let until = Instant::now() + PATIENCE;
    while !writer.under_way.is_empty() {
        assert!(
            Instant::now() < until,
            "{} are lost",
            writer.under_way.len()
        );
        writer.take();
    }
    assert_eq!(writer.done, writer.begun);
    assert!(writer.done > ROUNDS, "{} requests", writer.done);
    let file = std::fs::read(&path).unwrap();
    let places = SIZE / BLOCK as u64;
    for number in writer.begun.saturating_sub(places)..writer.begun {
        let at = (number * BLOCK as u64 % SIZE) as usize;
        assert!(file[at..at + BLOCK] == content(number), "request {number}");
    }
}
