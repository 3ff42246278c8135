//! What time is here, and what host this is.

use husk_bench::{Clock, HostInfo};
use rustix::time::{ClockId, clock_gettime};
use std::arch::x86_64::__cpuid;
use std::hint::black_box;
use std::time::Duration;

/// Time on CLOCK_MONOTONIC, which processes share.
pub fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

/// Whether time passes here, or instructions are counted: QEMU's TCG with `-icount shift=0`, where one is a nanosecond.
pub fn clock() -> Clock {
    match is_tcg() && counts_instructions() {
        true => Clock::Virtual,
        false => Clock::Real,
    }
}

/// The hypervisor's signature, CPUID leaf 0x4000_0000.
fn is_tcg() -> bool {
    let leaf = __cpuid(0x4000_0000);
    let words = [leaf.ebx, leaf.ecx, leaf.edx];
    words.map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG"
}

const TURNS: u64 = 100_000;

/// A loop takes a whole number of nanoseconds a turn, and the same number each time.
fn counts_instructions() -> bool {
    // An interrupt may be in one of them.
    let mut times: Vec<u64> = (0..7).map(|_| time_of_loop()).collect();
    times.sort_unstable();
    let (Some(&least), Some(&middle)) = (times.first(), times.get(3)) else {
        return false;
    };
    let per_turn = (least + TURNS / 2) / TURNS;
    let whole = least.abs_diff(per_turn * TURNS) < TURNS / 50;
    whole && per_turn > 0 && middle - least < least / 200
}

fn time_of_loop() -> u64 {
    let begin = now();
    for turn in 0..TURNS {
        black_box(turn);
    }
    u64::try_from((now().saturating_sub(begin)).as_nanos()).unwrap_or(u64::MAX)
}

/// This host, for the report.
pub fn host() -> HostInfo {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = text("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "model name").then(|| value.trim().to_owned())
    });
    HostInfo {
        cpu: model.unwrap_or_default(),
        kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        husk: env!("CARGO_PKG_VERSION").into(),
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
    }
}
