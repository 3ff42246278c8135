//! What a VM is between two instructions of its guest, to be kept and gone on from.

use crate::changes::Base;
use crate::devices::{self, Devices};
use crate::error::{Error, printable};
use crate::memory::GuestMemory;
use crate::platform::Platform;
use crate::this_host::this_host;
use crate::working_set;
use husk_config::{Drive, HugePages, LoadSnapshot, MemBackendType, VmConfig};
use husk_devices::{keyboard, pci_hotplug, serial};
use husk_kvm::{VcpuState, VmState};
use husk_snapshot::{Header, Lineage, MemoryFile, Pages};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

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
    /// Where it was made ([`this_host`]).
    #[serde(default)]
    host: Option<String>,
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
            host: this_host(),
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
    /// It was made on this host, which gave what it needs.
    pub is_of_this_host: bool,
    memory: Source,
}

/// Where memory comes from.
enum Source {
    /// It is mapped, or copied into huge pages.
    File(File),
    /// The same, and it is copied even where it could be mapped.
    Copied(File),
    /// By who listens there.
    Handler(PathBuf),
}

impl Saved {
    /// What a VM of this host is, with its memory in a file that stays as it is.
    pub fn of_template(snapshot: Snapshot, config: VmConfig, memory: File) -> Self {
        Self {
            snapshot,
            config,
            memory: Source::File(memory),
            clock_realtime: false,
            is_of_this_host: true,
        }
    }

    /// The memory file's.
    pub fn descriptor(&self) -> Option<RawFd> {
        match &self.memory {
            Source::File(file) | Source::Copied(file) => Some(file.as_raw_fd()),
            Source::Handler(_) => None,
        }
    }

    /// Open the files of a snapshot, and see that they belong together. What is to be read ahead, is from now on.
    pub fn open(load: &LoadSnapshot) -> Result<Self, Error> {
        let (kind, memory) = load.memory().map_err(Error::Unsupported)?;
        let state = &load.snapshot_path;
        let mut tries = 0;
        loop {
            let before = identity(state);
            let (header, mut snapshot, mut config) = read(state)?;
            if snapshot.lineage.diff.is_some() {
                return Err(husk_snapshot::Error::IsDiff(state.into()).into());
            }
            let size = snapshot.memory_size;
            let file = match kind {
                MemBackendType::File => Some(husk_snapshot::open_memory_of(&header, memory, size)),
                MemBackendType::Uffd => None,
            };
            // A newer snapshot may have come into its place meanwhile, and its memory is not this state's.
            tries += 1;
            if identity(state) == before || tries >= TRIES {
                let behind = file.as_ref().map_or(state.as_path(), |_| memory);
                snapshot.base = Base::of(snapshot.lineage.id(), [state, behind]);
                let memory = match file.transpose()? {
                    Some(file) => of_file(load, &mut config, file, size)?,
                    None => by_handler(load, &mut config, memory)?,
                };
                return Ok(Self {
                    is_of_this_host: snapshot.host.is_some() && snapshot.host == this_host(),
                    snapshot,
                    config,
                    clock_realtime: load.clock_realtime,
                    memory,
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
            match &self.memory {
                Source::Handler(path) => return Ok(memory.fill_by(path)?),
                Source::Copied(file) => memory.copy_data(file, offset, range.size, range.start)?,
                Source::File(file) => memory.place_file(file, offset, range.size, range.start)?,
            }
            offset += range.size;
        }
        if let Source::File(file) = &self.memory {
            memory.set_source(file);
        }
        Ok(())
    }
}

/// Memory of a file of `size` bytes, with the pages that `load` wants.
fn of_file(
    load: &LoadSnapshot,
    config: &mut VmConfig,
    file: File,
    size: u64,
) -> Result<Source, Error> {
    adapt(load, config);
    let pages = config.machine_config.huge_pages;
    let copied = load.huge_pages == Some(HugePages::Transparent) || pages == HugePages::TwoMiB;
    if copied && (load.prefetch.is_some() || load.record_working_set.is_some()) {
        return Err(Error::Unsupported("a working set with huge_pages"));
    }
    if let Some(path) = &load.prefetch {
        working_set::read_ahead(path, &file, size)?;
    }
    Ok(match copied {
        true => Source::Copied(file),
        false => Source::File(file),
    })
}

/// Memory that who listens at `socket` fills.
fn by_handler(load: &LoadSnapshot, config: &mut VmConfig, socket: &Path) -> Result<Source, Error> {
    adapt(load, config);
    match config.shares_memory() {
        true => Err(Error::Unsupported(
            "a mem_backend of type Uffd for a VM that has drives with a socket",
        )),
        false => Ok(Source::Handler(socket.into())),
    }
}

fn adapt(load: &LoadSnapshot, config: &mut VmConfig) {
    let machine = &mut config.machine_config;
    machine.track_dirty_pages |= load.track_dirty_pages;
    machine.huge_pages = load.huge_pages.unwrap_or(machine.huge_pages);
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
    let kernel = config.boot_source.kernel_image_path.display();
    Ok(format!(
        "a snapshot of version {}, by husk {}\n{} vCPUs, {} MiB of memory, booted from {}\n{lineage}",
        header.version,
        printable(header.husk),
        snapshot.vcpus.len(),
        snapshot.memory_size >> 20,
        printable(kernel.to_string()),
    ))
}

/// What cannot be kept yet is said before anything is written.
pub fn check(config: &VmConfig) -> Result<(), Error> {
    let any = |what: fn(&Drive) -> bool| config.drives.iter().any(what);
    // What its server has begun, nobody else can tell.
    if any(|drive| drive.socket.is_some()) {
        return Err(Error::NoSnapshot("vhost-user drives"));
    }
    // What the guest wrote is gone with this process.
    match any(|drive| drive.overlay.is_some()) {
        true => Err(Error::NoSnapshot("drives with overlays")),
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
    let write = |pages: &Pages| {
        memory.each_of(pages, |offset, bytes| {
            file.write(offset, bytes).map_err(Error::from)
        })
    };
    if pages.count() < MANY {
        write(pages)?;
        return Ok(file);
    }
    // One copies while the disk writes for the other.
    let (first, second) = pages.halves();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        let other = thread.spawn_scoped(scope, || write(&second));
        write(&first)?;
        match other {
            Ok(other) => other
                .join()
                .unwrap_or(Err(Error::State("a thread that writes memory failed"))),
            Err(_) => write(&second),
        }
    })?;
    Ok(file)
}

/// From so many pages on a second thread is worth its start.
const MANY: u64 = 512;

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
