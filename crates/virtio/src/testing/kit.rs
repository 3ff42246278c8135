//! What every device must do and survive, over every transport.

use super::{Driver, Layout, Mmio, Pci, Registers};
use crate::queue::QueueState;
use crate::transport::Core;
use crate::{DeviceError, DeviceState, DeviceThread, GuestMemory, VirtioDevice};
use crate::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use husk_bus::BusDevice;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A kind of device under test.
pub struct Subject<'a> {
    /// A new device.
    pub make: &'a dyn Fn() -> Box<dyn VirtioDevice>,
    /// Memory for its guest: [`super::memory`], or more of the kind.
    pub memory: fn() -> GuestMemory,
    /// Do something useful with a device that was started, and check it.
    pub use_it: &'a dyn Fn(&mut Driver),
    /// The same after `use_it` without a reset in between, where that needs another way.
    pub use_again: Option<&'a dyn Fn(&mut Driver)>,
    /// The queues in which the device looks at every buffer at once, and so finds a bad one.
    pub eager: &'a [usize],
}

/// How a device is reached.
type Attach = fn(Box<dyn VirtioDevice>, &Arc<DeviceThread>, &GuestMemory) -> Box<dyn Registers>;

fn transports() -> Vec<(&'static str, Attach)> {
    vec![
        ("mmio", |device, thread, mem| {
            Box::new(Mmio::new(device, thread, mem))
        }),
        ("pci", |device, thread, mem| {
            Box::new(Pci::new(device, thread, mem))
        }),
    ]
}

/// Everything in this kit, for `subject`.
pub fn check_device(subject: &Subject) {
    let thread = Arc::new(DeviceThread::start("kit", || ()).expect("a thread"));
    for (name, attach) in transports() {
        let check = |what: &str, test: &dyn Fn(&mut Driver)| {
            eprintln!("--- {name}: {what}");
            let mem = (subject.memory)();
            let registers = attach((subject.make)(), &thread, &mem);
            let mut driver = Driver::new(registers, mem);
            test(&mut driver);
            // Whatever it was: after a reset the device is as new.
            driver.start(u64::MAX, 256);
            (subject.use_it)(&mut driver);
        };
        check("starts and starts again", &|driver| {
            starts_again(driver, subject)
        });
        check("suspended, saved, loaded, resumed", &|driver| {
            let mem = driver.mem.clone();
            let fresh = || attach((subject.make)(), &thread, &mem);
            saved_and_loaded(driver, subject, &fresh);
        });
        check("status out of order", &status_out_of_order);
        check("features that were not offered", &features_not_offered);
        check("configuration at odd places", &odd_configuration);
        check("registers at random", &random_registers);
        check("reset with requests in flight", &reset_in_flight);
        check("queues outside memory", &queues_outside_memory);
        for (what, chain) in malformed_chains() {
            check(what, &|driver| {
                malformed_chain(driver, subject.eager, chain)
            });
        }
        check("chains at random", &random_chains);
    }
}

fn starts_again(driver: &mut Driver, subject: &Subject) {
    let optional = [F_EVENT_IDX, F_INDIRECT_DESC];
    for left_out in [0, optional[0], optional[1], optional[0] | optional[1]] {
        for size in [256, 16] {
            driver.start(!left_out, size);
            assert_eq!(driver.features & left_out, 0);
            (subject.use_it)(driver);
        }
    }
}

/// The driver notices nothing, neither of a pause nor of another device in the place of its own.
fn saved_and_loaded(
    driver: &mut Driver,
    subject: &Subject,
    fresh: &dyn Fn() -> Box<dyn Registers>,
) {
    let use_again = subject.use_again.unwrap_or(subject.use_it);
    driver.start(u64::MAX, 64);
    (subject.use_it)(driver);
    let save = |driver: &Driver| {
        driver.registers.suspend();
        driver.registers.save()
    };
    save(driver);
    driver.registers.resume();
    assert_eq!(driver.registers.status(), 15);
    use_again(driver);
    // More than once: what one device has loaded, the next one loads.
    for _ in 0..3 {
        let state = save(driver);
        let text = serde_json::to_string(&state).expect("a state is data");
        let read: DeviceState = serde_json::from_str(&text).expect("what was written");
        assert_eq!(state, read);
        // As in another process: the first device is gone before the other one comes.
        driver.registers = Box::new(Gone);
        let fresh = fresh();
        fresh.load(read).expect("a state that was saved");
        assert_eq!(fresh.save(), state);
        fresh.resume();
        driver.registers = fresh;
        assert_eq!(driver.registers.status(), 15);
        use_again(driver);
    }
    let good = save(driver);
    driver.registers = Box::new(Gone);
    hostile_states(&good, fresh);
    driver.registers = fresh();
}

/// Every number of a state is another one, and every list shorter or longer: the device is refused, or comes up as whatever that
/// is, and goes on after a reset.
fn hostile_states(good: &DeviceState, fresh: &dyn Fn() -> Box<dyn Registers>) {
    let mut places = Vec::new();
    find_places(good, &mut String::new(), &mut places);
    for place in places {
        for change in 0..4 {
            let mut state = good.clone();
            let value = state.pointer_mut(&place).expect("it was found there");
            match (value, change) {
                (DeviceState::Number(number), _) => {
                    let extremes = [0, 1, u64::from(u16::MAX), u64::MAX];
                    *number = extremes[change].into();
                }
                (DeviceState::Array(all), 0) => drop(all.pop()),
                (DeviceState::Array(all), 1) => all.extend(all.clone()),
                (DeviceState::Array(all), 2) => all.clear(),
                (other, 3) => *other = DeviceState::Null,
                (DeviceState::Bool(value), 0) => *value = !*value,
                _ => continue,
            }
            let device = fresh();
            if device.load(state).is_ok() {
                device.resume();
            }
            device.set_status(0);
            assert_eq!(device.status(), 0, "{place}");
        }
    }
    let device = fresh();
    device
        .load(DeviceState::Null)
        .expect_err("nothing is no state");
    let mut state = good.clone();
    let queues = ["/core/queues", "/common/core/queues"];
    let mut queues = queues.iter().filter(|path| good.pointer(path).is_some());
    let queues = state.pointer_mut(queues.next().expect("queues"));
    drop(queues.and_then(|queues| queues.as_array_mut()?.pop()));
    device.load(state).expect_err("other queues");
}

/// Where numbers, truths and lists are; of a long list its first elements.
fn find_places(state: &DeviceState, at: &mut String, found: &mut Vec<String>) {
    const MOST: usize = 4;
    let length = at.len();
    let mut inside = |name: &str, value: &DeviceState| {
        at.push('/');
        at.push_str(name);
        found.push(at.clone());
        find_places(value, at, found);
        at.truncate(length);
    };
    match state {
        DeviceState::Object(all) => all.iter().for_each(|(name, value)| inside(name, value)),
        DeviceState::Array(all) => {
            let first = (0..).zip(all).take(MOST);
            first.for_each(|(index, value): (usize, _)| inside(&index.to_string(), value));
        }
        _ => {}
    }
}

fn status_out_of_order(driver: &mut Driver) {
    let registers = &driver.registers;
    registers.set_status(0);
    for status in [2, 4, 8, 12, 14, 0x40] {
        registers.set_status(status);
        assert_eq!(registers.status(), 0, "{status} without those before");
    }
    registers.set_status(1);
    registers.set_status(1 | 4);
    assert_eq!(registers.status(), 1);
    // Bits cannot be taken back but all together.
    registers.set_status(3);
    registers.set_status(1);
    assert_eq!(registers.status(), 3);
    registers.set_status(0x80);
    assert_eq!(registers.status() & 0x80, 0x80);
    registers.set_status(15);
    assert_eq!(registers.status() & 4, 0, "started after FAILED");
}

fn features_not_offered(driver: &mut Driver) {
    let registers = &driver.registers;
    let offered = registers.device_features();
    assert_ne!(offered & F_VERSION_1, 0);
    for wanted in [offered | (1 << 63), offered & !F_VERSION_1, 0] {
        registers.set_status(0);
        registers.set_status(1);
        registers.set_status(3);
        registers.set_driver_features(wanted);
        registers.set_status(11);
        assert_eq!(registers.status(), 3, "{wanted:#x} was taken");
        registers.set_status(15);
        assert_eq!(registers.status(), 3, "started without features");
    }
}

fn odd_configuration(driver: &mut Driver) {
    driver.start(u64::MAX, 64);
    for offset in (0..300).chain([0xeff, 0x10_0000, u64::MAX - 0x200]) {
        for length in 1..=8 {
            let mut data = vec![0xa5; length];
            driver.registers.read_config(offset, &mut data);
            driver.registers.write_config(offset, &data);
        }
    }
    driver.registers.read_config(0x1000, &mut [0; 4]);
}

/// Without DRIVER_OK, which would give the device wild queues: that has its own test.
fn random_registers(driver: &mut Driver) {
    let mut random = Random(0x1234_5678_9abc_def1);
    let (registers, size) = driver.registers.raw();
    for _ in 0..20_000 {
        let offset = random.below(size + 16);
        let length = 1 + random.below(8) as usize;
        let data = random.next().to_le_bytes();
        match random.below(3) {
            0 => registers.read(offset, &mut [0; 8][..length]),
            1 => registers.write(offset, &data[..length]),
            _ => registers.write(offset & !3, &data[..4]),
        }
    }
}

fn reset_in_flight(driver: &mut Driver) {
    for _ in 0..20 {
        driver.start(u64::MAX, 64);
        for queue in 0..driver.queues.len() {
            for _ in 0..8 {
                let chain = driver.chain(&[&[0; 64]], &[64]);
                driver.queues[queue].add(&chain, Layout::Direct, 0);
            }
            driver.registers.notify(queue as u16);
        }
        driver.registers.set_status(0);
        assert_eq!(driver.registers.status(), 0);
    }
}

fn queues_outside_memory(driver: &mut Driver) {
    for part in 0..3 {
        for address in [super::MEMORY - 8, super::MEMORY, 1 << 40, u64::MAX - 15, 1] {
            driver.set_up(u64::MAX, 64);
            driver.registers.set_status(0);
            driver.registers.set_status(1);
            driver.registers.set_status(3);
            driver.registers.set_driver_features(driver.features);
            driver.registers.set_status(11);
            let mut state = driver.queues[0].state;
            match part {
                0 => state.descriptors = address,
                1 => state.available = address,
                _ => state.used = address,
            }
            driver.registers.enable_queue(0, &state);
            driver.registers.set_status(15);
            assert_ne!(
                driver.registers.status() & 0x40,
                0,
                "{part} at {address:#x}"
            );
        }
    }
    for size in [0, 3, 65535] {
        driver.set_up(u64::MAX, 64);
        driver.registers.set_status(0);
        driver.registers.set_status(1);
        driver.registers.set_status(3);
        driver.registers.set_driver_features(driver.features);
        driver.registers.set_status(11);
        let state = QueueState {
            size,
            ..driver.queues[0].state
        };
        driver.registers.enable_queue(0, &state);
        driver.registers.set_status(15);
        assert_ne!(driver.registers.status() & 0x40, 0, "size {size}");
    }
}

/// Fills descriptors of a queue of 16 and makes them available.
type Malform = fn(&mut super::DriverQueue, u64);

fn malformed_chains() -> Vec<(&'static str, Malform)> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    vec![
        ("a buffer outside memory", |queue, _| {
            queue.describe(0, super::MEMORY - 4, 8, WRITE, 0);
            queue.make_available(0);
        }),
        ("a buffer at the end of the address space", |queue, _| {
            queue.describe(0, u64::MAX - 3, 8, 0, 0);
            queue.make_available(0);
        }),
        ("a buffer of 4 GiB", |queue, buffer| {
            queue.describe(0, buffer, u32::MAX, 0, 0);
            queue.make_available(0);
        }),
        ("a loop", |queue, buffer| {
            queue.describe(0, buffer, 8, NEXT, 1);
            queue.describe(1, buffer, 8, NEXT, 0);
            queue.make_available(0);
        }),
        ("a next descriptor that does not exist", |queue, buffer| {
            queue.describe(0, buffer, 8, NEXT, 999);
            queue.make_available(0);
        }),
        ("a first descriptor that does not exist", |queue, _| {
            queue.make_available(16);
        }),
        (
            "a readable buffer behind a writable one",
            |queue, buffer| {
                queue.describe(0, buffer, 8, NEXT | WRITE, 1);
                queue.describe(1, buffer, 8, 0, 0);
                queue.make_available(0);
            },
        ),
        ("an indirect table that is empty", |queue, buffer| {
            queue.describe(0, buffer, 0, INDIRECT, 0);
            queue.make_available(0);
        }),
        ("an indirect table that is cut off", |queue, buffer| {
            queue.describe(0, buffer, 17, INDIRECT, 0);
            queue.make_available(0);
        }),
        ("an indirect table outside memory", |queue, _| {
            queue.describe(0, super::MEMORY - 16, 64, INDIRECT, 0);
            queue.make_available(0);
        }),
        ("an indirect table in an indirect table", |queue, buffer| {
            super::write_descriptor(&queue.mem, buffer, buffer, 32, INDIRECT, 0);
            queue.describe(0, buffer, 32, INDIRECT, 0);
            queue.make_available(0);
        }),
        ("a loop in an indirect table", |queue, buffer| {
            super::write_descriptor(&queue.mem, buffer, buffer, 8, NEXT, 0);
            queue.describe(0, buffer, 32, INDIRECT, 0);
            queue.make_available(0);
        }),
        ("an available index far ahead", |queue, _| {
            queue.set_available_index(17);
        }),
        ("an available index that went back", |queue, _| {
            queue.set_available_index(u16::MAX);
        }),
    ]
}

/// In each queue alone: the device asks for a reset, where it looks at once.
fn malformed_chain(driver: &mut Driver, eager: &[usize], malform: Malform) {
    driver.start(u64::MAX, 16);
    for queue in 0..driver.queues.len() {
        driver.start(u64::MAX, 16);
        driver.registers.take_interrupt();
        let buffer = driver.allocate(4096);
        malform(&mut driver.queues[queue], buffer);
        driver.registers.notify(queue as u16);
        let must = eager.contains(&queue);
        let patience = if must {
            super::PATIENCE
        } else {
            Duration::from_millis(20)
        };
        let until = Instant::now() + patience;
        while driver.registers.status() & 0x40 == 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(50));
        }
        match driver.registers.status() & 0x40 {
            0 => assert!(!must, "queue {queue}: the device takes it"),
            // The status says so a moment before the interrupt.
            _ => assert!(interrupted(driver), "the driver was not told"),
        }
    }
}

/// Whether there is an interrupt before long.
fn interrupted(driver: &Driver) -> bool {
    let until = Instant::now() + super::PATIENCE;
    while !driver.registers.take_interrupt() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    true
}

/// Any descriptors, some of them sound. The device may ask for a reset, and must go on after one.
fn random_chains(driver: &mut Driver) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..60 {
        driver.start(random.next(), 16);
        let buffer = driver.allocate(1 << 16);
        for _ in 0..12 {
            let at = random.below(driver.queues.len() as u64) as usize;
            let queue = &mut driver.queues[at];
            for index in 0..16 {
                let address = match random.below(8) {
                    0 => random.next(),
                    1 => queue.state.descriptors,
                    _ => buffer + random.below(1 << 15),
                };
                let length = match random.below(8) {
                    0 => random.next() as u32,
                    _ => random.below(600) as u32,
                };
                let flags = [0, 1, 2, 3, 0, 2, 3, random.next() as u16 & 7];
                let flags = flags[random.below(8) as usize];
                queue.describe(index, address, length, flags, random.below(17) as u16);
            }
            queue.make_available(random.below(16) as u16);
            driver.registers.notify(at as u16);
        }
        std::thread::sleep(Duration::from_micros(random.below(500)));
    }
}

/// xorshift64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// In the place of a device that is gone.
struct Gone;

impl Registers for Gone {
    fn status(&self) -> u8 {
        unreachable!("no device")
    }
    fn set_status(&self, _: u8) {
        unreachable!("no device")
    }
    fn device_features(&self) -> u64 {
        unreachable!("no device")
    }
    fn set_driver_features(&self, _: u64) {
        unreachable!("no device")
    }
    fn queue_max_size(&self, _: u16) -> u16 {
        unreachable!("no device")
    }
    fn enable_queue(&self, _: u16, _: &QueueState) {
        unreachable!("no device")
    }
    fn reset_queue(&self, _: u16) {
        unreachable!("no device")
    }
    fn notify(&self, _: u16) {
        unreachable!("no device")
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {
        unreachable!("no device")
    }
    fn write_config(&self, _: u64, _: &[u8]) {
        unreachable!("no device")
    }
    fn take_interrupt(&self) -> bool {
        unreachable!("no device")
    }
    fn suspend(&self) {
        unreachable!("no device")
    }
    fn resume(&self) {
        unreachable!("no device")
    }
    fn save(&self) -> DeviceState {
        unreachable!("no device")
    }
    fn load(&self, _: DeviceState) -> Result<(), DeviceError> {
        unreachable!("no device")
    }
    fn with_core(&self, _: &mut dyn FnMut(&mut Core)) {
        unreachable!("no device")
    }
    fn raw(&self) -> (Arc<dyn BusDevice>, u64) {
        unreachable!("no device")
    }
}
