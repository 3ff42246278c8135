//! Virtio devices: made from their configuration, put on a bus, and connected to KVM.

mod opened;
mod saved;

pub use opened::{Disk, Opened};
pub use saved::State;

use crate::error::Error;
use crate::footprint::schedule_in_batches;
use crate::host::Watch;
use husk_arch::acpi::MmioSlot;
use husk_arch::layout;
use husk_bus::Bus;
use husk_config::{DeviceUpdate, Event, NewDevice, VmConfig};
use husk_devices::balloon::Balloon;
use husk_devices::entropy::Entropy;
use husk_devices::net::Net;
use husk_kvm::MsiVectors;
use husk_metrics::METRICS;
use husk_mmds::{Mmds, Server, Stack};
use husk_pci::{HostBridge, Message, MsiSink, Relocate};
use husk_sandbox::{Filters, Kind};
use husk_virtio::transport::mmio::MmioTransport;
use husk_virtio::transport::pci::PciTransport;
use husk_virtio::transport::{Core, Doorbell};
use husk_virtio::{DeviceThread, GuestMemory, VirtioDevice, WriteLog};
use opened::{VSOCK, open_drive, open_interface, open_vsock, take};
use saved::Saved;
use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// A device that is on no bus yet, with its name.
pub type Named = (String, Box<dyn VirtioDevice>);

/// How often it is told that a device was reset: a guest may do it without end.
const RESETS_APART: Duration = Duration::from_millis(100);

/// How many devices have an interrupt line of their own.
const MOST_ON_MMIO: usize = (layout::IO_APIC_PINS - layout::VIRTIO_IRQ) as usize;
/// Device numbers of a PCI bus, less the host bridge's.
pub const MOST_ON_PCI: usize = 31;

/// Places that are left for devices that come while the VM runs.
const SPARE_ON_PCI: usize = 8;

/// How many places of the PCI bus there are in all for a VM whose devices may come and go.
pub fn hotplug_slots(config: &VmConfig) -> usize {
    match config.pci {
        true => (count(config) + SPARE_ON_PCI).min(MOST_ON_PCI),
        false => 0,
    }
}

/// Whether other processes can map the guest's memory.
fn is_shared(memory: &GuestMemory) -> bool {
    memory.iter().all(|region| region.file_offset().is_some())
}

/// The devices of `config`: those that are `opened`, the others opened now; the guest reads its metadata from `mmds`. Nothing
/// of it depends on KVM.
pub fn open(config: &VmConfig, opened: &mut Opened, mmds: &Arc<Mmds>) -> Result<Vec<Named>, Error> {
    let mut devices: Vec<Named> = Vec::new();
    // The root device first: the guest calls it vda.
    let (root, others): (Vec<_>, Vec<_>) = config.drives.iter().partition(|d| d.is_root_device);
    for drive in root.into_iter().chain(others) {
        let device = take(&mut opened.drives, &drive.drive_id, || open_drive(drive))?;
        devices.push((drive.drive_id.clone(), device.device()));
    }
    // Of this VM alone, and so are its session tokens.
    let server = config.mmds_config.as_ref();
    let server = server.map(|config| Server::new(Arc::clone(mmds), config));
    let server = server.transpose().map_err(no_random)?;
    for interface in &config.network_interfaces {
        let id = &interface.iface_id;
        let mut device = take(&mut opened.interfaces, id, || open_interface(interface))?;
        if let Some(stack) = metadata(config, server.as_ref(), id).map_err(no_random)? {
            device = device.with_mmds(stack).map_err(|e| failed(id, e))?;
        }
        devices.push((id.clone(), Box::new(device)));
    }
    if let Some(vsock) = &config.vsock {
        let device = take(&mut opened.vsock, VSOCK, || open_vsock(vsock))?;
        devices.push((VSOCK.into(), Box::new(device)));
    }
    if let Some(entropy) = &config.entropy {
        let device = Entropy::new(entropy).map_err(|e| failed("entropy", e))?;
        devices.push(("entropy".into(), Box::new(device)));
    }
    if let Some(balloon) = &config.balloon {
        let device = Balloon::new(balloon).map_err(|e| failed("balloon", e))?;
        devices.push(("balloon".into(), Box::new(device)));
    }
    Ok(devices)
}

/// The way to the metadata service for the interface `id`, if it is to have one.
fn metadata(
    config: &VmConfig,
    server: Option<&Arc<Server>>,
    id: &String,
) -> std::io::Result<Option<Stack>> {
    match (&config.mmds_config, server) {
        (Some(mmds), Some(server)) if mmds.network_interfaces.contains(id) => {
            Stack::new(Arc::clone(server), mmds.address()).map(Some)
        }
        _ => Ok(None),
    }
}

fn no_random(error: std::io::Error) -> Error {
    Error::Host("random numbers for the metadata service", error)
}

fn failed(id: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Device(id.into(), Box::new(error))
}

/// Number of devices that `config` asks for.
fn count(config: &VmConfig) -> usize {
    let singles = [
        config.vsock.is_some(),
        config.entropy.is_some(),
        config.balloon.is_some(),
    ];
    let singles = singles.iter().filter(|&&there| there).count();
    config.drives.len() + config.network_interfaces.len() + singles
}

/// Where the devices of `config` are on MMIO, in the order of [`open`]; nowhere, when they are on PCI.
pub fn slots(config: &VmConfig) -> Result<Vec<MmioSlot>, Error> {
    let count = count(config);
    let most = if config.pci {
        MOST_ON_PCI
    } else {
        MOST_ON_MMIO
    };
    if count > most {
        return Err(Error::TooManyDevices { count, most });
    }
    if config.pci {
        return Ok(Vec::new());
    }
    let slot = |index: u32| MmioSlot {
        address: layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_SIZE,
        size: layout::VIRTIO_MMIO_SIZE,
        irq: layout::VIRTIO_IRQ + index,
    };
    Ok((0..count as u32).map(slot).collect())
}

/// The kernel's whole command line: the user's, and what it must know of the devices. The configuration says whether the root device
/// can be written, or else `root_is_read_only`, of [`Opened::root_is_read_only`].
pub fn command_line(
    config: &VmConfig,
    slots: &[MmioSlot],
    root_is_read_only: bool,
) -> Result<String, Error> {
    let given = &config.boot_source.boot_args;
    let mut line = match given {
        Some(given) => given.clone(),
        None => config.default_boot_args(),
    };
    if let Some(root) = config.drives.iter().find(|drive| drive.is_root_device) {
        let mode = if root_is_read_only || root.read_only() {
            "ro"
        } else {
            "rw"
        };
        let place = match &root.partuuid {
            Some(partition) => format!("PARTUUID={partition}"),
            None => "/dev/vda".into(),
        };
        let _ = write!(line, " root={place} {mode}");
    }
    // For kernels without ACPI; one with it finds the device there first.
    for MmioSlot { address, size, irq } in slots {
        let _ = write!(line, " virtio_mmio.device={size:#x}@{address:#x}:{irq}");
    }
    match line.len() {
        0..=husk_config::MAX_BOOT_ARGS => Ok(line),
        length => Err(husk_config::Error::BootArgsTooLong(length).into()),
    }
}

/// The virtio devices of a VM. Dropped before guest memory: transports and devices hold handles on it.
#[derive(Default)]
pub struct Devices {
    attached: Vec<(String, Transport)>,
    bridge: Option<Arc<HostBridge>>,
    threads: IoThreads,
    suspended: AtomicBool,
}

/// What the devices run on, as far as there are any.
#[derive(Default)]
pub struct IoThreads {
    /// For all devices but network interfaces.
    io: Option<Arc<DeviceThread>>,
    /// For network interfaces.
    net: Option<Arc<DeviceThread>>,
    doorbells: Option<DoorbellThread>,
    /// The doorbells' thread knows its VM.
    has_vm: bool,
}

impl IoThreads {
    /// Those that `devices` need.
    pub fn start(devices: &[Named], filters: &Filters) -> Result<Self, Error> {
        let mut threads = Self::default();
        for (_, device) in devices {
            threads.for_device(device.info().id, filters)?;
        }
        if !devices.is_empty() {
            threads.doorbells = Some(DoorbellThread::start(filters.clone())?);
        }
        Ok(threads)
    }

    /// The doorbells' thread, which is told of its VM when it is first asked for.
    fn doorbells(&mut self, place: &Place) -> Result<&DoorbellThread, Error> {
        let doorbells = match &mut self.doorbells {
            Some(doorbells) => doorbells,
            none => none.insert(DoorbellThread::start(place.filters.clone())?),
        };
        if !self.has_vm {
            // It listens until this is dropped.
            let _ = doorbells.sender.send(Command::Vm(Arc::clone(place.kvm)));
            self.has_vm = true;
        }
        Ok(doorbells)
    }

    /// The I/O thread for a device of this virtio device ID.
    ///
    /// That of network interfaces is scheduled in batches: it does not preempt the vCPU that has just made a packet
    /// available, so that packets come in rows, and so do kicks and interrupts. A disk has its own thread, because one that
    /// waits for each block would only wait longer.
    fn for_device(&mut self, id: u32, filters: &Filters) -> Result<Arc<DeviceThread>, Error> {
        let is_net = id == VIRTIO_ID_NET;
        let (thread, name) = match is_net {
            true => (&mut self.net, "net0"),
            false => (&mut self.io, "io0"),
        };
        if let Some(thread) = thread {
            return Ok(Arc::clone(thread));
        }
        let filters = filters.clone();
        let prepare = move || {
            if is_net {
                schedule_in_batches();
            }
            filters.confine(Kind::Io);
        };
        let started = DeviceThread::start(name, prepare).map_err(|e| failed("I/O thread", e))?;
        Ok(Arc::clone(thread.insert(Arc::new(started))))
    }
}

enum Transport {
    Mmio(Arc<MmioTransport>),
    /// With its device number on the bus.
    Pci(Arc<PciTransport>, u8),
}

/// Where devices are put, and what they are connected to.
pub struct Place<'a> {
    /// Where devices on MMIO are; empty when they are on PCI.
    pub slots: &'a [MmioSlot],
    /// Guest-physical addresses.
    pub bus: &'a Bus,
    /// The guest's memory.
    pub memory: &'a GuestMemory,
    /// The VM.
    pub kvm: &'a Arc<husk_kvm::Vm>,
    /// What their threads may ask of the host's kernel.
    pub filters: &'a Filters,
    /// Hears when one is reset.
    pub watch: &'a Watch,
    /// Hears what they write to memory.
    pub log: Option<&'a Arc<WriteLog>>,
}

impl Devices {
    /// Put `devices` on MMIO or, with `pci`, on PCI, and connect their interrupts. Doorbells follow when a driver starts a
    /// device: KVM takes milliseconds for each, and until it is done a kick merely costs an exit.
    ///
    /// Those that were `saved` are what and where they were, suspended.
    pub fn attach(
        (devices, threads): (Vec<Named>, IoThreads),
        pci: bool,
        place: &Place,
        mut saved: Option<State>,
    ) -> Result<Self, Error> {
        let bridge = pci.then(|| add_host_bridge(place.bus)).transpose()?;
        if let (Some(bridge), Some(saved)) = (&bridge, &saved) {
            bridge.restore_own_config(saved.host_bridge());
        }
        let mut all = Self {
            attached: Vec::with_capacity(devices.len()),
            bridge,
            threads,
            suspended: AtomicBool::new(saved.is_some()),
        };
        for (index, (id, device)) in devices.into_iter().enumerate() {
            let was = saved.as_mut().map(|saved| saved.take(&id)).transpose()?;
            all.put(id, device, place.slots.get(index), place, was)?;
        }
        Ok(all)
    }

    fn put(
        &mut self,
        id: String,
        device: Box<dyn VirtioDevice>,
        slot: Option<&MmioSlot>,
        place: &Place,
        saved: Option<Saved>,
    ) -> Result<&Transport, Error> {
        let io = self.threads.for_device(device.info().id, place.filters)?;
        let doorbells = self.threads.doorbells(place)?;
        let transport = match (&self.bridge, slot) {
            (Some(bridge), _) => {
                let transport = new_pci(device, io, place)?;
                let number = match saved {
                    Some((number, state)) => {
                        saved::load_pci(&id, &transport, state)?;
                        Some(number.ok_or(Error::State("a device has no place"))?)
                    }
                    None => None,
                };
                attach_pci(transport, number, bridge, doorbells)?
            }
            (None, Some(slot)) => {
                let transport = new_mmio(device, io, place, slot)?;
                if let Some((_, state)) = saved {
                    saved::load_mmio(&id, &transport, state)?;
                }
                attach_mmio(transport, place, slot, doorbells)?
            }
            (None, None) => return Err(Error::State("a device has no place")),
        };
        if let Some(log) = place.log {
            transport.with_core(|core| core.log_writes(Arc::clone(log)));
        }
        let (name, watch) = (id.clone(), place.watch.clone());
        let told = Mutex::new(None::<Instant>);
        let tell = move || {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if told.is_none_or(|at| at.elapsed() >= RESETS_APART) {
                *told = Some(Instant::now());
                let device = name.clone();
                watch(Event::DeviceReset { device });
            }
        };
        transport.with_core(|core| core.when_reset(Box::new(tell)));
        self.attached.push((id, transport));
        match self.attached.last() {
            Some((_, transport)) => Ok(transport),
            None => Err(Error::State("a device has no place")),
        }
    }

    /// Put a new device on the PCI bus, which has places for `most`, while the VM runs; its device number there.
    pub fn plug(&mut self, device: &NewDevice, most: usize, place: &Place) -> Result<u8, Error> {
        let id = device.id().to_owned();
        if self.bridge.is_none() || most == 0 {
            return Err(Error::NoHotplug(id));
        }
        // passt is a program to be started, which a monitor with a running guest must not.
        if matches!(device, NewDevice::Network(net) if net.user.is_some()) {
            return Err(Error::NoLatePasst(id));
        }
        if self.attached.len() >= most {
            let count = self.attached.len() + 1;
            return Err(Error::TooManyDevices { count, most });
        }
        let opened: Box<dyn VirtioDevice> = match device {
            NewDevice::Drive(drive) if drive.socket.is_some() && !is_shared(place.memory) => {
                return Err(Error::NoLateSharing(id));
            }
            NewDevice::Drive(drive) => open_drive(drive)?.device(),
            NewDevice::Network(net) => Box::new(Net::new(net).map_err(|e| failed(&id, e))?),
        };
        match self.put(id, opened, None, place, None)? {
            Transport::Pci(_, number) => Ok(*number),
            Transport::Mmio(_) => Err(Error::State("a device has no place")),
        }
    }

    /// The PCI device number of the device called `id`.
    pub fn number(&self, id: &str) -> Result<u8, Error> {
        let found = self.attached.iter().find(|(own, _)| own == id);
        match found {
            Some((_, Transport::Pci(_, number))) => Ok(*number),
            Some((_, Transport::Mmio(_))) => Err(Error::NoHotplug(id.into())),
            None => Err(Error::NoDevice(id.into())),
        }
    }

    /// Take the device with this PCI device number away: it stops, and what it has open is closed. Its name.
    pub fn unplug(&mut self, number: u8) -> Option<String> {
        let is_it = |(_, transport): &(_, Transport)| matches!(transport, Transport::Pci(_, own) if *own == number);
        let at = self.attached.iter().position(is_it)?;
        let (id, transport) = self.attached.remove(at);
        if let Some(bridge) = &self.bridge {
            bridge.remove(number);
        }
        drop(transport);
        Some(id)
    }

    /// Change the device called `id` while the VM runs.
    pub fn update(&self, id: &str, change: DeviceUpdate) -> Result<(), Error> {
        let updated = self.with_device(id, move |device| device.update(&change))?;
        updated.map_err(|e| failed(id, e))
    }

    /// What the device called `id` tells of itself.
    pub fn report(&self, id: &str) -> Result<serde_json::Value, Error> {
        self.with_device(id, |device| device.report())
    }

    fn with_device<R: Send + 'static>(
        &self,
        id: &str,
        what: impl FnOnce(&mut dyn VirtioDevice) -> R + Send + 'static,
    ) -> Result<R, Error> {
        let missing = || Error::NoDevice(id.into());
        let found = self.attached.iter().find(|(own, _)| own == id);
        let (_, transport) = found.ok_or_else(missing)?;
        let done = transport.with_core(|core| core.with_device(what));
        done.ok_or_else(missing)
    }
}

impl Transport {
    fn with_core<R>(&self, what: impl FnOnce(&mut Core) -> R) -> R {
        match self {
            Transport::Mmio(transport) => transport.with_core(what),
            Transport::Pci(transport, _) => transport.with_core(what),
        }
    }
}

fn new_mmio(
    device: Box<dyn VirtioDevice>,
    thread: Arc<DeviceThread>,
    place: &Place,
    slot: &MmioSlot,
) -> Result<MmioTransport, Error> {
    let line = EventFd::new(EFD_CLOEXEC).map_err(|e| Error::Host("an eventfd", e))?;
    place.kvm.register_irqfd(&line, slot.irq)?;
    let transport = MmioTransport::new(device, thread, place.memory.clone(), line)
        .map_err(|e| Error::Host("an eventfd", e))?;
    if let Some(line) = transport.remote_line() {
        place.kvm.register_irqfd(line, slot.irq)?;
    }
    Ok(transport)
}

fn attach_mmio(
    transport: MmioTransport,
    place: &Place,
    slot: &MmioSlot,
    doorbells: &DoorbellThread,
) -> Result<Transport, Error> {
    let (own, base) = (transport.doorbells(), slot.address);
    let tell = doorbells.sender.clone();
    transport.when_started(Box::new(move || {
        // Without a listener the VM is being taken down.
        let _ = tell.send(Command::Register(base, own));
    }));
    let transport = Arc::new(transport);
    place
        .bus
        .insert(slot.address, slot.size, transport.clone())?;
    Ok(Transport::Mmio(transport))
}

fn add_host_bridge(bus: &Bus) -> Result<Arc<HostBridge>, Error> {
    let (window, size) = (layout::PCI_WINDOW, layout::PCI_WINDOW_SIZE);
    let bridge = HostBridge::new(window..window + size);
    bus.insert(layout::PCI_ECAM, layout::PCI_ECAM_SIZE, bridge.ecam())?;
    bus.insert(window, size, bridge.window())?;
    Ok(bridge)
}

fn new_pci(
    device: Box<dyn VirtioDevice>,
    thread: Arc<DeviceThread>,
    place: &Place,
) -> Result<PciTransport, Error> {
    let kvm = Arc::clone(place.kvm);
    let sink = move |count| {
        let vectors = MsiVectors::new(kvm, count)?;
        Ok(Arc::new(Vectors(vectors)) as Arc<dyn MsiSink>)
    };
    PciTransport::new(device, thread, place.memory.clone(), sink)
        .map_err(|e| Error::Host("an eventfd", e))
}

/// On the bus, with the device number `number` if it has had one.
fn attach_pci(
    transport: PciTransport,
    number: Option<u8>,
    bridge: &HostBridge,
    doorbells: &DoorbellThread,
) -> Result<Transport, Error> {
    let moving = Arc::new(MovingDoorbells {
        own: transport.doorbells(),
        state: Mutex::default(),
        tell: doorbells.sender.clone(),
    });
    let started = Arc::clone(&moving);
    transport.when_started(Box::new(move || started.start()));
    let transport = Arc::new(transport);
    let (function, relocate) = (transport.clone(), Some(Box::new(Relocation(moving)) as _));
    let number = match number {
        Some(number) => bridge.add_at(number, function, relocate).map(|()| number),
        None => bridge.add(function, relocate),
    };
    let number = number.map_err(|e| failed("bus PCI", e))?;
    Ok(Transport::Pci(transport, number))
}

/// A function's vectors, as KVM knows them.
struct Vectors(MsiVectors);

impl MsiSink for Vectors {
    fn set(&self, messages: &[(u16, Message)]) {
        let messages: Vec<_> = messages
            .iter()
            .map(|(vector, message)| (*vector, message.address, message.data))
            .collect();
        METRICS.interrupts.config_updates.inc();
        if let Err(e) = self.0.set(&messages) {
            // A guest can write any number of messages that KVM refuses.
            log::debug!(
                "a message-signalled interrupt has no route: {}",
                crate::chain(&e)
            );
        }
    }

    fn trigger(&self, vector: u16) {
        METRICS.interrupts.triggers.inc();
        self.0.trigger(vector);
    }

    fn connect(&self, vector: u16, event: &EventFd) -> std::io::Result<()> {
        let connected = self.0.connect(vector, event);
        connected.map_err(std::io::Error::other)
    }

    fn disconnect(&self, vector: u16, event: &EventFd) {
        self.0.disconnect(vector, event);
    }
}

/// Doorbells of a function whose registers the guest may move.
struct MovingDoorbells {
    own: Vec<Doorbell>,
    /// Where the registers are, and whether a driver has started the device.
    state: Mutex<(Option<u64>, bool)>,
    tell: Sender<Command>,
}

impl MovingDoorbells {
    fn start(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 = true;
        if let Some(base) = state.0 {
            let _ = self.tell.send(Command::Register(base, self.own.clone()));
        }
    }
}

struct Relocation(Arc<MovingDoorbells>);

impl Relocate for Relocation {
    fn relocate(&self, from: Option<u64>, to: Option<u64>) {
        let Self(doorbells) = self;
        let state = doorbells.state.lock();
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.0 = to;
        if !state.1 {
            return;
        }
        for command in [
            from.map(|base| Command::Unregister(base, doorbells.own.clone())),
            to.map(|base| Command::Register(base, doorbells.own.clone())),
        ]
        .into_iter()
        .flatten()
        {
            let _ = doorbells.tell.send(command);
        }
    }
}

/// What the doorbells' thread is told: at which guest-physical address a device's registers begin, and its doorbells.
enum Command {
    /// The VM that all that follows is for: the thread is started while KVM still makes it.
    Vm(Arc<husk_kvm::Vm>),
    Register(u64, Vec<Doorbell>),
    Unregister(u64, Vec<Doorbell>),
    Stop,
}

/// A thread that gives doorbells to KVM. Dropped, it ends, and lets go of KVM's VM.
struct DoorbellThread {
    sender: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl DoorbellThread {
    fn start(filters: Filters) -> Result<Self, Error> {
        let (sender, commands) = channel::<Command>();
        let body = move || {
            filters.confine(Kind::Doorbells);
            let Ok(Command::Vm(kvm)) = commands.recv() else {
                return;
            };
            while let Ok(command) = commands.recv() {
                let result = match command {
                    Command::Vm(_) => Ok(()),
                    Command::Register(base, own) => own.iter().try_for_each(|bell| {
                        kvm.register_doorbell(base + bell.offset, bell.value, &bell.event)
                    }),
                    Command::Unregister(base, own) => own.iter().try_for_each(|bell| {
                        kvm.unregister_doorbell(base + bell.offset, bell.value, &bell.event)
                    }),
                    Command::Stop => return,
                };
                if let Err(e) = result {
                    log::debug!("a virtio device's kicks stay slow: {}", crate::chain(&e));
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("doorbells".into())
            .stack_size(64 << 10)
            .spawn(body)
            .map_err(|e| Error::Host("a thread for doorbells", e))?;
        Ok(Self {
            sender,
            thread: Some(thread),
        })
    }
}

impl Drop for DoorbellThread {
    fn drop(&mut self) {
        let _ = self.sender.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the doorbells' thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_config::{Drive, Entropy as EntropyConfig, default_boot_args};

    fn config() -> VmConfig {
        let mut root = Drive::new("root", "/img");
        root.is_root_device = true;
        VmConfig {
            drives: vec![Drive::new("data", "/data"), root],
            entropy: Some(EntropyConfig::default()),
            ..VmConfig::default()
        }
    }

    #[test]
    fn the_kernel_is_told_of_its_devices() {
        let mut config = config();
        let slots = slots(&config).unwrap();
        assert_eq!(slots.len(), 3);
        let line = command_line(&config, &slots, false).unwrap();
        assert!(line.starts_with(&default_boot_args(false)), "{line}");
        let end = " root=/dev/vda rw virtio_mmio.device=0x1000@0xc0001000:6 \
                   virtio_mmio.device=0x1000@0xc0002000:7 virtio_mmio.device=0x1000@0xc0003000:8";
        assert!(line.ends_with(end), "{line}");
        config.drives[1].is_read_only = Some(true);
        config.drives[1].partuuid = Some("1234-01".into());
        config.boot_source.boot_args = Some("mine".into());
        let line = command_line(&config, &[], false).unwrap();
        assert_eq!(line, "mine root=PARTUUID=1234-01 ro");
        config.drives[1].is_read_only = None;
        for (server, mode) in [(true, "ro"), (false, "rw")] {
            let line = command_line(&config, &[], server).unwrap();
            assert_eq!(line, format!("mine root=PARTUUID=1234-01 {mode}"));
        }
        config.boot_source.boot_args = Some("x".repeat(2040));
        assert!(command_line(&config, &slots, false).is_err());
    }

    #[test]
    fn more_devices_than_interrupt_lines_are_refused() {
        let mut config = VmConfig::default();
        for index in 0..18 {
            config.drives.push(Drive::new(format!("d{index}"), "/d"));
        }
        assert_eq!(slots(&config).unwrap().last().unwrap().irq, 23);
        config.entropy = Some(EntropyConfig::default());
        let error = slots(&config).unwrap_err().to_string();
        assert!(error.contains("19") && error.contains("--pci"), "{error}");
        config.pci = true;
        assert_eq!(slots(&config).unwrap(), []);
    }
}
