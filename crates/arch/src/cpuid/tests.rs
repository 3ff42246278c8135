use super::*;

fn leaf(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// A cache as a host of many cores describes it: shared by 64 at the third level.
fn cache(function: u32, index: u32, kind: u32, level: u32) -> kvm_cpuid_entry2 {
    let sharing = if level == 3 { 63 } else { 1 };
    leaf(
        function,
        index,
        [kind | level << 5 | sharing << 14 | 31 << 26, 0x3f, 0x1ff, 0],
    )
}

fn kvm_leaves() -> [kvm_cpuid_entry2; 2] {
    let signature = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
    let [b, c, d] = signature;
    [
        leaf(LEAF_KVM, 0, [0x4000_0001, b, c, d]),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
    ]
}

fn vendor(max: u32, name: &[u8; 12]) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    leaf(0, 0, [max, word(0), word(8), word(4)])
}

fn intel() -> Vec<kvm_cpuid_entry2> {
    let mut leaves = vec![
        vendor(0x1f, b"GenuineIntel"),
        leaf(1, 0, [0xc06f2, 0x2540_0800, PDCM, HTT]),
        leaf(2, 0, [0x00fe_ff01, 0xf0, 0, 0]),
        cache(4, 0, 1, 1),
        cache(4, 1, 2, 1),
        cache(4, 2, 3, 2),
        cache(4, 3, 3, 3),
        leaf(4, 4, [0; 4]),
        leaf(6, 0, [0x77, 2, 9, 0]),
        leaf(0xa, 0, [0x0730_0405, 0, 0, 0x603]),
        leaf(0xb, 0, [1, 2, 0x100, 0x25]),
        leaf(0xb, 1, [7, 96, 0x201, 0x25]),
        leaf(0x1f, 0, [1, 2, 0x100, 0x25]),
        leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0]),
        leaf(0x8000_0002, 0, [0x6574_6e49, 0x2952_286c, 0, 0]),
        leaf(0x8000_0008, 0, [0x3934, 0, 0, 0]),
    ];
    leaves.extend(kvm_leaves());
    leaves
}

fn amd(name: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = vec![
        vendor(0x10, name),
        leaf(1, 0, [0x00a0_0f11, 0x2540_0800, 0, HTT]),
        leaf(6, 0, [4, 0, 0, 0]),
        leaf(0xb, 0, [0; 4]),
        leaf(0x8000_0000, 0, [0x8000_0026, 0, 0, 0]),
        leaf(
            0x8000_0001,
            0,
            [0, 0, TOPOLOGY_EXTENSIONS | PERFORMANCE_COUNTERS | 1, 0],
        ),
        leaf(0x8000_0008, 0, [0x3030, 0x111ef257, 0x0000_707f, 0]),
        cache(0x8000_001d, 0, 1, 1),
        cache(0x8000_001d, 1, 2, 1),
        cache(0x8000_001d, 2, 3, 2),
        cache(0x8000_001d, 3, 3, 3),
        leaf(0x8000_001d, 4, [0; 4]),
        leaf(0x8000_001e, 0, [0x25, 0x0112, 0x0103, 0]),
        leaf(0x8000_001f, 0, [0x2, 0x33, 0, 0]),
        leaf(0x8000_0022, 0, [1, 6, 0, 0]),
        leaf(0x8000_0026, 0, [1, 2, 0x100, 0x25]),
    ];
    leaves.extend(kvm_leaves());
    leaves
}

fn config(cpus: u32, threads_per_core: u32) -> CpuidConfig<'static> {
    let topology = CpuTopology {
        cpus,
        threads_per_core,
    };
    CpuidConfig {
        topology,
        modifiers: &[],
        tsc_deadline: true,
        tsc_khz: None,
        pmu: false,
    }
}

fn guest(supported: &[kvm_cpuid_entry2], config: &CpuidConfig, cpu: u32) -> Guest {
    Guest(prepare(supported, config).unwrap().for_cpu(cpu).unwrap())
}

/// CPUID as a guest reads it: a leaf that is not there reads as zeros.
struct Guest(Vec<kvm_cpuid_entry2>);

impl Guest {
    fn read(&self, function: u32, index: u32) -> [u32; 4] {
        let matches: Vec<_> = self
            .0
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index))
            .collect();
        assert!(matches.len() <= 1, "{function:#x}.{index} is there twice");
        let found = matches.first();
        found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    /// APIC id bits per core and package, and threads in each, by leaf 0xB or 0x1F.
    fn levels(&self, function: u32) -> [(u32, u32); 2] {
        let [smt, core, end] = [0, 1, 2].map(|index| self.read(function, index));
        assert_eq!([smt[2], core[2], end[2]], [0x100, 0x201, 2], "level types");
        assert_eq!((end[0], end[1]), (0, 0), "the list ends");
        [(smt[0], smt[1]), (core[0], core[1])]
    }
}

#[test]
fn every_apic_id_is_the_index_of_its_vcpu() {
    for supported in [intel(), amd(b"AuthenticAMD")] {
        for cpus in [1, 2, 3, 4, 63, 64] {
            let template = prepare(&supported, &config(cpus, 1)).unwrap();
            for cpu in 0..cpus {
                let guest = Guest(template.for_cpu(cpu).unwrap());
                assert_eq!(guest.read(1, 0)[1] >> 24, cpu);
                for index in 0..3 {
                    assert_eq!(guest.read(0xb, index)[3], cpu);
                }
            }
            let error = template.for_cpu(cpus).unwrap_err();
            assert_eq!(error, Error::NoSuchCpu { index: cpus, cpus });
        }
    }
}

#[test]
fn an_intel_guest_has_one_package_of_its_own_cores() {
    let one = guest(&intel(), &config(1, 1), 0);
    assert_eq!(one.levels(0xb), [(0, 1), (0, 1)]);
    let four = guest(&intel(), &config(4, 1), 3);
    assert_eq!(four.levels(0xb), [(0, 1), (2, 4)]);
    assert_eq!(four.levels(0x1f), four.levels(0xb));
    assert_eq!(four.read(0x1f, 1)[3], 3);
    let six = guest(&intel(), &config(6, 2), 5);
    assert_eq!(six.levels(0xb), [(1, 2), (3, 6)]);
    let most = guest(&intel(), &config(64, 2), 63);
    assert_eq!(most.levels(0xb), [(1, 2), (6, 64)]);
}

#[test]
fn the_logical_processor_count_is_a_power_of_two_and_announced_if_above_one() {
    for (cpus, count) in [(1, 1), (2, 2), (3, 4), (33, 64), (64, 64)] {
        let leaf = guest(&intel(), &config(cpus, 1), 0).read(1, 0);
        assert_eq!(leaf[1] >> 16 & 0xff, count);
        assert_eq!(leaf[1] >> 8 & 0xff, 8, "CLFLUSH stays");
        assert_eq!(leaf[3] & HTT != 0, cpus > 1);
    }
}

#[test]
fn caches_are_shared_within_the_guest_only() {
    for (supported, function) in [(intel(), 4), (amd(b"AuthenticAMD"), 0x8000_001d)] {
        for (cpus, threads, core, package) in [(1, 1, 1, 1), (3, 1, 1, 4), (8, 2, 2, 8)] {
            let guest = guest(&supported, &config(cpus, threads), 0);
            let cores = if function == 4 { package / core } else { 1 };
            for (index, sharing) in [(0, core), (1, core), (2, core), (3, package)] {
                let [eax, ebx, ecx, _] = guest.read(function, index);
                assert_eq!(eax >> 14 & 0xfff, sharing - 1, "{function:#x}.{index}");
                assert_eq!(eax >> 26, cores - 1, "cores in the package");
                assert_eq!((ebx, ecx), (0x3f, 0x1ff), "sizes stay");
            }
            assert_eq!(guest.read(function, 4), [0; 4], "the list ends");
        }
    }
}

#[test]
fn an_amd_or_hygon_guest_has_one_package_of_its_own_cores() {
    for name in [b"AuthenticAMD", b"HygonGenuine"] {
        let guest = guest(&amd(name), &config(6, 2), 5);
        assert_eq!(guest.levels(0xb), [(1, 2), (3, 6)]);
        let [eax, ebx, ecx, edx] = guest.read(0x8000_001e, 0);
        assert_eq!(
            (eax, ebx, ecx, edx),
            (5, 0x0102, 0, 0),
            "thread 5 is in core 2"
        );
        assert_eq!(guest.read(0x8000_0008, 0)[2], 3 << 12 | 5);
        assert_eq!(guest.read(0x8000_0008, 0)[0], 0x3030, "address sizes stay");
        let features = guest.read(0x8000_0001, 0)[2];
        assert_eq!(features, 1 | CMP_LEGACY | TOPOLOGY_EXTENSIONS);
        assert_eq!(guest.read(0x8000_0026, 0), [0; 4]);
    }
    let single = guest(&amd(b"AuthenticAMD"), &config(1, 1), 0);
    assert_eq!(single.read(0x8000_0001, 0)[2] & CMP_LEGACY, 0);
    assert_eq!(single.read(0x8000_0008, 0)[2], 0);
}

#[test]
fn an_amd_host_without_topology_extensions_gives_a_guest_without() {
    let mut supported = amd(b"AuthenticAMD");
    for entry in &mut supported {
        match entry.function {
            0 => entry.eax = 5,
            0x8000_0001 => entry.ecx = 1,
            _ => {}
        }
    }
    let guest = guest(&supported, &config(4, 1), 1);
    for function in [0xb, 0x8000_001d, 0x8000_001e] {
        assert_eq!(guest.read(function, 0), [0; 4], "{function:#x}");
    }
    assert_eq!(guest.read(0x8000_0008, 0)[2], 2 << 12 | 3);
}

#[test]
fn an_unknown_vendor_gets_what_applies_to_any() {
    let mut supported = intel();
    supported[0] = vendor(0x1f, b"  Shanghai  ");
    let guest = guest(&supported, &config(4, 1), 2);
    assert_eq!(guest.levels(0xb), [(0, 1), (2, 4)]);
    assert_eq!(guest.read(4, 3)[0] >> 14 & 0xfff, 3);
    assert_eq!(guest.read(0x8000_0001, 0)[2], 0x121, "no bit of AMD's");
}

#[test]
fn features_that_kvm_s_list_does_not_decide_are_decided_here() {
    let with = guest(&intel(), &config(1, 1), 0).read(1, 0)[2];
    assert_eq!(with, HYPERVISOR | X2APIC | TSC_DEADLINE);
    let without = CpuidConfig {
        tsc_deadline: false,
        ..config(1, 1)
    };
    let mut supported = intel();
    supported[1].ecx |= TSC_DEADLINE;
    assert_eq!(
        guest(&supported, &without, 0).read(1, 0)[2] & TSC_DEADLINE,
        0
    );
    let power = guest(&intel(), &config(1, 1), 0).read(6, 0);
    assert_eq!(power, [ARAT, 0, 0, 0]);
}

#[test]
fn the_pmu_is_hidden_unless_asked_for() {
    let hidden = guest(&intel(), &config(1, 1), 0);
    assert_eq!(hidden.read(0xa, 0), [0; 4]);
    assert_eq!(hidden.read(1, 0)[2] & PDCM, 0);
    let hidden = guest(&amd(b"AuthenticAMD"), &config(1, 1), 0);
    assert_eq!(hidden.read(0x8000_0022, 0), [0; 4]);
    let shown = CpuidConfig {
        pmu: true,
        ..config(1, 1)
    };
    assert_eq!(guest(&intel(), &shown, 0).read(0xa, 0)[0], 0x0730_0405);
    let features = guest(&amd(b"AuthenticAMD"), &shown, 0).read(0x8000_0001, 0)[2];
    assert_eq!(features & PERFORMANCE_COUNTERS, PERFORMANCE_COUNTERS);
}

#[test]
fn what_is_not_topology_stays_as_kvm_has_it() {
    let guest = guest(&intel(), &config(2, 1), 0);
    for function in [2, 0x8000_0002, 0x8000_0008, 0x4000_0000, 0x4000_0001] {
        let before = Guest(intel()).read(function, 0);
        assert_eq!(guest.read(function, 0), before, "{function:#x}");
    }
    assert_eq!(guest.read(1, 0)[0], 0xc06f2, "family, model, stepping");
    assert_eq!(guest.read(0x15, 0), [0; 4]);
}

#[test]
fn a_guest_is_not_told_of_memory_encryption_that_it_does_not_have() {
    let guest = guest(&amd(b"AuthenticAMD"), &config(1, 1), 0);
    assert_eq!(guest.read(0x8000_001f, 0), [0; 4]);
}

#[test]
fn the_timing_leaf_is_added_once_and_announced() {
    let config = CpuidConfig {
        tsc_khz: Some(2_300_000),
        ..config(1, 1)
    };
    let timed = guest(&intel(), &config, 0);
    assert_eq!(timed.read(LEAF_KVM, 0)[0], LEAF_TIMING);
    assert_eq!(timed.read(LEAF_TIMING, 0), [2_300_000, 1_000_000, 0, 0]);
    // KVM has one of its own.
    let mut supported = intel();
    supported
        .iter_mut()
        .filter(|entry| entry.function == LEAF_KVM)
        .for_each(|entry| {
            entry.eax = LEAF_TIMING;
        });
    supported.push(leaf(LEAF_TIMING, 0, [7, 8, 0, 0]));
    assert_eq!(
        guest(&supported, &config, 0).read(LEAF_TIMING, 0),
        [7, 8, 0, 0]
    );
    // Not KVM.
    let bare: Vec<_> = intel()
        .into_iter()
        .filter(|entry| entry.function >> 28 != 4)
        .collect();
    assert_eq!(guest(&bare, &config, 0).read(LEAF_TIMING, 0), [0; 4]);
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |supported: &[kvm_cpuid_entry2], config| prepare(supported, &config).unwrap_err();
    assert_eq!(refused(&intel(), config(0, 1)), Error::Cpus(0));
    assert_eq!(refused(&intel(), config(65, 1)), Error::Cpus(65));
    for (cpus, threads_per_core) in [(3, 2), (1, 2), (2, 0), (4, 4)] {
        let error = refused(&intel(), config(cpus, threads_per_core));
        assert_eq!(
            error,
            Error::Threads {
                cpus,
                threads_per_core
            }
        );
    }
    assert_eq!(refused(&[], config(1, 1)), Error::MissingLeaf(0));
    assert_eq!(refused(&intel()[..1], config(1, 1)), Error::MissingLeaf(1));
    let full = |count| {
        let mut leaves = intel();
        leaves.resize(count, leaf(0xd, 7, [1; 4]));
        leaves
    };
    assert_eq!(
        refused(&full(257), config(1, 1)),
        Error::TooManyEntries(257)
    );
    // What is added counts too.
    let error = refused(&full(256), config(1, 1));
    assert!(matches!(error, Error::TooManyEntries(257..)), "{error:?}");
}

#[test]
fn cpu_config_changes_what_kvm_supports_and_not_the_topology() {
    let modifiers: Vec<CpuidModifier> = serde_json::from_str(
        r#"[{"leaf": "0x80000001", "subleaf": "0x0", "flags": 0,
             "modifiers": [{"register": "ecx", "bitmap": "0b1xxxx0"}, {"register": "edx", "bitmap": "0b1"}]},
            {"leaf": "0x1", "subleaf": "0x0", "flags": 0,
             "modifiers": [{"register": "ebx", "bitmap": "0b11111111xxxxxxxxxxxxxxxxxxxxxxxx"}]}]"#,
    )
    .unwrap();
    let config = CpuidConfig {
        modifiers: &modifiers,
        ..config(4, 1)
    };
    let guest = guest(&intel(), &config, 2);
    // 0x121, with bit 5 set and bit 0 clear.
    assert_eq!(guest.read(0x8000_0001, 0), [0, 0, 0x120, 1]);
    assert_eq!(
        guest.read(1, 0)[1] >> 24,
        2,
        "the APIC id is the vCPU's own"
    );
}

#[test]
fn a_change_of_a_leaf_that_kvm_lacks_is_refused_by_name() {
    for (leaf, subleaf) in [(0x8000_0007, 0), (0xb, 7)] {
        let modifiers = [CpuidModifier {
            leaf,
            subleaf,
            flags: 0,
            modifiers: Vec::new(),
        }];
        let config = CpuidConfig {
            modifiers: &modifiers,
            ..config(1, 1)
        };
        let error = prepare(&intel(), &config).unwrap_err();
        assert_eq!(error, Error::NoSuchLeaf { leaf, subleaf });
        assert!(error.to_string().contains(&format!("{leaf:#x}")), "{error}");
    }
}

#[test]
fn amds_threads_are_told_also_where_the_host_has_no_topology_extensions() {
    let mut supported = amd(b"AuthenticAMD");
    supported.retain(|leaf| leaf.function < 0x8000_001d);
    for leaf in &mut supported {
        match leaf.function {
            0x8000_0000 => leaf.eax = 0x8000_000a,
            0x8000_0001 => leaf.ecx &= !TOPOLOGY_EXTENSIONS,
            _ => {}
        }
    }
    let without = guest(&supported, &config(4, 1), 3);
    assert_eq!(without.read(0x8000_0000, 0)[0], 0x8000_000a);
    assert_eq!(without.read(0x8000_001e, 0), [0; 4]);
    let threads = guest(&supported, &config(4, 2), 3);
    assert_eq!(threads.read(0x8000_0000, 0)[0], 0x8000_001e);
    assert_ne!(threads.read(0x8000_0001, 0)[2] & TOPOLOGY_EXTENSIONS, 0);
    // APIC id 3, two threads a core, core 1.
    assert_eq!(threads.read(0x8000_001e, 0), [3, 1 << 8 | 1, 0, 0]);
}
