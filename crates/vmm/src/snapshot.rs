//! What a VM is between two instructions of its guest, to be kept and gone on from.

use crate::changes::Base;
use crate::devices::{self, Devices};
use crate::error::Error;
use crate::memory::GuestMemory;
use crate::platform::Platform;
use husk_config::VmConfig;
use husk_devices::{keyboard, pci_hotplug, serial};
use husk_kvm::{VcpuState, VmState};
use husk_snapshot::{Header, Lineage, MemoryFile, Pages};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
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
    #[serde(default)]
    pub devices: devices::State,
    /// Which snapshot it is, and of which it is a diff.
    #[serde(default)]
    pub lineage: Lineage,
    /// What diffs of a VM that goes on from it are the difference to.
    #[serde(skip)]
    pub base: Option<Base>,
}

impl Snapshot {
    pub fn new(
        config: &VmConfig,
        (memory_size, lineage): (u64, Lineage),
        vm: VmState,
        vcpus: Vec<VcpuState>,
        (platform, devices): (&Platform, &Devices),
    ) -> Result<Self, Error> {
        let config = config.to_saved();
        Ok(Self {
            config: config.map_err(|e| Error::Json(e.to_string()))?,
            memory_size,
            vm,
            vcpus,
            platform: PlatformState::of(platform),
            devices: devices.save()?,
            lineage,
            base: None,
        })
    }
}

/// Of devices that every VM has.
#[derive(Debug, Serialize, Deserialize)]
pub struct PlatformState {
    serial: serial::Registers,
    keyboard: Option<keyboard::State>,
    power_events: u8,
    #[serde(default)]
    hotplug: pci_hotplug::State,
    /// Places of the PCI bus that the guest's tables tell of.
    #[serde(default)]
    hotplug_slots: usize,
    /// Guest-physical address of the VM generation ID, where the guest has been told of one.
    #[serde(default)]
    generation_id: Option<u64>,
}

impl PlatformState {
    fn of(platform: &Platform) -> Self {
        Self {
            serial: platform.serial.registers(),
            keyboard: platform.keyboard.as_ref().map(|keyboard| keyboard.state()),
            power_events: platform.power.pending(),
            hotplug: platform
                .hotplug
                .as_ref()
                .map_or_else(Default::default, |hotplug| hotplug.state()),
            hotplug_slots: platform.slots,
            generation_id: platform.generation_id,
        }
    }

    /// Places of the PCI bus that the guest's tables tell of.
    pub fn hotplug_slots(&self) -> usize {
        self.hotplug_slots.min(devices::MOST_ON_PCI)
    }

    pub fn restore(self, platform: &mut Platform) {
        platform.generation_id = self.generation_id;
        platform.power.restore(self.power_events);
        if let (Some(keyboard), Some(state)) = (&platform.keyboard, self.keyboard) {
            keyboard.restore(state);
        }
        if let Some(hotplug) = &platform.hotplug {
            hotplug.restore(self.hotplug);
        }
        // Last: it interrupts for what is pending.
        platform.serial.restore(self.serial);
    }
}

/// A snapshot whose files are open.
pub struct Saved {
    pub snapshot: Snapshot,
    pub config: VmConfig,
    /// The guest's clocks have not stood still since.
    pub clock_realtime: bool,
    memory: File,
}

/// What clones of a VM go on from: its state, and its memory, which they share until they write to it.
pub struct Template(Saved);

impl Template {
    pub(crate) fn new(snapshot: Snapshot, config: VmConfig, memory: File) -> Self {
        Self(Saved {
            snapshot,
            config,
            memory,
            clock_realtime: false,
        })
    }

    /// The descriptor that a process needs for it.
    pub fn descriptor(&self) -> RawFd {
        self.0.memory.as_raw_fd()
    }

    pub(crate) fn into_saved(self) -> Saved {
        self.0
    }
}

impl Saved {
    /// Open the files of a snapshot, and see that they belong together.
    pub fn open(state: &Path, memory: &Path) -> Result<Self, Error> {
        let mut tries = 0;
        loop {
            let before = identity(state);
            let (header, mut snapshot, config) = read(state)?;
            if snapshot.lineage.diff.is_some() {
                return Err(husk_snapshot::Error::IsDiff(state.into()).into());
            }
            let file = husk_snapshot::open_memory_of(&header, memory, snapshot.memory_size);
            // A newer snapshot may have come into its place meanwhile, and its memory is not this state's.
            tries += 1;
            if identity(state) == before || tries >= TRIES {
                snapshot.base = Base::of(snapshot.lineage.id(), [state, memory]);
                return Ok(Self {
                    snapshot,
                    config,
                    clock_realtime: false,
                    memory: file?,
                });
            }
        }
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

/// How often a snapshot that is being replaced is looked at anew.
const TRIES: u32 = 8;

/// Another one with each file that comes into a place.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let about = std::fs::metadata(path).ok()?;
    Some(husk_snapshot::identity(&about))
}

/// The state and the configuration, as far as they can be checked without a VM.
fn read(path: &Path) -> Result<(Header, Snapshot, VmConfig), Error> {
    let (header, mut snapshot): (_, Snapshot) = husk_snapshot::read_state(path)?;
    let config = VmConfig::from_saved(snapshot.config.take());
    let config = config.map_err(|source| husk_snapshot::Error::Content {
        path: path.into(),
        source,
    })?;
    if !snapshot.lineage.is_sound(snapshot.memory_size) {
        return Err(husk_snapshot::Error::Lineage(path.into()).into());
    }
    check(&config)?;
    config.validate_parts()?;
    let cpus = config.machine_config.vcpu_count as usize;
    if snapshot.vcpus.len() != cpus {
        return Err(Error::State(
            "the snapshot's vCPUs are not those of its configuration",
        ));
    }
    Ok((header, snapshot, config))
}

/// The version of snapshots that are made.
pub const SNAPSHOT_VERSION: u32 = husk_snapshot::VERSION;

/// The version of a state file that is whole.
pub fn snapshot_version(path: &Path) -> Result<u32, Error> {
    let (header, _) = husk_snapshot::read_parts(path)?;
    Ok(header.version)
}

/// What is in a state file, in words.
pub fn describe_snapshot(path: &Path) -> Result<String, Error> {
    let (header, snapshot, config) = read(path)?;
    let lineage = &snapshot.lineage;
    let lineage = match (&lineage.diff, lineage.id()) {
        (Some(diff), _) => {
            let pages = diff.pages(snapshot.memory_size).unwrap_or_default();
            let (id, count) = (&lineage.id, pages.count());
            format!(
                "a diff of {} called {id}, with {count} pages\n",
                diff.parent
            )
        }
        (None, Some(id)) => format!("complete, called {id}\n"),
        (None, None) => String::new(),
    };
    Ok(format!(
        "a snapshot of version {}, by husk {}\n{} vCPUs, {} MiB of memory, booted from {}\n{lineage}",
        header.version,
        header.husk,
        snapshot.vcpus.len(),
        snapshot.memory_size >> 20,
        config.boot_source.kernel_image_path.display(),
    ))
}

/// What cannot be kept yet is said before anything is written.
pub fn check(config: &VmConfig) -> Result<(), Error> {
    // What its server has begun, nobody else can tell.
    match config.drives.iter().any(|drive| drive.socket.is_some()) {
        true => Err(Error::NoSnapshot("vhost-user drives")),
        false => Ok(()),
    }
}

/// A name for a new snapshot, unlike all others.
pub fn new_id() -> Result<String, Error> {
    let mut bytes = [0; 16];
    crate::fill_random(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// Write these pages of guest memory, beside its place.
pub fn write_pages(memory: &GuestMemory, pages: &Pages, path: &Path) -> Result<MemoryFile, Error> {
    let file = MemoryFile::create_direct(path, memory.size())?;
    memory.each_of(pages, |offset, bytes| {
        file.write(offset, bytes).map_err(Error::from)
    })?;
    Ok(file)
}

/// Write guest memory, beside its place.
pub fn write_memory(memory: &GuestMemory, path: &Path) -> Result<MemoryFile, Error> {
    let file = MemoryFile::create(path, memory.size())?;
    memory.each_used(|offset, bytes| file.write(offset, bytes).map_err(Error::from))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(name: &str) -> std::path::PathBuf {
        let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/snapshots");
        resources.join(name)
    }

    /// Of each version that there was, one that was made then. It must be read for ever.
    #[test]
    fn snapshots_of_all_versions_are_understood() {
        let said = describe_snapshot(&resource("version-1.state")).unwrap();
        assert_eq!(
            said,
            "a snapshot of version 1, by husk 0.1.0\n1 vCPUs, 128 MiB of memory, booted from vmlinux\n"
        );
    }

    #[test]
    fn a_state_that_contradicts_itself_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (_, body) = husk_snapshot::read_parts(&resource("version-1.state")).unwrap();
        let refused = |change: fn(&mut serde_json::Value)| {
            let mut state: serde_json::Value = serde_json::from_slice(&body).unwrap();
            change(&mut state);
            husk_snapshot::write_state(&path, &state).unwrap();
            crate::error::chain(&describe_snapshot(&path).unwrap_err())
        };
        type Case = (fn(&mut serde_json::Value), &'static str);
        let cases: [Case; 5] = [
            (|s| s["vcpus"] = serde_json::json!([]), "vCPUs"),
            (|s| s["vcpus"][0]["regs"] = "0".into(), "hexadecimal"),
            (
                |s| s["config"]["machine-config"]["vcpu_count"] = 1000.into(),
                "1000",
            ),
            (
                |s| {
                    let drive = serde_json::json!({ "drive_id": "d", "socket": "/s", "is_root_device": false });
                    s["config"]["drives"] = serde_json::json!([drive]);
                },
                "vhost-user",
            ),
            (
                |s| drop(s.as_object_mut().unwrap().remove("vm")),
                "missing field `vm`",
            ),
        ];
        for (change, word) in cases {
            let said = refused(change);
            assert!(said.contains(word), "{word}: {said}");
        }
    }
}
