//! CPUID as the guest sees it: what KVM supports, with the guest's own topology in place of the
//! host's.
//!
//! References are to the Intel SDM, volume 2A, CPUID, and the AMD APM, volume 3, appendix E.

use husk_config::{CpuidModifier, CpuidRegister};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::layout;

/// Most CPUID entries that KVM takes for a vCPU (`KVM_MAX_CPUID_ENTRIES`).
pub const MAX_ENTRIES: usize = 256;

/// How the vCPUs are arranged: one package of equal cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTopology {
    /// Number of vCPUs, 1 to [`layout::MAX_CPUS`]; a multiple of `threads_per_core`.
    pub cpus: u32,
    /// Threads of a core, 1 or 2.
    pub threads_per_core: u32,
}

/// What the guest's CPUID depends on, beside what KVM supports.
#[derive(Debug, Clone, Copy)]
pub struct CpuidConfig<'a> {
    /// How the vCPUs are arranged.
    pub topology: CpuTopology,
    /// Changes of what KVM supports, made first: topology and the like are set over them.
    pub modifiers: &'a [CpuidModifier],
    /// Whether the local APIC timer has its TSC-deadline mode: `KVM_CAP_TSC_DEADLINE_TIMER`, which
    /// takes the in-kernel local APIC. `KVM_GET_SUPPORTED_CPUID` does not say it.
    pub tsc_deadline: bool,
    /// The guest's TSC frequency in kHz, for the hypervisor timing leaf 0x4000_0010. Without it, or
    /// where KVM itself has that leaf, nothing is added.
    pub tsc_khz: Option<u32>,
    /// Whether the guest may see the performance-monitoring unit.
    pub pmu: bool,
}

/// Why there is no CPUID for the guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The number of vCPUs is outside 1 to [`layout::MAX_CPUS`].
    #[error("CPUID for {0} vCPUs: give 1 to {max}", max = layout::MAX_CPUS)]
    Cpus(u32),
    /// Neither one nor two threads a core, or cores that would not be full.
    #[error(
        "CPUID for {cpus} vCPUs with {threads_per_core} threads per core: give 1 thread, or 2 and \
         an even number of vCPUs"
    )]
    Threads {
        /// Number of vCPUs.
        cpus: u32,
        /// Threads of a core.
        threads_per_core: u32,
    },
    /// KVM's list lacks a leaf that every x86-64 processor has.
    #[error("KVM reports no CPUID leaf {0:#x}: use a host kernel whose KVM works")]
    MissingLeaf(u32),
    /// A change of a leaf that KVM's list does not have.
    #[error(
        "cpu-config changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which this host's KVM does \
         not have: leave it out, or use another host"
    )]
    NoSuchLeaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// More entries than KVM takes.
    #[error(
        "CPUID has {0} entries and KVM takes {MAX_ENTRIES}: report this with your host's model"
    )]
    TooManyEntries(usize),
    /// There is no vCPU of this index.
    #[error("CPUID for vCPU {index}: the VM has {cpus} vCPUs, counted from 0")]
    NoSuchCpu {
        /// The index asked for.
        index: u32,
        /// Number of vCPUs.
        cpus: u32,
    },
}

/// The CPUID entries that all vCPUs of a VM share, and where they differ.
#[derive(Debug, Clone)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    /// Indices into `entries`, and what is the vCPU's own there.
    own: Vec<(usize, Own)>,
    topology: CpuTopology,
}

impl Template {
    /// The entries of vCPU `index`, whose APIC id is `index`, for `KVM_SET_CPUID2`. Costs one copy.
    ///
    /// # Errors
    /// There is no such vCPU.
    pub fn for_cpu(&self, index: u32) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        let CpuTopology {
            cpus,
            threads_per_core,
        } = self.topology;
        if index >= cpus {
            return Err(Error::NoSuchCpu { index, cpus });
        }
        let mut entries = self.entries.clone();
        for (at, own) in &self.own {
            let Some(entry) = entries.get_mut(*at) else {
                continue;
            };
            match own {
                Own::Initial => entry.ebx = entry.ebx & 0x00ff_ffff | index << 24,
                Own::X2Apic => entry.edx = index,
                Own::Extended => {
                    entry.eax = index;
                    // The core's id is 8 bits wide; there are at most 64.
                    entry.ebx = entry.ebx & !0xff | (index / threads_per_core);
                }
            }
        }
        Ok(entries)
    }
}

/// Makes what is common to all vCPUs out of the entries that `KVM_GET_SUPPORTED_CPUID` gave.
///
/// Processors of vendors other than Intel, AMD and Hygon get what applies to any.
///
/// # Errors
/// The topology is impossible, a leaf that every processor has is missing in `supported`, or there
/// are more than [`MAX_ENTRIES`] entries.
pub fn prepare(
    supported: &[kvm_cpuid_entry2],
    config: &CpuidConfig<'_>,
) -> Result<Template, Error> {
    check(&config.topology)?;
    let too_many = |entries: usize| (entries > MAX_ENTRIES).then_some(entries);
    if let Some(entries) = too_many(supported.len()) {
        return Err(Error::TooManyEntries(entries));
    }
    let shape = Shape::new(&config.topology);
    let mut leaves = Leaves(Vec::with_capacity(supported.len() + 8));
    leaves.0.extend_from_slice(supported);
    for modifier in config.modifiers {
        modify(&mut leaves, modifier)?;
    }

    let vendor = Vendor::of(leaves.get(0).ok_or(Error::MissingLeaf(0))?);
    features(leaves.get_mut(1).ok_or(Error::MissingLeaf(1))?, config);
    timer_and_power(&mut leaves);
    if !config.pmu {
        hide_pmu(&mut leaves);
    }
    caches(&mut leaves, LEAF_CACHES_INTEL, &shape);
    caches(&mut leaves, LEAF_CACHES_AMD, &shape);
    x2apic_topology(&mut leaves, LEAF_TOPOLOGY, &shape);
    x2apic_topology(&mut leaves, LEAF_TOPOLOGY_V2, &shape);
    amd_topology(&mut leaves, vendor, &shape);
    hide_memory_encryption(&mut leaves);
    if let Some(tsc_khz) = config.tsc_khz {
        timing(&mut leaves, tsc_khz);
    }
    // Half of what KVM lists is empty, and a leaf that is absent reads as zeros; KVM searches its
    // list leaf by leaf.
    leaves
        .0
        .retain(|leaf| leaf.eax | leaf.ebx | leaf.ecx | leaf.edx != 0);

    if let Some(entries) = too_many(leaves.0.len()) {
        return Err(Error::TooManyEntries(entries));
    }
    let own = leaves.0.iter().enumerate();
    let own = own
        .filter_map(|(at, entry)| Some((at, Own::of(entry)?)))
        .collect();
    Ok(Template {
        entries: leaves.0,
        own,
        topology: config.topology,
    })
}

const LEAF_CACHES_INTEL: u32 = 0x4;
const LEAF_POWER: u32 = 0x6;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_PMU_EXTENDED: u32 = 0x23;
const LEAF_KVM: u32 = 0x4000_0000;
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_EXTENDED: u32 = 0x8000_0000;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_SIZES: u32 = 0x8000_0008;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;
const LEAF_MEMORY_ENCRYPTION: u32 = 0x8000_001f;
const LEAF_PMU_AMD: u32 = 0x8000_0022;
const LEAF_TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

/// Leaf 1, ECX.
const PDCM: u32 = 1 << 15;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the logical processor count in EBX is valid.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the local APIC timer always runs.
const ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001, ECX, of AMD.
const CMP_LEGACY: u32 = 1 << 1;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Core, northbridge and last-level-cache performance counters.
const PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Level types of leaves 0xB and 0x1F, in ECX bits 15 to 8.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// KVM's local APIC timer counts nanoseconds.
const LOCAL_APIC_KHZ: u32 = 1_000_000;
/// Cache line size that CLFLUSH works on, in units of 8 bytes.
const CLFLUSH_SIZE: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    /// AMD, or Hygon, whose processors are AMD's.
    Amd,
    /// Intel and all others.
    Other,
}

impl Vendor {
    fn of(leaf: &kvm_cpuid_entry2) -> Self {
        let mut name = [0; 12];
        let words = [leaf.ebx, leaf.edx, leaf.ecx];
        for (bytes, word) in name.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        match &name {
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Other,
        }
    }
}

/// Which APIC id of a vCPU's own an entry has.
#[derive(Debug, Clone, Copy)]
enum Own {
    /// Leaf 1: EBX bits 31 to 24.
    Initial,
    /// Leaves 0xB and 0x1F: EDX.
    X2Apic,
    /// Leaf 0x8000_001E: EAX, and the core's id in EBX.
    Extended,
}

impl Own {
    fn of(entry: &kvm_cpuid_entry2) -> Option<Self> {
        match entry.function {
            1 => Some(Own::Initial),
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => Some(Own::X2Apic),
            LEAF_TOPOLOGY_AMD => Some(Own::Extended),
            _ => None,
        }
    }
}

/// The topology in the numbers that CPUID wants.
struct Shape {
    cpus: u32,
    threads: u32,
    /// APIC ids that a core takes: a power of two.
    core_ids: u32,
    /// APIC ids that the package takes: a power of two.
    package_ids: u32,
}

impl Shape {
    fn new(topology: &CpuTopology) -> Self {
        Shape {
            cpus: topology.cpus,
            threads: topology.threads_per_core,
            core_ids: topology.threads_per_core.next_power_of_two(),
            package_ids: topology.cpus.next_power_of_two(),
        }
    }

    fn core_shift(&self) -> u32 {
        self.core_ids.trailing_zeros()
    }

    fn package_shift(&self) -> u32 {
        self.package_ids.trailing_zeros()
    }
}

fn check(topology: &CpuTopology) -> Result<(), Error> {
    // 64 is also what the 6 bits for cores in leaf 4 hold.
    const _: () = assert!(layout::MAX_CPUS <= 64);
    let CpuTopology {
        cpus,
        threads_per_core,
    } = *topology;
    if !(1..=layout::MAX_CPUS).contains(&cpus) {
        return Err(Error::Cpus(cpus));
    }
    if !matches!(threads_per_core, 1 | 2) || !cpus.is_multiple_of(threads_per_core) {
        return Err(Error::Threads {
            cpus,
            threads_per_core,
        });
    }
    Ok(())
}

/// The entries under construction. There are a few dozen, looked through a dozen times per VM.
struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    fn get(&self, function: u32) -> Option<&kvm_cpuid_entry2> {
        self.0.iter().find(|entry| entry.function == function)
    }

    fn get_mut(&mut self, function: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0.iter_mut().find(|entry| entry.function == function)
    }

    fn subleaves(&mut self, function: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0
            .iter_mut()
            .filter(move |entry| entry.function == function)
    }

    fn remove(&mut self, function: u32) {
        self.0.retain(|entry| entry.function != function);
    }

    /// Whether the guest may ask for a leaf: the first leaf of its range says which is the last.
    fn in_range(&self, function: u32) -> bool {
        let first = self.get(function & 0xffff_0000);
        first.is_some_and(|first| function <= first.eax)
    }
}

fn modify(leaves: &mut Leaves, modifier: &CpuidModifier) -> Result<(), Error> {
    let CpuidModifier { leaf, subleaf, .. } = *modifier;
    let entry = leaves.subleaves(leaf).find(|entry| entry.index == subleaf);
    let entry = entry.ok_or(Error::NoSuchLeaf { leaf, subleaf })?;
    entry.flags = modifier.flags;
    for change in &modifier.modifiers {
        let register = match change.register {
            CpuidRegister::Eax => &mut entry.eax,
            CpuidRegister::Ebx => &mut entry.ebx,
            CpuidRegister::Ecx => &mut entry.ecx,
            CpuidRegister::Edx => &mut entry.edx,
        };
        *register = change.bitmap.apply(u64::from(*register)) as u32;
    }
    Ok(())
}

/// Leaf 1. KVM itself keeps OSXSAVE in step with CR4, and the APIC bit with the APIC base register.
fn features(leaf: &mut kvm_cpuid_entry2, config: &CpuidConfig<'_>) {
    let logical = config.topology.cpus.next_power_of_two();
    let clflush = match leaf.ebx >> 8 & 0xff {
        0 => CLFLUSH_SIZE,
        size => size,
    };
    leaf.ebx = leaf.ebx & 0xff | clflush << 8 | logical << 16;
    leaf.ecx |= HYPERVISOR | X2APIC;
    set(&mut leaf.ecx, TSC_DEADLINE, config.tsc_deadline);
    set(&mut leaf.edx, HTT, config.topology.cpus > 1);
}

fn set(register: &mut u32, bits: u32, on: bool) {
    *register = if on {
        *register | bits
    } else {
        *register & !bits
    };
}

/// Leaf 6: the guest has no frequency or thermal control. Without ARAT Linux looks for another
/// timer to wake an idle processor, and with hardware-reduced ACPI there is none.
fn timer_and_power(leaves: &mut Leaves) {
    if !leaves.in_range(LEAF_POWER) {
        return;
    }
    leaves.remove(LEAF_POWER);
    leaves.0.push(kvm_cpuid_entry2 {
        function: LEAF_POWER,
        eax: ARAT,
        ..Default::default()
    });
}

fn hide_pmu(leaves: &mut Leaves) {
    for leaf in [LEAF_PMU, LEAF_PMU_EXTENDED, LEAF_PMU_AMD] {
        leaves.remove(leaf);
    }
    if let Some(features) = leaves.get_mut(1) {
        features.ecx &= !PDCM;
    }
    // Reserved bits with Intel.
    if let Some(features) = leaves.get_mut(LEAF_EXTENDED_FEATURES) {
        features.ecx &= !PERFORMANCE_COUNTERS;
    }
}

/// Leaves 4 (Intel) and 0x8000_001D (AMD), which share a format: each subleaf is a cache, until one
/// of type 0. The sizes stay the host's. First and second level belong to a core, a third level to
/// the package.
fn caches(leaves: &mut Leaves, function: u32, shape: &Shape) {
    for cache in leaves.subleaves(function) {
        if cache.eax & 0x1f == 0 {
            continue;
        }
        let level = cache.eax >> 5 & 7;
        let sharing = if level >= 3 {
            shape.package_ids
        } else {
            shape.core_ids
        };
        cache.eax = cache.eax & 0x3fff | (sharing - 1) << 14;
        if function == LEAF_CACHES_INTEL {
            let cores = shape.package_ids / shape.core_ids;
            cache.eax |= (cores - 1) << 26;
        }
    }
}

/// Leaves 0xB and 0x1F. Linux reads both on Intel and the first on AMD; KVM gives them empty or, in
/// old versions, with the host's topology. Where the processor has no such leaf none is invented:
/// leaves 1 and 4 and AMD's own then say the same.
fn x2apic_topology(leaves: &mut Leaves, function: u32, shape: &Shape) {
    leaves.remove(function);
    if !leaves.in_range(function) {
        return;
    }
    let levels = [
        (shape.core_shift(), shape.threads, LEVEL_SMT),
        (shape.package_shift(), shape.cpus, LEVEL_CORE),
        (0, 0, 0),
    ];
    for (index, (shift, threads, level)) in (0..).zip(levels) {
        leaves.0.push(kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: threads,
            ecx: index | level << 8,
            ..Default::default()
        });
    }
}

/// What AMD has of its own: CmpLegacy and TopologyExtensions in leaf 0x8000_0001, thread count and
/// APIC id size in 0x8000_0008, and 0x8000_001E. Leaf 0x8000_0026 is left out, for which kernels
/// then use 0xB.
fn amd_topology(leaves: &mut Leaves, vendor: Vendor, shape: &Shape) {
    leaves.remove(LEAF_TOPOLOGY_AMD);
    leaves.remove(LEAF_TOPOLOGY_AMD_V2);
    if vendor != Vendor::Amd {
        return;
    }
    // Threads can be told in no other way, so these leaves are there for them whatever the host's processor has.
    let threads = shape.threads > 1;
    if threads && let Some(first) = leaves.get_mut(LEAF_EXTENDED) {
        first.eax = first.eax.max(LEAF_TOPOLOGY_AMD);
    }
    let in_range = leaves.in_range(LEAF_TOPOLOGY_AMD);
    let mut extensions = false;
    if let Some(features) = leaves.get_mut(LEAF_EXTENDED_FEATURES) {
        set(&mut features.ecx, CMP_LEGACY, shape.cpus > 1);
        extensions = (threads || features.ecx & TOPOLOGY_EXTENSIONS != 0) && in_range;
        set(&mut features.ecx, TOPOLOGY_EXTENSIONS, extensions);
    }
    if let Some(sizes) = leaves.get_mut(LEAF_SIZES) {
        sizes.ecx = shape.package_shift() << 12 | (shape.cpus - 1);
    }
    if extensions {
        // One node in the package.
        leaves.0.push(kvm_cpuid_entry2 {
            function: LEAF_TOPOLOGY_AMD,
            ebx: (shape.threads - 1) << 8,
            ..Default::default()
        });
    } else {
        leaves.remove(LEAF_CACHES_AMD);
    }
}

/// KVM lists SEV where the host can make SEV guests. This is none, and a Linux that sees the leaf
/// reads an MSR which such a guest only has, before it can handle the fault.
fn hide_memory_encryption(leaves: &mut Leaves) {
    leaves.remove(LEAF_MEMORY_ENCRYPTION);
}

/// Adds the timing leaf that VMware introduced: TSC and local APIC timer frequency in kHz.
fn timing(leaves: &mut Leaves, tsc_khz: u32) {
    let Some(first) = leaves.get_mut(LEAF_KVM) else {
        return;
    };
    if first.ebx.to_le_bytes() != *b"KVMK" || first.eax >= LEAF_TIMING {
        return;
    }
    first.eax = LEAF_TIMING;
    leaves.remove(LEAF_TIMING);
    leaves.0.push(kvm_cpuid_entry2 {
        function: LEAF_TIMING,
        eax: tsc_khz,
        ebx: LOCAL_APIC_KHZ,
        ..Default::default()
    });
}

#[cfg(test)]
mod tests;
