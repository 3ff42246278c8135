//! virtio over MMIO (4.2): a page of registers, one interrupt line.

use super::Doorbell;
use super::core::{Core, CoreState, Ring};
use crate::GuestMemory;
use crate::device::{DeviceError, VirtioDevice};
use crate::thread::DeviceThread;
use husk_bus::{BusDevice, Interrupt};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Register offsets (4.2.2).
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const QUEUE_RESET: u64 = 0x0c0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"HUSK");

const INTERRUPT_VRING: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// The interrupt line, and the register that says why it was raised.
struct Line {
    status: AtomicU32,
    line: EventFd,
    /// The same line, for another process that serves the queues.
    remote: Option<EventFd>,
}

impl Line {
    /// Why the line was raised. Another process does not say why, and then it is for a queue, if for anything.
    fn status(&self) -> u32 {
        let remote = self.remote.as_ref().map_or(0, |_| INTERRUPT_VRING);
        self.status.load(Ordering::Acquire) | remote
    }

    /// An edge, unless the driver has still to acknowledge one for the same cause: it looks at its queues after that.
    fn raise(&self, cause: u32) {
        if self.status.fetch_or(cause, Ordering::AcqRel) & cause == 0 {
            husk_metrics::METRICS.interrupts.triggers.inc();
            // At its maximum the counter is pending already.
            let _ = self.line.write(1);
        }
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {
        self.raise(INTERRUPT_VRING);
    }

    fn config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    /// 2.1.2: the driver is told by a configuration change.
    fn needs_reset(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    fn remote(&self, _index: u16) -> Option<RawFd> {
        self.remote.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// A device behind a page of registers.
pub struct MmioTransport {
    line: Arc<Line>,
    kicks: Vec<Arc<EventFd>>,
    registers: Mutex<Registers>,
}

struct Registers {
    core: Core,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

/// What a snapshot holds of a device behind MMIO.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MmioState {
    /// The device.
    pub core: CoreState,
    /// Registers that select.
    pub device_features_select: u32,
    /// See above.
    pub driver_features_select: u32,
    /// See above.
    pub queue_select: u32,
    /// Causes of interrupts that the driver has not acknowledged.
    pub interrupt_status: u32,
}

impl MmioTransport {
    /// Size of the registers in bytes.
    pub const SIZE: u64 = 0x1000;

    /// `device` with the interrupt line `line` (edges). It runs on `thread` while its driver uses it.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        thread: Arc<DeviceThread>,
        mem: GuestMemory,
        line: EventFd,
    ) -> std::io::Result<Self> {
        // One of its own: a process that has the other end of `line` could fill it, and what writes to it here would wait.
        let remote = device.remote_ring_features();
        let remote = remote.map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC));
        let line = Arc::new(Line {
            status: AtomicU32::new(0),
            line,
            remote: remote.transpose()?,
        });
        let core = Core::new(device, thread, mem, line.clone())?;
        Ok(Self {
            line,
            kicks: core.kicks().map(|(_, kick)| Arc::clone(kick)).collect(),
            registers: Mutex::new(Registers {
                core,
                device_features_select: 0,
                driver_features_select: 0,
                queue_select: 0,
            }),
        })
    }

    /// Writes that KVM can turn into kicks.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let doorbell = |(index, event): (u32, &Arc<EventFd>)| Doorbell {
            offset: register::QUEUE_NOTIFY,
            value: Some(index),
            event: Arc::clone(event),
        };
        (0..).zip(&self.kicks).map(doorbell).collect()
    }

    /// What raises the line as well, for a device whose queues another process serves.
    pub fn remote_line(&self) -> Option<&EventFd> {
        self.line.remote.as_ref()
    }

    /// Call `what` once, when a driver starts the device for the first time.
    pub fn when_started(&self, what: Box<dyn FnOnce() + Send>) {
        self.lock().core.when_started(what);
    }

    /// Stop the device as it is, after what is in flight; see [`Core::suspend`].
    pub fn suspend(&self) {
        self.lock().core.suspend();
    }

    /// Let a device that was suspended, or loaded, go on.
    pub fn resume(&self) {
        let loaded = self.lock().core.resume();
        // An edge may have been on its way when the device was saved; the driver takes a second one for what it is.
        if loaded && self.line.status.load(Ordering::Acquire) != 0 {
            let _ = self.line.line.write(1);
        }
    }

    /// What a snapshot must hold; None when the device was lost. Only while suspended.
    pub fn save(&self) -> Option<MmioState> {
        let registers = self.lock();
        Some(MmioState {
            core: registers.core.save()?,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            interrupt_status: self.line.status.load(Ordering::Acquire),
        })
    }

    /// Take over what [`MmioTransport::save`] gave; see [`Core::load`].
    pub fn load(&self, state: MmioState) -> Result<(), DeviceError> {
        let mut registers = self.lock();
        registers.core.load(state.core)?;
        registers.device_features_select = state.device_features_select;
        registers.driver_features_select = state.driver_features_select;
        registers.queue_select = state.queue_select;
        let known = INTERRUPT_VRING | INTERRUPT_CONFIG;
        let status = state.interrupt_status & known;
        self.line.status.store(status, Ordering::Release);
        Ok(())
    }

    /// Use the transport's core, with vCPUs kept out meanwhile.
    pub fn with_core<R>(&self, what: impl FnOnce(&mut Core) -> R) -> R {
        what(&mut self.lock().core)
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Without the lock: on the way of every interrupt.
        if offset == register::INTERRUPT_STATUS && data.len() == 4 {
            return data.copy_from_slice(&self.line.status().to_le_bytes());
        }
        let registers = self.lock();
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return registers.core.read_config(offset, data);
        }
        // 4.2.2.2: registers are read whole, aligned, and nothing else is defined.
        match (offset % 4, data.len()) {
            (0, 4) => data.copy_from_slice(&registers.read(offset, &self.line).to_le_bytes()),
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            return self.lock().core.write_config(offset, data);
        }
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        if offset == register::INTERRUPT_ACK {
            self.line.status.fetch_and(!value, Ordering::AcqRel);
            return;
        }
        // What a doorbell does that KVM does not know. Without the lock: it may wait for another process.
        if offset == register::QUEUE_NOTIFY {
            let index = usize::try_from(value).ok();
            if let Some(kick) = index.and_then(|index| self.kicks.get(index)) {
                // At its maximum the counter is readable already.
                let _ = kick.write(1);
            }
            return;
        }
        let mut registers = self.lock();
        if offset == register::STATUS && value == 0 {
            registers.reset();
            self.line.status.store(0, Ordering::Release);
            return;
        }
        registers.write(offset, value);
    }
}

impl Registers {
    /// The selected queue; numbers that no queue can have select none.
    fn queue(&self) -> u16 {
        u16::try_from(self.queue_select).unwrap_or(u16::MAX)
    }

    fn read(&self, offset: u64, line: &Line) -> u32 {
        let queue = self.queue();
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.core.device_id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.core.device_features(self.device_features_select),
            register::QUEUE_NUM_MAX => self.core.queue_max_size(queue).into(),
            register::QUEUE_READY => self.core.is_queue_enabled(queue).into(),
            register::INTERRUPT_STATUS => line.status(),
            register::STATUS => self.core.status().into(),
            // No shared memory regions: length and base read as all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            // A reset is done when the write returns.
            register::QUEUE_RESET => 0,
            register::CONFIG_GENERATION => self.core.config_generation().into(),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let queue = self.queue();
        let (core, ring) = (&mut self.core, Core::set_queue_address);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_select = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::DRIVER_FEATURES => {
                core.set_driver_features(self.driver_features_select, value);
            }
            register::QUEUE_SEL => self.queue_select = value,
            // What does not fit is no size either: it fails when the queue is to be used.
            register::QUEUE_NUM => core.set_queue_size(queue, u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY if value == 1 => core.enable_queue(queue),
            register::QUEUE_READY if value == 0 => core.disable_queue(queue),
            register::STATUS => core.set_status((value & 0xff) as u8),
            register::QUEUE_DESC_LOW => ring(core, queue, Ring::Descriptors, false, value),
            register::QUEUE_DESC_HIGH => ring(core, queue, Ring::Descriptors, true, value),
            register::QUEUE_DRIVER_LOW => ring(core, queue, Ring::Available, false, value),
            register::QUEUE_DRIVER_HIGH => ring(core, queue, Ring::Available, true, value),
            register::QUEUE_DEVICE_LOW => ring(core, queue, Ring::Used, false, value),
            register::QUEUE_DEVICE_HIGH => ring(core, queue, Ring::Used, true, value),
            register::QUEUE_RESET if value == 1 => core.reset_queue(queue),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.core.set_status(0);
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }
}
