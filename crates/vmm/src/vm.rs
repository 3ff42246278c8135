//! Building a VM from its configuration, and taking it down again.

mod boot_processor;
mod ready;

pub use ready::{Aids, Ready, check_memory};

use boot_processor::{BootProcessor, Go, Origin, recv_soon};
use ready::{Back, Begun, Loaded, Start, prepare_boot};

use crate::Prepared;
use crate::changes::{Changes, Taken};
use crate::devices::{self, Devices, IoThreads, Place};
use crate::error::Error;
use crate::generation;
use crate::host::{Host, Watch};
use crate::lifecycle::Outcome;
use crate::memory::GuestMemory;
use crate::platform::Platform;
use crate::snapshot::{self, PlatformState, Saved, Snapshot};
use crate::standby::Wanted;
use crate::template::Template;
use crate::timeline::Phase;
use crate::vcpu::{Shared, VcpuThread};
use husk_config::{CreateSnapshot, DeviceUpdate, Fork, HugePages, NewDevice, VmConfig};
use husk_devices::boot_timer;
use husk_kvm::{Kvm, Passed, VcpuState, VmState};
use husk_sandbox::{Filters, Kind};
use husk_snapshot::Lineage;
use std::sync::mpsc::{Receiver, channel};
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
        // Where nobody asks, nobody looks: the host's kernel may take the processor from who asks for its time.
        let asked = config.boot_timer.then(boot_timer::Times::now);
        host.timeline.reach(Phase::Asked);
        config.validate()?;
        let slots = devices::slots(config)?;
        let wanted = Wanted::of(config);
        let Prepared {
            standby,
            kernel,
            devices: opened,
        } = prepared;
        let made = match standby.take_if(|standby| *standby.wanted() == wanted) {
            Some(standby) => standby.take().transpose()?,
            None => None,
        };
        let kernel = kernel.take();
        let origin = match &saved {
            None => Origin::Configuration(&wanted),
            Some(saved) if saved.is_of_this_host => Origin::ThisHost,
            Some(_) => Origin::Snapshot,
        };
        let fill = |memory: &GuestMemory, saved: Option<(Saved, Back)>| {
            let start = match saved {
                Some((saved, back)) => {
                    host.timeline.reach(Phase::KernelLoaded);
                    Start::Saved(Box::new(saved.snapshot), back)
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
                if let Some(saved) = &saved {
                    saved.fill(&ready.memory)?;
                }
                let (saved, boot_vcpu) = Back::take(saved)?;
                ready.put_back(boot_vcpu);
                let filled = fill(&ready.memory, saved)?;
                (ready, filled)
            }
            None => {
                let aids = Aids::of(host);
                let memory = ready::memory(&wanted)?;
                // While KVM does not know it: to map files over what it knows has it look for pages to let go.
                if let Some(saved) = &saved {
                    saved.fill(&memory)?;
                }
                let begun = Begun::new(origin, &aids)?;
                // Not before memory is there, which may take seconds: the guest's clocks go on from here.
                let (saved, boot_vcpu) = Back::take(saved)?;
                let fill = |memory: &GuestMemory| fill(memory, saved);
                Ready::make_of(&wanted, &aids, (memory, begun), boot_vcpu, fill)?
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
