//! Whether a host has the processor that a guest was given on another one.
//!
//! Features have the names that Linux gives them in /proc/cpuinfo. References are to the Intel SDM, volume 2A, CPUID, the AMD APM,
//! volume 3, appendix E, and Linux's Documentation/virt/kvm/x86/cpuid.rst for KVM's own leaf.

use kvm_bindings::kvm_cpuid_entry2;
use std::fmt::Write as _;

/// Most names in one message.
const MOST_NAMES: usize = 24;

/// Why a guest cannot go on here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Other processors altogether.
    #[error(
        "the snapshot is from a host with a processor of {saved}, and this one's is of {here}: load it on a host like the first"
    )]
    Vendor {
        /// As CPUID leaf 0 has it.
        saved: String,
        /// Likewise.
        here: String,
    },
    /// Another model of the same vendor's.
    #[error(
        "the snapshot is from another CPU model ({saved}; this host has {here}): {difference}; VMs that are to move need a CPU template"
    )]
    Model {
        /// Family and model.
        saved: String,
        /// Likewise.
        here: String,
        /// The features.
        difference: String,
    },
    /// The model is the same, and the host's kernel or firmware is not.
    #[error(
        "this host's processor or KVM lacks what the snapshot's guest was given: {0}; load it on a host that has it"
    )]
    Missing(String),
    /// A leaf that every x86-64 processor has.
    #[error("the snapshot has no CPUID leaf {0:#x}")]
    NoLeaf(u32),
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        }
    }
}

/// A register of features: leaf, subleaf, names from bit 0 on; `-` has none.
type Features = (u32, u32, Register, &'static str);

/// OSXSAVE and OSPKE, which follow the guest's CR4: leaf, register as in [`FEATURES`], bits.
const OF_THE_GUEST: [(u32, u32); 2] = [(0x1, 1 << 27), (0x7, 1 << 4)];

const FEATURES: [Features; 17] = [
    (
        0x1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 \
         x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (
        0x1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 \
         ss ht tm ia64 pbe",
    ),
    (
        0x7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw \
         avx512vl",
    ),
    (
        0x7,
        0,
        Register::Ecx,
        "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        0x7,
        0,
        Register::Edx,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 \
         spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        0x7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - \
         amx_fp16 hreset avx_ifma - - lam",
    ),
    (
        0x7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - - - - avx10",
    ),
    (
        0x7,
        2,
        Register::Edx,
        "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    (
        0xd,
        0,
        Register::Eax,
        "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state pt_state \
         pkru_state pasid_state cet_user_state cet_kernel_state hdc_state uintr_state lbr_state hwp_state xtilecfg_state \
         xtiledata_state",
    ),
    (0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x4000_0001,
        0,
        Register::Eax,
        "kvm_clock kvm_nopiodelay kvm_mmu_op kvm_clock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int \
         kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clock_stable",
    ),
    (
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 \
         tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    (
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (0x8000_0007, 0, Register::Edx, "- - - - - - - - nonstop_tsc"),
    (
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on - - - - - \
         amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no",
    ),
    (0x8000_000a, 0, Register::Edx, "npt lbrv svm_lock nrip_save"),
    (
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs",
    ),
];

/// Whether a vCPU whose CPUID is `saved` can go on where a vCPU of the same configuration gets `here`.
///
/// # Errors
/// Vendor, family or model are others, or a feature is missing.
pub fn check(saved: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let names = (vendor(saved)?, vendor(here)?);
    if names.0 != names.1 {
        return Err(Error::Vendor {
            saved: names.0,
            here: names.1,
        });
    }
    let missing = differences(saved, here);
    let models = (model(saved)?, model(here)?);
    if models.0 != models.1 {
        let difference = match (list(&missing), list(&differences(here, saved))) {
            (None, None) => "no feature differs".into(),
            (Some(missing), None) => format!("this host lacks {missing}"),
            (None, Some(more)) => format!("the guest knows nothing of {more}"),
            (Some(missing), Some(more)) => {
                format!("this host lacks {missing}, and the guest knows nothing of {more}")
            }
        };
        let name = |(family, model)| format!("family {family}, model {model}");
        return Err(Error::Model {
            saved: name(models.0),
            here: name(models.1),
            difference,
        });
    }
    list(&missing).map_or(Ok(()), |missing| Err(Error::Missing(missing)))
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
    let is = |entry: &&kvm_cpuid_entry2| entry.function == leaf && entry.index == subleaf;
    entries.iter().find(is)
}

/// What `one` has and `other` has not.
fn differences(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut names = Vec::new();
    for (leaf, subleaf, register, text) in FEATURES {
        let value = |entries| find(entries, leaf, subleaf).map_or(0, |entry| register.of(entry));
        let mut bits = value(one) & !value(other);
        if matches!(register, Register::Ecx) && subleaf == 0 {
            let own = OF_THE_GUEST.iter().find(|(of, _)| *of == leaf);
            bits &= !own.map_or(0, |(_, bits)| *bits);
        }
        let mut known = text.split_ascii_whitespace();
        for bit in 0..32 {
            let name = known.next().filter(|name| *name != "-");
            if bits & 1 << bit != 0 {
                names.push(match name {
                    Some(name) => name.to_owned(),
                    None => format!("CPUID {leaf:#x}.{subleaf} {} bit {bit}", register.name()),
                });
            }
        }
    }
    // The guest's kernel computes with these places.
    for area in one.iter().filter(|e| e.function == 0xd && e.index >= 2) {
        let there = find(other, 0xd, area.index);
        if area.eax != 0 && there.is_some_and(|e| (e.eax, e.ebx) != (area.eax, area.ebx)) {
            names.push(format!("the layout of XSAVE component {}", area.index));
        }
    }
    let bits = |entries| find(entries, 0x8000_0008, 0).map_or(36, |entry| entry.eax & 0xff);
    if bits(one) > bits(other) {
        names.push(format!("physical addresses of {} bits", bits(one)));
    }
    names
}

fn list(names: &[String]) -> Option<String> {
    let mut text = names.get(..names.len().min(MOST_NAMES))?.join(", ");
    if names.len() > MOST_NAMES {
        // A String takes all.
        let _ = write!(text, " and {} more", names.len() - MOST_NAMES);
    }
    (!text.is_empty()).then_some(text)
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Result<String, Error> {
    let leaf = find(entries, 0, 0).ok_or(Error::NoLeaf(0))?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    // A snapshot's may be anything.
    Ok(bytes.escape_ascii().to_string())
}

/// Leaf 1, EAX: family and model as processors' manuals have them.
fn model(entries: &[kvm_cpuid_entry2]) -> Result<(u32, u32), Error> {
    let eax = find(entries, 1, 0).ok_or(Error::NoLeaf(1))?.eax;
    let family = match eax >> 8 & 0xf {
        0xf => 0xf + (eax >> 20 & 0xff),
        family => family,
    };
    Ok((family, eax >> 12 & 0xf0 | eax >> 4 & 0xf))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, 0, [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            entry(1, 0, [0x000a_0671, 0, 1 << 28, 0]),
            entry(7, 0, [0, 1 << 16, 0, 0]),
            entry(0xd, 2, [0x100, 0x240, 0, 0]),
            entry(0x8000_0008, 0, [0x3027, 0, 0, 0]),
        ]
    }

    fn refused(change: impl Fn(&mut Vec<kvm_cpuid_entry2>)) -> String {
        let mut saved = intel();
        change(&mut saved);
        check(&saved, &intel()).unwrap_err().to_string()
    }

    #[test]
    fn each_register_has_at_most_32_names() {
        for (leaf, subleaf, _, names) in FEATURES {
            let count = names.split_ascii_whitespace().count();
            assert!(count <= 32, "{leaf:#x}.{subleaf}: {count}");
        }
    }

    #[test]
    fn the_same_processor_and_one_with_less_go_on() {
        check(&intel(), &intel()).unwrap();
        let mut saved = intel();
        saved[2].ebx = 0;
        saved[1].ecx = 0;
        // Another stepping, and what the guest's own CR4 says.
        saved[1].eax += 1;
        saved[1].ecx |= 1 << 27;
        check(&saved, &intel()).unwrap();
    }

    #[test]
    fn what_is_missing_is_named() {
        let said = refused(|saved| saved[2].ebx |= 1 << 17 | 1 << 30);
        assert!(said.contains("given: avx512dq, avx512bw;"), "{said}");
        let said = refused(|saved| saved[2].ebx |= 1 << 22);
        assert!(said.contains("CPUID 0x7.0 EBX bit 22"), "{said}");
        let said = refused(|saved| saved.push(entry(0x4000_0001, 0, [1 << 16, 0, 0, 0])));
        assert!(said.contains("kvm_hc_map_gpa_range"), "{said}");
        let said = refused(|saved| saved[3].ebx = 0x340);
        assert!(said.contains("layout of XSAVE component 2"), "{said}");
        let said = refused(|saved| saved[4].eax = 0x3034);
        assert!(said.contains("physical addresses of 52 bits"), "{said}");
        let said = refused(|saved| saved[2].edx = u32::MAX);
        assert!(said.contains("and 8 more"), "{said}");
    }

    #[test]
    fn another_model_is_refused_with_the_features_that_differ() {
        let said = refused(|saved| {
            saved[1].eax = 0x0006_06a6;
            saved[2].ebx = 1 << 3;
        });
        for part in [
            "family 6, model 106; this host has family 6, model 167",
            "this host lacks bmi1, and the guest knows nothing of avx512f;",
        ] {
            assert!(said.contains(part), "{said}");
        }
        let said = refused(|saved| saved[1].eax = 0x00a2_0f10);
        assert!(said.contains("family 25, model 33"), "{said}");
        assert!(said.contains("no feature differs"), "{said}");
    }

    #[test]
    fn another_vendor_is_refused_whatever_it_is() {
        let said = refused(|saved| saved[0].ebx = 0x1b5b_0a41);
        assert!(said.contains(r"A\n[\x1bineIntel"), "{said}");
        assert!(said.contains("of GenuineIntel"), "{said}");
        let said = refused(Vec::clear);
        assert!(said.contains("no CPUID leaf 0x0"), "{said}");
    }
}
