use vmm_sys_util::errno;

/// What the host refused. None of these is the guest's or the configuration's fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device node is missing.
    #[error(
        "there is no /dev/kvm: load the module kvm_intel or kvm_amd, and allow virtualization in the firmware (in a cloud VM: \
         nested virtualization); `husk doctor` says more"
    )]
    NoDevice,
    /// The node is there, its driver is not.
    #[error(
        "/dev/kvm is there but its driver is not: load the module kvm_intel or kvm_amd, and allow virtualization in the \
         firmware; `husk doctor` says more"
    )]
    NoHardware,
    /// Not allowed.
    #[error(
        "no permission to open /dev/kvm: join its group (`sudo usermod -aG kvm $USER`, then log in again); `husk doctor` says more"
    )]
    NoPermission,
    /// Could not be opened for another reason.
    #[error("cannot open /dev/kvm; `husk doctor` says more")]
    Open(#[source] errno::Error),
    /// Not the stable API.
    #[error(
        "/dev/kvm speaks API version {0}, not 12; a host kernel that is not 25 years old is needed"
    )]
    ApiVersion(i32),
    /// KVM_CREATE_VM failed.
    #[error(
        "KVM cannot create a VM; is another hypervisor (VirtualBox, VMware) using the processor's virtualization?"
    )]
    CreateVm(#[source] errno::Error),
    /// A vCPU could not be created.
    #[error("KVM cannot create vCPU {0}; fewer may fit: --cpus")]
    CreateVcpu(u32, #[source] errno::Error),
    /// Guest memory was refused.
    #[error("KVM refuses {size:#x} bytes of guest memory at {address:#x}")]
    MemorySlot {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        size: u64,
        /// Why.
        source: errno::Error,
    },
    /// State of another KVM or processor, or none.
    #[error("the snapshot's {0} is not what this KVM takes")]
    State(&'static str, #[source] errno::Error),
    /// MSRs of a snapshot: index, and what it should become.
    #[error("this KVM does not take what the snapshot has in MSR {}", msrs(.0))]
    Msrs(Vec<(u32, u64)>),
    /// The guest has measured its TSC, and counts on it.
    #[error(
        "the snapshot's TSC runs at {saved} kHz, and this host's at {here} kHz, which KVM cannot scale here: load it on a host with the same frequency"
    )]
    TscFrequency {
        /// In kHz.
        saved: u32,
        /// Likewise.
        here: u32,
    },
    /// Any other ioctl.
    #[error("the KVM call {0} failed")]
    Ioctl(&'static str, #[source] errno::Error),
}

fn msrs(list: &[(u32, u64)]) -> String {
    let names = list.iter();
    let names = names.map(|(index, value)| format!("{index:#x} ({value:#x})"));
    names.collect::<Vec<_>>().join(", ")
}
