//! KVM as Husk uses it: the system, a VM, its vCPUs. The ioctls live here.
//!
//! **Architecture Invariant:** no guest memory is mapped, no device is known and no policy is made here; a caller
//! hands over addresses, registers and event descriptors.

mod blob;
mod error;
mod routes;
mod state;
mod vcpu;
mod vm;

pub use error::Error;
pub use kvm_bindings as bindings;
pub use routes::MsiVectors;
pub use state::{Passed, VcpuState, VmState};
pub use vcpu::{Exit, Vcpu};
pub use vm::Vm;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;
use std::ffi::CStr;

/// The KVM device node.
pub const DEVICE: &CStr = c"/dev/kvm";

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Open `/dev/kvm` and check that it speaks the stable API (version 12) with what Husk needs.
    pub fn open() -> Result<Self, Error> {
        let fd = kvm_ioctls::Kvm::new_with_path(DEVICE).map_err(|e| match e.errno() {
            libc::ENOENT => Error::NoDevice,
            libc::EACCES | libc::EPERM => Error::NoPermission,
            libc::ENODEV | libc::ENXIO => Error::NoHardware,
            _ => Error::Open(e),
        })?;
        let version = fd.get_api_version();
        if version != 12 {
            return Err(Error::ApiVersion(version));
        }
        Ok(Self { fd })
    }

    /// Create a VM.
    pub fn create_vm(&self) -> Result<Vm, Error> {
        loop {
            match self.fd.create_vm() {
                Ok(fd) => return Ok(Vm::new(fd)),
                // A signal that is pending for this process, a terminal's resize for example.
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(Error::CreateVm(e)),
            }
        }
    }

    /// CPUID leaves that this KVM can give to a guest.
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map(|cpuid| cpuid.as_slice().to_vec())
            .map_err(|e| Error::Ioctl("KVM_GET_SUPPORTED_CPUID", e))
    }

    /// The in-kernel local APIC has a TSC-deadline timer.
    pub fn has_tsc_deadline_timer(&self) -> bool {
        self.fd.check_extension(Cap::TscDeadlineTimer)
    }

    /// KVM has the capability of this number (`KVM_CAP_…`).
    pub fn has_capability(&self, number: u32) -> bool {
        self.fd.check_extension_raw(number.into()) > 0
    }

    /// MSRs that are part of a vCPU's state (KVM_GET_MSR_INDEX_LIST).
    pub fn state_msrs(&self) -> Result<Vec<u32>, Error> {
        let list = self.fd.get_msr_index_list();
        let list = list.map_err(|e| Error::Ioctl("KVM_GET_MSR_INDEX_LIST", e))?;
        Ok(list.as_slice().to_vec())
    }

    /// Most vCPUs of one VM.
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }
}
