//! The VM's state machine and its one builder.
//!
//! A request comes in as [`husk_config::VmmRequest`], whoever sends it; [`Vmm::handle`] is the one place that answers it.
//!
//! **Architecture Invariant:** nothing here reads the command line, speaks HTTP or owns a terminal.

mod devices;
mod error;
mod lifecycle;
mod load;
mod memory;
mod timeline;
mod vcpu;
mod vm;

pub use error::{Error, chain};
pub use lifecycle::{Outcome, Wake};
pub use timeline::{Phase, Timeline};
pub use vcpu::{ExitCounts, install_kick_handler};
pub use vm::{Console, Host};

use husk_config::{VmConfig, VmmRequest};
use vm::Vm;

/// The monitor of one VM.
pub struct Vmm {
    host: Host,
    config: VmConfig,
    state: State,
}

enum State {
    Configuring,
    /// Complete, and its guest has not run yet.
    Built(Box<Vm>),
    Running(Box<Vm>),
}

impl Vmm {
    /// A monitor without a configuration.
    pub fn new(host: Host) -> Self {
        Self {
            host,
            config: VmConfig::default(),
            state: State::Configuring,
        }
    }

    /// Do what `request` asks. A request that fails changes nothing.
    pub fn handle(&mut self, request: VmmRequest) -> Result<(), Error> {
        match (&self.state, request) {
            (State::Configuring, VmmRequest::Configure(config)) => {
                config.validate()?;
                self.config = *config;
            }
            (State::Configuring, VmmRequest::Boot) => {
                self.build()?;
                self.start()?;
            }
            (State::Running(vm), VmmRequest::PressPowerButton) => vm.press_power_button(),
            (State::Running(vm), VmmRequest::Update(id, change)) => {
                vm.update_device(&id, change)?;
            }
            (State::Running(vm), VmmRequest::Stop) => vm.end(Outcome::Stopped),
            (State::Configuring | State::Built(_), _) => {
                return Err(Error::State("the VM is not running"));
            }
            (State::Running(_), _) => return Err(Error::State("the VM is already running")),
        }
        Ok(())
    }

    /// The first half of [`VmmRequest::Boot`]: all that may take long or fail.
    pub fn build(&mut self) -> Result<(), Error> {
        let State::Configuring = self.state else {
            return Err(Error::State("the VM is already built"));
        };
        self.state = State::Built(Box::new(Vm::build(&self.config, &self.host)?));
        Ok(())
    }

    /// The second half: the guest runs.
    pub fn start(&mut self) -> Result<(), Error> {
        match std::mem::replace(&mut self.state, State::Configuring) {
            State::Built(mut vm) => {
                vm.start();
                self.state = State::Running(vm);
                Ok(())
            }
            other => {
                self.state = other;
                Err(Error::State("the VM is not built, or runs already"))
            }
        }
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// How the VM ended; None while it runs or before it was booted.
    pub fn outcome(&self) -> Option<Outcome> {
        match &self.state {
            State::Configuring | State::Built(_) => None,
            State::Running(vm) => vm.outcome(),
        }
    }

    /// The guest's kernel has said that it panicked; it may still run.
    pub fn has_panicked(&self) -> bool {
        matches!(&self.state, State::Running(vm) if vm.has_panicked())
    }

    /// The power button was pressed and the guest has not looked. A press that comes before the guest's driver is there
    /// is lost, so press again while this is true.
    pub fn is_press_pending(&self) -> bool {
        matches!(&self.state, State::Running(vm) if vm.is_press_pending())
    }

    /// Look whether the guest has halted for good; see [`Vmm::outcome`] after a few calls. True when it looks like it, and
    /// another call soon will tell.
    pub fn look_for_halt(&mut self) -> bool {
        match &mut self.state {
            State::Configuring | State::Built(_) => false,
            State::Running(vm) => vm.look_for_halt(),
        }
    }

    /// The VM ends as one whose kernel has panicked.
    pub fn give_up_after_panic(&self) {
        if let State::Running(vm) = &self.state {
            vm.end(Outcome::Panic);
        }
    }

    /// Take the VM down, back to its configuration. None when there is none.
    pub fn take_down(&mut self) -> Option<(Outcome, Option<ExitCounts>)> {
        match std::mem::replace(&mut self.state, State::Configuring) {
            State::Configuring => None,
            State::Built(vm) | State::Running(vm) => Some(vm.stop()),
        }
    }
}
