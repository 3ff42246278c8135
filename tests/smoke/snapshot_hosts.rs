//! Snapshots of other hosts, which are a real one's, changed: refused before anything of them runs.

use crate::LIMIT;
use crate::common::{Vm, husk, temp_dir, text};
use crate::snapshots::{command, create, paused};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A state whose checksum is right, and that no host has made that is known.
pub fn change(dir: &Path, change: impl FnOnce(&mut Value)) {
    let path = dir.join("state");
    let (_, body) = husk_snapshot::read_parts(&path).unwrap();
    let mut state: Value = serde_json::from_slice(&body).unwrap();
    assert!(state["host"].is_string(), "the host is not told");
    state["host"] = "another one".into();
    change(&mut state);
    husk_snapshot::write_state(&path, &state).unwrap();
}

/// `struct kvm_cpuid_entry2`: ten words, of which these are the leaf, the subleaf and the first of four registers.
const WORDS: usize = 10;
const EAX: usize = 3;

/// Change register `register` (EAX is 0) of a CPUID leaf of all vCPUs.
fn cpuid(state: &mut Value, leaf: u32, register: usize, change: impl Fn(u32) -> u32) {
    for vcpu in state["vcpus"].as_array_mut().unwrap() {
        let hex = vcpu["cpuid"].as_str().unwrap().to_owned();
        let word = |at: usize| {
            let bytes = hex.get(at * 8..at * 8 + 8).unwrap();
            u32::from_str_radix(bytes, 16).unwrap().swap_bytes()
        };
        let entries = hex.len() / 8 / WORDS;
        let entry = (0..entries).find(|e| word(e * WORDS) == leaf && word(e * WORDS + 1) == 0);
        let at = entry.unwrap() * WORDS + EAX + register;
        let new = format!("{:08x}", change(word(at)).swap_bytes());
        let mut changed = hex.clone();
        changed.replace_range(at * 8..at * 8 + 8, &new);
        vcpu["cpuid"] = changed.into();
    }
}

#[test]
fn a_snapshot_of_another_host_is_refused_with_what_differs() {
    let kept = temp_dir();
    create(&paused(), kept.path());
    let refused = |edit: fn(&mut Value), words: &[&str]| {
        let dir = temp_dir();
        for name in ["state", "memory"] {
            std::fs::copy(kept.path().join(name), dir.path().join(name)).unwrap();
        }
        change(dir.path(), edit);
        let ended = command(&["restore", text(dir.path())]);
        ended.expect_status(2);
        assert_eq!(ended.stdout, b"", "the guest has run");
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        for word in words {
            assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
        }
    };
    // Features that no host has, as this is written: reserved bits of leaf 7.
    refused(
        |s| cpuid(s, 7, 3, |edx| edx | 1 << 6),
        &["CPUID 0x7.0 EDX bit 6"],
    );
    // Nor a serial number, or what only Itanium had.
    refused(
        |s| cpuid(s, 1, 3, |edx| edx | 1 << 18 | 1 << 30),
        &["pn, ia64"],
    );
    refused(
        |s| cpuid(s, 0, 1, |_| u32::from_le_bytes(*b"Othe")),
        &["processor of Othe", "and this one's is of "],
    );
    refused(
        |s| {
            cpuid(s, 1, 0, |eax| eax ^ 0x10);
            cpuid(s, 1, 3, |edx| edx | 1 << 18);
        },
        &["another CPU model (family ", "this host lacks pn"],
    );
    refused(
        |s| cpuid(s, 0x8000_0008, 0, |eax| eax & !0xff | 63),
        &["physical addresses of 63 bits"],
    );
    refused(
        |s| {
            // KVM that scales has its limits, too.
            s["vcpus"][0]["tsc_khz"] = 0x7fff_ffff.into();
        },
        &["TSC runs at "],
    );
    refused(
        |s| {
            let msrs = s["vcpus"][1]["msrs"].as_array_mut().unwrap();
            msrs.insert(0, serde_json::json!([0xdead_0000_u32, 1]));
            msrs.push(serde_json::json!([0xdead_0001_u32, 2]));
        },
        &["MSR 0xdead0000 (0x1), 0xdead0001 (0x2)"],
    );
    refused(
        |s| s["vm"]["ioapic"] = "ff".into(),
        &["I/O APIC is not what this KVM takes"],
    );
}

/// What can be known is not asked for again, which takes long where CPUID traps: a snapshot of this host is believed.
#[test]
fn a_snapshot_of_this_host_is_not_compared_with_it() {
    let dir = temp_dir();
    create(&paused(), dir.path());
    let (_, body) = husk_snapshot::read_parts(&dir.path().join("state")).unwrap();
    let own: Value = serde_json::from_slice(&body).unwrap();
    change(dir.path(), |s| {
        cpuid(s, 7, 3, |edx| edx | 1 << 6);
        s["host"] = own["host"].clone();
    });
    let mut vm = Vm::start(husk().args(["restore", text(dir.path())]), LIMIT);
    vm.expect("\n");
    // One of the same host before it booted anew is.
    change(dir.path(), |s| {
        let (_, kvm) = own["host"].as_str().unwrap().split_once(' ').unwrap();
        let boot_id = "00000000-0000-4000-8000-000000000000";
        s["host"] = format!("{boot_id} {kvm}").into();
    });
    let ended = command(&["restore", text(dir.path())]);
    ended.expect_status(2);
    assert!(ended.stderr.contains("EDX bit 6"), "{}", ended.stderr);
}

/// Vendor, family and model, as the host's kernel tells them.
fn this_processor() -> [String; 3] {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    ["vendor_id", "cpu family", "model"].map(|name| {
        let line = told
            .lines()
            .find(|line| line.split('\t').next() == Some(name));
        line.and_then(|line| line.split(": ").nth(1))
            .unwrap()
            .to_owned()
    })
}

/// Those of the processor on which the snapshots in resources/snapshots were made.
const MADE_ON: [&str; 3] = ["GenuineIntel", "6", "167"];

/// The state and the memory of each version that there was, as it was written then. The memory is text here: its size, and each
/// row of 32 bytes that is not zero, with its place.
#[test]
fn snapshots_of_all_versions_go_on() {
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/snapshots");
    for version in ["version-1-ticks"] {
        let dir = temp_dir();
        let state = resources.join(format!("{version}.state"));
        std::fs::copy(&state, dir.path().join("state")).unwrap();
        let memory = std::fs::File::create(dir.path().join("memory")).unwrap();
        let rows = std::fs::read_to_string(resources.join(format!("{version}.memory"))).unwrap();
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (size, rows) = rows.split_once('\n').unwrap();
        memory.set_len(number(size)).unwrap();
        for row in rows.lines() {
            let (place, bytes) = row.split_once(' ').unwrap();
            let bytes: Vec<u8> = (0..bytes.len() / 2)
                .map(|at| number(&bytes[at * 2..at * 2 + 2]) as u8)
                .collect();
            memory.write_all_at(&bytes, number(place)).unwrap();
        }
        let told = command(&["snapshot", "info", text(dir.path())]);
        let told = told.expect_status(0).console();
        assert!(
            told.contains("1 vCPUs, 64 MiB of memory, booted from ticks"),
            "{told}"
        );
        let vm = Vm::start(husk().args(["restore", text(dir.path())]), LIMIT);
        let is_refused = |said: &str| {
            let reasons = [
                "CPU model",
                "with a processor of",
                "TSC runs at",
                "lacks what",
            ];
            reasons.iter().any(|reason| said.contains(reason))
        };
        // Whichever comes first.
        while vm.stdout.bytes().len() < 5000 && !is_refused(&vm.report()) {
            assert!(std::time::Instant::now() < vm.until, "{}", vm.report());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        if vm.stdout.bytes().is_empty() {
            let said = vm.report();
            assert!(
                this_processor() != MADE_ON || !said.contains("CPU model"),
                "{said}"
            );
            println!("{version} was described, and refused on this host, as it must be: {said}");
            continue;
        }
        let said = vm.stdout.bytes();
        let (first, last) = crate::snapshot_crashes::numbers(&said);
        assert!(first > 1 && last > first + 200, "{first} {last}");
        println!("{version} was described, and has gone on from {first} to {last}");
    }
}
