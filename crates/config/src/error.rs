use crate::{MAX_BOOT_ARGS, MAX_CLONES, MAX_VCPUS, MIN_MEMORY_MIB};
use std::path::PathBuf;

/// What is wrong with a configuration. All of these are the user's to mend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no sensible size.
    #[error("the configuration file {} is larger than 1 MiB; is it the right file?", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not JSON, or a field is unknown or of the wrong kind.
    #[error("the configuration file {} is not valid", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// No kernel.
    #[error("no kernel is named; give one with --kernel PATH (or boot-source.kernel_image_path)")]
    NoKernel,
    /// vCPU count out of range.
    #[error("{0} vCPUs cannot be had; --cpus takes 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// Too little memory.
    #[error("{0} MiB of memory is too little; --memory takes {MIN_MEMORY_MIB}M or more")]
    MemoryTooSmall(u64),
    /// Cores of two threads that would not be full.
    #[error("{0} vCPUs do not fill cores of two threads; with smt, vcpu_count is 1 or even")]
    OddVcpus(u32),
    /// Half a huge page.
    #[error("{0} MiB of memory are no whole number of huge pages of 2 MiB; make mem_size_mib even")]
    OddMemory(u64),
    /// Command line too long.
    #[error(
        "the kernel command line is {0} bytes long, Linux takes {MAX_BOOT_ARGS}; shorten --cmdline"
    )]
    BootArgsTooLong(usize),
    /// Command line has a NUL.
    #[error("the kernel command line has a NUL at byte {0}; remove it from --cmdline")]
    BootArgsNul(usize),
    /// A device's name.
    #[error("{0:?} is no name for a device; use 1 to 64 letters, digits and _")]
    DeviceId(String),
    /// A device cannot be as it is configured.
    #[error("the device {0} {1}")]
    Device(String, String),
    /// A snapshot's device is to be another, and there is none of that name.
    #[error("the snapshot has no {what} called {id}; it has: {known}")]
    NotInSnapshot {
        /// The kind of device.
        what: &'static str,
        /// The name.
        id: String,
        /// The names that there are.
        known: String,
    },
    /// There is no such device.
    #[error("there is no device called {0}")]
    NoDevice(String),
    /// The metadata service cannot be as it is configured.
    #[error("the metadata service (mmds-config) {0}")]
    Mmds(String),
    /// More clones than can be had at once.
    #[error("{0} clones are too many at once; {MAX_CLONES} are the most")]
    Clones(u32),
    /// Clones that nobody could let run.
    #[error("clones that are paused need an api_sock, on which they are told to go on")]
    ClonesUnsteered,
    /// Clones that would take the same name.
    #[error(
        "several clones cannot have the same {0}; write {{n}} where the number of each is to stand"
    )]
    ClonesAlike(&'static str),
    /// Two VMs cannot have one tap.
    #[error(
        "the network interface {0} needs a tap device of its own in each clone: name it in network_overrides (or --net)"
    )]
    CloneWithoutTap(String),
    /// Not a size.
    #[error("{0:?} is not a memory size; write for example 512M or 2G (a bare number is MiB)")]
    Size(String),
}
