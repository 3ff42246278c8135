//! What all transports have in common: the status machine (2.1, 3.1), features (2.2), queue set-up, and where the device is.

use crate::device::{ConfigSpace, DeviceError, DeviceInfo, DeviceState, VirtioDevice};
use crate::queue::{ActiveQueue, QueueState};
use crate::thread::{DeviceThread, RunningId, ThreadError};
use crate::{F_EVENT_IDX, F_RING_RESET, F_VERSION_1, GuestMemory, RING_FEATURES, WriteLog};
use husk_bus::Interrupt;
use serde::{Deserialize, Serialize};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;

/// The order in which a driver sets the status bits (3.1.1): each needs those before it.
const ORDER: [u8; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// One of the three parts of a queue in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// The descriptor table.
    Descriptors,
    /// The available ring, "driver area".
    Available,
    /// The used ring, "device area".
    Used,
}

/// A queue as the driver has set it up so far.
struct Setup {
    max_size: u16,
    state: QueueState,
    enabled: bool,
    kick: Arc<EventFd>,
}

/// What a snapshot holds of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// Where it is and how far it has come.
    pub state: QueueState,
    /// The driver has enabled it.
    pub enabled: bool,
}

/// What a snapshot holds of a device and of its driver's work, whatever the transport.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CoreState {
    /// The device status field, with DEVICE_NEEDS_RESET.
    pub status: u8,
    /// Features that the driver has accepted.
    pub features: u64,
    /// By number.
    pub queues: Vec<QueueSetup>,
    /// The configuration space, as the driver knows it, and its generation.
    #[serde(default)]
    pub config: Vec<u8>,
    /// See [`CoreState::config`].
    #[serde(default)]
    pub generation: u8,
    /// The device's own progress.
    pub device: DeviceState,
}

/// Where the device is.
enum Place {
    /// Here, stopped.
    Here(Box<dyn VirtioDevice>),
    /// On the I/O thread, started.
    Running(RunningId),
    /// The I/O thread has died with it.
    Lost,
}

/// A device's interrupt with the flag that the status register shows.
struct Signals {
    interrupt: Arc<dyn Interrupt>,
    needs_reset: AtomicBool,
    /// Hears of resets of a started device.
    when_reset: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Signals {
    fn tell_of_reset(&self) {
        if let Some(tell) = self.when_reset.get() {
            tell();
        }
    }
}

impl Interrupt for Signals {
    fn queue(&self, index: u16) {
        self.interrupt.queue(index);
    }

    fn config(&self) {
        self.interrupt.config();
    }

    fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.tell_of_reset();
        }
        self.interrupt.needs_reset();
    }

    fn remote(&self, index: u16) -> Option<RawFd> {
        self.interrupt.remote(index)
    }
}

/// The device's side of a transport, without its registers. A transport keeps it behind one lock, which is taken on vCPU
/// threads and on the main thread, never on an I/O thread.
pub struct Core {
    id: u32,
    offered: u64,
    config: Arc<ConfigSpace>,
    status: u8,
    accepted: u64,
    queues: Vec<Setup>,
    place: Place,
    thread: Arc<DeviceThread>,
    mem: GuestMemory,
    signals: Arc<Signals>,
    when_started: Option<Box<dyn FnOnce() + Send>>,
    /// The configuration space that the driver of a loaded device knows, until that goes on.
    loaded: Option<Vec<u8>>,
    log: Option<Arc<WriteLog>>,
    /// Another process takes the kicks. It could fill their counters, so that a write to one waits: never with the transport locked.
    is_remote: bool,
}

impl Core {
    /// For `device`, which runs on `thread` when its driver is ready. Fails only when the host has no more descriptors.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        thread: Arc<DeviceThread>,
        mem: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
    ) -> std::io::Result<Self> {
        let DeviceInfo {
            id,
            features,
            queue_sizes,
            config,
        } = device.info();
        let queues = queue_sizes.iter().map(|&max_size| {
            Ok(Setup {
                max_size,
                state: QueueState::default(),
                enabled: false,
                kick: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            })
        });
        let remote = device.remote_ring_features();
        let known = remote.unwrap_or(RING_FEATURES);
        let mut core = Self {
            id,
            offered: features | RING_FEATURES & known,
            config,
            status: 0,
            accepted: 0,
            queues: queues.collect::<std::io::Result<_>>()?,
            place: Place::Here(device),
            thread,
            mem,
            signals: Arc::new(Signals {
                interrupt,
                needs_reset: AtomicBool::new(false),
                when_reset: OnceLock::new(),
            }),
            when_started: None,
            loaded: None,
            log: None,
            is_remote: remote.is_some(),
        };
        core.forget_driver();
        Ok(core)
    }

    /// Call `what` once, on the vCPU that starts the device for the first time.
    pub fn when_started(&mut self, what: Box<dyn FnOnce() + Send>) {
        self.when_started = Some(what);
    }

    /// Note in `log` what the device writes to memory. Before any driver comes.
    pub fn log_writes(&mut self, log: Arc<WriteLog>) {
        self.log = Some(log);
    }

    /// Call `what` whenever the driver resets a device that it had started, and when the device cannot go on without: on a vCPU's
    /// or an I/O thread, as often as a guest likes. Once.
    pub fn when_reset(&mut self, what: Box<dyn Fn() + Send + Sync>) {
        // A second one is not heard.
        let _ = self.signals.when_reset.set(what);
    }

    /// virtio device ID (5).
    pub fn device_id(&self) -> u32 {
        self.id
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        self.queues.len() as u16
    }

    /// The device status field (2.1).
    pub fn status(&self) -> u8 {
        match self.signals.needs_reset.load(Ordering::Acquire) {
            true => self.status | NEEDS_RESET,
            false => self.status,
        }
    }

    /// The driver writes the status: 0 resets, and returns when the device has stopped; other values only ever add bits, in
    /// order. What a driver may not write is ignored.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        if value & FAILED != 0 {
            self.stop();
            self.status |= FAILED;
            return;
        }
        for (place, bit) in ORDER.into_iter().enumerate() {
            let before: u8 = ORDER.iter().take(place).sum();
            let new = value & bit != 0 && self.status & bit == 0;
            if !new || self.status & before != before || self.status & FAILED != 0 {
                continue;
            }
            match bit {
                FEATURES_OK if !self.features_are_valid() => {}
                DRIVER_OK => {
                    self.status |= bit;
                    self.start();
                }
                _ => self.status |= bit,
            }
        }
    }

    /// 2.2: not more than was offered, and no legacy driver.
    fn features_are_valid(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }

    /// Bits 0–31 (`select` 0) or 32–63 (1) of the features that the device offers, else 0.
    pub fn device_features(&self, select: u32) -> u32 {
        match select {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        }
    }

    /// The same bits of what the driver has accepted.
    pub fn driver_features(&self, select: u32) -> u32 {
        match select {
            0 => self.accepted as u32,
            1 => (self.accepted >> 32) as u32,
            _ => 0,
        }
    }

    /// The driver accepts features; not any more after FEATURES_OK.
    pub fn set_driver_features(&mut self, select: u32, value: u32) {
        let shift = match select {
            0 => 0,
            1 => 32,
            _ => return,
        };
        if self.status & DRIVER != 0 && self.status & FEATURES_OK == 0 {
            self.accepted &= !(0xffff_ffff << shift);
            self.accepted |= u64::from(value) << shift;
        }
    }

    /// Largest size of a queue; 0 when there is none of that number.
    pub fn queue_max_size(&self, index: u16) -> u16 {
        self.queues
            .get(usize::from(index))
            .map_or(0, |queue| queue.max_size)
    }

    /// The size that the driver has chosen.
    pub fn queue_size(&self, index: u16) -> u16 {
        self.queues
            .get(usize::from(index))
            .map_or(0, |queue| queue.state.size)
    }

    /// Whether the driver has enabled a queue.
    pub fn is_queue_enabled(&self, index: u16) -> bool {
        self.queues
            .get(usize::from(index))
            .is_some_and(|queue| queue.enabled)
    }

    /// Guest-physical address of a part of a queue, as the driver has set it.
    pub fn queue_address(&self, index: u16, ring: Ring) -> u64 {
        let queue = self.queues.get(usize::from(index));
        queue.map_or(0, |queue| match ring {
            Ring::Descriptors => queue.state.descriptors,
            Ring::Available => queue.state.available,
            Ring::Used => queue.state.used,
        })
    }

    /// The driver chooses a size. Any number is taken; it is checked when the queue comes into use.
    pub fn set_queue_size(&mut self, index: u16, size: u16) {
        if let Some(queue) = self.queue_in_setup(index) {
            queue.state.size = size;
        }
    }

    /// The driver says where a part of a queue lies. `high`: the upper 32 bits of the address.
    pub fn set_queue_address(&mut self, index: u16, ring: Ring, high: bool, value: u32) {
        let Some(queue) = self.queue_in_setup(index) else {
            return;
        };
        let address = match ring {
            Ring::Descriptors => &mut queue.state.descriptors,
            Ring::Available => &mut queue.state.available,
            Ring::Used => &mut queue.state.used,
        };
        let shift = if high { 32 } else { 0 };
        *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
    }

    /// A queue that may be changed: the driver is there, and it is not enabled.
    fn queue_in_setup(&mut self, index: u16) -> Option<&mut Setup> {
        // 3.1.1: queues are set up after FEATURES_OK; a queue that was reset alone, at any time.
        let ready = self.status & FEATURES_OK != 0 && self.status & FAILED == 0;
        self.queues
            .get_mut(usize::from(index))
            .filter(|queue| ready && !queue.enabled)
    }

    /// The driver enables a queue.
    pub fn enable_queue(&mut self, index: u16) {
        let Some(queue) = self.queue_in_setup(index) else {
            return;
        };
        queue.enabled = true;
        // Enabled at DRIVER_OK; later only when it was reset before.
        if let Place::Running(id) = self.place {
            match self.active_queue(index) {
                Some(queue) if self.accepted & F_RING_RESET != 0 => {
                    if self.thread.enable_queue(id, queue).is_err() {
                        self.lose();
                    }
                }
                _ => self.signals.needs_reset(),
            }
        }
    }

    /// The driver disables a queue without a reset, which only an MMIO transport lets it, and only before DRIVER_OK.
    pub fn disable_queue(&mut self, index: u16) {
        if self.status & DRIVER_OK == 0
            && let Some(queue) = self.queues.get_mut(usize::from(index))
        {
            queue.enabled = false;
        }
    }

    /// The driver resets one queue (2.6.1); returns when the device does not use it any more.
    pub fn reset_queue(&mut self, index: u16) {
        if self.accepted & F_RING_RESET == 0 || !self.is_queue_enabled(index) {
            return;
        }
        if let Place::Running(id) = self.place {
            let given_up = self
                .thread
                .with_device(id, move |device| drop(device.reset_queue(index)));
            if given_up.is_err() {
                self.lose();
            }
        }
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.reset();
        }
    }

    /// Fill `data` from the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// The driver writes to the configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        match &mut self.place {
            Place::Here(device) => device.write_config(offset, data),
            Place::Running(id) => {
                let data = data.to_vec();
                let written = self
                    .thread
                    .with_device(*id, move |device| device.write_config(offset, &data));
                if written.is_err() {
                    self.lose();
                }
            }
            Place::Lost => {}
        }
    }

    /// Changes whenever the device changes its configuration space.
    pub fn config_generation(&self) -> u8 {
        self.config.generation()
    }

    /// What is to become readable at a kick, queue by queue.
    pub fn kicks(&self) -> impl Iterator<Item = (u16, &Arc<EventFd>)> {
        (0..)
            .zip(&self.queues)
            .map(|(index, queue)| (index, &queue.kick))
    }

    /// Call `what` with the device, wherever it is; None when it was lost.
    pub fn with_device<R: Send + 'static>(
        &mut self,
        what: impl FnOnce(&mut dyn VirtioDevice) -> R + Send + 'static,
    ) -> Option<R> {
        match &mut self.place {
            Place::Here(device) => Some(what(device.as_mut())),
            Place::Running(id) => self.thread.with_device(*id, what).ok(),
            Place::Lost => None,
        }
    }

    /// How the driver is interrupted; also sets DEVICE_NEEDS_RESET.
    pub fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.signals) as Arc<dyn Interrupt>
    }

    /// Stop the device, after what is in flight, as it is: the driver learns nothing of it. Its vCPUs must not run.
    pub fn suspend(&mut self) {
        self.take_back(DeviceThread::suspend_device);
    }

    /// Let a device that was suspended, or loaded, go on. True when it was loaded and its driver uses it: interrupts that were on
    /// their way to the driver may be lost, and are to be repeated.
    pub fn resume(&mut self) -> bool {
        let loaded = self.loaded.take();
        let used = self.status & DRIVER_OK != 0 && self.status & FAILED == 0;
        if used {
            self.start();
        }
        let Some(known) = loaded else {
            return false;
        };
        if known != self.config.contents() {
            let next = self.config.generation().wrapping_add(1);
            self.config.set_generation(next);
            if used {
                self.signals.config();
            }
        }
        used
    }

    /// What a snapshot must hold; None when the device was lost. Only while suspended.
    pub fn save(&self) -> Option<CoreState> {
        let Place::Here(device) = &self.place else {
            return None;
        };
        let setup = |queue: &Setup| QueueSetup {
            state: queue.state,
            enabled: queue.enabled,
        };
        Some(CoreState {
            status: self.status(),
            features: self.accepted,
            queues: self.queues.iter().map(setup).collect(),
            config: match &self.loaded {
                Some(known) => known.clone(),
                None => self.config.contents(),
            },
            generation: self.config.generation(),
            device: device.save(),
        })
    }

    /// Take over what [`Core::save`] gave, of a device with the same configuration. After [`Core::resume`] the driver finds it
    /// as it was. Only before any driver came; an error leaves it like that.
    pub fn load(&mut self, state: CoreState) -> Result<(), DeviceError> {
        let CoreState {
            status,
            features,
            queues,
            config,
            generation,
            device,
        } = state;
        let Place::Here(own) = &mut self.place else {
            return Err(DeviceError::Driver("is there already"));
        };
        let sizes = queues.iter().zip(&self.queues);
        let fitting = |(new, own): (&QueueSetup, &Setup)| new.state.size <= own.max_size;
        if features & !self.offered != 0
            || queues.len() != self.queues.len()
            || !sizes.into_iter().all(fitting)
        {
            let why = "the saved device has features or queues that this one has not";
            return Err(DeviceError::Unsupported(why.into()));
        }
        if !is_reachable(status, features) {
            let why = "the saved device has a status that no driver brings about";
            return Err(DeviceError::Unsupported(why.into()));
        }
        own.load(device)?;
        self.config.set_generation(generation);
        self.loaded = Some(config);
        self.status = status & !NEEDS_RESET;
        self.accepted = features;
        for (own, new) in self.queues.iter_mut().zip(queues) {
            own.state = new.state;
            own.enabled = new.enabled;
        }
        let broken = status & NEEDS_RESET != 0;
        self.signals.needs_reset.store(broken, Ordering::Release);
        Ok(())
    }

    fn start(&mut self) {
        let place = std::mem::replace(&mut self.place, Place::Lost);
        let Place::Here(mut device) = place else {
            self.place = place;
            return;
        };
        let enabled = self.queues.iter().filter(|queue| queue.enabled).count();
        let queues: Vec<ActiveQueue> = (0..self.queue_count())
            .filter_map(|index| self.active_queue(index))
            .collect();
        if queues.len() != enabled {
            log::debug!("a virtio driver enabled a queue that is not in its memory");
            // What a device that was suspended has kept.
            device.stop();
            device.not_started();
            self.place = Place::Here(device);
            return self.signals.needs_reset();
        }
        let interrupt = self.interrupt();
        let started = self
            .thread
            .start_device(device, self.accepted, queues, interrupt);
        match started {
            Ok(id) => {
                self.place = Place::Running(id);
                // Buffers may have been made available before anyone listened, as before the device was suspended. One that another
                // process serves is not suspended (it can be in no snapshot), and a driver kicks behind DRIVER_OK in any case.
                if !self.is_remote {
                    for (_, kick) in self.kicks() {
                        let _ = kick.write(1);
                    }
                }
                if let Some(what) = self.when_started.take() {
                    what();
                }
            }
            Err((Some(mut device), why)) => {
                log::debug!("a virtio device did not start: {why}");
                device.not_started();
                self.place = Place::Here(device);
                self.signals.needs_reset();
            }
            Err((None, why)) => {
                log::error!("a virtio device was lost: {why}");
                self.signals.needs_reset();
            }
        }
    }

    /// An enabled queue as the device uses it; None when it is not enabled or not usable.
    fn active_queue(&self, index: u16) -> Option<ActiveQueue> {
        let queue = self.queues.get(usize::from(index))?;
        if !queue.enabled || queue.state.size > queue.max_size {
            return None;
        }
        let event_idx = self.accepted & F_EVENT_IDX != 0;
        let ends = (Arc::clone(&queue.kick), self.interrupt());
        ActiveQueue::new(index, queue.state, event_idx, self.mem.clone(), ends)
            .map(|active| active.log_writes(self.log.clone()))
            .inspect_err(|e| log::debug!("a virtio queue cannot be used: {e}"))
            .ok()
    }

    /// The device comes back from its thread, if it is there; where its queues came to is kept.
    fn stop(&mut self) {
        self.take_back(DeviceThread::stop_device);
    }

    fn take_back(&mut self, how: TakeBack) {
        let Place::Running(id) = self.place else {
            return;
        };
        match how(&self.thread, id) {
            Ok((device, queues)) => {
                self.place = Place::Here(device);
                for queue in queues {
                    if let Some(setup) = self.queues.get_mut(usize::from(queue.index())) {
                        setup.state = queue.state();
                    }
                }
            }
            Err(_) => self.lose(),
        }
    }

    fn lose(&mut self) {
        log::error!("a virtio device was lost with its I/O thread");
        self.place = Place::Lost;
        self.signals.needs_reset();
    }

    fn reset(&mut self) {
        if self.status & DRIVER_OK != 0 {
            self.signals.tell_of_reset();
        }
        self.stop();
        self.forget_driver();
    }

    /// As it was before any driver came.
    fn forget_driver(&mut self) {
        self.status = 0;
        self.accepted = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
        let lost = matches!(self.place, Place::Lost);
        self.signals.needs_reset.store(lost, Ordering::Release);
    }
}

/// How a device comes back from its thread.
type TakeBack =
    fn(&DeviceThread, RunningId) -> Result<(Box<dyn VirtioDevice>, Vec<ActiveQueue>), ThreadError>;

/// Whether a driver that keeps to the order of [`Core::set_status`] comes to `status` with `features`.
fn is_reachable(status: u8, features: u64) -> bool {
    let bits = ORDER.iter().map(|bit| status & bit != 0);
    let known = ORDER
        .iter()
        .fold(NEEDS_RESET | FAILED, |all, bit| all | bit);
    let in_order = bits
        .clone()
        .zip(bits.skip(1))
        .all(|(before, after)| before || !after);
    let agreed = status & FEATURES_OK == 0 || features & F_VERSION_1 != 0;
    status & !known == 0 && in_order && agreed
}

impl Setup {
    fn reset(&mut self) {
        self.enabled = false;
        self.state = QueueState {
            size: self.max_size,
            ..QueueState::default()
        };
    }
}

impl Drop for Core {
    /// The device is dropped here, not with the thread.
    fn drop(&mut self) {
        self.stop();
    }
}
