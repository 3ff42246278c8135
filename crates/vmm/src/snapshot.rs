//! What a VM is between two instructions of its guest, to be kept and gone on from.

use crate::error::Error;
use crate::memory::GuestMemory;
use crate::platform::Platform;
use husk_config::VmConfig;
use husk_devices::{keyboard, serial};
use husk_kvm::{VcpuState, VmState};
use husk_snapshot::MemoryFile;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::Path;

/// All but the guest's memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// In the shape of a configuration file.
    config: serde_json::Value,
    /// Bytes of the memory file.
    pub memory_size: u64,
    pub vm: VmState,
    /// By their numbers.
    pub vcpus: Vec<VcpuState>,
    pub platform: PlatformState,
}

impl Snapshot {
    pub fn new(
        config: &VmConfig,
        memory_size: u64,
        vm: VmState,
        vcpus: Vec<VcpuState>,
        platform: &Platform,
    ) -> Result<Self, Error> {
        let config = config.to_saved();
        Ok(Self {
            config: config.map_err(|e| Error::Json(e.to_string()))?,
            memory_size,
            vm,
            vcpus,
            platform: PlatformState::of(platform),
        })
    }
}

/// Of devices that every VM has.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlatformState {
    serial: serial::Registers,
    keyboard: Option<keyboard::State>,
    power_events: u8,
}

impl PlatformState {
    fn of(platform: &Platform) -> Self {
        Self {
            serial: platform.serial.registers(),
            keyboard: platform.keyboard.as_ref().map(|keyboard| keyboard.state()),
            power_events: platform.power.pending(),
        }
    }

    pub fn restore(self, platform: &Platform) {
        platform.power.restore(self.power_events);
        if let (Some(keyboard), Some(state)) = (&platform.keyboard, self.keyboard) {
            keyboard.restore(state);
        }
        // Last: it interrupts for what is pending.
        platform.serial.restore(self.serial);
    }
}

/// A snapshot whose files are open.
pub struct Saved {
    pub snapshot: Snapshot,
    pub config: VmConfig,
    memory: File,
}

impl Saved {
    /// Open the files of a snapshot, and see that they belong together.
    pub fn open(state: &Path, memory: &Path) -> Result<Self, Error> {
        let mut snapshot: Snapshot = husk_snapshot::read_state(state)?;
        let config = VmConfig::from_saved(snapshot.config.take());
        let config = config.map_err(|source| husk_snapshot::Error::Content {
            path: state.into(),
            source,
        })?;
        check(&config)?;
        config.validate_parts()?;
        let cpus = config.machine_config.vcpu_count as usize;
        if snapshot.vcpus.len() != cpus {
            return Err(Error::State(
                "the snapshot's vCPUs are not those of its configuration",
            ));
        }
        let memory = husk_snapshot::open_memory(memory, snapshot.memory_size)?;
        Ok(Self {
            snapshot,
            config,
            memory,
        })
    }

    /// Let the guest find its memory.
    pub fn fill(&self, memory: &GuestMemory) -> Result<(), Error> {
        if memory.size() != self.snapshot.memory_size {
            return Err(Error::State(
                "the snapshot's memory is not that of its configuration",
            ));
        }
        let mut offset = 0;
        for (range, _) in memory.slots() {
            memory.place_file(&self.memory, offset, range.size, range.start)?;
            offset += range.size;
        }
        Ok(())
    }
}

/// What cannot be kept yet is said before anything is written.
pub fn check(config: &VmConfig) -> Result<(), Error> {
    let devices = [
        ("drives", !config.drives.is_empty()),
        ("network interfaces", !config.network_interfaces.is_empty()),
        ("a vsock device", config.vsock.is_some()),
        ("an entropy device", config.entropy.is_some()),
        ("a balloon", config.balloon.is_some()),
        ("a PCI bus", config.pci),
    ];
    match devices.iter().find(|(_, there)| *there) {
        Some((what, _)) => Err(Error::NoSnapshot(what)),
        None => Ok(()),
    }
}

/// Write guest memory.
pub fn write_memory(memory: &GuestMemory, path: &Path) -> Result<(), Error> {
    let file = MemoryFile::create(path, memory.size())?;
    memory.each_used(|offset, bytes| file.write(offset, bytes).map_err(Error::from))?;
    Ok(file.finish()?)
}
