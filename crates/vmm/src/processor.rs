//! What the guest's processors are: CPUID and MSRs, after the configuration and KVM.

use crate::error::Error;
use crate::standby::Wanted;
use husk_arch::cpuid::{self, CpuTopology, CpuidConfig, Template};
use husk_arch::{cpu_templates, host_check, msrs};
use husk_config::{CpuConfig, KvmCapability, MsrModifier};
use husk_kvm::bindings::kvm_cpuid_entry2;
use husk_kvm::{Kvm, Vcpu};
use std::borrow::Cow;

/// What every vCPU of a VM is made from.
pub struct Processor {
    /// None: of this host, for a snapshot.
    cpuid: Option<Template>,
    msrs: Vec<MsrModifier>,
    /// What this host's KVM can give to a guest.
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl Processor {
    /// As `wanted`, as far as this host has it.
    pub fn new(kvm: &Kvm, wanted: &Wanted) -> Result<Self, Error> {
        let supported = kvm.supported_cpuid()?;
        let changes = changes(wanted, &supported)?;
        check_capabilities(kvm, &changes)?;
        let tsc_deadline = kvm.has_tsc_deadline_timer();
        let cpuid = prepare(wanted, &changes, &supported, tsc_deadline)?;
        let msrs = changes.into_owned().msr_modifiers;
        Ok(Self {
            cpuid: Some(cpuid),
            msrs,
            supported,
            tsc_deadline,
        })
    }

    /// What this host has. No vCPU can be set up of it.
    pub fn of_host(kvm: &Kvm) -> Result<Self, Error> {
        Ok(Self {
            cpuid: None,
            msrs: Vec::new(),
            supported: kvm.supported_cpuid()?,
            tsc_deadline: kvm.has_tsc_deadline_timer(),
        })
    }

    /// Nothing: vCPUs become what they were on this host.
    pub fn unknown() -> Self {
        Self {
            cpuid: None,
            msrs: Vec::new(),
            supported: Vec::new(),
            tsc_deadline: false,
        }
    }

    /// Whether this host gives all of the processors that were `saved`, by their CPUID, to a VM that is as `wanted`: nothing of it
    /// may run otherwise.
    pub fn check(&self, wanted: &Wanted, saved: &[Vec<kvm_cpuid_entry2>]) -> Result<(), Error> {
        if saved.is_empty() {
            return Ok(());
        }
        let prepared;
        let here = match &self.cpuid {
            Some(own) => own,
            None => {
                let changes = changes(wanted, &self.supported)?;
                prepared = prepare(wanted, &changes, &self.supported, self.tsc_deadline)?;
                &prepared
            }
        };
        let here = here.for_cpu(0)?;
        let check = |saved: &Vec<_>| host_check::check(saved, &here);
        Ok(saved.iter().try_for_each(check)?)
    }

    /// Make `vcpu`, number `index`, such a processor. Runs on the vCPU's own thread.
    pub fn set_up(&self, vcpu: &Vcpu, index: u32) -> Result<(), Error> {
        let none = Error::State("no processor is configured");
        vcpu.set_cpuid(&self.cpuid.as_ref().ok_or(none)?.for_cpu(index)?)?;
        vcpu.set_msrs(&msrs::boot_msrs())?;
        for MsrModifier { addr, bitmap } in &self.msrs {
            let index = *addr;
            let before = vcpu.msr(index)?.ok_or(Error::NoMsr(index))?;
            let value = bitmap.apply(before);
            if !vcpu.set_msr(index, value)? {
                return Err(Error::MsrValue { index, value });
            }
        }
        Ok(())
    }
}

/// What the configuration changes of what KVM supports.
fn changes<'a>(
    wanted: &'a Wanted,
    supported: &[kvm_cpuid_entry2],
) -> Result<Cow<'a, CpuConfig>, Error> {
    Ok(match &wanted.cpu_config {
        Some(own) => Cow::Borrowed(own),
        None => {
            let template = wanted.machine.cpu_template;
            Cow::Owned(cpu_templates::cpu_config(template, supported)?)
        }
    })
}

fn prepare(
    wanted: &Wanted,
    changes: &CpuConfig,
    supported: &[kvm_cpuid_entry2],
    tsc_deadline: bool,
) -> Result<Template, Error> {
    let config = CpuidConfig {
        topology: CpuTopology {
            cpus: wanted.machine.vcpu_count,
            threads_per_core: wanted.machine.threads_per_core(),
        },
        modifiers: &changes.cpuid_modifiers,
        tsc_deadline,
        tsc_khz: None,
        pmu: false,
    };
    Ok(cpuid::prepare(supported, &config)?)
}

fn check_capabilities(kvm: &Kvm, changes: &CpuConfig) -> Result<(), Error> {
    for capability in &changes.kvm_capabilities {
        match *capability {
            KvmCapability::Needed(number) if !kvm.has_capability(number) => {
                return Err(Error::NoCapability(number));
            }
            KvmCapability::Needed(_) | KvmCapability::NotNeeded(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_config::MachineConfig;

    fn with(cpu_config: &str) -> Wanted {
        Wanted {
            shared_memory: false,
            machine: MachineConfig::default(),
            cpu_config: Some(serde_json::from_str(cpu_config).unwrap()),
        }
    }

    fn vcpu(kvm: &Kvm) -> (husk_kvm::Vm, Vcpu) {
        let vm = kvm.create_vm().unwrap();
        vm.create_interrupt_controllers(husk_arch::layout::KVM_TSS)
            .unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        (vm, vcpu)
    }

    /// IA32_TSC_AUX: plain bits on every processor that KVM runs on.
    const TSC_AUX: u32 = 0xc000_0103;

    #[test]
    fn cpu_config_changes_msrs_and_leaves_their_other_bits() {
        let kvm = Kvm::open().unwrap();
        let config = with(
            r#"{"msr_modifiers": [{"addr": "0xc0000103", "bitmap": "0b1111xxxx"},
                                  {"addr": "0xc0000103", "bitmap": "0bxxxx1010"}]}"#,
        );
        let processor = Processor::new(&kvm, &config).unwrap();
        let (_vm, vcpu) = vcpu(&kvm);
        processor.set_up(&vcpu, 0).unwrap();
        assert_eq!(vcpu.msr(TSC_AUX).unwrap(), Some(0xfa));
    }

    #[test]
    fn what_this_host_does_not_have_is_named() {
        let kvm = Kvm::open().unwrap();
        let refused = |text: &str| {
            let config = with(text);
            let processor = Processor::new(&kvm, &config)?;
            processor.set_up(&vcpu(&kvm).1, 0)
        };
        for (text, named) in [
            (r#"{"kvm_capabilities": ["99999"]}"#, "99999"),
            (
                r#"{"cpuid_modifiers": [{"leaf": "0x5000", "subleaf": "0x0", "flags": 0, "modifiers": []}]}"#,
                "0x5000",
            ),
            (
                r#"{"msr_modifiers": [{"addr": "0xdead0000", "bitmap": "0b1"}]}"#,
                "0xdead0000",
            ),
            (
                // IA32_APIC_BASE: its reserved bits.
                r#"{"msr_modifiers": [{"addr": "0x1b", "bitmap": "0b1111"}]}"#,
                "0x1b",
            ),
        ] {
            let error = refused(text).unwrap_err();
            let said = crate::error::chain(&error);
            assert!(said.contains(named), "{said}");
            assert!(!error.is_host_trouble(), "{said}");
        }
        // KVM_CAP_IRQCHIP is 0, and KVM_CAP_USER_MEMORY is 3.
        refused(r#"{"kvm_capabilities": ["3", "!99999"]}"#).unwrap();
    }
}
