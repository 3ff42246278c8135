//! A KVM VM that is ready before anybody asks for it.
//!
//! KVM takes a millisecond, and on some hosts many, to make a VM, its interrupt controllers and its memory. Whoever waits for requests
//! anyway, as the REST socket does, has that done on threads in the meantime, so that booting is loading a kernel and going.

use crate::error::Error;
use crate::host::Host;
use crate::vm::{Aids, Ready};
use husk_config::{CpuConfig, MachineConfig, VmConfig};
use std::thread::JoinHandle;

/// All of a configuration that KVM's VM, its memory and its vCPUs depend on.
#[derive(Clone, PartialEq)]
pub struct Wanted {
    pub machine: MachineConfig,
    pub cpu_config: Option<CpuConfig>,
    /// Memory is in a file that other processes can map.
    pub shared_memory: bool,
}

impl Wanted {
    /// What `config` needs.
    pub fn of(config: &VmConfig) -> Self {
        Self {
            machine: config.machine_config.clone(),
            cpu_config: config.cpu_config.clone(),
            shared_memory: config.shares_memory(),
        }
    }
}

/// A machine that is being made, or is ready.
pub struct Standby {
    wanted: Wanted,
    /// None: there was no thread to make it on.
    thread: Option<JoinHandle<Result<Ready, Error>>>,
}

impl Standby {
    /// Begin to make one.
    pub fn start(wanted: Wanted, host: &Host) -> Self {
        let (own, aids) = (wanted.clone(), Aids::of(host));
        let body = move || Ready::make(&own, &aids, |_| Ok(())).map(|(ready, ())| ready);
        let thread = std::thread::Builder::new()
            .name("standby".into())
            .stack_size(256 << 10)
            .spawn(body);
        if let Err(e) = &thread {
            log::debug!("no machine is made ahead: {e}");
        }
        Self {
            wanted,
            thread: thread.ok(),
        }
    }

    /// What it was made for.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// The machine, as soon as it is ready. None: it has to be made by the caller.
    pub fn take(mut self) -> Option<Result<Ready, Error>> {
        self.thread.take()?.join().ok()
    }
}

impl Drop for Standby {
    /// A machine that nobody wants any more is taken down beside what goes on.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let reaper = std::thread::Builder::new()
            .name("standby".into())
            .stack_size(256 << 10);
        if let Err(e) = reaper.spawn(move || drop(thread.join())) {
            log::debug!("a machine that was made ahead is left alone: {e}");
        }
    }
}
