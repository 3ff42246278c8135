//! Reports and noise to test with. The tests beside the code include this file, too.
#![allow(dead_code)]

use fastrand::Rng;
use husk_bench::{
    Clock, Counts, Failed, HostInfo, Initcall, Phase, PhaseCounts, Report, Run, Subject,
};
use std::collections::BTreeMap;

/// The noise of a boot on a shared machine: a factor of 1 or a little less or more, mostly more: two thirds are within 2 %
/// of the median, one of twenty is disturbed besides, and one of a hundred takes a quarter longer.
pub fn noise(rng: &mut Rng) -> f64 {
    let uniform = |rng: &mut Rng| 1.0 - rng.f64();
    let normal = (-2.0 * uniform(rng).ln()).sqrt() * (std::f64::consts::TAU * rng.f64()).cos();
    let skewed = -uniform(rng).ln();
    let disturbed = if rng.f64() < 0.05 {
        -uniform(rng).ln()
    } else {
        0.0
    };
    1.0 + 0.012 * normal + 0.015 * skewed + 0.15 * disturbed
}

/// The noise's median, from a million draws.
pub const NOISE_MEDIAN: f64 = 1.01376;

/// `runs` noisy values.
pub fn noisy(rng: &mut Rng, base: f64, runs: usize) -> Vec<u64> {
    (0..runs).map(|_| (base * noise(rng)) as u64).collect()
}

/// Nanoseconds that each phase of the sample takes.
pub const STEPS: [(Phase, f64); 9] = [
    (Phase::Exec, 0.9e6),
    (Phase::VmReady, 3.2e6),
    (Phase::KernelLoaded, 1.4e6),
    (Phase::VcpuEntered, 0.3e6),
    (Phase::FirstExit, 0.2e6),
    (Phase::FirstConsoleByte, 14.0e6),
    (Phase::HandsOver, 21.0e6),
    (Phase::Mark, 9.0e6),
    (Phase::Exit, 2.5e6),
];

/// A run whose phases take `steps`, each with noise of its own.
pub fn run(rng: &mut Rng, steps: &[(Phase, f64)]) -> Run {
    let mut at = 0.0;
    let phases = steps.iter().map(|&(phase, step)| {
        at += step * noise(rng);
        (phase, at as u64)
    });
    Run {
        phases: phases.collect(),
        failed: None,
    }
}

/// A subject of `runs` runs.
pub fn subject(name: &str, seed: u64, runs: usize, steps: &[(Phase, f64)]) -> Subject {
    let mut rng = Rng::with_seed(seed);
    Subject {
        name: name.into(),
        command: vec![
            "husk".into(),
            "run".into(),
            "--kernel".into(),
            "vmlinuz".into(),
        ],
        runs: (0..runs).map(|_| run(&mut rng, steps)).collect(),
        ..Subject::default()
    }
}

/// [`STEPS`] with one of them longer or shorter by a factor.
pub fn steps_with(slow: Phase, factor: f64) -> Vec<(Phase, f64)> {
    let step = |(phase, step)| (phase, if phase == slow { step * factor } else { step });
    STEPS.into_iter().map(step).collect()
}

/// A report with one subject that has everything a report can have, and a console that attacks its reader.
pub fn report(seed: u64, steps: &[(Phase, f64)]) -> Report {
    let mut subject = subject("husk", seed, 30, steps);
    let mut failed = run(&mut Rng::with_seed(seed), &steps[..steps.len().min(6)]);
    failed.failed = Some(Failed {
        reason: "no mark within 10 s".into(),
        console: vec![
            "[    0.412345] VFS: Unable to mount root fs on unknown-block(0,0)".into(),
            "</pre><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & &lt;".into(),
            "\u{1b}[31mred\u{1b}[0m \u{202e}backwards\u{0}".into(),
            format!("a line without a space: {}", "A".repeat(300)),
        ],
    });
    subject.runs.insert(1, failed);
    subject.counts = Some(Counts {
        by_phase: steps
            .iter()
            .zip(1..)
            .map(|(&(phase, _), n)| counts(phase, n))
            .collect(),
    });
    let scale = seed % 7 + 20;
    let names = [
        "acpi_init",
        "pci_subsys_init",
        "virtio_blk_init [virtio_blk]",
        "inet_init",
        "populate_rootfs",
    ];
    let initcall = |(name, n): (&&str, u64)| Initcall {
        name: (*name).into(),
        us: 4021 * scale / (20 * n * n),
        returned: if n == 4 { -19 } else { 0 },
    };
    subject.initcalls = names.iter().zip(1..).map(initcall).collect();
    Report {
        created: "2026-03-01T12:00:00Z".into(),
        subjects: vec![subject],
        ..Report::new(Clock::Real, host())
    }
}

fn counts(phase: Phase, n: u64) -> PhaseCounts {
    let exits: BTreeMap<String, u64> = [
        ("io".into(), 311 * n),
        ("mmio".into(), 12 * n),
        ("hlt".into(), n),
    ]
    .into();
    PhaseCounts {
        phase,
        exits: if n > 4 { exits } else { BTreeMap::new() },
        pages_touched: 850 * n,
        bytes_read: 1_048_576 * n,
    }
}

/// The sample's host.
pub fn host() -> HostInfo {
    HostInfo {
        cpu: "AMD EPYC 7B13 64-Core Processor".into(),
        kernel: "6.1.0-28-cloud-amd64".into(),
        husk: "0.1.0".into(),
        cpus: 4,
    }
}
