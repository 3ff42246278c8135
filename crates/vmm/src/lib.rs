//! The VM's state machine and its one builder.
//!
//! A request comes in as [`husk_config::VmmRequest`], whoever sends it; [`Vmm::handle`] is the one place that answers it.
//!
//! **Architecture Invariant:** nothing here reads the command line, speaks HTTP or owns a terminal.

mod changes;
mod devices;
mod error;
mod footprint;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod generation;
mod host;
mod lifecycle;
mod load;
mod memory;
mod pause;
mod platform;
mod processor;
mod snapshot;
mod spin;
mod standby;
mod template;
mod this_host;
mod timeline;
mod vcpu;
mod view;
mod vm;
mod working_set;

pub use error::{Error, chain};
pub use footprint::{forget_code, share_heap};
pub use host::{Console, Host, Identity, OpenOutput, Watch};
pub use lifecycle::{Outcome, Wake};
pub use snapshot::{SNAPSHOT_VERSION, describe_snapshot, snapshot_version};
pub use spin::{give_way, spin_for};
pub use template::{CloneOf, Template};
pub use timeline::{Cost, Counting, Phase, Reached, Timeline};
pub use vcpu::{ExitCounts, install_kick_handler};

use devices::Opened;
use husk_config::{
    Answer, Event, Fork, LoadSnapshot, NewDevice, Part, SnapshotType, VmConfig, VmmRequest,
};
use husk_loader::Kernel;
use husk_metrics::METRICS;
use standby::Standby;
use std::time::Instant;
use vm::Vm;
use working_set::Recording;

/// Fill at most 256 bytes. By the system call: the usual library opens /dev/urandom in a static program, for good, which a process that is
/// forked has not.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), Error> {
    use rustix::rand::{GetRandomFlags, getrandom};
    match getrandom(&mut *bytes, GetRandomFlags::empty()) {
        Ok(filled) if filled == bytes.len() => Ok(()),
        Ok(_) => Err(Error::Random("too few".into())),
        Err(e) => Err(Error::Random(e.to_string())),
    }
}

/// The monitor of one VM.
pub struct Vmm {
    host: Host,
    config: VmConfig,
    state: State,
    /// What is ready before it is asked for.
    prepared: Prepared,
    /// The configuration comes in parts, and time passes between them: what a VM needs is made ready ahead.
    awaits: bool,
    /// Something was configured that a snapshot would bring along.
    touched: bool,
    /// The working set that is being recorded.
    recording: Option<Recording>,
}

/// Parts of the next VM that are ready already. Empty when a VM is booted from a whole configuration at once.
#[derive(Default)]
pub(crate) struct Prepared {
    /// KVM's VM, with its memory and vCPUs.
    standby: Option<Standby>,
    /// The kernel of the boot source.
    kernel: Option<Kernel>,
    /// Devices whose files, taps and sockets are open.
    devices: Opened,
}

enum State {
    Configuring,
    /// Complete, and its guest has not run yet.
    Built(Box<Vm>),
    Running(Box<Vm>),
    /// Its vCPUs stay out of the guest. I/O that the guest has asked for goes on.
    Paused(Box<Vm>),
}

impl Vmm {
    /// A monitor without a configuration.
    pub fn new(host: Host) -> Self {
        Self {
            host,
            config: VmConfig::default(),
            state: State::Configuring,
            prepared: Prepared::default(),
            awaits: false,
            touched: false,
            recording: None,
        }
    }

    /// Have what a VM needs of KVM ready before it is asked for. It takes milliseconds, mostly asleep, on threads of its own;
    /// this returns at once. Does nothing for a monitor that was not told to [`Vmm::await_requests`].
    pub fn stand_by(&mut self) {
        if !self.awaits || !matches!(self.state, State::Configuring) {
            return;
        }
        let machine = standby::Wanted::of(&self.config);
        match &self.prepared.standby {
            Some(standby) if *standby.wanted() == machine => {}
            _ => self.prepared.standby = Some(Standby::start(machine, &self.host)),
        }
    }

    /// Do what `request` asks. A request that fails changes nothing.
    pub fn handle(&mut self, request: VmmRequest) -> Result<Answer, Error> {
        self.collect_ejected();
        match (&mut self.state, request) {
            (_, VmmRequest::Get(query)) => return self.get(query),
            (_, VmmRequest::PutMmds(value)) => self.host.mmds.put(value)?,
            (_, VmmRequest::PatchMmds(value)) => self.host.mmds.patch(value)?,
            (State::Configuring, VmmRequest::Configure(config)) => {
                config.validate()?;
                self.config = *config;
                self.touched = true;
            }
            (State::Configuring, VmmRequest::Put(part)) => self.put(*part)?,
            (State::Configuring, VmmRequest::PatchMachine(change)) => {
                let mut machine = self.config.machine_config.clone();
                change.apply(&mut machine);
                self.put(Part::MachineConfig(machine))?;
            }
            // Whoever owns the process has written them.
            (State::Running(_) | State::Paused(_), VmmRequest::FlushMetrics) => {}
            (State::Running(_) | State::Paused(_), VmmRequest::Put(part)) => match *part {
                Part::Drive(drive) => self.attach(NewDevice::Drive(drive))?,
                Part::NetworkInterface(interface) => self.attach(NewDevice::Network(interface))?,
                _ => return Err(Error::AfterBoot),
            },
            (State::Configuring, VmmRequest::LoadSnapshot(_)) if self.touched => {
                return Err(Error::LoadAfterConfiguration);
            }
            (State::Configuring, VmmRequest::LoadSnapshot(load)) => {
                let begun = Instant::now();
                self.load(&load).map_err(|e| Error::Load(chain(&e)))?;
                METRICS.latencies_us.vmm_load_snapshot.set(begun.elapsed());
            }
            (State::Paused(vm), VmmRequest::CreateSnapshot(create)) => {
                let begun = Instant::now();
                vm.save(&self.config, &create)?;
                let latency = match create.snapshot_type {
                    SnapshotType::Full => &METRICS.latencies_us.vmm_full_create_snapshot,
                    SnapshotType::Diff => &METRICS.latencies_us.vmm_diff_create_snapshot,
                };
                latency.set(begun.elapsed());
            }
            (State::Running(_), VmmRequest::CreateSnapshot(_)) => return Err(Error::NotPaused),
            (State::Configuring, VmmRequest::Boot) => {
                self.build()?;
                self.start()?;
            }
            (State::Running(vm) | State::Paused(vm), VmmRequest::PressPowerButton) => {
                vm.press_power_button();
            }
            (State::Running(vm) | State::Paused(vm), VmmRequest::SendCtrlAltDel) => {
                vm.send_ctrl_alt_del();
            }
            (State::Running(_) | State::Paused(_), VmmRequest::Attach(device)) => {
                self.attach(*device)?;
            }
            (State::Running(vm) | State::Paused(vm), VmmRequest::Detach(id)) => vm.detach(&id)?,
            (State::Running(vm) | State::Paused(vm), VmmRequest::Update(id, change)) => {
                let mut config = self.config.clone();
                change.apply(&id, &mut config)?;
                vm.update_device(&id, change)?;
                self.config = config;
            }
            (State::Running(vm) | State::Paused(vm), VmmRequest::Stop) => vm.end(Outcome::Stopped),
            (State::Running(vm), VmmRequest::Pause) => {
                let begun = Instant::now();
                vm.pause()?;
                METRICS.latencies_us.vmm_pause_vm.set(begun.elapsed());
                self.exchange(|state| match state {
                    State::Running(vm) => State::Paused(vm),
                    other => other,
                });
                (self.host.watch)(Event::Paused);
            }
            (State::Paused(vm), VmmRequest::Resume) => {
                let begun = Instant::now();
                vm.resume();
                self.recording.iter_mut().for_each(Recording::begin);
                METRICS.latencies_us.vmm_resume_vm.set(begun.elapsed());
                self.exchange(|state| match state {
                    State::Paused(vm) => State::Running(vm),
                    other => other,
                });
                (self.host.watch)(Event::Resumed);
            }
            // They start processes, which is not for this crate.
            (
                State::Running(_) | State::Paused(_),
                VmmRequest::Fork(_) | VmmRequest::DropTemplate(_),
            ) => {
                return Err(Error::State("clones are started elsewhere"));
            }
            // As it is already.
            (State::Paused(_), VmmRequest::Pause) | (State::Running(_), VmmRequest::Resume) => {}
            (State::Configuring | State::Built(_), _) => return Err(Error::BeforeBoot),
            (State::Running(_) | State::Paused(_), _) => return Err(Error::AfterBoot),
        }
        Ok(Answer::Done)
    }

    /// Go on from a snapshot.
    fn load(&mut self, load: &LoadSnapshot) -> Result<(), Error> {
        let mut saved = snapshot::Saved::open(load)?;
        load.apply_overrides(&mut saved.config)?;
        self.go_on(saved, load.resume_vm)?;
        self.recording = load.record_working_set.clone().map(Recording::new);
        if load.resume_vm {
            self.recording.iter_mut().for_each(Recording::begin);
        }
        Ok(())
    }

    /// Freeze the VM as it is: clones of it, as `fork` wants them, can go on from there. It runs on if it ran, and its memory is a view of
    /// the template's.
    pub fn freeze(&mut self, fork: &Fork) -> Result<Template, Error> {
        let template = match &mut self.state {
            State::Paused(vm) => vm.freeze(&self.config, fork)?,
            State::Running(vm) => {
                vm.pause()?;
                let template = vm.freeze(&self.config, fork);
                vm.resume();
                template?
            }
            State::Configuring | State::Built(_) => return Err(Error::BeforeBoot),
        };
        Ok(template.with_metadata(&self.host.mmds))
    }

    /// Be a clone that goes on from `template`.
    pub fn be_clone(&mut self, template: Template, clone: &CloneOf<'_>) -> Result<(), Error> {
        let (saved, metadata) = template.for_clone(clone, &mut self.prepared.devices)?;
        self.host.mmds.put(metadata)?;
        self.go_on(saved, clone.fork.resume_vm)
    }

    /// The VM is what was saved.
    fn go_on(&mut self, mut saved: snapshot::Saved, resume: bool) -> Result<(), Error> {
        let config = std::mem::take(&mut saved.config);
        let mut vm = Vm::build_from(&config, &self.host, &mut self.prepared, Some(saved))?;
        vm.start();
        self.config = config;
        if resume {
            vm.resume();
            self.state = State::Running(Box::new(vm));
            (self.host.watch)(Event::Resumed);
        } else {
            self.state = State::Paused(Box::new(vm));
            (self.host.watch)(Event::Paused);
        }
        Ok(())
    }

    /// When [`Vmm::record_working_set`] is to be called.
    pub fn recording_due(&self) -> Option<Instant> {
        self.recording.as_ref().and_then(Recording::due)
    }

    /// Write the working set that was to be recorded, once. What goes wrong does not concern the guest.
    pub fn record_working_set(&mut self) {
        let (State::Running(vm) | State::Paused(vm)) = &self.state else {
            return;
        };
        if let Some(Err(e)) = self.recording.take().map(|set| set.write(vm.memory())) {
            log::error!("the working set is not recorded: {}", chain(&e));
        }
    }

    /// Plug a device into a VM that runs.
    fn attach(&mut self, device: NewDevice) -> Result<(), Error> {
        let (State::Running(vm) | State::Paused(vm)) = &mut self.state else {
            return Err(Error::BeforeBoot);
        };
        let mut config = self.config.clone();
        config.add(device.clone())?;
        vm.attach(&device)?;
        self.config = config;
        Ok(())
    }

    /// Set a part of the configuration, and open what it names.
    fn put(&mut self, part: Part) -> Result<(), Error> {
        let mut config = self.config.clone();
        let opened = part.clone();
        part.set(&mut config);
        config.validate_parts()?;
        match opened {
            Part::BootSource(source) => {
                let kernel = Kernel::open(&source.kernel_image_path, &self.host.cache)?;
                if let Some(initrd) = &source.initrd_path {
                    load::check_initrd(initrd)?;
                }
                self.prepared.kernel = self.awaits.then_some(kernel);
            }
            Part::MachineConfig(_) => vm::check_memory(&config)?,
            Part::Drive(drive) => self.prepared.devices.drive(&drive, &self.config)?,
            Part::NetworkInterface(interface) => {
                self.prepared.devices.interface(&interface, &self.config)?;
            }
            Part::Vsock(vsock) => self.prepared.devices.vsock(&vsock, &self.config)?,
            Part::CpuConfig(_)
            | Part::Balloon(_)
            | Part::Entropy(_)
            | Part::Serial(_)
            | Part::MmdsConfig(_)
            | Part::Logger(_)
            | Part::Metrics(_) => {}
        }
        self.config = config;
        self.touched = true;
        self.stand_by();
        Ok(())
    }

    /// Devices that the guest has let go, after a [`VmmRequest::Detach`], are closed and leave the configuration; their
    /// names. To be called when the main thread is woken; [`Vmm::handle`] does it first as well.
    pub fn collect_ejected(&mut self) -> Vec<String> {
        let (State::Running(vm) | State::Paused(vm)) = &mut self.state else {
            return Vec::new();
        };
        let gone = vm.collect_ejected();
        gone.iter().for_each(|id| self.config.remove(id));
        gone
    }

    fn exchange(&mut self, change: impl FnOnce(State) -> State) {
        self.state = change(std::mem::replace(&mut self.state, State::Configuring));
    }

    /// The first half of [`VmmRequest::Boot`]: all that may take long or fail.
    pub fn build(&mut self) -> Result<(), Error> {
        let State::Configuring = self.state else {
            return Err(Error::AfterBoot);
        };
        match Vm::build(&self.config, &self.host, &mut self.prepared) {
            Ok(vm) => {
                self.state = State::Built(Box::new(vm));
                Ok(())
            }
            Err(e) => {
                self.stand_by();
                Err(e)
            }
        }
    }

    /// The second half: the guest runs.
    pub fn start(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.state, State::Configuring) {
            State::Built(mut vm) => {
                vm.start();
                self.state = State::Running(vm);
                (self.host.watch)(Event::Booted);
                Ok(())
            }
            other => {
                self.state = other;
                Err(Error::State("the VM is not built, or runs already"))
            }
        }
    }

    /// Begin with `config`, which is not complete: requests add to it.
    pub fn await_requests(&mut self, config: VmConfig) {
        self.config = config;
        self.awaits = true;
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// A VM is there, and its guest runs, is paused, or has run.
    pub fn is_booted(&self) -> bool {
        matches!(self.state, State::Running(_) | State::Paused(_))
    }

    /// The guest is paused.
    pub fn is_paused(&self) -> bool {
        matches!(&self.state, State::Paused(_))
    }

    /// How the VM ended; None while it runs or before it was booted.
    pub fn outcome(&self) -> Option<Outcome> {
        match &self.state {
            State::Configuring | State::Built(_) => None,
            State::Running(vm) | State::Paused(vm) => vm.outcome(),
        }
    }

    /// The guest's kernel has said that it panicked; it may still run.
    pub fn has_panicked(&self) -> bool {
        matches!(&self.state, State::Running(vm) | State::Paused(vm) if vm.has_panicked())
    }

    /// The power button was pressed and the guest has not looked. A press that comes before the guest's driver is there
    /// is lost, so press again while this is true. A guest that is paused cannot look.
    pub fn is_press_pending(&self) -> bool {
        matches!(&self.state, State::Running(vm) if vm.is_press_pending())
    }

    /// Look whether the guest has halted for good; see [`Vmm::outcome`] after a few calls. True when it looks like it, and
    /// another call soon will tell.
    pub fn look_for_halt(&mut self) -> bool {
        match &mut self.state {
            // One that is paused has not halted.
            State::Configuring | State::Built(_) | State::Paused(_) => false,
            State::Running(vm) => vm.look_for_halt(),
        }
    }

    /// The VM ends as one whose kernel has panicked.
    pub fn give_up_after_panic(&self) {
        if let State::Running(vm) | State::Paused(vm) = &self.state {
            vm.end(Outcome::Panic);
        }
    }

    /// Take the VM down, back to its configuration. None when there is none.
    pub fn take_down(&mut self) -> Option<Outcome> {
        self.record_working_set();
        match std::mem::replace(&mut self.state, State::Configuring) {
            State::Configuring => None,
            State::Built(vm) | State::Running(vm) | State::Paused(vm) => Some(vm.stop()),
        }
    }
}
