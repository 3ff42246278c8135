//! What a VM is to be, and what may be asked of the monitor: the types that the command line, a configuration
//! file and the REST socket fill.
//!
//! Field names and shapes follow Firecracker's API, so that its users' files and programs need no change.
//!
//! **Architecture Invariant:** a leaf. No KVM, no file is opened here but the configuration file itself, and
//! nothing here has a second copy elsewhere: a device or a boot reads what it needs from [`VmConfig`].
#![forbid(unsafe_code)]

mod cpu;
mod devices;
mod error;
mod fork;
mod logging;
mod machine;
mod mmds;
mod overrides;
mod request;
mod size;

pub use cpu::{
    Bitmap, CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, KvmCapability, MsrModifier,
    OnlyOnAarch64, RegisterModifier,
};
pub use devices::{
    Balloon, CacheType, Drive, Entropy, Forward, IoEngine, MAX_QUEUES, NetworkInterface, Overlay,
    RateLimiter, Serial, TokenBucket, UserNetwork, Vsock,
};
pub use error::Error;
pub use fork::{CLONE_NUMBER, Fork, MAX_CLONES};
pub use logging::{LogLevel, Logger, Metrics};
pub use machine::HugePages;
pub use mmds::{MmdsConfig, MmdsVersion};
pub use overrides::{DriveOverride, NetworkOverride, VsockOverride};
pub use request::{
    Answer, CreateSnapshot, DeviceUpdate, Event, Hinting, LoadSnapshot, MachineConfigUpdate,
    MemBackend, MemBackendType, NewDevice, Part, Query, SnapshotType, VmmRequest,
};
pub use size::parse_mib;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use std::path::{Path, PathBuf};

/// Most vCPUs that a VM may have.
pub const MAX_VCPUS: u32 = 64;
/// Least memory that a VM may have, in MiB.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Longest kernel command line in bytes: x86 Linux takes 2048 with the final NUL.
pub const MAX_BOOT_ARGS: usize = 2047;
/// Largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Kernel parameters that Husk gives when the user gives none of his own, and in front of those that he adds.
///
/// - `console=ttyS0`: the console is the 16550A.
/// - `reboot=panic_warm panic=-1`: a panic restarts at once, marked as warm, so that Husk tells it from an
///   orderly reboot.
/// - `pci=off 8250.nr_uarts=1 i8042.noaux i8042.nokbd …`: do not search for hardware that is not there.
/// - `no_timer_check`, `tsc=reliable`: the timer and the TSC are KVM's; checking them takes time and finds
///   only the host's load.
/// - `cryptomgr.notests`: kernels with their cryptography built in try all of it when they boot, which is half of the boot of
///   Debian's cloud kernel. With `fips=1` Linux tests nevertheless.
pub const DEFAULT_BOOT_ARGS: &str = "console=ttyS0 reboot=panic_warm panic=-1 pci=off 8250.nr_uarts=1 \
     i8042.noaux i8042.nokbd i8042.dumbkbd no_timer_check tsc=reliable \
     cryptomgr.notests";

/// [`DEFAULT_BOOT_ARGS`], with PCI left on for a VM that has it.
pub fn default_boot_args(pci: bool) -> String {
    match pci {
        true => DEFAULT_BOOT_ARGS.replace(" pci=off", ""),
        false => DEFAULT_BOOT_ARGS.to_owned(),
    }
}

/// All of a VM's configuration. Its JSON form is the configuration file and the body of `GET /vm/config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// What is booted.
    #[serde(default, deserialize_with = "object")]
    pub boot_source: BootSource,
    /// Processors and memory.
    #[serde(default, deserialize_with = "object")]
    pub machine_config: MachineConfig,
    /// Changes of the processors that the guest sees; goes before a `cpu_template` of the machine's.
    #[serde(default)]
    pub cpu_config: Option<CpuConfig>,
    /// What a reboot by the guest does.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_reboot: OnReboot,
    /// Disks.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Network interfaces.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Sockets between host and guest.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// A source of random bytes.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// Memory that the guest gives back.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// Where the console's output goes, when not to stdout.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// The metadata service.
    #[serde(default)]
    pub mmds_config: Option<MmdsConfig>,
    /// Devices are on PCI instead of MMIO.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pci: bool,
    /// Log messages.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// Metrics.
    #[serde(default)]
    pub metrics: Option<Metrics>,
    /// There is a keyboard, for Ctrl-Alt-Del alone. Looking for it takes the guest's kernel a while.
    #[serde(default, skip_serializing_if = "is_default")]
    pub keyboard: bool,
    /// There is Firecracker's boot timer: the guest says by it that it is up.
    #[serde(default, skip_serializing_if = "is_default")]
    pub boot_timer: bool,
}

/// The kernel, its initrd and its command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF vmlinux or a bzImage.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The whole kernel command line; [`DEFAULT_BOOT_ARGS`] when absent.
    #[serde(default)]
    pub boot_args: Option<String>,
    /// How the kernel is entered.
    #[serde(default, skip_serializing_if = "is_default")]
    pub boot_protocol: BootProtocol,
}

impl BootSource {
    /// The kernel command line that the guest gets.
    pub fn command_line(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
    }
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH for an ELF file that has its note, else the 64-bit Linux boot protocol.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux,
    /// PVH: 32-bit entry, `hvm_start_info` in EBX.
    Pvh,
}

/// Processors and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// 1 to [`MAX_VCPUS`].
    pub vcpu_count: u32,
    /// At least [`MIN_MEMORY_MIB`], in MiB; even with huge pages of 2 MiB.
    pub mem_size_mib: u64,
    /// Each core has two threads: `vcpu_count` is then 1 or even.
    #[serde(default)]
    pub smt: bool,
    /// The processor that the guest sees.
    #[serde(default, skip_serializing_if = "CpuTemplate::is_none")]
    pub cpu_template: CpuTemplate,
    /// KVM notes which pages of its memory the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The host's pages behind the guest's memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 256,
            smt: false,
            cpu_template: CpuTemplate::None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

impl MachineConfig {
    /// Threads of each core. A single vCPU is a core of its own.
    pub fn threads_per_core(&self) -> u32 {
        if self.smt && self.vcpu_count > 1 {
            2
        } else {
            1
        }
    }

    fn validate_options(&self) -> Result<(), Error> {
        if self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2) {
            return Err(Error::OddVcpus(self.vcpu_count));
        }
        if self.huge_pages == HugePages::TwoMiB && !self.mem_size_mib.is_multiple_of(2) {
            return Err(Error::OddMemory(self.mem_size_mib));
        }
        Ok(())
    }
}

/// What a reboot by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// The VM ends, as at a power-off.
    #[default]
    Exit,
    /// The VM boots again from its configuration, in the same process.
    Restart,
}

impl VmConfig {
    /// Read a JSON configuration file.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = read_file(path)?;
        Self::from_json(&text).map_err(|source| Error::Json {
            path: path.into(),
            source,
        })
    }

    /// Read a configuration file as Firecracker does: what it does not know at the top is ignored, `cpu-config` is the path of a
    /// file, and what the file does not say is as in `base`.
    pub fn from_firecracker_file(path: &Path, base: Self) -> Result<Self, Error> {
        let json = |path: &Path, source| Error::Json {
            path: path.into(),
            source,
        };
        let text = read_file(path)?;
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(text.as_bytes()).map_err(|e| json(path, e))?;
        let given = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
        let has_machine = given("machine-config");
        let mut known = serde_json::Map::new();
        for (name, value) in &fields {
            let value = match (name.as_str(), value) {
                ("cpu-config", serde_json::Value::String(file)) => {
                    let file = Path::new(file);
                    let text = read_file(file)?;
                    serde_json::from_slice(text.as_bytes()).map_err(|e| json(file, e))?
                }
                (_, value) => value.clone(),
            };
            if FIRECRACKER_FIELDS.contains(&name.as_str()) && !value.is_null() {
                known.insert(name.clone(), value);
            }
        }
        let mut config = Self::from_saved(known.into()).map_err(|e| json(path, e))?;
        if !has_machine {
            config.machine_config = base.machine_config;
        }
        Ok(config)
    }

    /// Parse JSON. Only an object is a configuration: serde alone would take a list for one, by the order of fields.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        match serde_json::from_slice(text.as_bytes()) {
            Ok(_) if !text.trim_start().starts_with('{') => {
                Err(serde::de::Error::custom("it is not a JSON object {…}"))
            }
            parsed => parsed,
        }
    }

    /// Check every value that can be judged without looking at the host.
    pub fn validate(&self) -> Result<(), Error> {
        if self.boot_source.kernel_image_path.as_os_str().is_empty() {
            return Err(Error::NoKernel);
        }
        self.validate_parts()
    }

    /// The same for a configuration that is not complete yet: it may lack a kernel.
    pub fn validate_parts(&self) -> Result<(), Error> {
        let cpus = self.machine_config.vcpu_count;
        if !(1..=MAX_VCPUS).contains(&cpus) {
            return Err(Error::Vcpus(cpus));
        }
        let mib = self.machine_config.mem_size_mib;
        if mib < MIN_MEMORY_MIB {
            return Err(Error::MemoryTooSmall(mib));
        }
        self.machine_config.validate_options()?;
        let args = self.boot_source.command_line();
        if args.len() > MAX_BOOT_ARGS {
            return Err(Error::BootArgsTooLong(args.len()));
        }
        if let Some(at) = args.find('\0') {
            return Err(Error::BootArgsNul(at));
        }
        self.validate_devices()
    }

    /// The guest's memory must be one that other processes can map: they serve a device of it.
    pub fn shares_memory(&self) -> bool {
        self.drives.iter().any(|drive| drive.socket.is_some())
    }

    /// The kernel command line when `boot_args` is absent: [`DEFAULT_BOOT_ARGS`], less what would hide hardware that is there.
    pub fn default_boot_args(&self) -> String {
        let line = default_boot_args(self.pci);
        match self.keyboard {
            true => line.replace(" i8042.nokbd i8042.dumbkbd", ""),
            false => line,
        }
    }

    /// As JSON, for a snapshot.
    pub fn to_saved(&self) -> Result<serde_json::Value, serde_json::Error> {
        serde_json::to_value(self)
    }

    /// What [`VmConfig::to_saved`] told. Nothing is checked but the shape.
    pub fn from_saved(saved: serde_json::Value) -> Result<Self, serde_json::Error> {
        // As text, because so it is read from everywhere else: each other way is another copy of all that reads it. Nobody has seen
        // that text.
        let told = serde_json::from_slice(saved.to_string().as_bytes());
        told.map_err(|e: serde_json::Error| {
            let text = e.to_string();
            let what = text.split(" at line ").next().unwrap_or_default();
            serde::de::Error::custom(what)
        })
    }

    /// Add `device`, if the result is a valid configuration.
    pub fn add(&mut self, device: NewDevice) -> Result<(), Error> {
        let mut config = self.clone();
        match device {
            NewDevice::Drive(drive) => config.drives.push(drive),
            NewDevice::Network(interface) => config.network_interfaces.push(interface),
        }
        config.validate()?;
        *self = config;
        Ok(())
    }

    /// Forget the device called `id`.
    pub fn remove(&mut self, id: &str) {
        self.drives.retain(|drive| drive.drive_id != id);
        self.network_interfaces
            .retain(|interface| interface.iface_id != id);
        self.vsock.take_if(|_| id == "vsock");
        self.entropy.take_if(|_| id == "entropy");
        self.balloon.take_if(|_| id == "balloon");
    }

    fn validate_devices(&self) -> Result<(), Error> {
        let mut ids = Vec::new();
        for drive in &self.drives {
            drive.validate()?;
            ids.push(&drive.drive_id);
        }
        for interface in &self.network_interfaces {
            interface.validate()?;
            ids.push(&interface.iface_id);
        }
        for (at, id) in ids.iter().enumerate() {
            if ids.iter().take(at).any(|other| other == id) {
                return Err(Error::Device(
                    (*id).clone(),
                    "is there twice: give each device a name of its own".into(),
                ));
            }
        }
        if let Some(second) = self.drives.iter().filter(|d| d.is_root_device).nth(1) {
            let why = "is a second root device: mark one only";
            return Err(Error::Device(second.drive_id.clone(), why.into()));
        }
        if let Some(mmds) = &self.mmds_config {
            let interfaces = self.network_interfaces.iter();
            mmds.validate(interfaces.map(|interface| interface.iface_id.as_str()))?;
        }
        self.vsock.iter().try_for_each(Vsock::validate)?;
        let memory = self.machine_config.mem_size_mib;
        self.balloon.iter().try_for_each(|b| b.validate(memory))
    }
}

/// What Firecracker's configuration file has at the top.
const FIRECRACKER_FIELDS: [&str; 12] = [
    "balloon",
    "boot-source",
    "cpu-config",
    "drives",
    "entropy",
    "logger",
    "machine-config",
    "metrics",
    "mmds-config",
    "network-interfaces",
    "serial",
    "vsock",
];

fn read_file(path: &Path) -> Result<String, Error> {
    use std::io::Read;
    let read = |source| Error::Read {
        path: path.into(),
        source,
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(read)?;
    file.take(MAX_FILE + 1)
        .read_to_string(&mut text)
        .map_err(read)?;
    match text.len() as u64 > MAX_FILE {
        true => Err(Error::FileTooLarge { path: path.into() }),
        false => Ok(text),
    }
}

/// For fields that Firecracker does not have: they show only where they say something.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// For a field that is a structure: refuse a list, which serde would take for one.
fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let fields = serde_json::Map::deserialize(deserializer)?;
    T::deserialize(serde_json::Value::Object(fields)).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> VmConfig {
        let mut config = VmConfig::default();
        config.boot_source.kernel_image_path = "vmlinux".into();
        config
    }

    #[test]
    fn a_firecracker_file_is_read_and_written_back_the_same() {
        let text = r#"{"boot-source":{"kernel_image_path":"vmlinux","initrd_path":"i","boot_args":"a=1"},
                       "machine-config":{"vcpu_count":2,"mem_size_mib":1024}}"#;
        let config: VmConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.machine_config.vcpu_count, 2);
        assert_eq!(config.boot_source.command_line(), "a=1");
        assert_eq!(config.on_reboot, OnReboot::Exit);
        let again = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&again).unwrap(), config);
    }

    #[test]
    fn unknown_fields_are_refused_by_name() {
        let error =
            serde_json::from_str::<VmConfig>(r#"{"machine-config":{"vcpus":2}}"#).unwrap_err();
        assert!(error.to_string().contains("vcpus"), "{error}");
    }

    #[test]
    fn a_list_is_no_configuration() {
        for text in [
            "[]",
            r#"{"machine-config":[2,64]}"#,
            r#"[{"kernel_image_path":"k"}]"#,
            "3",
            "",
        ] {
            assert!(VmConfig::from_json(text).is_err(), "{text}");
        }
        assert!(VmConfig::from_json(" {}").is_ok());
    }

    #[test]
    fn each_value_out_of_range_is_named() {
        valid().validate().unwrap();
        let with = |change: &dyn Fn(&mut VmConfig)| {
            let mut config = valid();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(with(&|c| c.machine_config.vcpu_count = 0).contains("0 vCPUs"));
        assert!(with(&|c| c.machine_config.vcpu_count = 65).contains("1 to 64"));
        assert!(with(&|c| c.machine_config.mem_size_mib = 0).contains("0 MiB"));
        let odd = with(&|c| (c.machine_config.smt, c.machine_config.vcpu_count) = (true, 3));
        assert!(odd.contains("3 vCPUs") && odd.contains("even"), "{odd}");
        let odd = with(&|c| {
            c.machine_config.huge_pages = HugePages::TwoMiB;
            c.machine_config.mem_size_mib = 33;
        });
        assert!(odd.contains("33 MiB") && odd.contains("even"), "{odd}");
        assert!(with(&|c| c.boot_source.boot_args = Some("x".repeat(2048))).contains("2048 bytes"));
        assert!(with(&|c| c.boot_source.boot_args = Some("a\0b".into())).contains("NUL"));
        assert!(with(&|c| c.boot_source.kernel_image_path = "".into()).contains("--kernel"));
    }

    #[test]
    fn the_machines_options_have_firecrackers_names_and_are_written_back() {
        let text = r#"{"vcpu_count":1,"mem_size_mib":128,"smt":true,"cpu_template":"T2CL",
                       "track_dirty_pages":true,"huge_pages":"2M"}"#;
        let machine: MachineConfig = serde_json::from_str(text).unwrap();
        assert_eq!(machine.threads_per_core(), 1);
        assert_eq!(machine.cpu_template, CpuTemplate::T2CL);
        assert_eq!(machine.huge_pages, HugePages::TwoMiB);
        assert_eq!(
            serde_json::to_string(&machine).unwrap(),
            text.replace(['\n', ' '], "")
        );
        let plain = serde_json::to_string(&MachineConfig::default()).unwrap();
        let wanted = r#""smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#;
        assert!(plain.ends_with(wanted), "{plain}");
        for wrong in [
            r#""cpu_template":"V1N1""#,
            r#""huge_pages":"1G""#,
            r#""smt":1"#,
        ] {
            let text = format!(r#"{{"vcpu_count":1,"mem_size_mib":128,{wrong}}}"#);
            assert!(
                serde_json::from_str::<MachineConfig>(&text).is_err(),
                "{text}"
            );
        }
    }

    #[test]
    fn a_keyboard_is_not_hidden_from_the_kernel() {
        let mut config = valid();
        assert_eq!(config.default_boot_args(), DEFAULT_BOOT_ARGS);
        config.keyboard = true;
        let line = config.default_boot_args();
        assert!(
            line.contains("i8042.noaux") && line.contains("tsc=reliable"),
            "{line}"
        );
        assert!(!line.contains("nokbd") && !line.contains("nopnp"), "{line}");
    }

    #[test]
    fn devices_come_and_go_and_a_bad_one_changes_nothing() {
        let mut config = valid();
        config.pci = true;
        config.entropy = Some(Entropy::default());
        config.add(NewDevice::Drive(Drive::new("a", "/a"))).unwrap();
        let before = config.clone();
        for bad in [
            NewDevice::Drive(Drive::new("a", "/other")),
            NewDevice::Drive(Drive::new("no name", "/b")),
            NewDevice::Network(NetworkInterface::new("a")),
        ] {
            assert!(config.add(bad.clone()).is_err(), "{bad:?}");
            assert_eq!(config, before);
        }
        config.remove("b");
        assert_eq!(config, before);
        config.remove("a");
        config.remove("entropy");
        assert_eq!((config.drives.len(), config.entropy), (0, None));
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        let mut config = valid();
        config.machine_config = MachineConfig {
            vcpu_count: 64,
            mem_size_mib: 32,
            ..MachineConfig::default()
        };
        config.boot_source.boot_args = Some("x".repeat(MAX_BOOT_ARGS));
        config.validate().unwrap();
    }
}
