//! Whose VM it is: each that goes on from a snapshot has a generation ID of its own, natively.

use crate::api::Served;
use crate::common::payload::payload;
use crate::common::temp_dir;
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where the ID lies in guest memory.
const PLACE: u64 = 0xf_2000;
/// Bit of the events that the guest is told of.
const NEWS: u64 = 4;

fn places(dir: &Path) -> Value {
    json!({ "snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory") })
}

/// A guest that was just booted, kept.
fn kept(dir: &Path) {
    let served = Served::start(&[]);
    let source = json!({ "kernel_image_path": payload("ticks", "") });
    served.done("PUT", "/boot-source", source);
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 64 });
    served.done("PUT", "/machine-config", machine);
    served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    served.done("PUT", "/snapshot/create", places(dir));
}

/// What is kept of a VM that goes on from a snapshot, before it does.
fn clone(from: &Path, to: &Path) {
    let served = Served::start(&[]);
    served.done("PUT", "/snapshot/load", places(from));
    served.done("PUT", "/snapshot/create", places(to));
}

/// The ID, and what the platform was told.
fn look(dir: &Path) -> ([u8; 16], Value) {
    let memory = std::fs::File::open(dir.join("memory")).unwrap();
    let mut id = [0; 16];
    memory.read_exact_at(&mut id, PLACE).unwrap();
    let (_, body) = husk_snapshot::read_parts(&dir.join("state")).unwrap();
    let state: Value = serde_json::from_slice(&body).unwrap();
    (id, state["platform"].clone())
}

#[test]
fn each_vm_that_goes_on_from_a_snapshot_gets_an_id_of_its_own_and_is_told() {
    let dirs: Vec<_> = (0..4).map(|_| temp_dir()).collect();
    let [first, a, b, c] = [0, 1, 2, 3].map(|at| dirs[at].path());
    kept(first);
    // Two of one snapshot, and one of a VM that went on from a snapshot itself.
    clone(first, a);
    clone(first, b);
    clone(b, c);
    let mut ids = Vec::new();
    for (dir, told) in [(first, 0), (a, NEWS), (b, NEWS), (c, NEWS)] {
        let (id, platform) = look(dir);
        assert_eq!(platform["generation_id"], PLACE);
        assert_eq!(platform["power_events"], told);
        assert_eq!(
            (id[7] >> 4, id[8] >> 6),
            (4, 2),
            "a GUID of version 4: {id:x?}"
        );
        assert!(!ids.contains(&id), "{id:x?}");
        ids.push(id);
    }
}

/// Its guest was never told of a place for an ID, and may have something else there.
#[test]
fn a_snapshot_from_before_there_were_ids_is_left_as_it_was() {
    let (old, new) = (temp_dir(), temp_dir());
    let (old, new) = (old.path(), new.path());
    kept(old);
    let path = old.join("state");
    let (_, body) = husk_snapshot::read_parts(&path).unwrap();
    let mut state: Value = serde_json::from_slice(&body).unwrap();
    let platform = state["platform"].as_object_mut().unwrap();
    platform.remove("generation_id").unwrap();
    husk_snapshot::write_state(&path, &state).unwrap();
    clone(old, new);
    let (before, _) = look(old);
    let (after, platform) = look(new);
    assert_eq!(before, after);
    assert_eq!(platform["generation_id"], Value::Null);
    assert_eq!(platform["power_events"], 0);
}

#[test]
fn a_place_outside_memory_is_refused() {
    let dir = temp_dir();
    kept(dir.path());
    let path = dir.path().join("state");
    let (_, body) = husk_snapshot::read_parts(&path).unwrap();
    let mut state: Value = serde_json::from_slice(&body).unwrap();
    for place in [(64 << 20) - 15, u64::MAX] {
        state["platform"]["generation_id"] = place.into();
        husk_snapshot::write_state(&path, &state).unwrap();
        let mut served = Served::start(&[]);
        let said = served.refused("PUT", "/snapshot/load", places(dir.path()));
        assert!(said.contains("outside guest memory"), "{said}");
        drop(served.vm.take_stdin());
        served.vm.wait().expect_status(1);
    }
}
