//! What a VM is built with besides its configuration.

use crate::lifecycle::Wake;
use crate::timeline::Timeline;
use husk_config::Event;
use husk_devices::serial::{Output, Wire};
use husk_loader::Cache;
use husk_mmds::Mmds;
use husk_sandbox::Filters;
use std::path::PathBuf;
use std::sync::Arc;

/// Where the guest's console leads. It outlives a VM: a restarted guest goes on with the same one.
#[derive(Clone)]
pub struct Console {
    /// Takes what the guest writes.
    pub output: Arc<dyn Output>,
    /// Holds what the guest has not read yet.
    pub wire: Arc<Wire>,
    /// Finds what takes the guest's output as a configuration wants it.
    pub open: OpenOutput,
}

impl Console {
    /// Output and input of the guest, whatever a configuration says of files.
    pub fn new(output: Arc<dyn Output>, wire: Arc<Wire>) -> Self {
        Self {
            output,
            wire,
            open: Arc::new(|_, output| Ok(output)),
        }
    }
}

/// Finds where a console's output goes, given where it goes otherwise. An error comes with its path.
pub type OpenOutput = Arc<
    dyn Fn(
            &husk_config::Serial,
            Arc<dyn Output>,
        ) -> Result<Arc<dyn Output>, (PathBuf, std::io::Error)>
        + Send
        + Sync,
>;

/// What the monitor says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The VM's name.
    pub id: String,
    /// The program's name.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The version of Firecracker's API that clients are told.
    pub api_version: &'static str,
}

/// What a VM is built with besides its configuration.
pub struct Host {
    /// What the monitor says of itself.
    pub identity: Identity,
    /// The guest's console.
    pub console: Console,
    /// What the guest's metadata service answers from. It outlives VMs.
    pub mmds: Arc<Mmds>,
    /// Unpacked kernels.
    pub cache: Cache,
    /// What the VM's threads may ask of the host's kernel.
    pub filters: Filters,
    /// The VM ends when its guest has set a boot mark.
    pub ends_at_mark: bool,
    /// Phases of the boot are noted here.
    pub timeline: Arc<Timeline>,
    /// Called when the VM has ended or its kernel has panicked.
    pub wake: Wake,
    /// Hears what happens to the VM. Called on any thread; must not block.
    pub watch: Watch,
    /// Devices may come and go while a VM with PCI runs. A guest that boots pays for that.
    pub hotplug: bool,
}

impl Host {
    /// A monitor that nobody watches, whose guests have this console. The VM's threads are confined.
    pub fn new(console: Console, cache: Cache, timeline: Arc<Timeline>, wake: Wake) -> Self {
        Self {
            identity: Identity {
                id: "anonymous-instance".into(),
                name: "Husk",
                version: env!("CARGO_PKG_VERSION"),
                api_version: "",
            },
            console,
            mmds: Mmds::new(husk_mmds::DEFAULT_LIMIT),
            cache,
            filters: Filters::built_in(),
            ends_at_mark: false,
            timeline,
            wake,
            watch: Arc::new(|_| ()),
            hotplug: true,
        }
    }
}

/// Hears what happens to the VM.
pub type Watch = Arc<dyn Fn(Event) + Send + Sync>;
