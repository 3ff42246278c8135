//! Building a VM from its configuration, and taking it down again.

use crate::Prepared;
use crate::changes::{Changes, Taken};
use crate::devices::{self, Devices, IoThreads, Place};
use crate::error::Error;
use crate::generation;
use crate::host::{Host, Watch};
use crate::lifecycle::Outcome;
use crate::load::load;
use crate::memory::GuestMemory;
use crate::platform::{Platform, hotplug_slots, platform};
use crate::processor::Processor;
use crate::snapshot::{self, PlatformState, Saved, Snapshot};
use crate::spin::spin_for;
use crate::standby::Wanted;
use crate::template::Template;
use crate::timeline::{Phase, Timeline};
use crate::vcpu::{self, Shared, VcpuThread};
use husk_arch::acpi::{self, AcpiConfig, MmioSlot};
use husk_arch::boot::BootState;
use husk_arch::memory_map::Range;
use husk_arch::{layout, mptable};
use husk_config::{
    CreateSnapshot, DeviceUpdate, Fork, HugePages, MachineConfig, NewDevice, VmConfig,
};
use husk_devices::boot_timer;
use husk_kvm::{Kvm, Passed, Vcpu, VcpuState, VmState};
use husk_loader::Kernel;
use husk_sandbox::{Filters, Kind};
use husk_snapshot::Lineage;
use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A VM. [`Vm::start`] lets its guest run, [`Vm::stop`] takes it down; fields are dropped in order, memory last.
pub struct Vm {
    /// The boot vCPU and where it starts, until it does.
    boot: Option<(BootProcessor, Go)>,
    threads: Vec<VcpuThread>,
    shared: Arc<Shared>,
    platform: Platform,
    panic_is_warm: bool,
    halted_before: bool,
    devices: Devices,
    kvm: Arc<husk_kvm::Vm>,
    filters: Filters,
    watch: Watch,
    changes: Changes,
    memory: GuestMemory,
}

/// Where Linux leaves the kind of reset for the firmware (BIOS data area), and its value for a warm one.
const RESET_FLAG: u64 = 0x472;
const RESET_FLAG_WARM: u16 = 0x1234;
/// The kernel parameter that makes a panic, and only a panic, restart warm.
const PANIC_WARM: &str = "reboot=panic_warm";

/// How long threads that start a VM together wait for each other without sleep.
const MOMENT: Duration = Duration::from_millis(1);

/// How long a pause waits for the vCPUs. Each leaves the guest at once, unless it waits for room for its console output.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// How long threads of a VM that is taken down may wait for pages: that may come, or that cannot.
const DOWN_LIMIT: Duration = Duration::from_secs(3);
const LOST_LIMIT: Duration = Duration::from_millis(200);

impl Vm {
    /// Build a VM, complete up to the boot vCPU's first instruction.
    ///
    /// See [`Ready::make`] for what runs beside what.
    ///
    /// Where a machine was made ahead, what is left is to load the kernel.
    pub fn build(config: &VmConfig, host: &Host, prepared: &mut Prepared) -> Result<Self, Error> {
        Self::build_from(config, host, prepared, None)
    }

    /// As [`Vm::build`], or, from what was saved, complete up to the instruction that its guest would have done next.
    pub fn build_from(
        config: &VmConfig,
        host: &Host,
        prepared: &mut Prepared,
        saved: Option<Saved>,
    ) -> Result<Self, Error> {
        let asked = boot_timer::Times::now();
        host.timeline.reach(Phase::Asked);
        config.validate()?;
        let slots = devices::slots(config)?;
        let wanted = Wanted::of(config);
        let Prepared {
            standby,
            kernel,
            devices: opened,
            begun,
        } = prepared;
        let made = match standby.take_if(|standby| *standby.wanted() == wanted) {
            Some(standby) => standby.take().transpose()?,
            None => None,
        };
        let kernel = kernel.take();
        let (is_saved, is_template) = match &saved {
            Some(saved) => (true, saved.is_of_this_host),
            None => (false, false),
        };
        let origin = match (is_saved, is_template) {
            (false, _) => Origin::Configuration(&wanted),
            (true, false) => Origin::Snapshot,
            (true, true) => Origin::Template,
        };
        let fill = |memory: &GuestMemory| {
            let start = match saved {
                Some(saved) => {
                    saved.fill(memory)?;
                    host.timeline.reach(Phase::KernelLoaded);
                    let how = (saved.clock_realtime, saved.is_of_this_host);
                    Start::Saved(Box::new(saved.snapshot), how)
                }
                None => {
                    let root = opened.root_is_read_only(config)?;
                    let boot = prepare_boot(config, kernel, memory, host, (&slots, root))?;
                    Start::Boot(Box::new(boot))
                }
            };
            let devices = devices::open(config, opened, &host.mmds)?;
            // Threads take a while to start: here KVM is busy meanwhile.
            let threads = IoThreads::start(&devices, &host.filters)?;
            Ok((start, (devices, threads)))
        };
        let (ready, (start, devices)) = match made {
            Some(ready) => {
                let filled = fill(&ready.memory)?;
                (ready, filled)
            }
            None => {
                let aids = Aids::of(host);
                let begun = || match begun.take() {
                    Some(begun) if is_saved => Ok(begun),
                    _ => Begun::new(origin, &aids),
                };
                Ready::make_of(&wanted, &aids, begun, fill)?
            }
        };
        let loaded = Loaded {
            devices,
            slots: &slots,
            start,
            asked,
        };
        ready.complete(config, host, loaded)
    }

    /// Let the guest run.
    pub fn start(&mut self) {
        if let Some((first, go)) = self.boot.take() {
            self.threads.extend(first.go(go));
        }
    }

    /// How the VM ended; None while it runs.
    pub fn outcome(&self) -> Option<Outcome> {
        self.shared.lifecycle.outcome()
    }

    /// The guest's kernel has said through pvpanic that it panicked.
    pub fn has_panicked(&self) -> bool {
        self.shared.lifecycle.has_panicked()
    }

    /// Press the ACPI power button.
    pub fn press_power_button(&self) {
        self.platform.power.press_power_button();
    }

    /// Press Ctrl, Alt and Del, or the power button where no driver listens to a keyboard.
    pub fn send_ctrl_alt_del(&self) {
        let keyboard = self.platform.keyboard.as_ref();
        if !keyboard.is_some_and(|keyboard| keyboard.press_ctrl_alt_del()) {
            self.press_power_button();
        }
    }

    /// Plug a device into the PCI bus, and tell the guest.
    pub fn attach(&mut self, device: &NewDevice) -> Result<(), Error> {
        let place = Place {
            slots: &[],
            bus: &self.shared.mmio,
            memory: self.memory.memory(),
            kvm: &self.kvm,
            filters: &self.filters,
            watch: &self.watch,
            log: self.memory.log(),
        };
        let slot = self.devices.plug(device, self.platform.slots, &place)?;
        if let Some(hotplug) = &self.platform.hotplug {
            hotplug.came(slot);
            self.platform.power.notify_pci();
        }
        Ok(())
    }

    /// Ask the guest to let a device go.
    pub fn detach(&self, id: &str) -> Result<(), Error> {
        let slot = self.devices.number(id)?;
        let hotplug = self.platform.hotplug.as_ref();
        let hotplug = hotplug.ok_or_else(|| Error::NoHotplug(id.into()))?;
        hotplug.ask_to_go(slot);
        self.platform.power.notify_pci();
        Ok(())
    }

    /// Close the devices that the guest has let go; their names.
    pub fn collect_ejected(&mut self) -> Vec<String> {
        let slots = self
            .platform
            .hotplug
            .iter()
            .flat_map(|hotplug| hotplug.take_gone());
        slots.filter_map(|slot| self.devices.unplug(slot)).collect()
    }

    /// Look whether the guest has halted for good, as Linux without ACPI does when it powers off; then the VM ends. To be
    /// called now and then: what one call begins, the next ones find out. True when it looks like it, and another call
    /// soon will tell.
    pub fn look_for_halt(&mut self) -> bool {
        self.platform.power.remind();
        let all = self.threads.len() as u32;
        let halted = self.shared.halts.next_round() == all;
        if halted && self.halted_before {
            self.end(match self.has_panicked() {
                true => Outcome::Panic,
                false => Outcome::Halted,
            });
        }
        self.halted_before = halted;
        for thread in &self.threads {
            thread.kick();
        }
        halted
    }

    /// The guest has not taken the last press yet.
    pub fn is_press_pending(&self) -> bool {
        self.platform.power.is_press_pending()
    }

    /// What the device called `id` tells of itself.
    pub fn report(&self, id: &str) -> Result<serde_json::Value, Error> {
        self.devices.report(id)
    }

    /// Change the device called `id`.
    pub fn update_device(&self, id: &str, change: DeviceUpdate) -> Result<(), Error> {
        self.devices.update(id, change)
    }

    /// Take all vCPUs out of the guest, where they stay. On an error the guest runs on.
    pub fn pause(&self) -> Result<(), Error> {
        let (shared, threads) = (&self.shared, &self.threads);
        let kick = || threads.iter().for_each(VcpuThread::kick);
        let has_ended = || shared.lifecycle.has_ended();
        let all = threads.len() as u32;
        if shared.pause.stop_all(all, PAUSE_LIMIT, kick, has_ended) {
            return Ok(());
        }
        Err(Error::State(match has_ended() {
            true => "the VM has ended",
            false if self.memory.handler().is_some() => {
                "the guest could not be paused in time: does the handler of its page faults answer, and anybody read its console?"
            }
            false => "the guest could not be paused in time: does anybody read its console?",
        }))
    }

    /// Let the guest go on after a pause, or from a snapshot.
    pub fn resume(&mut self) {
        // Of a VM that was loaded all vCPUs have their state: an interrupt is not forgotten.
        if self.devices.are_suspended() {
            self.devices.resume();
        }
        self.halted_before = false;
        self.shared.pause.go_on();
    }

    /// What the vCPUs of a VM that is paused are. Devices stand still.
    fn tell(&self) -> Result<Vec<VcpuState>, Error> {
        let msrs = Kvm::open()?.state_msrs()?;
        let (shared, count) = (&self.shared, self.threads.len() as u32);
        let ask = || shared.pause.ask(count, PAUSE_LIMIT);
        shared.census.take(msrs, count, ask, PAUSE_LIMIT)
    }

    /// Make a VM that is paused a template for clones. Its own memory is a view of the same from now on.
    pub fn freeze(&mut self, config: &VmConfig, fork: &Fork) -> Result<Template, Error> {
        if config.machine_config.huge_pages == HugePages::TwoMiB {
            return Err(Error::Unsupported("a fork of a VM with huge_pages 2M"));
        }
        snapshot::check(config)?;
        // As in `save`.
        self.pause()?;
        let _still = Still::new(&self.devices);
        let vcpus = self.tell()?;
        self.changes.before_freeze(&self.memory)?;
        let (size, vm) = (self.memory.size(), self.kvm.state()?);
        let own = (&self.platform, &self.devices);
        let snapshot = Snapshot::new(config, (size, Lineage::default()), vm, vcpus, own)?;
        // This may fail for want of room: before memory is moved.
        let disks = Template::copy_disks(config, fork)?;
        let memory = self.memory.freeze()?;
        Ok(Template::new(snapshot, config.clone(), memory, disks))
    }

    /// Keep a VM that is paused, in two files. An error changes nothing for the next time.
    pub fn save(&mut self, config: &VmConfig, create: &CreateSnapshot) -> Result<(), Error> {
        snapshot::check(config)?;
        let parent = self.changes.parent(create, &self.memory)?;
        // Those of a VM that was just loaded may still be on their way to where they park; asked before, they would not hear it.
        self.pause()?;
        // Before the vCPUs tell: devices still complete requests, write to memory, and interrupt.
        let _still = Still::new(&self.devices);
        let vcpus = self.tell()?;
        // Behind the vCPUs' state: to ask for it has KVM write to memory.
        let taken = self.changes.take(&self.kvm, &self.memory)?;
        let written = self.write_snapshot(config, create, vcpus, parent.map(|id| (id, &taken)));
        match &written {
            Ok(id) => self.changes.kept(id, create),
            Err(_) => self.changes.put_back(&taken),
        }
        written.map(drop)
    }

    /// Write the files of a snapshot, or of a diff to what is called so, with the changes since; its name.
    fn write_snapshot(
        &self,
        config: &VmConfig,
        create: &CreateSnapshot,
        vcpus: Vec<VcpuState>,
        diff: Option<(String, &Taken)>,
    ) -> Result<String, Error> {
        let (id, memory) = (snapshot::new_id()?, &create.mem_file_path);
        let (size, vm) = (self.memory.size(), self.kvm.state()?);
        let (memory, lineage) = match diff {
            None => {
                let memory = snapshot::write_memory(&self.memory, memory)?;
                (memory, Lineage::full(id.clone()))
            }
            Some((parent, taken)) => {
                let pages = taken.pages(&self.memory);
                let memory = snapshot::write_pages(&self.memory, &pages, memory)?;
                (memory, Lineage::diff(id.clone(), parent, &pages))
            }
        };
        let own = (&self.platform, &self.devices);
        let snapshot = Snapshot::new(config, (size, lineage), vm, vcpus, own)?;
        husk_snapshot::keep(&create.snapshot_path, &snapshot, memory)?;
        Ok(id)
    }

    /// Once its vCPUs are what they were (`told` by all but the boot vCPU), so is the rest: what the I/O APIC has pending goes to
    /// their local APICs.
    fn put_back(
        &mut self,
        state: &VmState,
        platform: PlatformState,
        told: &Receiver<Result<(), husk_kvm::Error>>,
        passed: &Passed,
    ) -> Result<(), Error> {
        if let Some((first, _)) = &self.boot {
            first.is_put_back()?;
        }
        for _ in &self.threads {
            let failed = Error::State("a vCPU's thread failed");
            recv_soon(told).map_err(|_| failed)??;
        }
        self.kvm.restore(state, passed)?;
        platform.restore(&mut self.platform);
        if let Some(address) = self.platform.generation_id {
            self.memory.fetch(address)?;
            generation::renew(&self.memory, address)?;
            self.platform.power.notify_generation();
        }
        Ok(())
    }

    /// End the VM with `outcome` unless it has ended already.
    pub fn end(&self, outcome: Outcome) {
        self.shared.lifecycle.end(outcome);
        self.shared.pause.look_again();
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// End the VM if it has not ended, wait until its vCPUs are out of the guest, and give everything back to the host.
    ///
    /// What waits for a page of memory that nobody fills is not waited for: such a VM is left as it is, and the process must end.
    pub fn stop(self) -> Outcome {
        self.end(Outcome::Stopped);
        let Some(handler) = self.memory.handler() else {
            return self.dismantle();
        };
        handler.end_watch();
        let let_go = handler.last_resort();
        let shared = Arc::clone(&self.shared);
        // Its memory must not go when there is no thread to take it down on.
        let vm = Arc::new(Mutex::new(Some(self)));
        let (say, stopped) = channel();
        let body = {
            let vm = Arc::clone(&vm);
            move || {
                if let Some(vm) = take(&vm) {
                    // Who waited may have given up.
                    let _ = say.send(vm.dismantle());
                }
            }
        };
        let thread = std::thread::Builder::new().name("down".into());
        if let Err(e) = thread.spawn(body) {
            log::warn!("taking the VM down may take for ever: {e}");
            return take(&vm).map_or(Outcome::Stopped, Self::dismantle);
        }
        let limit = match shared.lifecycle.outcome() {
            Some(Outcome::Memory(_)) => LOST_LIMIT,
            _ => DOWN_LIMIT,
        };
        if let Ok(outcome) = stopped.recv_timeout(limit) {
            // KVM has workers of its own that wait for pages, and its VM may be kept a little longer.
            let_go(false);
            return outcome;
        }
        let_go(true);
        match shared.lifecycle.outcome() {
            // It cannot start again here.
            None | Some(Outcome::Reset) => Outcome::Memory("pages of it do not come".into()),
            Some(outcome) => outcome,
        }
    }

    fn dismantle(mut self) -> Outcome {
        drop(self.boot.take());
        for thread in self.threads.drain(..) {
            thread.stop();
        }
        match self.outcome() {
            Some(Outcome::Reset) if self.was_panic() => Outcome::Panic,
            Some(outcome) => outcome,
            None => Outcome::Stopped,
        }
    }

    /// A reset after a panic: said by pvpanic, or, by a kernel without its driver, with a warm reset that only a panic
    /// makes.
    fn was_panic(&self) -> bool {
        let warm = self.memory.read_u16(RESET_FLAG) == Some(RESET_FLAG_WARM);
        self.has_panicked() || (self.panic_is_warm && warm)
    }
}

/// Devices that stand still until this is dropped, unless they did before.
struct Still<'a>(Option<&'a Devices>);

impl<'a> Still<'a> {
    fn new(devices: &'a Devices) -> Self {
        if devices.are_suspended() {
            return Self(None);
        }
        devices.suspend();
        Self(Some(devices))
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        if let Some(devices) = self.0 {
            devices.resume();
        }
    }
}

/// Whether this host can give the memory of `config`.
pub fn check_memory(config: &VmConfig) -> Result<(), Error> {
    memory_size(&config.machine_config).map(drop)
}

/// Memory in bytes, checked against what this host can give.
fn memory_size(machine: &MachineConfig) -> Result<u64, Error> {
    let mib = machine.mem_size_mib;
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    let host_mib = (info.totalram as u64)
        .saturating_add(info.totalswap as u64)
        .saturating_mul(unit)
        >> 20;
    if mib > host_mib {
        return Err(Error::MemoryTooLarge { mib, host_mib });
    }
    let size = mib.checked_mul(1 << 20);
    let end = size.and_then(husk_arch::memory_map::memory_ranges);
    let end = end.map(|(low, high)| high.unwrap_or(low).end());
    // CPUID, which tells the rest, takes long where the host is itself a VM.
    if let Some(size) = size.filter(|_| end.is_some_and(|end| end <= 1 << LEAST_ADDRESS_BITS)) {
        return Ok(size);
    }
    let bits = physical_address_bits();
    let too_large = |bits| Error::AddressBits { mib, bits };
    let (size, end) = size.zip(end).ok_or(too_large(bits))?;
    match 1u64.checked_shl(bits) {
        Some(limit) if end > limit => Err(too_large(bits)),
        _ => Ok(size),
    }
}

/// What every x86-64 processor can address, in bits.
const LEAST_ADDRESS_BITS: u32 = 36;

/// What threads that make a machine need of the [`Host`].
#[derive(Clone)]
pub struct Aids {
    timeline: Arc<Timeline>,
    filters: Filters,
}

impl Aids {
    pub fn of(host: &Host) -> Self {
        Self {
            timeline: Arc::clone(&host.timeline),
            filters: host.filters.clone(),
        }
    }
}

/// What the vCPUs of a VM become.
#[derive(Clone, Copy)]
pub enum Origin<'a> {
    /// What the configuration wants.
    Configuration(&'a Wanted),
    /// What was saved, maybe on another host.
    Snapshot,
    /// What was saved on this one.
    Template,
}

/// KVM's VM, bare, and the thread that will be the boot vCPU's: what a VM needs that nothing is known of yet.
pub struct Begun {
    first: BootProcessor,
    vm: husk_kvm::Vm,
    most_vcpus: usize,
}

impl Begun {
    /// Make it. Nothing else runs in this process meanwhile: for the first VM of a host, KVM has something done on each of
    /// its processors, and waits ten times as long for one on which the host's CPUID is asked for.
    pub fn new(origin: Origin<'_>, aids: &Aids) -> Result<Self, Error> {
        let kvm = Arc::new(Kvm::open()?);
        // It takes a while to start, and is there when it is needed.
        let first = BootProcessor::start(Arc::clone(&kvm), origin, aids)?;
        let vm = kvm.create_vm()?;
        first.vm_is_made();
        aids.timeline.reach(Phase::VmCreated);
        let most_vcpus = kvm.max_vcpus();
        Ok(Self {
            first,
            vm,
            most_vcpus,
        })
    }
}

/// A VM that has memory and vCPUs, and neither devices nor anything in its memory. Fields are dropped in order: memory
/// comes after KVM's descriptors.
pub struct Ready {
    first: BootProcessor,
    /// All vCPUs but the boot vCPU, which is its thread's.
    others: Vec<Vcpu>,
    kvm: Arc<husk_kvm::Vm>,
    pub memory: GuestMemory,
}

impl Ready {
    /// Make one, and do something with its memory `meanwhile`.
    ///
    /// This thread has KVM make the machine. What takes a while beside (CPUID, where it traps itself; the filter, which the
    /// host's kernel compiles) is done on the thread that is to be the boot vCPU's, and no other is needed.
    pub fn make<T>(
        wanted: &Wanted,
        aids: &Aids,
        meanwhile: impl FnOnce(&GuestMemory) -> Result<T, Error>,
    ) -> Result<(Self, T), Error> {
        let begin = || Begun::new(Origin::Configuration(wanted), aids);
        Self::make_of(wanted, aids, begin, meanwhile)
    }

    /// The same of what is `begun`.
    fn make_of<T>(
        wanted: &Wanted,
        aids: &Aids,
        begun: impl FnOnce() -> Result<Begun, Error>,
        meanwhile: impl FnOnce(&GuestMemory) -> Result<T, Error>,
    ) -> Result<(Self, T), Error> {
        // Before KVM's descriptors, so that it is dropped after them.
        let (size, pages) = (memory_size(&wanted.machine)?, wanted.machine.huge_pages);
        let mut memory = match wanted.shared_memory {
            true => GuestMemory::shared(size, pages)?,
            false => GuestMemory::new(size, pages)?,
        };
        if wanted.machine.track_dirty_pages {
            memory.track();
        }
        let Begun {
            mut first,
            vm,
            most_vcpus: most,
        } = begun()?;
        let cpus = wanted.machine.vcpu_count;
        if cpus as usize > most {
            return Err(Error::TooManyVcpus { cpus, most });
        }
        let (vcpu, others) = furnish(&vm, wanted, memory.slots(), &aids.timeline)?;
        first.furnish(vcpu);
        // Beside what the boot vCPU's thread does to it.
        vm.create_timer()?;
        let done = meanwhile(&memory)?;
        let ready = Self {
            first,
            others,
            kvm: Arc::new(vm),
            memory,
        };
        Ok((ready, done))
    }

    /// Add devices, and start the threads of all vCPUs but the boot vCPU's, which wakes them.
    fn complete(self, config: &VmConfig, host: &Host, loaded: Loaded) -> Result<Vm, Error> {
        let Loaded {
            devices: opened,
            slots,
            start,
            asked,
        } = loaded;
        // In this order, because when this fails the last of them is dropped first, and memory must be the last to go.
        let Self {
            memory,
            kvm,
            others,
            first,
        } = self;
        let mut changes = Changes::new(&memory, None);
        let mut cpuids = Vec::new();
        let mut passed = Passed::nothing();
        let mut saved_devices = None;
        let mut places = hotplug_slots(config, host);
        let (entry, mut states, rest) = match start {
            Start::Boot(boot) => (Some(boot), Vec::new().into_iter(), None),
            Start::Saved(mut saved, (realtime, of_this_host)) => {
                passed = match realtime {
                    true => saved.vm.passed(),
                    false => Passed::nothing(),
                };
                changes = Changes::new(&memory, Some(&mut saved));
                saved_devices = Some(std::mem::take(&mut saved.devices));
                places = saved.platform.hotplug_slots();
                if !of_this_host {
                    cpuids = saved.vcpus.iter().map(VcpuState::cpuid).collect();
                }
                let mut states = saved.vcpus.into_iter();
                // Its thread does it beside what follows.
                let state = states.next().ok_or(Error::State("no vCPU was saved"))?;
                first.put_back(state, passed);
                (None, states, Some((saved.vm, saved.platform)))
            }
        };
        let (shared, mut platform) = platform(&kvm, config, host, asked, places)?;
        if entry.is_some() {
            platform.generation_id = Some(layout::GENERATION_ID);
        }
        watch_handler(&memory, &shared, &host.filters)?;
        let place = Place {
            slots,
            bus: &shared.mmio,
            memory: memory.memory(),
            kvm: &kvm,
            filters: &host.filters,
            watch: &host.watch,
            log: memory.log(),
        };
        let devices = Devices::attach(opened, config.pci, &place, saved_devices)?;
        if rest.is_some() {
            shared.pause.begin_stopped();
        }
        let template = first.template()?;
        template.check(&Wanted::of(config), &cpuids)?;
        let go = Go {
            shared: Arc::clone(&shared),
            entry,
        };
        let mut vm = Vm {
            boot: Some((first, go)),
            threads: Vec::with_capacity(others.len() + 1),
            shared: Arc::clone(&shared),
            platform,
            panic_is_warm: config.boot_source.command_line().contains(PANIC_WARM),
            halted_before: false,
            devices,
            kvm,
            filters: host.filters.clone(),
            watch: Arc::clone(&host.watch),
            changes,
            memory,
        };
        let (say, told) = channel();
        for (index, mut vcpu) in (1u32..).zip(others) {
            let saved = states.next();
            let (template, shared) = (Arc::clone(&template), Arc::clone(&shared));
            let (filters, say) = (host.filters.clone(), say.clone());
            let body = move || {
                let ready = match saved {
                    // Who listens has the fault.
                    Some(state) => {
                        let _ = say.send(vcpu.restore(&state, &passed));
                        Ok(())
                    }
                    None => template.set_up(&vcpu, index),
                };
                drop(say);
                filters.confine(Kind::Vcpu);
                vcpu::enter(index, &mut vcpu, &shared, ready);
            };
            match VcpuThread::start(index, body) {
                Ok(thread) => vm.threads.push(thread),
                Err(e) => {
                    vm.stop();
                    return Err(no_thread(e));
                }
            }
        }
        drop(say);
        if let Some((state, platform)) = rest
            && let Err(e) = vm.put_back(&state, platform, &told, &passed)
        {
            vm.stop();
            return Err(e);
        }
        Ok(vm)
    }
}

/// What makes a VM of a machine that is ready.
struct Loaded<'a> {
    devices: (Vec<devices::Named>, IoThreads),
    slots: &'a [MmioSlot],
    start: Start,
    /// When the VM was asked for.
    asked: boot_timer::Times,
}

/// The boot vCPU's thread, which sets the vCPU up and waits to be told to go. Dropped instead, it ends.
struct BootProcessor {
    made: Option<Sender<()>>,
    vcpu: Option<Sender<Vcpu>>,
    orders: Option<Sender<Order>>,
    thread: Option<VcpuThread>,
    /// What this host's KVM and the configuration make of processors.
    template: Receiver<Result<Arc<Processor>, Error>>,
    put_back: Receiver<Result<(), husk_kvm::Error>>,
}

/// What the boot vCPU's thread is told.
enum Order {
    PutBack(Box<VcpuState>, Passed),
    Go(Go),
}

/// What a VM begins with.
enum Start {
    /// A kernel, which is in memory.
    Boot(Box<BootState>),
    /// What was saved; memory is as it was. First: clocks have not stood still since. Second: it was saved on this host.
    Saved(Box<Snapshot>, (bool, bool)),
}

/// What the boot vCPU's thread needs to enter the guest.
struct Go {
    shared: Arc<Shared>,
    /// The kernel's entry; None: where it was.
    entry: Option<Box<BootState>>,
}

impl BootProcessor {
    fn start(kvm: Arc<Kvm>, origin: Origin<'_>, aids: &Aids) -> Result<Self, Error> {
        let (made, is_made) = channel::<()>();
        let (give, given) = channel::<Vcpu>();
        let (say, template) = channel();
        let (say_back, put_back) = channel();
        let (orders, told) = channel::<Order>();
        let wanted = match origin {
            Origin::Configuration(wanted) => Some(wanted.clone()),
            Origin::Snapshot | Origin::Template => None,
        };
        let is_template = matches!(origin, Origin::Template);
        let aids = aids.clone();
        let body = move || {
            if recv_soon(&is_made).is_err() {
                return;
            }
            // KVM asks the processor for it, which takes as long as the main thread takes to the vCPU.
            let template = match &wanted {
                Some(wanted) => Processor::new(&kvm, wanted),
                None if is_template => Ok(Processor::unknown()),
                None => Processor::of_host(&kvm),
            };
            let Ok(mut vcpu) = recv_soon(&given) else {
                return;
            };
            let is_saved = wanted.is_none();
            let made = template.and_then(|template| {
                if !is_saved {
                    template.set_up(&vcpu, 0)?;
                }
                Ok(Arc::new(template))
            });
            aids.timeline.reach(Phase::VcpusReady);
            // A main thread that has failed meanwhile does not listen, and tells nobody to go.
            let _ = say.send(made);
            drop((kvm, say, wanted));
            let restore = |vcpu: &Vcpu, state: &VcpuState, passed: &Passed| {
                drop(say_back.send(vcpu.restore(state, passed)));
            };
            // The main thread needs it to go on.
            let early = is_saved.then(|| recv_soon(&told).ok()).flatten();
            if let Some(Order::PutBack(state, passed)) = &early {
                restore(&vcpu, state, passed);
            }
            // The host's kernel compiles the filter: beside what the main thread still does, not when the guest waits.
            aids.filters.confine(Kind::Vcpu);
            loop {
                match recv_soon(&told) {
                    Ok(Order::PutBack(state, passed)) => restore(&vcpu, &state, &passed),
                    Ok(Order::Go(Go { shared, entry })) => {
                        let ready = entry.map_or(Ok(()), |boot| set_entry(&vcpu, &boot));
                        return vcpu::enter(0, &mut vcpu, &shared, ready);
                    }
                    Err(_) => return,
                }
            }
        };
        let thread = VcpuThread::start(0, body).map_err(no_thread)?;
        Ok(Self {
            made: Some(made),
            vcpu: Some(give),
            orders: Some(orders),
            thread: Some(thread),
            template,
            put_back,
        })
    }

    /// KVM's VM is there: what would have disturbed it may begin.
    fn vm_is_made(&self) {
        if let Some(sender) = &self.made {
            let _ = sender.send(());
        }
    }

    /// Give it the vCPU, bare.
    fn furnish(&mut self, vcpu: Vcpu) {
        if let Some(sender) = self.vcpu.take() {
            // It listens: nothing else makes it end.
            let _ = sender.send(vcpu);
        }
    }

    /// Have the vCPU become what it was; [`BootProcessor::is_put_back`] tells whether it has.
    fn put_back(&self, state: VcpuState, passed: Passed) {
        if let Some(orders) = &self.orders {
            let _ = orders.send(Order::PutBack(Box::new(state), passed));
        }
    }

    fn is_put_back(&self) -> Result<(), Error> {
        let failed = Error::State("the boot vCPU's thread failed");
        Ok(recv_soon(&self.put_back).map_err(|_| failed)??)
    }

    /// What the processors are, as soon as KVM has told and the boot vCPU is one. Once.
    fn template(&self) -> Result<Arc<Processor>, Error> {
        let failed = Err(Error::State("the boot vCPU's thread failed"));
        recv_soon(&self.template).unwrap_or(failed)
    }

    fn go(mut self, go: Go) -> Option<VcpuThread> {
        // It listens until this is dropped.
        let _ = self.orders.take()?.send(Order::Go(go));
        self.thread.take()
    }
}

impl Drop for BootProcessor {
    fn drop(&mut self) {
        self.made = None;
        self.vcpu = None;
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

/// Have the VM end when the handler of its page faults is gone.
fn watch_handler(
    memory: &GuestMemory,
    shared: &Arc<Shared>,
    filters: &Filters,
) -> Result<(), Error> {
    let Some(handler) = memory.handler() else {
        return Ok(());
    };
    let (shared, filters) = (Arc::clone(shared), filters.clone());
    let lost = move |why| {
        shared.lifecycle.end(Outcome::Memory(why));
        shared.pause.look_again();
    };
    let prepare = move || filters.confine(Kind::Console);
    handler.watch(prepare, lost).map_err(no_thread)
}

fn take<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn no_thread(error: std::io::Error) -> Error {
    Error::Host("a thread for each vCPU", error)
}

/// Receive what is about to come.
fn recv_soon<T>(receiver: &Receiver<T>) -> Result<T, RecvError> {
    match spin_for(receiver, MOMENT) {
        Err(RecvTimeoutError::Timeout) => receiver.recv(),
        received => received.map_err(|_| RecvError),
    }
}

/// Add memory, interrupt controllers and vCPUs; the boot vCPU apart from the others.
///
/// The order counts. To register memory KVM waits for a grace period, which is over at once where nothing was ever changed,
/// and takes milliseconds where the controllers' ports have just been registered (since Linux 6.18, where those do not wait).
fn furnish(
    vm: &husk_kvm::Vm,
    wanted: &Wanted,
    slots: &[(Range, u64)],
    timeline: &Timeline,
) -> Result<(Vcpu, Vec<Vcpu>), Error> {
    let track = wanted.machine.track_dirty_pages;
    for (slot, (range, host)) in (0u32..).zip(slots) {
        // SAFETY: the addresses are GuestMemory's own mapping. `Ready` and `Vm` drop all of KVM's descriptors before it,
        // and so does `Ready::make` when it fails, because it makes the memory first.
        unsafe { vm.set_memory_slot(slot, range.start, range.size, *host, track)? };
    }
    timeline.reach(Phase::MemoryReady);
    vm.create_interrupt_controllers(layout::KVM_TSS)?;
    let first = vm.create_vcpu(0)?;
    let others = (1..wanted.machine.vcpu_count)
        .map(|index| vm.create_vcpu(index))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((first, others))
}

/// Kernel, initrd and tables into memory. The kernel is opened unless it is already.
fn prepare_boot(
    config: &VmConfig,
    kernel: Option<Kernel>,
    memory: &GuestMemory,
    host: &Host,
    (slots, root_is_read_only): (&[MmioSlot], bool),
) -> Result<BootState, Error> {
    let cpus = config.machine_config.vcpu_count;
    let kernel = match kernel {
        Some(kernel) => kernel,
        None => Kernel::open(&config.boot_source.kernel_image_path, &host.cache)?,
    };
    let boot = load(
        config,
        &kernel,
        (slots, root_is_read_only),
        memory,
        &host.cache,
    )?;
    let acpi = AcpiConfig {
        cpus,
        virtio_mmio: slots,
        pci: config.pci,
        hotplug_slots: hotplug_slots(config, host) as u32,
        keyboard: config.keyboard,
    };
    memory.write(layout::ACPI, &acpi::tables(&acpi, layout::ACPI)?)?;
    generation::renew(memory, layout::GENERATION_ID)?;
    memory.write(layout::MP_TABLE, &mptable::table(cpus, layout::MP_TABLE)?)?;
    host.timeline.reach(Phase::KernelLoaded);
    Ok(boot)
}

/// Where the boot vCPU starts.
fn set_entry(vcpu: &Vcpu, boot: &BootState) -> Result<(), Error> {
    let mut sregs = vcpu.sregs()?;
    boot.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&boot.regs)?;
    Ok(())
}

/// CPUID leaf 0x8000_0008, EAX bits 7:0.
fn physical_address_bits() -> u32 {
    use std::arch::x86_64::__cpuid;
    match __cpuid(0x8000_0000).eax {
        0x8000_0008.. => __cpuid(0x8000_0008).eax & 0xff,
        _ => LEAST_ADDRESS_BITS,
    }
}
