//! A driver's view of a device over PCI, found through its capabilities as Linux does.

use super::{Registers, from_value, to_value};
use crate::queue::QueueState;
use crate::transport::Core;
use crate::transport::pci::{PciTransport, layout};
use crate::{DeviceError, DeviceState, DeviceThread, GuestMemory, VirtioDevice};
use husk_bus::BusDevice;
use husk_pci::{Function, Message, MsiSink};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Where messages end: who was told what, and what was sent.
#[derive(Default)]
pub struct Sink {
    /// The message of each vector.
    pub messages: Mutex<HashMap<u16, Message>>,
    /// A bit for each vector that has sent since it was last looked at.
    sent: AtomicU64,
    /// Events of other processes, by their descriptor, and the vector of each.
    connected: Mutex<HashMap<RawFd, (u16, EventFd)>>,
}

impl Sink {
    /// The vectors that have sent since the last call, as bits.
    pub fn take(&self) -> u64 {
        let connected = self.connected.lock().unwrap();
        let written = connected.values().filter(|(_, event)| event.read().is_ok());
        let written = written.fold(0, |all, (vector, _)| all | 1 << (vector % 64));
        self.sent.swap(0, Ordering::SeqCst) | written
    }

    /// An event of another process that is connected with this vector, as that process has it.
    pub fn event(&self, vector: u16) -> Option<EventFd> {
        let connected = self.connected.lock().unwrap();
        let event = connected.values().find(|(own, _)| *own == vector);
        event.map(|(_, event)| event.try_clone().expect("an eventfd"))
    }
}

impl MsiSink for Sink {
    fn set(&self, messages: &[(u16, Message)]) {
        self.messages
            .lock()
            .unwrap()
            .extend(messages.iter().copied());
    }

    fn trigger(&self, vector: u16) {
        let known = self.messages.lock().unwrap().contains_key(&vector);
        assert!(known, "vector {vector} sends, but has no message");
        self.sent.fetch_or(1 << (vector % 64), Ordering::SeqCst);
    }

    fn connect(&self, vector: u16, event: &EventFd) -> std::io::Result<()> {
        let known = self.messages.lock().unwrap().contains_key(&vector);
        assert!(known, "vector {vector} is connected, but has no message");
        let other = self
            .connected
            .lock()
            .unwrap()
            .insert(event.as_raw_fd(), (vector, event.try_clone()?));
        assert!(other.is_none(), "an event is connected twice");
        Ok(())
    }

    fn disconnect(&self, vector: u16, event: &EventFd) {
        let other = self.connected.lock().unwrap().remove(&event.as_raw_fd());
        assert_eq!(other.map(|(own, _)| own), Some(vector));
    }
}

/// Any device behind a PCI function, its BAR reached directly. Vector 0 is for the configuration, the next for the queues. A
/// clone is another view of the same function.
#[derive(Clone)]
pub struct Pci {
    /// The transport.
    pub transport: Arc<PciTransport>,
    /// Where its messages end.
    pub sink: Arc<Sink>,
    vectors: u16,
    msix: u16,
    common: u64,
    notify: u64,
    device: u64,
}

impl Pci {
    /// Put `device` behind one.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        thread: &Arc<DeviceThread>,
        mem: &GuestMemory,
    ) -> Self {
        let sink = Arc::new(Sink::default());
        let mut vectors = 0;
        let end = sink.clone();
        let transport = PciTransport::new(device, Arc::clone(thread), mem.clone(), |count| {
            vectors = count;
            Ok(end)
        });
        let mut pci = Self {
            transport: Arc::new(transport.expect("a transport")),
            sink,
            vectors,
            msix: 0,
            common: u64::MAX,
            notify: u64::MAX,
            device: u64::MAX,
        };
        pci.find_structures();
        pci
    }

    /// Walk the list of capabilities.
    fn find_structures(&mut self) {
        assert_ne!(self.config_word(6) & 1 << 4, 0, "no capabilities");
        let mut at = self.config_word(0x34) & 0xff;
        while at != 0 {
            let [id, next] = self.config_word(at).to_le_bytes();
            let [_, kind] = self.config_word(at + 2).to_le_bytes();
            let offset = u64::from(self.config_dword(at + 8));
            match (id, kind) {
                (0x11, _) => self.msix = at,
                (9, 1) => self.common = offset,
                (9, 2) => {
                    self.notify = offset;
                    let multiplier = u64::from(self.config_dword(at + 16));
                    assert_eq!(multiplier, layout::NOTIFY_MULTIPLIER);
                }
                (9, 4) => self.device = offset,
                _ => {}
            }
            at = next.into();
        }
        let found = [self.common, self.notify, self.device];
        assert!(!found.contains(&u64::MAX) && self.msix != 0);
    }

    /// Two bytes of configuration space.
    pub fn config_word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.transport.read_config(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes of configuration space.
    pub fn config_dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.transport.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Read `N` bytes of the common configuration.
    pub fn get<const N: usize>(&self, field: u64) -> [u8; N] {
        let mut data = [0xff; N];
        self.transport.read(self.common + field, &mut data);
        data
    }

    /// Write to the common configuration.
    pub fn set(&self, field: u64, data: &[u8]) {
        self.transport.write(self.common + field, data);
    }

    fn set_word(&self, field: u64, value: u16) {
        self.set(field, &value.to_le_bytes());
    }

    fn set_dword(&self, field: u64, value: u32) {
        self.set(field, &value.to_le_bytes());
    }

    /// As a driver that comes anew: MSI-X on, each vector with a message, vector 0 for the configuration.
    pub fn enable_interrupts(&self) {
        for vector in 0..self.vectors {
            let entry = layout::MSIX_TABLE + 16 * u64::from(vector);
            let data = u32::from(vector) + 0x20;
            for (field, value) in (0..).zip([0xfee0_0000, 0, data, 0]) {
                let value: u32 = value;
                self.transport
                    .write(entry + 4 * field, &value.to_le_bytes());
            }
        }
        self.transport.write_config(self.msix + 2, &[0, 0x80]);
        self.set_word(16, 0);
    }
}

impl Registers for Pci {
    fn status(&self) -> u8 {
        let [status] = self.get(20);
        status
    }
    fn set_status(&self, value: u8) {
        self.set(20, &[value]);
        if value == 1 {
            self.enable_interrupts();
        }
    }
    fn device_features(&self) -> u64 {
        self.set_dword(0, 1);
        let high = u64::from(u32::from_le_bytes(self.get(4)));
        self.set_dword(0, 0);
        high << 32 | u64::from(u32::from_le_bytes(self.get(4)))
    }
    fn set_driver_features(&self, features: u64) {
        self.set_dword(8, 0);
        self.set_dword(12, features as u32);
        self.set_dword(8, 1);
        self.set_dword(12, (features >> 32) as u32);
    }
    fn queue_max_size(&self, queue: u16) -> u16 {
        self.set_word(22, queue);
        u16::from_le_bytes(self.get(24))
    }
    fn enable_queue(&self, queue: u16, state: &QueueState) {
        self.set_word(22, queue);
        self.set_word(24, state.size);
        self.set_word(26, queue + 1);
        assert_eq!(u16::from_le_bytes(self.get(26)), queue + 1, "no vector");
        for (field, address) in [
            (32, state.descriptors),
            (40, state.available),
            (48, state.used),
        ] {
            self.set_dword(field, address as u32);
            self.set_dword(field + 4, (address >> 32) as u32);
        }
        self.set_word(28, 1);
    }
    fn reset_queue(&self, queue: u16) {
        self.set_word(22, queue);
        self.set_word(58, 1);
        assert_eq!(self.get(58), [0, 0], "the reset is not done");
    }
    fn notify(&self, queue: u16) {
        self.set_word(22, queue);
        let offset = u64::from(u16::from_le_bytes(self.get(30)));
        let doorbell = self.notify + offset * layout::NOTIFY_MULTIPLIER;
        self.transport.write(doorbell, &queue.to_le_bytes());
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_add(self.device) {
            self.transport.read(offset, data);
        }
    }
    fn write_config(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_add(self.device) {
            self.transport.write(offset, data);
        }
    }
    fn take_interrupt(&self) -> bool {
        self.sink.take() != 0
    }
    fn suspend(&self) {
        self.transport.suspend();
    }
    fn resume(&self) {
        self.transport.resume();
    }
    fn save(&self) -> DeviceState {
        to_value(self.transport.save())
    }
    fn load(&self, state: DeviceState) -> Result<(), DeviceError> {
        self.transport.load(from_value(state)?)
    }
    fn with_core(&self, what: &mut dyn FnMut(&mut Core)) {
        self.transport.with_core(|core| what(core));
    }
    fn raw(&self) -> (Arc<dyn BusDevice>, u64) {
        (self.transport.clone(), layout::BAR_SIZE)
    }
}
