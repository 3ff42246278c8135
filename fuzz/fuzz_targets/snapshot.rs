//! A snapshot's files: the state with changes somewhere in it, a list of a diff's pages, a working set, and what is none of these.
#![no_main]

use arbitrary::Arbitrary;
use husk_config::{DriveOverride, LoadSnapshot, NetworkOverride, VsockOverride};
use husk_fuzz::bytes::{Bytes, Few, Rare};
use husk_fuzz::json::{Change, change};
use husk_snapshot::{PAGE, Pages, WorkingSet, first_line};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Memory of the snapshot that is changed.
const MEMORY: u64 = 128 << 20;

#[derive(Debug, Arbitrary)]
enum Input {
    /// The state with changes.
    State {
        changes: Few<Change, 8>,
        load: Load,
        /// It is a diff, of these pages.
        diff: Rare<Bytes>,
    },
    /// What is behind a first line that fits; and all of a file.
    Any(Bytes, Bytes),
    /// Pages of two diffs.
    Pages(Bytes, Bytes),
    /// Lines of a working set.
    WorkingSet(Bytes),
    /// Diffs that are laid over each other.
    Merge {
        base: Few<Change, 4>,
        base_diff: Rare<Bytes>,
        diff: Few<Change, 4>,
        pages: Few<(u8, u8), 8>,
    },
}

#[derive(Debug, Arbitrary)]
struct Load {
    track: bool,
    drive: Rare<Bytes>,
    network: Rare<(Bytes, Option<Bytes>)>,
    vsock: Rare<u32>,
    working_set: Rare<Bytes>,
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(&bytes.0).into_owned()
}

/// One that was made, with what later ones have.
fn state() -> &'static Value {
    static STATE: OnceLock<Value> = OnceLock::new();
    STATE.get_or_init(|| {
        let file = include_bytes!("../../resources/snapshots/version-1.state");
        let body = file.splitn(2, |&byte| byte == b'\n').nth(1);
        let mut state: Value = serde_json::from_slice(body.expect("two parts")).expect("JSON");
        let config = &mut state["config"];
        config["drives"] =
            json!([{ "drive_id": "d", "path_on_host": "/dev/null", "is_root_device": true }]);
        config["network-interfaces"] = json!([{ "iface_id": "n", "host_dev_name": "tap0" }]);
        config["vsock"] = json!({ "guest_cid": 3, "uds_path": "/tmp/vsock" });
        config["entropy"] = json!({});
        config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": true });
        let platform = &mut state["platform"];
        platform["hotplug"] = json!({ "came": 0, "shall_go": 2, "going": 2, "gone": 4 });
        platform["hotplug_slots"] = 8.into();
        platform["generation_id"] = 0x1000.into();
        state["lineage"] = json!({ "id": "ab" });
        state["devices"] =
            json!({ "devices": [{ "id": "d", "number": 1, "state": {} }], "host_bridge": [] });
        state
    })
}

fn in_memory(parts: &[&[u8]]) -> (File, PathBuf) {
    let mut file = File::from(memfd_create("state", MemfdFlags::CLOEXEC).expect("memory"));
    parts
        .iter()
        .for_each(|part| file.write_all(part).expect("memory"));
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

fn whole(body: &[u8]) -> (File, PathBuf) {
    in_memory(&[&first_line(body).expect("a line of JSON"), body])
}

fn describe(path: &Path) {
    match husk_vmm::describe_snapshot(path) {
        Ok(said) => assert!(said.starts_with("a snapshot")),
        Err(refused) => is_short(&husk_vmm::chain(&refused)),
    }
}

/// Inputs are, and what is said of them.
fn is_short(said: &str) {
    assert!(
        !said.is_empty() && said.len() < 8192,
        "{} bytes",
        said.len()
    );
    assert!(!said.contains('\n'), "{said}");
}

fn load(changes: &[Change], how: Load, diff: Option<Bytes>) {
    let mut state = state().clone();
    if let Some(pages) = diff {
        state["lineage"]["diff"] = json!({ "parent": "cd", "pages": text(&pages) });
    }
    change(&mut state, changes);
    let (_state, snapshot_path) = whole(state.to_string().as_bytes());
    describe(&snapshot_path);
    let (memory, mem_file_path) = in_memory(&[]);
    let size = state.get("memory_size").and_then(Value::as_u64);
    let _ = ftruncate(&memory, size.unwrap_or(MEMORY).min(1 << 40));
    let set = how.working_set.0.map(|lines| working_set(&lines));
    let load = LoadSnapshot {
        snapshot_path,
        mem_file_path: Some(mem_file_path),
        track_dirty_pages: how.track,
        prefetch: set.as_ref().map(|(_, path)| path.clone()),
        drive_overrides: Vec::from_iter(how.drive.0.map(|name| DriveOverride {
            drive_id: text(&name),
            path_on_host: "/dev/null".into(),
        })),
        network_overrides: Vec::from_iter(how.network.0.map(|(name, mac)| NetworkOverride {
            iface_id: text(&name),
            host_dev_name: Some("tap1".into()),
            guest_mac: mac.as_ref().map(text),
        })),
        vsock_override: how.vsock.0.map(|cid| VsockOverride {
            uds_path: None,
            guest_cid: Some(cid),
        }),
        ..LoadSnapshot::default()
    };
    if let Err(refused) = husk_vmm::fuzzing::load_without_kvm(&load) {
        is_short(&husk_vmm::chain(&refused));
    }
}

fn working_set(lines: &Bytes) -> (File, PathBuf) {
    let body = [
        format!("working set of {MEMORY} bytes\n").as_bytes(),
        &lines.0,
    ]
    .concat();
    whole(&body)
}

/// Every page is where it may be, behind those before.
fn check_runs(runs: impl Iterator<Item = (u64, u64)>, end: u64) {
    let mut free = 0;
    for (first, count) in runs {
        assert!(count > 0 && first >= free && first + count <= end);
        free = first + count;
    }
}

fn pages(first: &Bytes, second: &Bytes) {
    let lists = [first, second].map(|bytes| Pages::of_text(&text(bytes)));
    let [Some(first), Some(second)] = lists else {
        return;
    };
    let both = first.and(&second);
    for pages in [&first, &second, &both] {
        check_runs(
            pages.runs().iter().map(|run| (run.first, run.count)),
            1 << 52,
        );
        assert_eq!(Pages::of_text(&pages.to_text()).as_ref(), Some(pages));
    }
    assert!(both.count() >= first.count().max(second.count()));
}

/// Of 16 pages, each with a number in it.
fn merge(base: [Value; 2], pages: &[(u8, u8)]) {
    const SIZE: u64 = 16 * PAGE;
    let dir = std::env::temp_dir().join(format!("husk-fuzz-merge-{}", std::process::id()));
    let paths = ["base", "diff"].map(|name| dir.join(name));
    for (path, state) in paths.iter().zip(base) {
        std::fs::create_dir_all(path).expect("a folder");
        husk_snapshot::write_state(&path.join(husk_snapshot::STATE), &state).expect("a file");
        let memory = File::create(path.join(husk_snapshot::MEMORY)).expect("a file");
        let size = state["memory_size"].as_u64().unwrap_or(SIZE).min(1 << 30);
        memory.set_len(size).expect("a file");
        for &(page, byte) in pages {
            use std::os::unix::fs::FileExt;
            let at = u64::from(page % 16) * PAGE;
            memory.write_all_at(&[byte; 64], at).expect("a file");
        }
    }
    let [base, diff] = &paths;
    if let Err(refused) = husk_snapshot::merge(base, diff, None) {
        is_short(&refused.to_string());
    }
    let left = std::fs::read_dir(&dir).expect("a folder").count();
    assert_eq!(left, 2, "something is left over");
    std::fs::remove_dir_all(&dir).expect("a folder");
}

fn merge_changed(
    base: Few<Change, 4>,
    base_diff: Option<Bytes>,
    diff: Few<Change, 4>,
    pages: Few<(u8, u8), 8>,
) {
    let mut lower = json!({ "memory_size": 16 * PAGE, "lineage": { "id": "ab" } });
    if let Some(pages) = base_diff {
        lower["lineage"]["diff"] = json!({ "parent": "ef", "pages": text(&pages) });
    }
    let lineage = json!({ "id": "cd", "diff": { "parent": "ab", "pages": "1+2,3" } });
    let mut upper = json!({ "memory_size": 16 * PAGE, "lineage": lineage });
    change(&mut lower, &base.0);
    change(&mut upper, &diff.0);
    merge([lower, upper], &pages.0);
}

fuzz_target!(|input: Input| match input {
    Input::State {
        changes,
        load: how,
        diff,
    } => load(&changes.0, how, diff.0),
    Input::Any(body, file) => {
        describe(&whole(&body.0).1);
        describe(&in_memory(&[&file.0]).1);
    }
    Input::Pages(first, second) => pages(&first, &second),
    Input::WorkingSet(lines) => {
        let (_file, path) = working_set(&lines);
        if let Ok(set) = WorkingSet::read(&path, MEMORY) {
            check_runs(set.runs().iter().copied(), MEMORY / PAGE);
        }
    }
    Input::Merge {
        base,
        base_diff,
        diff,
        pages,
    } => merge_changed(base, base_diff.0, diff, pages),
});
