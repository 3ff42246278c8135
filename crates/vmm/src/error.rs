use crate::memory;
use std::path::PathBuf;

/// Why a VM could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] husk_config::Error),
    /// The kernel is no kernel, or cannot be read.
    #[error(transparent)]
    Kernel(#[from] husk_loader::Error),
    /// A segment of the kernel lies where there is no memory.
    #[error(
        "the kernel {} wants {size:#x} bytes at {address:#x}, which {memory_mib} MiB of memory do not have there; give it more --memory", path.display()
    )]
    SegmentOutside {
        /// The kernel.
        path: PathBuf,
        /// Guest-physical address of the segment.
        address: u64,
        /// Its length in memory, in bytes.
        size: u64,
        /// The VM's memory.
        memory_mib: u64,
    },
    /// PVH was asked for, and the kernel has no PVH entry.
    #[error("the kernel {} has no PVH entry (ELF note Xen, type 18); use --boot-protocol auto", .0.display())]
    NoPvh(PathBuf),
    /// The initrd cannot be read.
    #[error("cannot read the initrd {}", path.display())]
    Initrd {
        /// The initrd.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The initrd is a directory.
    #[error("the initrd {} is a directory; give the image file", .0.display())]
    InitrdDirectory(PathBuf),
    /// The initrd has no bytes.
    #[error("the initrd {} is empty; leave --initrd out, or give another", .0.display())]
    InitrdEmpty(PathBuf),
    /// The initrd does not fit.
    #[error(
        "the initrd {} is {} MiB large, and only {} MiB of memory are free for it; give the VM more --memory",
        path.display(), size.div_ceil(1 << 20), room >> 20
    )]
    InitrdTooLarge {
        /// The initrd.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// What is free behind the kernel, in bytes.
        room: u64,
    },
    /// A device cannot be made or changed.
    #[error("the device {0}")]
    Device(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// There is no such device.
    #[error("there is no device called {0}")]
    NoDevice(String),
    /// Devices come and go on PCI only.
    #[error("the device {0} cannot come or go while the VM runs: that needs a VM with --pci")]
    NoHotplug(String),
    /// Networking by passt starts a program.
    #[error(
        "the network interface {0} cannot be plugged in: `user` is for interfaces that are there from the start, give a tap"
    )]
    NoLatePasst(String),
    /// Memory is made before.
    #[error(
        "the disk {0} cannot be plugged in: the VM's memory is shared with vhost-user servers only if a drive with a socket is there from the start"
    )]
    NoLateSharing(String),
    /// More devices than there are places for them.
    #[error("{count} devices do not fit, there is room for {most}; leave some out, or use --pci")]
    TooManyDevices {
        /// What was asked for.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// More memory than the host has.
    #[error(
        "{mib} MiB of memory do not fit this host, which has {host_mib} MiB (swap included); use a smaller --memory"
    )]
    MemoryTooLarge {
        /// What was asked for.
        mib: u64,
        /// What the host has.
        host_mib: u64,
    },
    /// More memory than the processor can address.
    #[error(
        "{mib} MiB of memory do not fit the {bits} address bits of this processor; use a smaller --memory"
    )]
    AddressBits {
        /// What was asked for.
        mib: u64,
        /// Physical address bits.
        bits: u32,
    },
    /// More vCPUs than this KVM allows.
    #[error("this host's KVM allows {most} vCPUs, not {cpus}; use a smaller --cpus")]
    TooManyVcpus {
        /// What was asked for.
        cpus: u32,
        /// What KVM allows.
        most: usize,
    },
    /// The serial console's output cannot be opened.
    #[error("cannot open {} for the serial console's output", .0.display())]
    Serial(PathBuf, #[source] std::io::Error),
    /// The guest's metadata do not change.
    #[error(transparent)]
    Mmds(#[from] husk_mmds::StoreError),
    /// A device was configured without what is asked of it.
    #[error("the {0} was made without {1}: ask for it before boot")]
    NotMade(&'static str, &'static str),
    /// Only after boot. As Firecracker's clients know it.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeBoot,
    /// Only before boot.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterBoot,
    /// Loading a snapshot after something else was configured.
    #[error(
        "Loading a microVM snapshot not allowed after configuring boot-specific resources: start a new process for it"
    )]
    LoadAfterConfiguration,
    /// A snapshot that is not to be.
    #[error("Load snapshot error: {0}")]
    Load(String),
    /// A part of a VM that snapshots do not hold.
    #[error("snapshots of VMs with {0} are not supported yet")]
    NoSnapshot(&'static str),
    /// A kind of snapshot, or of its memory.
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
    /// A snapshot's files.
    #[error(transparent)]
    Snapshot(#[from] husk_snapshot::Error),
    /// No copy of a disk for clones.
    #[error(
        "the disk {0} cannot be copied for clones: give them disks of their own (drive_overrides)"
    )]
    CopyDisk(String, #[source] std::io::Error),
    /// The template was made for clones with a disk of their own.
    #[error(
        "the template has no copy of the disk {0}: it was made for clones with disks of their own (drive_overrides)"
    )]
    NoCopy(String),
    /// The guest runs.
    #[error("a snapshot is made of a guest that is paused: pause it first")]
    NotPaused,
    /// Nobody has noted which pages were written.
    #[error(
        "a diff snapshot needs track_dirty_pages, in machine-config or at the load: nobody has noted what the guest has written; make a Full one"
    )]
    NotTracked,
    /// Others write, and note nothing.
    #[error(
        "a VM whose devices other processes serve (vhost-user) cannot have diff snapshots; make a Full one"
    )]
    SharedDiff,
    /// An answer cannot be put in words.
    #[error("the answer cannot be written as JSON: {0}")]
    Json(String),
    /// A capability of KVM that `cpu-config` wants.
    #[error(
        "this host's KVM does not have capability {0}, which cpu-config wants; use another host, or leave it out"
    )]
    NoCapability(u32),
    /// The host's processor is not the template's.
    #[error(transparent)]
    CpuTemplate(#[from] husk_arch::cpu_templates::Error),
    /// A guest that was kept cannot go on here.
    #[error(transparent)]
    OtherHost(#[from] husk_arch::host_check::Error),
    /// An MSR that this host does not have.
    #[error(
        "cpu-config (or the CPU template) changes MSR {0:#x}, which this host's KVM does not have; leave it out, or use another host"
    )]
    NoMsr(u32),
    /// A value that KVM refuses.
    #[error(
        "cpu-config (or the CPU template) sets MSR {index:#x} to {value:#x}, which this host's KVM refuses; change its bitmap"
    )]
    MsrValue {
        /// The MSR.
        index: u32,
        /// What it was to be.
        value: u64,
    },
    /// The request does not fit the VM's state.
    #[error("{0}")]
    State(&'static str),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] husk_kvm::Error),
    /// ACPI tables.
    #[error("the ACPI tables cannot be made")]
    Acpi(#[from] husk_arch::acpi::Error),
    /// MP table.
    #[error("the MP table cannot be made")]
    MpTable(#[from] husk_arch::mptable::Error),
    /// CPUID.
    #[error("the processor's features cannot be described to the guest")]
    Cpuid(#[from] husk_arch::cpuid::Error),
    /// A device could not be put on its bus.
    #[error("two devices want the same address")]
    Bus(#[from] husk_bus::Error),
    /// The host has no more event descriptors, threads or the like.
    #[error("the host refuses {0}")]
    Host(&'static str, #[source] std::io::Error),
    /// No random bytes.
    #[error("the host gives no random bytes: {0}")]
    Random(String),
}

impl Error {
    /// Exit status 1: the host is in the way. Everything else is the user's to mend, exit status 2.
    pub fn is_host_trouble(&self) -> bool {
        match self {
            Error::Cpuid(husk_arch::cpuid::Error::NoSuchLeaf { .. }) => false,
            Error::Kvm(_)
            | Error::Acpi(_)
            | Error::MpTable(_)
            | Error::Cpuid(_)
            | Error::Bus(_)
            | Error::Host(..)
            | Error::Random(_)
            | Error::Memory(_) => true,
            Error::Config(_)
            | Error::Kernel(_)
            | Error::SegmentOutside { .. }
            | Error::NoPvh(_)
            | Error::Initrd { .. }
            | Error::InitrdDirectory(_)
            | Error::InitrdEmpty(_)
            | Error::InitrdTooLarge { .. }
            | Error::MemoryTooLarge { .. }
            | Error::AddressBits { .. }
            | Error::TooManyVcpus { .. }
            | Error::NoCapability(_)
            | Error::CpuTemplate(_)
            | Error::OtherHost(_)
            | Error::NoMsr(_)
            | Error::MsrValue { .. }
            | Error::Device(..)
            | Error::NoDevice(_)
            | Error::NoHotplug(_)
            | Error::NoLatePasst(_)
            | Error::NoLateSharing(_)
            | Error::TooManyDevices { .. }
            | Error::Serial(..)
            | Error::Mmds(_)
            | Error::NotMade(..)
            | Error::LoadAfterConfiguration
            | Error::Load(_)
            | Error::NoSnapshot(_)
            | Error::Unsupported(_)
            | Error::NotPaused
            | Error::CopyDisk(..)
            | Error::NoCopy(_)
            | Error::NotTracked
            | Error::SharedDiff
            | Error::Snapshot(_)
            | Error::BeforeBoot
            | Error::AfterBoot
            | Error::Json(_)
            | Error::State(_) => false,
        }
    }
}

impl Error {
    /// What was sent is larger than a limit allows.
    pub fn is_too_large(&self) -> bool {
        matches!(self, Error::Mmds(husk_mmds::StoreError::TooLarge))
    }

    /// The process has nothing left to do after this: the client that asked counts on its end.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Error::Load(_))
    }
}

/// `error` and all that it was caused by, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error is its own cause's text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    printable(text)
}

/// Most bytes of a message.
const MOST_SAID: usize = 4096;

/// One line, and not too long: a file of somebody else's may have any text where a name should be.
pub fn printable(mut text: String) -> String {
    if text.len() > MOST_SAID {
        text.truncate(text.floor_char_boundary(MOST_SAID));
        text.push_str(" ...");
    }
    if !text.contains(char::is_control) {
        return text;
    }
    let parts = text.split_inclusive(char::is_control);
    let shown = parts.map(|part| match part.char_indices().next_back() {
        Some((at, last)) if last.is_control() => {
            let before = part.get(..at).unwrap_or_default();
            format!("{before}{}", last.escape_default())
        }
        _ => part.to_owned(),
    });
    shown.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_whatever_a_file_says() {
        let json: Result<[u8; 1], _> = serde_json::from_str(r#"["a\u001b]0;x\u0007\nb\u0085"]"#);
        let json = json.unwrap_err();
        let e = Error::Json(format!("é {json} \u{1b}[2J\r\n"));
        let said = chain(&e);
        assert!(!said.contains(char::is_control), "{said:?}");
        assert!(
            said.contains("é ") && said.ends_with("\\u{1b}[2J\\r\\n"),
            "{said}"
        );
        let long = chain(&Error::Json("é".repeat(100_000)));
        assert!(
            long.len() <= MOST_SAID + 4 && long.ends_with("é ..."),
            "{}",
            long.len()
        );
    }
}
