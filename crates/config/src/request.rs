//! What may be asked of the monitor, and what it answers.

use crate::{
    Balloon, BootSource, CpuConfig, CpuTemplate, Drive, DriveOverride, Entropy, Error, Fork,
    HugePages, Logger, MachineConfig, Metrics, MmdsConfig, NetworkInterface, NetworkOverride,
    RateLimiter, Serial, VmConfig, Vsock, VsockOverride,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What may be asked of the monitor. One state machine in `husk-vmm` answers all of them.
#[derive(Clone, Debug, PartialEq)]
pub enum VmmRequest {
    /// Replace the configuration. Before boot only.
    Configure(Box<VmConfig>),
    /// Set one part of the configuration, or add it. Before boot only, but for drives and network interfaces: those are
    /// plugged into a running VM.
    Put(Box<Part>),
    /// Change processors and memory. Before boot only.
    PatchMachine(MachineConfigUpdate),
    /// Tell something.
    Get(Query),
    /// Build the VM and let it run.
    Boot,
    /// Press the ACPI power button: the guest decides what to do.
    PressPowerButton,
    /// Press Ctrl-Alt-Del on the guest's keyboard, or, in a guest without one, the power button.
    SendCtrlAltDel,
    /// Let the guest stand still.
    Pause,
    /// Let it run again.
    Resume,
    /// Change a device, by its name, while the VM runs.
    Update(String, DeviceUpdate),
    /// Plug a device into the PCI bus of a VM that runs.
    Attach(Box<NewDevice>),
    /// Ask the guest to let the device of this name go; it is there until the guest has done so.
    Detach(String),
    /// Replace the guest's metadata.
    PutMmds(serde_json::Value),
    /// Merge this into the guest's metadata (RFC 7396).
    PatchMmds(serde_json::Value),
    /// Write the metrics now.
    FlushMetrics,
    /// Keep all of a VM that is paused.
    CreateSnapshot(Box<CreateSnapshot>),
    /// Go on from a snapshot instead of booting.
    LoadSnapshot(Box<LoadSnapshot>),
    /// Start clones of the VM.
    Fork(Box<Fork>),
    /// Let go of a template that was kept.
    DropTemplate(String),
    /// End the VM now, whatever the guest is doing.
    Stop,
}

/// A snapshot that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Where the state goes. A file that is there is replaced when the new one is whole.
    pub snapshot_path: PathBuf,
    /// Where guest memory goes, likewise.
    pub mem_file_path: PathBuf,
    /// What is in it.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
}

/// What is in a snapshot's memory file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum SnapshotType {
    /// All of memory that is not zero.
    #[default]
    Full,
    /// What has changed since the last one.
    Diff,
}

/// A snapshot that is to be gone on from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The state.
    pub snapshot_path: PathBuf,
    /// Where memory comes from.
    pub mem_backend: Option<MemBackend>,
    /// The memory file; the old name of a `mem_backend` that is one.
    pub mem_file_path: Option<PathBuf>,
    /// KVM notes which pages of its memory the guest writes.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    /// The guest runs at once; otherwise it is paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// The guest's clocks go on as if they had never stood still, by the host's wall clock; otherwise from where they were.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages of the host behind memory, instead of those that the guest had. Memory is copied into huge ones, and mapped otherwise.
    pub huge_pages: Option<HugePages>,
    /// A file that the guest's working set is written to: the pages of a memory file that it touches in its first seconds.
    pub record_working_set: Option<PathBuf>,
    /// Such a file: its pages are read ahead of the guest.
    pub prefetch: Option<PathBuf>,
    /// What network interfaces are connected with, where that is not what it was.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Files of disks, where they are not what they were.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// The vsock device's socket, where it is not what it was.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
}

/// Where the memory of a snapshot comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// A file, or a handler of page faults.
    pub backend_type: MemBackendType,
    /// The file, or the handler's socket.
    pub backend_path: PathBuf,
}

/// Who has the memory of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum MemBackendType {
    /// A file.
    File,
    /// Another process, by userfaultfd.
    Uffd,
}

impl LoadSnapshot {
    /// Where memory comes from; what is wrong otherwise.
    pub fn memory(&self) -> Result<(MemBackendType, &std::path::Path), &'static str> {
        let (kind, path) = match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), None) => (backend.backend_type, &backend.backend_path),
            (None, Some(path)) => (MemBackendType::File, path),
            (None, None) => return Err("a snapshot without mem_backend or mem_file_path"),
            (Some(_), Some(_)) => return Err("mem_backend together with mem_file_path"),
        };
        let handled = kind == MemBackendType::Uffd;
        match (&self.record_working_set, &self.prefetch) {
            (Some(_), _) if handled => Err("record_working_set with a mem_backend of type Uffd"),
            (_, Some(_)) if handled => Err("prefetch with a mem_backend of type Uffd"),
            _ => Ok((kind, path)),
        }
    }
}

/// A part of the configuration that is set at once.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// What is booted.
    BootSource(BootSource),
    /// Processors and memory.
    MachineConfig(MachineConfig),
    /// Changes of the processors that the guest sees.
    CpuConfig(CpuConfig),
    /// A disk; it replaces the one of the same name.
    Drive(Drive),
    /// A network interface; it replaces the one of the same name.
    NetworkInterface(NetworkInterface),
    /// Sockets between host and guest.
    Vsock(Vsock),
    /// Memory that the guest gives back.
    Balloon(Balloon),
    /// A source of random bytes.
    Entropy(Entropy),
    /// Where the console's output goes.
    Serial(Serial),
    /// How the guest reaches its metadata.
    MmdsConfig(MmdsConfig),
    /// Log messages.
    Logger(Logger),
    /// Where metrics go.
    Metrics(Metrics),
}

impl Part {
    /// Set this part in `config`. Nothing is checked.
    pub fn set(self, config: &mut VmConfig) {
        match self {
            Part::BootSource(part) => config.boot_source = part,
            Part::MachineConfig(part) => config.machine_config = part,
            Part::CpuConfig(part) => config.cpu_config = Some(part),
            Part::Drive(part) => {
                let same = |other: &Drive| other.drive_id == part.drive_id;
                put(&mut config.drives, part.clone(), same);
            }
            Part::NetworkInterface(part) => {
                let same = |other: &NetworkInterface| other.iface_id == part.iface_id;
                put(&mut config.network_interfaces, part.clone(), same);
            }
            Part::Vsock(part) => config.vsock = Some(part),
            Part::Balloon(part) => config.balloon = Some(part),
            Part::Entropy(part) => config.entropy = Some(part),
            Part::Serial(part) => config.serial = Some(part),
            Part::Logger(part) => config.logger = Some(part),
            Part::Metrics(part) => config.metrics = Some(part),
            Part::MmdsConfig(part) => config.mmds_config = Some(part),
        }
    }
}

fn put<T>(list: &mut Vec<T>, new: T, same: impl Fn(&T) -> bool) {
    match list.iter_mut().find(|other| same(other)) {
        Some(old) => *old = new,
        None => list.push(new),
    }
}

/// A device that comes while the VM runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewDevice {
    /// A disk.
    Drive(Drive),
    /// A network interface.
    Network(NetworkInterface),
}

impl NewDevice {
    /// Its name.
    pub fn id(&self) -> &str {
        match self {
            NewDevice::Drive(drive) => &drive.drive_id,
            NewDevice::Network(interface) => &interface.iface_id,
        }
    }
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// The VM's name and state, and the monitor's version.
    Info,
    /// The version of the API, and the monitor's.
    Version,
    /// The whole configuration.
    Config,
    /// Processors and memory.
    MachineConfig,
    /// The balloon's configuration.
    Balloon,
    /// What the guest says of its memory.
    BalloonStatistics,
    /// How far the search for free pages has come.
    BalloonHinting,
    /// The guest's metadata.
    Mmds,
    /// All counters, as Prometheus reads them.
    Metrics,
    /// When each phase of the boot was reached.
    BootTimeline,
}

/// What the monitor answers to a request that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is done, and there is nothing to tell.
    Done,
    /// What was asked for.
    Value(serde_json::Value),
    /// The same, as plain text.
    Text(String),
}

/// A change of processors and memory. What is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// 1 to [`crate::MAX_VCPUS`].
    pub vcpu_count: Option<u32>,
    /// At least [`crate::MIN_MEMORY_MIB`], in MiB.
    pub mem_size_mib: Option<u64>,
    /// Each core has two threads.
    pub smt: Option<bool>,
    /// The processor that the guest sees.
    pub cpu_template: Option<CpuTemplate>,
    /// KVM notes which pages of its memory the guest writes.
    pub track_dirty_pages: Option<bool>,
    /// The host's pages behind the guest's memory.
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigUpdate {
    /// Nothing is to change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Change `config`. Nothing is checked.
    pub fn apply(self, config: &mut MachineConfig) {
        let Self {
            vcpu_count,
            mem_size_mib,
            smt,
            cpu_template,
            track_dirty_pages,
            huge_pages,
        } = self;
        set(&mut config.vcpu_count, vcpu_count);
        set(&mut config.mem_size_mib, mem_size_mib);
        set(&mut config.smt, smt);
        set(&mut config.cpu_template, cpu_template);
        set(&mut config.track_dirty_pages, track_dirty_pages);
        set(&mut config.huge_pages, huge_pages);
    }
}

fn set<T>(field: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *field = new;
    }
}

/// What may be changed of a device while the VM runs. Absent fields stay as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceUpdate {
    /// A disk.
    Disk {
        /// Go on with this file or block device; the same path again, or none, reads its size anew.
        path: Option<PathBuf>,
        /// Limits, from now on.
        rate_limiter: Option<RateLimiter>,
    },
    /// A network interface.
    Network {
        /// Limits on what the guest receives, from now on.
        rx_rate_limiter: Option<RateLimiter>,
        /// Limits on what the guest sends, from now on.
        tx_rate_limiter: Option<RateLimiter>,
        /// The cable is plugged in, or pulled out.
        link_up: Option<bool>,
    },
    /// The entropy device.
    Entropy {
        /// Limits, from now on.
        rate_limiter: RateLimiter,
    },
    /// The balloon.
    Balloon {
        /// Memory that the guest is to give back, in MiB.
        amount_mib: Option<u32>,
        /// How often the guest reports statistics, in seconds.
        stats_polling_interval_s: Option<u16>,
        /// Search for pages that the guest does not use, or end the search.
        hinting: Option<Hinting>,
    },
}

impl DeviceUpdate {
    /// Note in `config` what changes with the device called `id`. An error changes nothing, and names what is wrong.
    pub fn apply(&self, id: &str, config: &mut VmConfig) -> Result<(), Error> {
        let missing = || Error::NoDevice(id.into());
        match self {
            DeviceUpdate::Disk { path, rate_limiter } => {
                let mut drives = config.drives.iter_mut();
                let drive = drives.find(|drive| drive.drive_id == id);
                let drive = drive.ok_or_else(missing)?;
                drive.check_update(path.is_some(), rate_limiter.is_some())?;
                if path.is_some() {
                    drive.path_on_host.clone_from(path);
                }
                limit(&mut drive.rate_limiter, *rate_limiter);
                drive.validate()
            }
            DeviceUpdate::Network {
                rx_rate_limiter,
                tx_rate_limiter,
                ..
            } => {
                let mut interfaces = config.network_interfaces.iter_mut();
                let interface = interfaces.find(|interface| interface.iface_id == id);
                let interface = interface.ok_or_else(missing)?;
                limit(&mut interface.rx_rate_limiter, *rx_rate_limiter);
                limit(&mut interface.tx_rate_limiter, *tx_rate_limiter);
                Ok(())
            }
            DeviceUpdate::Entropy { rate_limiter } => {
                let entropy = config.entropy.as_mut().ok_or_else(missing)?;
                limit(&mut entropy.rate_limiter, Some(*rate_limiter));
                Ok(())
            }
            DeviceUpdate::Balloon {
                amount_mib,
                stats_polling_interval_s,
                hinting,
            } => {
                let memory = config.machine_config.mem_size_mib;
                let balloon = config.balloon.as_mut().ok_or_else(missing)?;
                balloon.check_update(*stats_polling_interval_s, hinting.is_some())?;
                set(&mut balloon.amount_mib, *amount_mib);
                set(
                    &mut balloon.stats_polling_interval_s,
                    *stats_polling_interval_s,
                );
                balloon.validate(memory)
            }
        }
    }
}

/// Absent buckets stay; one that limits nothing is taken out.
fn limit(field: &mut Option<RateLimiter>, new: Option<RateLimiter>) {
    let Some(new) = new else { return };
    let mut limits = field.unwrap_or_default();
    for (bucket, new) in [
        (&mut limits.bandwidth, new.bandwidth),
        (&mut limits.ops, new.ops),
    ] {
        if let Some(new) = new {
            *bucket = Some(new).filter(|b| b.size != 0 && b.refill_time != 0);
        }
    }
    *field = Some(limits).filter(|limits| *limits != RateLimiter::default());
}

/// What the search for pages that the guest does not use is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hinting {
    /// Begin a search.
    Start {
        /// When the guest has told all, let it use the pages again at once; else only at [`Hinting::Stop`].
        acknowledge_on_stop: bool,
    },
    /// Let the guest use the pages again.
    Stop,
}

/// What has happened to a VM, for those who watch it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The guest runs.
    Booted,
    /// The guest stands still.
    Paused,
    /// It runs again.
    Resumed,
    /// A driver has reset its device, or the device needs it to.
    DeviceReset {
        /// The device's name.
        device: String,
    },
    /// The guest's kernel has said that it panicked.
    Panicked,
    /// The guest rebooted, and starts again in the same process.
    Restarted,
    /// The VM has ended.
    Exited {
        /// How, in words.
        reason: String,
        /// The exit status that the monitor's process is about to have.
        status: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenBucket;

    fn bucket(size: u64) -> Option<TokenBucket> {
        Some(TokenBucket {
            size,
            one_time_burst: None,
            refill_time: 100,
        })
    }

    #[test]
    fn a_part_replaces_what_has_its_name() {
        let mut config = VmConfig::default();
        for path in ["/a", "/b"] {
            Part::Drive(Drive::new("rootfs", path)).set(&mut config);
        }
        Part::Drive(Drive::new("data", "/c")).set(&mut config);
        let paths: Vec<_> = config.drives.iter().map(Drive::path).collect();
        assert_eq!(paths, ["/b", "/c"].map(std::path::Path::new));
    }

    #[test]
    fn an_update_keeps_the_buckets_that_it_does_not_name() {
        let mut config = VmConfig::default();
        Part::Drive(Drive::new("d", "/a")).set(&mut config);
        let mut update = |bandwidth, ops| {
            let change = DeviceUpdate::Disk {
                path: None,
                rate_limiter: Some(RateLimiter { bandwidth, ops }),
            };
            change.apply("d", &mut config).unwrap();
            config.drives[0].rate_limiter
        };
        let both = update(bucket(1), bucket(2)).unwrap();
        assert_eq!((both.bandwidth, both.ops), (bucket(1), bucket(2)));
        let ops = update(None, bucket(3)).unwrap();
        assert_eq!((ops.bandwidth, ops.ops), (bucket(1), bucket(3)));
        assert_eq!(update(bucket(0), None).unwrap().bandwidth, None);
        assert_eq!(update(None, bucket(0)), None);
    }

    #[test]
    fn a_drive_that_is_served_has_no_file_and_no_limits() {
        let mut config = VmConfig::default();
        assert!(!config.shares_memory());
        let mut drive = Drive::new("d", "");
        (drive.path_on_host, drive.socket) = (None, Some("/run/disk".into()));
        Part::Drive(drive).set(&mut config);
        assert!(config.shares_memory());
        let mut update = |path: Option<PathBuf>, rate_limiter| {
            let change = DeviceUpdate::Disk { path, rate_limiter };
            change.apply("d", &mut config).map_err(|e| e.to_string())
        };
        update(None, None).unwrap();
        let said = update(Some("/img".into()), None).unwrap_err();
        assert!(said.contains("path_on_host"), "{said}");
        let said = update(None, Some(RateLimiter::default())).unwrap_err();
        assert!(said.contains("rate_limiter"), "{said}");
        assert_eq!(config.drives[0].path_on_host, None);
    }

    #[test]
    fn an_update_of_nothing_is_refused_with_the_name() {
        let change = DeviceUpdate::Disk {
            path: None,
            rate_limiter: None,
        };
        let error = change.apply("nosuch", &mut VmConfig::default());
        assert!(error.unwrap_err().to_string().contains("nosuch"));
    }
}
