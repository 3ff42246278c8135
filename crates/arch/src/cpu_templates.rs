//! The named CPU templates, with the bits that Firecracker gives them: what a guest sees on one of their hosts must not depend
//! on the monitor.

use crate::msrs::ARCH_CAPABILITIES;
use husk_config::CpuidRegister::{self, Eax, Ebx, Ecx, Edx};
use husk_config::{Bitmap, CpuConfig, CpuTemplate, CpuidModifier, MsrModifier, RegisterModifier};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Why a template cannot be had on this host.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Another vendor's processor.
    #[error("the CPU template {0:?} is for {1} processors; use another, or cpu-config")]
    Vendor(CpuTemplate, &'static str),
    /// An old processor.
    #[error(
        "the CPU template {0:?} is for Intel Cascade Lake and newer; use another, or cpu-config"
    )]
    Model(CpuTemplate),
}

/// What `template` changes on a host with these entries of `KVM_GET_SUPPORTED_CPUID`.
///
/// # Errors
/// The host's processor is not one of the template's.
pub fn cpu_config(
    template: CpuTemplate,
    supported: &[kvm_cpuid_entry2],
) -> Result<CpuConfig, Error> {
    let (vendor, leaves, capabilities): (_, &[&[Leaf]], _) = match template {
        CpuTemplate::None => return Ok(CpuConfig::default()),
        CpuTemplate::C3 => (INTEL, &[&C3], None),
        CpuTemplate::T2 => (INTEL, &[&HASWELL, &T2], None),
        CpuTemplate::T2S => (INTEL, &[&HASWELL, &T2], Some(T2S_CAPABILITIES)),
        CpuTemplate::T2CL => (INTEL, &[&HASWELL, &T2CL], Some(T2CL_CAPABILITIES)),
        CpuTemplate::T2A => (AMD, &[&HASWELL, &T2A], None),
    };
    let find = |function| supported.iter().find(|leaf| leaf.function == function);
    let name = find(0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes));
    if name.map(|name| name.concat()).as_deref() != Some(vendor.as_bytes()) {
        return Err(Error::Vendor(
            template,
            if vendor == AMD { "AMD" } else { "Intel" },
        ));
    }
    let model = find(1).map_or(0, |leaf| leaf.eax);
    if template == CpuTemplate::T2CL && Model::of(model) < Model::of(CASCADE_LAKE) {
        return Err(Error::Model(template));
    }
    Ok(CpuConfig {
        cpuid_modifiers: leaves.concat().iter().map(modifier).collect(),
        msr_modifiers: capabilities.into_iter().map(arch_capabilities).collect(),
        ..CpuConfig::default()
    })
}

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";
/// The first model that T2CL is for, as leaf 1 has it in EAX.
const CASCADE_LAKE: u32 = 0x0005_0657;

/// Leaf 1, EAX, in the order in which models follow each other.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Model {
    extended_family: u32,
    extended_model: u32,
    family: u32,
    model: u32,
    stepping: u32,
}

impl Model {
    fn of(eax: u32) -> Self {
        Self {
            extended_family: eax >> 20 & 0xff,
            extended_model: eax >> 16 & 0xf,
            family: eax >> 8 & 0xf,
            model: eax >> 4 & 0xf,
            stepping: eax & 0xf,
        }
    }
}

/// A leaf, a subleaf, and for each register that changes the bits that do, and their values.
type Leaf = (u32, u32, &'static [(CpuidRegister, u32, u32)]);

fn modifier(&(leaf, subleaf, registers): &Leaf) -> CpuidModifier {
    let change = |&(register, mask, value): &(CpuidRegister, u32, u32)| RegisterModifier {
        register,
        bitmap: Bitmap::new(mask.into(), value.into()),
    };
    CpuidModifier {
        leaf,
        subleaf,
        flags: match leaf {
            0x7 | 0xd => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            _ => 0,
        },
        modifiers: registers.iter().map(change).collect(),
    }
}

fn arch_capabilities((mask, value): (u64, u64)) -> MsrModifier {
    MsrModifier {
        addr: ARCH_CAPABILITIES,
        bitmap: Bitmap::new(mask, value),
    }
}

/// Family, model and stepping.
const VERSION: u32 = 0x0fff_3fff;

/// What the T2 family shares: an Intel Haswell server, less what its instances do not have.
const HASWELL: [Leaf; 4] = [
    (
        0x1,
        0,
        &[
            (Eax, VERSION, 0x0003_06f2),
            // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA
            (Ecx, 0x0004_cdfc, 0),
            // MCE and MTRR there; PSN, DS, ACPI, SS, TM, IA-64, PBE not
            (Edx, 0xe864_1080, 0x0000_1080),
        ],
    ),
    (
        0x7,
        0,
        &[
            // ERMS there; SGX, HLE, RTM, RDT-M, MPX, RDT-A, all of AVX-512, RDSEED, ADX, PCOMMIT or RDPID, CLFLUSHOPT, CLWB, PT,
            // SHA not
            (Ebx, 0xffef_da14, 0x0000_0200),
            // AVX512_VBMI, UMIP, PKU, OSPKE, AVX512_VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512_VNNI, AVX512_BITALG,
            // AVX512_VPOPCNTDQ, LA57, RDPID, SGX_LC
            (Ecx, 0x4041_5f5e, 0),
            // AVX512_4VNNIW, AVX512_4FMAPS, FSRM, AVX512_VP2INTERSECT
            (Edx, 0x0000_011c, 0),
        ],
    ),
    (0xd, 0, &[XSAVE_STATES]),
    (0xd, 1, &[XSAVE_FORMS]),
];

/// The states of MPX, AVX-512 and PKRU.
const XSAVE_STATES: (CpuidRegister, u32, u32) = (Eax, 0x0000_02f8, 0);
/// XSAVEC, XGETBV with ECX = 1, XSAVES.
const XSAVE_FORMS: (CpuidRegister, u32, u32) = (Eax, 0x0000_000e, 0);

const T2: [Leaf; 2] = [
    (
        0x8000_0001,
        0,
        &[
            // PREFETCHW, MONITORX
            (Ecx, 0x2000_0100, 0),
            // Pages of 1 GiB
            (Edx, 0x0400_0000, 0),
        ],
    ),
    // WBNOINVD
    (0x8000_0008, 0, &[(Ebx, 0x0000_0200, 0)]),
];

const T2CL: [Leaf; 2] = [
    (
        0x8000_0001,
        0,
        &[
            // SSE4A, MisAlignSse, PREFETCHW, MONITORX
            (Ecx, 0x2000_01c0, 0),
            // MmxExt, MMX, FXSR, FFXSR, pages of 1 GiB
            (Edx, 0x07c0_0000, 0),
        ],
    ),
    // WBNOINVD
    (0x8000_0008, 0, &[(Ebx, 0x0000_0200, 0)]),
];

const T2A: [Leaf; 2] = [
    (
        0x8000_0001,
        0,
        &[
            // SVM, SSE4A, MisAlignSse, 3DNowPrefetch, MONITORX
            (Ecx, 0x2000_01c4, 0),
            // MmxExt, FFXSR, pages of 1 GiB
            (Edx, 0x0640_0000, 0),
        ],
    ),
    // RstrFpErrPtrs, IbrsPreferred, IbrsSameMode, EferLmsleUnsupported there; CLZERO, WBNOINVD not
    (0x8000_0008, 0, &[(Ebx, 0x001c_0205, 0x001c_0004)]),
];

const C3: [Leaf; 5] = [
    (
        0x1,
        0,
        &[
            (Eax, VERSION, 0x0003_06e4),
            // DTES64, MONITOR, DS-CPL, VMX, TM2, CNXT-ID, SDBG, FMA, xTPR, PDCM, MOVBE
            (Ecx, 0x0040_dd3c, 0),
            // MCE and MTRR there; PSN, DS, ACPI, SS, TM, PBE not
            (Edx, 0xa864_1080, 0x0000_1080),
        ],
    ),
    (
        0x7,
        0,
        &[
            // SGX, BMI1, HLE, AVX2, BMI2, INVPCID, RTM, RDT-M, MPX, RDT-A, all of AVX-512, RDSEED, ADX, CLFLUSHOPT, CLWB, PT, SHA
            (Ebx, 0xffaf_dd3c, 0),
            // AVX512_VBMI, UMIP, PKU, OSPKE, AVX512_VNNI, AVX512_VPOPCNTDQ, LA57, RDPID, SGX_LC
            (Ecx, 0x4041_481e, 0),
            // AVX512_4VNNIW, AVX512_4FMAPS
            (Edx, 0x0000_000c, 0),
        ],
    ),
    (0xd, 0, &[XSAVE_STATES]),
    (0xd, 1, &[XSAVE_FORMS]),
    (
        0x8000_0001,
        0,
        &[
            // LZCNT, PREFETCHW
            (Ecx, 0x0000_0120, 0),
            // Pages of 1 GiB
            (Edx, 0x0400_0000, 0),
        ],
    ),
];

/// RSBA, SKIP_L1DFL_VMENTRY, IF_PSCHANGE_MC_NO, MISC_PACKAGE_CTLS, ENERGY_FILTERING_CTL, RRSBA and GDS_NO, nothing else: the
/// weaknesses of Skylake and Cascade Lake together.
const T2S_CAPABILITIES: (u64, u64) = (u64::MAX, 0x0408_0c4c);
/// What KVM passes through of the processor's (in)vulnerability stays; MCU_CONTROL, MISC_PACKAGE_CTLS, ENERGY_FILTERING_CTL, DOITM,
/// FB_CLEAR_CTRL, BHI_NO, XAPIC_DISABLE_STATUS, OVERCLOCKING_STATUS, GDS_CTRL and what is reserved go.
const T2CL_CAPABILITIES: (u64, u64) = (0xffff_ffff_e2f5_1e00, 0);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::{CpuTopology, CpuidConfig, prepare};

    fn host(vendor: &str, version: u32) -> Vec<kvm_cpuid_entry2> {
        let word =
            |at: usize| u32::from_le_bytes(vendor.as_bytes()[at..at + 4].try_into().unwrap());
        let leaf = |function, index, fill: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: u32::from(matches!(function, 0x7 | 0xd)),
            eax: fill,
            ebx: fill,
            ecx: fill,
            edx: fill,
            ..Default::default()
        };
        let mut leaves = vec![
            leaf(0, 0, 0xd),
            leaf(1, 0, u32::MAX),
            leaf(7, 0, u32::MAX),
            leaf(0xd, 0, u32::MAX),
            leaf(0xd, 1, u32::MAX),
            leaf(0x8000_0000, 0, 0x8000_0008),
            leaf(0x8000_0001, 0, u32::MAX),
            leaf(0x8000_0008, 0, u32::MAX),
        ];
        (leaves[0].ebx, leaves[0].edx, leaves[0].ecx) = (word(0), word(4), word(8));
        leaves[1].eax = version;
        leaves
    }

    #[test]
    fn a_template_is_for_its_vendors_processors() {
        use CpuTemplate::*;
        let (intel, amd) = (host(INTEL, 0x0006_06a6), host(AMD, 0x00a0_0f11));
        for template in [C3, T2, T2S, T2CL] {
            cpu_config(template, &intel).unwrap();
            let error = cpu_config(template, &amd).unwrap_err().to_string();
            assert!(
                error.contains("Intel") && error.contains("cpu-config"),
                "{error}"
            );
        }
        cpu_config(T2A, &amd).unwrap();
        let error = cpu_config(T2A, &intel).unwrap_err().to_string();
        assert!(error.contains("T2A") && error.contains("AMD"), "{error}");
        assert_eq!(cpu_config(None, &[]), Ok(CpuConfig::default()));
        assert!(cpu_config(T2, &[]).is_err());
    }

    #[test]
    fn t2cl_is_for_cascade_lake_and_newer() {
        for (version, there) in [
            (0x0005_0654, false), // Skylake
            (0x0005_0657, true),
            (0x0006_06a6, true),  // Ice Lake
            (0x0003_06f2, false), // Haswell
        ] {
            let config = cpu_config(CpuTemplate::T2CL, &host(INTEL, version));
            assert_eq!(config.is_ok(), there, "{version:#x}");
        }
    }

    #[test]
    fn guests_see_the_templates_processor() {
        for (template, vendor, version, family) in [
            (CpuTemplate::C3, INTEL, 0x0005_0657, 0x0003_06e4),
            (CpuTemplate::T2, INTEL, 0x0005_0657, 0x0003_06f2),
            (CpuTemplate::T2S, INTEL, 0x0005_0657, 0x0003_06f2),
            (CpuTemplate::T2CL, INTEL, 0x0005_0657, 0x0003_06f2),
            (CpuTemplate::T2A, AMD, 0x00a0_0f11, 0x0003_06f2),
        ] {
            let supported = host(vendor, version);
            let config = cpu_config(template, &supported).unwrap();
            let cpuid = CpuidConfig {
                topology: CpuTopology {
                    cpus: 1,
                    threads_per_core: 1,
                },
                modifiers: &config.cpuid_modifiers,
                tsc_deadline: true,
                tsc_khz: None,
                pmu: false,
            };
            let entries = prepare(&supported, &cpuid).unwrap().for_cpu(0).unwrap();
            let find = |leaf| *entries.iter().find(|entry| entry.function == leaf).unwrap();
            assert_eq!(find(1).eax & VERSION, family, "{template:?}");
            // No AVX-512: neither its instructions nor its state.
            assert_eq!(find(7).ebx & 1 << 16, 0, "{template:?}");
            assert_eq!(find(0xd).eax & 0xe0, 0, "{template:?}");
            // SSE4.2, AES and AVX stay.
            for bit in [20, 25, 28] {
                assert_ne!(find(1).ecx & 1 << bit, 0, "{template:?}: {bit}");
            }
            // The monitor's own leaves stand over the template's.
            assert_ne!(
                find(1).ecx & 1 << 31,
                0,
                "{template:?}: a hypervisor is there"
            );
        }
    }

    #[test]
    fn only_t2s_and_t2cl_change_arch_capabilities() {
        let msrs = |template, host: &[kvm_cpuid_entry2]| {
            let config = cpu_config(template, host).unwrap();
            config
                .msr_modifiers
                .iter()
                .map(|msr| (msr.addr, msr.bitmap.apply(u64::MAX)))
                .collect()
        };
        let intel = host(INTEL, 0x0006_06a6);
        let of = |template| -> Vec<(u32, u64)> { msrs(template, &intel) };
        assert_eq!(of(CpuTemplate::T2S), [(0x10a, 0x0408_0c4c)]);
        assert_eq!(of(CpuTemplate::T2CL), [(0x10a, 0x1d0a_e1ff)]);
        assert_eq!(of(CpuTemplate::T2), []);
        assert_eq!(of(CpuTemplate::C3), []);
    }
}
