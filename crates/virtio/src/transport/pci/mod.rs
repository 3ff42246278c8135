//! virtio over PCI (4.1), without the legacy interface: one function, one BAR, MSI-X and no INTx.
//!
//! The BAR holds all structures (4.1.4) and the MSI-X table; [`layout`] says where.

mod common;
mod config;
mod remote;

pub use self::common::CommonState;

use self::common::Common;
use self::remote::Remote;
use super::Doorbell;
use super::core::Core;
use crate::GuestMemory;
use crate::device::{DeviceError, VirtioDevice};
use crate::thread::DeviceThread;
use husk_bus::{BusDevice, Interrupt};
use husk_pci::{ConfigSpace, Function, MAX_VECTORS, MsiSink, Msix};
use serde::{Deserialize, Serialize};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// A queue or the configuration has no vector (4.1.5.1.2.1, VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// What lies where in the BAR. Doorbells have a page of their own, and so has the MSI-X table with its pending bits.
pub mod layout {
    /// Size of the BAR in bytes.
    pub const BAR_SIZE: u64 = 0x4000;
    /// Common configuration (4.1.4.3).
    pub const COMMON: u64 = 0x0000;
    /// Bytes of it.
    pub const COMMON_SIZE: u64 = 0x40;
    /// ISR status (4.1.4.5), one byte.
    pub const ISR: u64 = 0x0800;
    /// The device's own configuration (4.1.4.6).
    pub const DEVICE: u64 = 0x1000;
    /// Room for it in bytes.
    pub const DEVICE_SIZE: u64 = 0x1000;
    /// MSI-X table.
    pub const MSIX_TABLE: u64 = 0x2000;
    /// MSI-X pending bits.
    pub const MSIX_PENDING: u64 = 0x2800;
    /// Doorbells (4.1.4.4).
    pub const NOTIFY: u64 = 0x3000;
    /// Distance of the doorbells of two queues (notify_off_multiplier).
    pub const NOTIFY_MULTIPLIER: u64 = 4;
}

// The table ends where the pending bits begin, and those before the doorbells.
const _: () = assert!(layout::MSIX_TABLE + MAX_VECTORS as u64 * 16 <= layout::MSIX_PENDING);
const _: () = assert!(layout::MSIX_PENDING + MAX_VECTORS as u64 / 8 <= layout::NOTIFY);

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// How the driver is interrupted: which vector for what, and the ISR for a driver that has not turned MSI-X on. No lock.
struct Messages {
    msix: Msix,
    isr: AtomicU8,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    /// Another process serves the queues.
    remote: Option<Remote>,
}

impl Messages {
    /// 4.1.4.5.1: the ISR is for drivers without MSI-X. There is no line: they can only poll it.
    fn raise(&self, vector: &AtomicU16, cause: u8) {
        match self.msix.is_enabled() {
            // NO_VECTOR does not exist, and sends nothing.
            true => self.msix.trigger(vector.load(Ordering::Acquire)),
            false => drop(self.isr.fetch_or(cause, Ordering::AcqRel)),
        }
    }

    /// Vectors that do not exist are refused: they read back as [`NO_VECTOR`] (4.1.5.1.2.1).
    fn set_vector(&self, of: &AtomicU16, vector: u16) {
        let exists = vector < self.msix.count();
        of.store(if exists { vector } else { NO_VECTOR }, Ordering::Release);
        self.changed();
    }

    /// After every change of a queue's vector, of MSI-X's control or of its table.
    fn changed(&self) {
        if let Some(remote) = &self.remote {
            remote.follow(&self.msix, &self.queues);
        }
    }

    fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::Release);
        for queue in &self.queues {
            queue.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.changed();
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        if let Some(remote) = &self.remote {
            remote.disconnect(&self.msix);
        }
    }
}

impl Interrupt for Messages {
    fn queue(&self, index: u16) {
        if let Some(vector) = self.queues.get(usize::from(index)) {
            self.raise(vector, ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.raise(&self.config, ISR_CONFIG);
    }

    /// 2.1.2: the driver is told by a configuration change.
    fn needs_reset(&self) {
        self.raise(&self.config, ISR_CONFIG);
    }

    fn remote(&self, index: u16) -> Option<RawFd> {
        self.remote.as_ref()?.event(index)
    }
}

/// A device behind a PCI function. As a [`BusDevice`] it is its BAR.
pub struct PciTransport {
    messages: Arc<Messages>,
    common: Mutex<Common>,
    kicks: Vec<Arc<EventFd>>,
    config: Mutex<ConfigSpace>,
    capabilities: config::Capabilities,
}

/// What a snapshot holds of a device behind a PCI function.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PciState {
    /// The common configuration, and the device.
    pub common: CommonState,
    /// ISR status.
    pub isr: u8,
    /// Configuration space: of it only what a driver may write counts.
    pub config: Vec<u8>,
    /// MSI-X table: address (low, high), data and control of each vector.
    pub vectors: Vec<[u32; 4]>,
    /// Whether a message of each vector waits until it is unmasked.
    pub pending: Vec<bool>,
}

impl PciTransport {
    /// `device` as a function that is still to be put on a bus. It runs on `thread` while its driver uses it. `sink` makes
    /// where its messages go, for that many vectors: one for each queue, one for the configuration.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        thread: Arc<DeviceThread>,
        mem: GuestMemory,
        sink: impl FnOnce(u16) -> std::io::Result<Arc<dyn MsiSink>>,
    ) -> std::io::Result<Self> {
        let info = device.info();
        let queues = info.queue_sizes.len();
        let vectors = u16::try_from(queues + 1)
            .unwrap_or(MAX_VECTORS)
            .min(MAX_VECTORS);
        let msix = Msix::new(vectors, sink(vectors)?).map_err(std::io::Error::other)?;
        let remote = device.remote_ring_features().map(|_| Remote::new(queues));
        let messages = Arc::new(Messages {
            msix,
            isr: AtomicU8::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            remote: remote.transpose()?,
        });
        let (config, capabilities) =
            config::build(info.id, queues, &messages.msix).map_err(std::io::Error::other)?;
        let core = Core::new(device, thread, mem, messages.clone())?;
        let kicks = core.kicks().map(|(_, kick)| Arc::clone(kick)).collect();
        Ok(Self {
            common: Mutex::new(Common::new(core, messages.clone())),
            messages,
            kicks,
            config: Mutex::new(config),
            capabilities,
        })
    }

    /// Writes that KVM can turn into kicks; offsets in the BAR. They move with it.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let doorbell = |(index, event): (u64, &Arc<EventFd>)| Doorbell {
            offset: layout::NOTIFY + index * layout::NOTIFY_MULTIPLIER,
            value: None,
            event: Arc::clone(event),
        };
        (0..).zip(&self.kicks).map(doorbell).collect()
    }

    /// Call `what` once, when a driver starts the device for the first time. The transport is locked meanwhile, and the bus
    /// may be: it must call neither.
    pub fn when_started(&self, what: Box<dyn FnOnce() + Send>) {
        self.common().core().when_started(what);
    }

    /// Stop the device as it is, after what is in flight; see [`Core::suspend`].
    pub fn suspend(&self) {
        self.common().core().suspend();
    }

    /// Let a device that was suspended, or loaded, go on.
    pub fn resume(&self) {
        let mut common = self.common();
        // Messages may have been on their way when the device was saved; a driver that is told once more finds nothing new.
        if common.core().resume() && self.messages.msix.is_enabled() {
            self.messages.config();
            let queues = 0..common.core().queue_count();
            queues.for_each(|index| self.messages.queue(index));
        }
    }

    /// What a snapshot must hold; None when the device was lost. Only while suspended.
    pub fn save(&self) -> Option<PciState> {
        let (vectors, pending) = self.messages.msix.state();
        Some(PciState {
            common: self.common().save()?,
            isr: self.messages.isr.load(Ordering::Acquire),
            config: self.lock_config().contents().to_vec(),
            vectors,
            pending,
        })
    }

    /// Take over what [`PciTransport::save`] gave; see [`Core::load`]. Before the function is put on its bus, at the same number.
    pub fn load(&self, state: PciState) -> Result<(), DeviceError> {
        let refused = |e: husk_pci::Error| DeviceError::Unsupported(e.to_string());
        let control = {
            let mut config = self.lock_config();
            config.write(0, &state.config);
            self.capabilities.msix_control(&config)
        };
        let msix = &self.messages.msix;
        msix.restore(control, &state.vectors, &state.pending)
            .map_err(refused)?;
        self.common().load(state.common)?;
        let isr = state.isr & (ISR_QUEUE | ISR_CONFIG);
        self.messages.isr.store(isr, Ordering::Release);
        self.messages.changed();
        Ok(())
    }

    /// Use the transport's core, with vCPUs kept out meanwhile.
    pub fn with_core<R>(&self, what: impl FnOnce(&mut Core) -> R) -> R {
        what(self.common().core())
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// 4.1.4.5: one byte, cleared by reading.
    fn read_isr(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (layout::ISR, Some(first)) = (offset, data.first_mut()) {
            *first = self.messages.isr.swap(0, Ordering::AcqRel);
            // Another process does not say why it interrupts: look at the queues.
            if self.messages.remote.is_some() && !self.messages.msix.is_enabled() {
                *first |= ISR_QUEUE;
            }
        }
    }

    /// Any write to a queue's doorbell is a kick: the address says which queue.
    fn ring(&self, offset: u64) {
        let index = usize::try_from(offset / layout::NOTIFY_MULTIPLIER).ok();
        if let Some(kick) = index.and_then(|index| self.kicks.get(index)) {
            // At its maximum the counter is readable already.
            let _ = kick.write(1);
        }
    }
}

impl BusDevice for PciTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            ..layout::ISR => self.common().read(offset, data),
            layout::ISR..layout::DEVICE => self.read_isr(offset, data),
            layout::DEVICE..layout::MSIX_TABLE => {
                let offset = offset - layout::DEVICE;
                self.common().core().read_config(offset, data);
            }
            layout::MSIX_TABLE..layout::MSIX_PENDING => {
                let offset = offset - layout::MSIX_TABLE;
                self.messages.msix.read_table(offset, data);
            }
            layout::MSIX_PENDING..layout::NOTIFY => {
                let offset = offset - layout::MSIX_PENDING;
                self.messages.msix.read_pending(offset, data);
            }
            layout::NOTIFY.. => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            ..layout::ISR => self.common().write(offset, data),
            layout::ISR..layout::DEVICE => {}
            layout::DEVICE..layout::MSIX_TABLE => {
                let offset = offset - layout::DEVICE;
                self.common().core().write_config(offset, data);
            }
            layout::MSIX_TABLE..layout::MSIX_PENDING => {
                let offset = offset - layout::MSIX_TABLE;
                self.messages.msix.write_table(offset, data);
                self.messages.changed();
            }
            layout::MSIX_PENDING..layout::NOTIFY => {}
            layout::NOTIFY.. => self.ring(offset - layout::NOTIFY),
        }
    }
}

impl Function for PciTransport {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if self.capabilities.is_window(offset, data.len()) {
            self.read_through_window();
        }
        self.lock_config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut config = self.lock_config();
        config.write(offset, data);
        let control = self.capabilities.msix_control(&config);
        // The structures behind the BAR have locks of their own.
        drop(config);
        self.messages.msix.set_control(control);
        self.messages.changed();
        if self.capabilities.is_window(offset, data.len()) {
            self.write_through_window();
        }
    }
}

#[cfg(test)]
mod tests;
