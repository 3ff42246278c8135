//! What is particular to PCI; the kit in `transport::tests` has the rest.

use super::*;
use crate::testing::{Driver, Pci, Registers, memory};
use crate::{ActiveQueue, ConfigSpace as DeviceConfig, DeviceError, DeviceInfo, F_RING_RESET};
use husk_pci::{HostBridge, Relocate};

/// Takes queues and does nothing with them; interrupts through them are the test's.
struct Idle {
    id: u32,
    config: Arc<DeviceConfig>,
    queues: Vec<ActiveQueue>,
    /// Another process would serve it.
    remote: bool,
}

impl VirtioDevice for Idle {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            id: self.id,
            features: F_RING_RESET,
            queue_sizes: vec![128, 64],
            config: self.config.clone(),
        }
    }
    fn remote_ring_features(&self) -> Option<u64> {
        self.remote.then_some(crate::F_VERSION_1)
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.config.set(offset as usize, data);
    }
    fn start(&mut self, _features: u64, queues: Vec<ActiveQueue>) -> Result<(), DeviceError> {
        self.queues = queues;
        Ok(())
    }
    fn stop(&mut self) -> Vec<ActiveQueue> {
        std::mem::take(&mut self.queues)
    }
    fn queue_ready(&mut self, _index: u16) -> Result<(), DeviceError> {
        Ok(())
    }
    fn reset_queue(&mut self, index: u16) -> Option<ActiveQueue> {
        let at = self.queues.iter().position(|q| q.index() == index)?;
        Some(self.queues.remove(at))
    }
    fn enable_queue(&mut self, queue: ActiveQueue) -> Result<(), DeviceError> {
        self.queues.push(queue);
        Ok(())
    }
}

fn pci_in(mem: &GuestMemory, id: u32, remote: bool) -> Pci {
    let thread = Arc::new(DeviceThread::start("pci", || ()).unwrap());
    let device = Box::new(Idle {
        id,
        config: DeviceConfig::new(vec![1, 2, 3, 4, 5]),
        queues: Vec::new(),
        remote,
    });
    Pci::new(device, &thread, mem)
}

fn pci(id: u32) -> Pci {
    pci_in(&memory(), id, false)
}

/// A device that was started, with another view of its function.
fn started() -> (Driver, Pci) {
    let mem = memory();
    let pci = pci_in(&mem, 42, false);
    let mut driver = Driver::new(Box::new(pci.clone()), mem);
    driver.start(u64::MAX, 64);
    (driver, pci)
}

fn word(pci: &Pci, field: u64) -> u16 {
    u16::from_le_bytes(pci.get(field))
}

/// The five structures (offset, length) by cfg_type, and where the last capability of each type is.
fn structures(pci: &Pci) -> Vec<(u8, u16, u32, u32)> {
    let mut found = Vec::new();
    let mut at = pci.config_word(0x34);
    while at != 0 {
        let [id, next] = pci.config_word(at).to_le_bytes();
        if id == 9 {
            let [size, kind] = pci.config_word(at + 2).to_le_bytes();
            assert!(size >= 16);
            assert_eq!(pci.config_word(at + 4), 0, "BAR 0");
            let (offset, length) = (pci.config_dword(at + 8), pci.config_dword(at + 12));
            found.push((kind, at, offset, length));
        }
        at = next.into();
    }
    found
}

#[test]
fn a_function_says_what_device_it_is() {
    for (id, device, class) in [
        (1, 0x1041, 0x02_00_00),
        (2, 0x1042, 0x01_80_00),
        (19, 0x1053, 0xff_00_00),
    ] {
        let pci = pci(id);
        assert_eq!(pci.config_dword(0), device << 16 | 0x1af4);
        assert_eq!(pci.config_dword(8), class << 8 | 1);
        assert_eq!(pci.config_word(0x3c) >> 8, 0, "no INTx");
    }
}

#[test]
fn the_structures_are_in_the_bar_apart_and_as_long_as_linux_wants_them() {
    let pci = pci(1);
    let found = structures(&pci);
    let kinds: Vec<u8> = found.iter().map(|one| one.0).collect();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    let mut ranges: Vec<(u64, u64)> = found
        .iter()
        .filter(|one| one.0 != 5)
        .map(|one| (one.2.into(), u64::from(one.2) + u64::from(one.3)))
        .collect();
    ranges.push((layout::MSIX_TABLE, layout::MSIX_TABLE + 3 * 16));
    ranges.push((layout::MSIX_PENDING, layout::MSIX_PENDING + 8));
    ranges.sort();
    for pair in ranges.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
    }
    assert!(ranges.iter().all(|range| range.1 <= layout::BAR_SIZE));
    assert!(
        found[0].3 >= 60,
        "the common configuration with queue_reset"
    );
    assert!(found[1].3 >= 2 * layout::NOTIFY_MULTIPLIER as u32);
}

#[test]
fn each_queue_and_the_configuration_interrupt_with_their_own_vector() {
    let (_driver, pci) = started();
    let irq = pci.transport.with_core(|core| core.interrupt());
    pci.sink.take();
    irq.queue(0);
    assert_eq!(pci.sink.take(), 0b010);
    irq.queue(1);
    assert_eq!(pci.sink.take(), 0b100);
    irq.config();
    assert_eq!(pci.sink.take(), 0b001);
    irq.queue(2);
    assert_eq!(pci.sink.take(), 0);
    assert_eq!(pci.sink.messages.lock().unwrap()[&2].data, 0x22);
    let mut isr = [0xff];
    pci.transport.read(layout::ISR, &mut isr);
    assert_eq!(isr, [0], "not with MSI-X");
}

#[test]
fn vectors_that_do_not_exist_read_back_as_none() {
    let (_driver, pci) = started();
    let irq = pci.transport.with_core(|core| core.interrupt());
    for vector in [3u16, 0x7fff, NO_VECTOR] {
        pci.set(16, &vector.to_le_bytes());
        pci.set(22, &[1, 0]);
        pci.set(26, &vector.to_le_bytes());
        assert_eq!((word(&pci, 16), word(&pci, 26)), (NO_VECTOR, NO_VECTOR));
        pci.sink.take();
        irq.config();
        irq.queue(1);
        assert_eq!(pci.sink.take(), 0);
    }
    pci.set(22, &[2, 0]);
    pci.set(26, &[0, 0]);
    assert_eq!(word(&pci, 26), NO_VECTOR, "there is no queue 2");
    assert_eq!((word(&pci, 24), word(&pci, 30)), (0, 0));
}

#[test]
fn a_reset_takes_the_vectors_and_the_selectors_back() {
    let (_driver, pci) = started();
    pci.set(22, &[1, 0]);
    assert_eq!((word(&pci, 16), word(&pci, 26)), (0, 2));
    pci.set(20, &[0]);
    assert_eq!(pci.get(20), [0]);
    assert_eq!(word(&pci, 22), 0);
    for queue in 0..2 {
        pci.set(22, &[queue, 0]);
        assert_eq!((word(&pci, 16), word(&pci, 26)), (NO_VECTOR, NO_VECTOR));
        assert_eq!(word(&pci, 28), 0);
    }
}

#[test]
fn a_queue_can_be_reset_alone_and_enabled_again() {
    let (mut driver, pci) = started();
    pci.reset_queue(1);
    assert_eq!((word(&pci, 28), word(&pci, 26)), (0, NO_VECTOR));
    assert_eq!(word(&pci, 24), 64, "its largest size");
    pci.set(22, &[0, 0]);
    assert_eq!((word(&pci, 28), word(&pci, 26)), (1, 1));
    let queue = driver.new_queue(1, 32);
    pci.enable_queue(1, &queue.state);
    assert_eq!((word(&pci, 28), word(&pci, 24)), (1, 32));
    assert_eq!(pci.status(), 15);
}

#[test]
fn without_msix_the_isr_says_why_until_it_is_read() {
    let pci = pci(42);
    let irq = pci.transport.with_core(|core| core.interrupt());
    irq.queue(0);
    irq.config();
    for wanted in [3, 0] {
        let mut isr = [0xff];
        pci.transport.read(layout::ISR, &mut isr);
        assert_eq!(isr, [wanted]);
    }
    assert_eq!(pci.sink.take(), 0);
}

#[test]
fn fields_are_accessed_at_their_width_and_addresses_in_halves_or_whole() {
    let pci = pci(42);
    for status in [1, 3] {
        pci.set(20, &[status]);
    }
    pci.set_driver_features(F_RING_RESET | crate::F_VERSION_1);
    pci.set(20, &[11]);
    assert_eq!(pci.get(20), [11]);
    pci.set(22, &[0, 0]);
    let address = 0x1122_3344_5566_7788_u64.to_le_bytes();
    pci.set(32, &address);
    pci.set(40, &address[..4]);
    pci.set(44, &address[4..]);
    assert_eq!((pci.get(32), pci.get(40)), (address, address));
    assert_eq!(pci.get::<4>(36), address[4..]);
    // Two bytes of a dword, a dword over two fields, eight bytes at the wrong place: nothing.
    pci.set(48, &[1, 2]);
    pci.set(52, &address);
    pci.set(24, &[8, 0, 1, 0]);
    assert_eq!(pci.get(48), [0; 8]);
    assert_eq!(word(&pci, 24), 128);
    assert_eq!(pci.get(24), [0; 4]);
    assert_eq!(pci.get(20), [0, 0]);
    let features = u32::from_le_bytes(pci.get(12));
    let accepted = F_RING_RESET | crate::F_VERSION_1;
    assert_eq!(
        u64::from(features),
        accepted >> 32,
        "the upper half is selected"
    );
}

#[test]
fn doorbells_are_where_the_notify_structure_says() {
    let pci = pci(42);
    let doorbells = pci.transport.doorbells();
    assert_eq!(doorbells.len(), 2);
    for (queue, doorbell) in doorbells.iter().enumerate() {
        // Each kick is drained first: the counter tells which doorbell rang.
        let _ = doorbell.event.read();
        pci.notify(queue as u16);
        assert_eq!(doorbell.event.read().unwrap(), 1);
        assert!(doorbell.offset < layout::BAR_SIZE && doorbell.value.is_none());
        pci.transport.write(doorbell.offset, &[0xff; 8]);
        assert_eq!(doorbell.event.read().unwrap(), 1);
    }
    pci.transport.write(layout::BAR_SIZE - 4, &[0; 4]);
    pci.transport.write(u64::MAX, &[0; 8]);
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let pci = pci(42);
    let window = structures(&pci)[4].1;
    let aim = |bar: u8, offset: u64, length: u32| {
        pci.transport.write_config(window + 4, &[bar]);
        let offset = (offset as u32).to_le_bytes();
        pci.transport.write_config(window + 8, &offset);
        let length = length.to_le_bytes();
        pci.transport.write_config(window + 12, &length);
    };
    aim(0, layout::DEVICE, 4);
    assert_eq!(pci.config_dword(window + 16).to_le_bytes(), [1, 2, 3, 4]);
    aim(0, layout::COMMON + 20, 1);
    pci.transport.write_config(window + 16, &[1]);
    assert_eq!(pci.status(), 1);
    assert_eq!(pci.config_dword(window + 16) & 0xff, 1);
    for (bar, offset, length) in [
        (1, layout::DEVICE, 4),
        (0, layout::DEVICE + 1, 4),
        (0, layout::BAR_SIZE, 4),
        (0, u64::from(u32::MAX) - 3, 4),
        (0, layout::COMMON + 20, 0),
        (0, layout::COMMON, 8),
        (0, layout::COMMON + 20, 3),
    ] {
        aim(bar, offset, length);
        pci.transport.write_config(window + 16, &[0; 4]);
        assert_eq!(pci.config_dword(window + 16), 0);
    }
    assert_eq!(pci.status(), 1, "no reset came through");
}

#[test]
fn the_msix_capability_turns_messages_on_and_off() {
    let (_driver, pci) = started();
    let irq = pci.transport.with_core(|core| core.interrupt());
    let mut at = pci.config_word(0x34);
    while pci.config_word(at) & 0xff != 0x11 {
        at = pci.config_word(at) >> 8;
    }
    assert_eq!(pci.config_word(at + 2), 0x8002, "on, three vectors");
    pci.sink.take();
    // As Linux while it changes things: all masked, here with a write of the whole dword.
    let masked = [0x11, 0, 0, 0xc0];
    pci.transport.write_config(at, &masked);
    irq.queue(0);
    assert_eq!(pci.sink.take(), 0);
    let mut pending = [0; 8];
    pci.transport.read(layout::MSIX_PENDING, &mut pending);
    assert_eq!(pending, [0b10, 0, 0, 0, 0, 0, 0, 0]);
    pci.transport.write_config(at + 2, &[0, 0x80]);
    assert_eq!(pci.sink.take(), 0b10);
    pci.transport.write_config(at + 3, &[0]);
    irq.queue(0);
    assert_eq!(pci.sink.take(), 0);
}

/// Remembers where the BAR is.
struct Place(Arc<Mutex<Option<u64>>>);

impl Relocate for Place {
    fn relocate(&self, _from: Option<u64>, to: Option<u64>) {
        *self.0.lock().unwrap() = to;
    }
}

#[test]
fn a_device_on_a_bus_is_used_at_its_bar_wherever_that_is() {
    let pci = pci(42);
    let bridge = HostBridge::new(0xd000_0000..0xd010_0000);
    let place = Arc::new(Mutex::new(None));
    let relocate = Box::new(Place(place.clone()));
    let number = bridge.add(pci.transport.clone(), Some(relocate)).unwrap();
    let ecam = |register: u64, data: &[u8]| {
        bridge
            .ecam()
            .write(u64::from(number) << 15 | register, data);
    };
    for moved in [None, Some(0xd008_0000_u32)] {
        if let Some(address) = moved {
            ecam(0x10, &address.to_le_bytes());
        }
        let bar = place.lock().unwrap().unwrap() - 0xd000_0000;
        let mut device = [0; 4];
        bridge.window().read(bar + layout::DEVICE, &mut device);
        assert_eq!(device, [1, 2, 3, 4]);
        bridge.window().write(bar + 20, &[1]);
        assert_eq!(pci.status(), 1);
        bridge.window().write(bar + 20, &[0]);
        assert_eq!(pci.status(), 0);
    }
}

#[test]
fn no_access_to_configuration_space_or_the_bar_can_break_the_function() {
    let (mut driver, pci) = started();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..50_000 {
        let length = 1 + (random() % 8) as usize;
        let mut data = random().to_le_bytes();
        if random() % 2 == 0 {
            data = (random() % 0x4100).to_le_bytes();
        }
        let register = (random() % 0x108) as u16;
        let offset = match random() % 3 {
            0 => random() % layout::COMMON_SIZE,
            1 => layout::MSIX_TABLE + random() % 0x40,
            _ => random() % (layout::BAR_SIZE + 8),
        };
        match random() % 4 {
            0 => Function::read_config(&*pci.transport, register, &mut data[..length]),
            1 => Function::write_config(&*pci.transport, register, &data[..length]),
            2 => pci.transport.read(offset, &mut data[..length]),
            _ => pci.transport.write(offset, &data[..length]),
        }
    }
    driver.start(u64::MAX, 64);
}

#[test]
fn what_another_process_writes_follows_its_queues_vector_and_waits_while_that_is_closed() {
    let mem = memory();
    let pci = pci_in(&mem, 42, true);
    let mut driver = Driver::new(Box::new(pci.clone()), mem);
    driver.start(u64::MAX, 64);
    assert_eq!(driver.features & crate::RING_FEATURES, crate::F_VERSION_1);
    let [first, second] = [1, 2].map(|vector| pci.sink.event(vector).unwrap());
    let sent = |event: &EventFd| {
        event.write(1).unwrap();
        pci.sink.take()
    };
    assert_eq!((sent(&first), sent(&second)), (0b010, 0b100));
    let mask = |vector: u64, value: u32| {
        let control = layout::MSIX_TABLE + 16 * vector + 12;
        pci.transport.write(control, &value.to_le_bytes());
    };
    mask(1, 1);
    assert_eq!((sent(&first), sent(&second)), (0, 0b100));
    mask(1, 0);
    assert_eq!(pci.sink.take(), 0b010);
    // Another vector, none, and the one that it had.
    let choose = |vector: u16| {
        pci.set(22, &[0, 0]);
        pci.set(26, &vector.to_le_bytes());
    };
    choose(2);
    assert_eq!(sent(&first), 0b100);
    choose(NO_VECTOR);
    assert_eq!(sent(&first), 0);
    choose(1);
    assert_eq!(pci.sink.take(), 0b010);
    // A driver that resets the device hears nothing more; nor does whoever has the vectors after the function.
    driver.registers.set_status(0);
    assert_eq!(sent(&first), 0);
    driver.start(u64::MAX, 64);
    assert!(pci.sink.event(1).is_some());
    let sink = Arc::clone(&pci.sink);
    drop((driver, pci));
    assert!(sink.event(1).is_none() && sink.event(2).is_none());
}

#[test]
fn a_driver_without_messages_is_told_to_look_at_queues_that_another_process_serves() {
    let isr = |remote: bool| {
        let pci = pci_in(&memory(), 42, remote);
        let mut data = [0xff];
        pci.transport.read(layout::ISR, &mut data);
        data
    };
    assert_eq!((isr(true), isr(false)), ([ISR_QUEUE], [0]));
}
