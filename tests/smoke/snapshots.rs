//! Snapshots, natively: what a guest was in the middle of goes on in another process.

use crate::api::Served;
use crate::common::payload::payload;
use crate::common::{Ended, Vm, husk, temp_dir, text};
use crate::{LIMIT, file};
use serde_json::{Value, json};
use std::path::Path;

/// A guest that counts, paused.
pub fn paused() -> Served {
    let mut served = Served::start(&[]);
    let source = json!({ "kernel_image_path": payload("ticks", "") });
    served.done("PUT", "/boot-source", source);
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": 64 });
    served.done("PUT", "/machine-config", machine);
    served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    served.vm.stdout_reaches(1000);
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    served
}

pub fn create(served: &Served, dir: &Path) {
    served.done("PUT", "/snapshot/create", places(dir));
}

pub fn places(dir: &Path) -> Value {
    json!({ "snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory") })
}

pub fn load(dir: &Path, resume: bool) -> Value {
    let backend = json!({ "backend_type": "File", "backend_path": dir.join("memory") });
    json!({ "snapshot_path": dir.join("state"), "mem_backend": backend, "resume_vm": resume })
}

/// The numbers that a guest has said are all that there are, one after the other.
#[track_caller]
pub fn assert_counts(said: &[u8]) -> u64 {
    let said = String::from_utf8_lossy(said);
    // The last line may not be whole.
    let whole = said.rsplit_once('\n').unwrap().0;
    let mut last = 0;
    for line in whole.lines() {
        let number = u64::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("{line:?}"));
        assert_eq!(number, last + 1, "{line:?}");
        last = number;
    }
    last
}

#[test]
fn a_guest_goes_on_where_it_was() {
    let dir = temp_dir();
    let first = paused();
    create(&first, dir.path());
    let before = first.vm.stdout.bytes();
    for resume in [true, false] {
        let mut second = Served::start(&[]);
        second.done("PUT", "/snapshot/load", load(dir.path(), resume));
        if !resume {
            assert_eq!(second.get("/")["state"], "Paused");
            assert_eq!(second.vm.stdout.bytes(), b"");
            second.done("PATCH", "/vm", json!({ "state": "Resumed" }));
        }
        second.vm.stdout_reaches(5000);
        assert_eq!(second.get("/")["state"], "Running");
        assert_eq!(second.get("/machine-config")["vcpu_count"], 2);
        let ended = second.stop();
        ended.expect_status(0);
        let both = [&before[..], &ended.stdout].concat();
        assert!(assert_counts(&both) > 200);
    }
    // The one that was kept goes on, too, and its memory is its own.
    let mut first = first;
    first.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    first.vm.stdout_reaches(before.len() + 5000);
    assert_counts(&first.stop().expect_status(0).stdout);
}

#[test]
fn a_snapshot_of_a_snapshot_is_as_good() {
    let dir = temp_dir();
    let first = paused();
    create(&first, dir.path());
    let mut said = first.vm.stdout.bytes();
    drop(first);
    for _ in 0..5 {
        let mut next = Served::start(&[]);
        next.done("PUT", "/snapshot/load", load(dir.path(), true));
        next.vm.stdout_reaches(300);
        next.done("PATCH", "/vm", json!({ "state": "Paused" }));
        // Over the files that its own memory comes from.
        create(&next, dir.path());
        said.extend(next.stop().stdout);
    }
    assert_counts(&said);
}

#[test]
fn only_what_was_touched_is_written() {
    use std::os::unix::fs::MetadataExt;
    let dir = temp_dir();
    create(&paused(), dir.path());
    let memory = std::fs::metadata(dir.path().join("memory")).unwrap();
    assert_eq!(memory.len(), 64 << 20);
    assert!(memory.blocks() * 512 < 1 << 20, "{}", memory.blocks());
}

#[test]
fn a_snapshot_is_refused_where_it_cannot_be_made() {
    let dir = temp_dir();
    let served = paused();
    let nowhere = dir.path().join("no");
    let said = served.refused("PUT", "/snapshot/create", places(&nowhere));
    assert!(said.contains("cannot write"), "{said}");
    let mut diff = places(dir.path());
    diff["snapshot_type"] = "Diff".into();
    let said = served.refused("PUT", "/snapshot/create", diff);
    assert!(said.contains("needs track_dirty_pages"), "{said}");
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    let said = served.refused("PUT", "/snapshot/create", places(dir.path()));
    assert!(said.contains("pause it first"), "{said}");
    // Nothing of all this is left.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    served.stop().expect_status(0);
}

#[test]
fn a_bad_snapshot_ends_a_fresh_process_with_the_reason() {
    let dir = temp_dir();
    create(&paused(), dir.path());
    let state = std::fs::read(dir.path().join("state")).unwrap();
    let mut changed = state.clone();
    *changed.last_mut().unwrap() ^= 1;
    let short = file(&dir, "short", b"memory");
    for (name, bytes, reason) in [
        ("torn", &state[..state.len() - 1], "not whole"),
        ("changed", &changed[..], "checksum"),
        ("foreign", b"{}\n", "no snapshot"),
    ] {
        let path = file(&dir, name, bytes);
        let mut body = load(dir.path(), true);
        body["snapshot_path"] = text(&path).into();
        assert_ends(body, &[text(&path), reason]);
    }
    let mut body = load(dir.path(), true);
    body["mem_backend"]["backend_path"] = text(&short).into();
    assert_ends(body, &[text(&short), "6 bytes"]);
    let mut body = load(dir.path(), true);
    body["mem_file_path"] = "/m".into();
    assert_ends(body, &["together"]);
}

#[track_caller]
pub fn assert_ends(body: Value, words: &[&str]) {
    let mut served = Served::start(&[]);
    let said = served.refused("PUT", "/snapshot/load", body);
    for word in words {
        assert!(said.contains(word), "{said}");
    }
    drop(served.vm.take_stdin());
    served.vm.wait().expect_status(1);
}

#[test]
fn a_process_that_was_configured_lives_on() {
    let dir = temp_dir();
    let served = Served::start(&[]);
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
    served.done("PUT", "/machine-config", machine);
    let said = served.refused("PUT", "/snapshot/load", load(dir.path(), true));
    assert!(said.contains("not allowed after configuring"), "{said}");
    served.stop().expect_status(0);
}

#[track_caller]
pub fn command(arguments: &[&str]) -> Ended {
    Vm::start(husk().args(arguments), LIMIT).finish()
}

#[test]
fn a_guest_is_kept_and_goes_on_from_the_command_line() {
    let dir = temp_dir();
    let kept = dir.path().join("kept");
    let first = paused();
    first.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    command(&["snapshot", "-s", text(&first.socket), text(&kept)]).expect_status(0);
    // It ran before, so it runs on.
    assert_eq!(first.get("/")["state"], "Running");
    first.done("PATCH", "/vm", json!({ "state": "Paused" }));
    command(&["snapshot", "-s", text(&first.socket), text(&kept)]).expect_status(0);
    assert_eq!(first.get("/")["state"], "Paused");
    let said = first.vm.stdout.bytes();
    let told = command(&["snapshot", "info", text(&kept)]);
    for word in ["version 1", "2 vCPUs, 64 MiB", "ticks"] {
        assert!(told.console().contains(word), "{}", told.console());
    }
    drop(first);
    // Two at a time, each with memory of its own.
    let restore = || Vm::start(husk().args(["restore", text(&kept)]), LIMIT);
    for mut vm in [restore(), restore()] {
        vm.stdout_reaches(3000);
        // The power button, of which this guest knows nothing, and the end. Two signals of one kind may become one.
        vm.signal(rustix::process::Signal::TERM);
        vm.signal(rustix::process::Signal::INT);
        drop(vm.take_stdin());
        let ended = vm.wait();
        assert_counts(&[&said[..], &ended.stdout].concat());
    }
    let socket = dir.path().join("api");
    let arguments = [
        "restore",
        text(&kept),
        "--paused",
        "--api-sock",
        text(&socket),
    ];
    let mut vm = Vm::start(husk().args(arguments), LIMIT);
    crate::api::wait_for(&socket, &vm);
    command(&["resume", "-s", text(&socket)]).expect_status(0);
    vm.stdout_reaches(1000);
    command(&["stop", "-s", text(&socket)]).expect_status(0);
    drop(vm.take_stdin());
    vm.wait().expect_status(0);
}

#[test]
fn what_cannot_be_kept_or_gone_on_from_is_said_in_one_line() {
    let dir = temp_dir();
    let nowhere = dir.path().join("nowhere");
    for (arguments, word) in [
        (&["restore", text(&nowhere)][..], "nowhere/state"),
        (&["snapshot", "info", text(&nowhere)], "nowhere"),
        (&["snapshot", "info", "/etc/passwd"], "no snapshot"),
        (&["restore", text(&nowhere), "--paused"], "--api-sock"),
        (&["snapshot", text(&nowhere)], "--api-sock"),
    ] {
        let ended = command(arguments);
        ended.expect_status(2);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(word), "{}", ended.stderr);
    }
    let ended = command(&["snapshot", "-s", text(&nowhere), text(dir.path())]);
    ended.expect_status(1);
}

/// One of each device that needs no privileges, on either bus.
fn paused_with_devices(dir: &Path, pci: bool) -> Served {
    let flags: &[&str] = if pci { &["--pci"] } else { &[] };
    let mut served = Served::start(flags);
    let image = dir.join("disk");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let source = json!({ "kernel_image_path": payload("ticks", "") });
    served.done("PUT", "/boot-source", source);
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
    served.done("PUT", "/machine-config", machine);
    let drive = json!({ "drive_id": "data", "path_on_host": image, "is_root_device": false });
    served.done("PUT", "/drives/data", drive);
    let vsock = json!({ "guest_cid": 3, "uds_path": dir.join("v") });
    served.done("PUT", "/vsock", vsock);
    served.done("PUT", "/entropy", json!({}));
    let balloon = json!({ "amount_mib": 1, "deflate_on_oom": true });
    served.done("PUT", "/balloon", balloon);
    served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    served.vm.stdout_reaches(500);
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    served
}

#[test]
fn devices_go_on_with_other_files_and_sockets() {
    for pci in [false, true] {
        let dir = temp_dir();
        let first = paused_with_devices(dir.path(), pci);
        create(&first, dir.path());
        let before = first.vm.stdout.bytes();
        // While the first one has its disk and its socket.
        std::fs::copy(dir.path().join("disk"), dir.path().join("copy")).unwrap();
        let mut body = load(dir.path(), true);
        let copy = dir.path().join("copy");
        body["drive_overrides"] = json!([{ "drive_id": "data", "path_on_host": copy }]);
        body["vsock_override"] = json!({ "uds_path": dir.path().join("w"), "guest_cid": 4 });
        let mut second = Served::start(&[]);
        second.done("PUT", "/snapshot/load", body);
        second.vm.stdout_reaches(500);
        let config = second.get("/vm/config");
        assert_eq!(config["drives"][0]["path_on_host"], text(&copy));
        assert_eq!(config["vsock"]["guest_cid"], 4);
        assert!(dir.path().join("w").exists());
        let both = [&before[..], &second.stop().expect_status(0).stdout].concat();
        assert_counts(&both);
        first.stop().expect_status(0);
        // And in its own place, from the command line.
        let mut third = Vm::start(husk().args(["restore", text(dir.path())]), LIMIT);
        third.stdout_reaches(500);
        third.signal(rustix::process::Signal::TERM);
        third.signal(rustix::process::Signal::INT);
        drop(third.take_stdin());
        third.wait();
    }
}

#[test]
fn devices_that_cannot_go_on_are_said_in_one_line() {
    let dir = temp_dir();
    let first = paused_with_devices(dir.path(), true);
    create(&first, dir.path());
    // It takes its socket along.
    first.stop().expect_status(0);
    let small = file(&dir, "small", &[0; 4096]);
    let missing = dir.path().join("missing");
    let disk = |path: &Path| json!([{ "drive_id": "data", "path_on_host": path }]);
    for (field, value, words) in [
        (
            "drive_overrides",
            disk(&small),
            ["4096 bytes", "not smaller"],
        ),
        (
            "drive_overrides",
            disk(&missing),
            [text(&missing), "No such file"],
        ),
        (
            "drive_overrides",
            json!([{ "drive_id": "x", "path_on_host": "/x" }]),
            ["no disk called x", "it has: data"],
        ),
        (
            "network_overrides",
            json!([{ "iface_id": "eth0", "host_dev_name": "t" }]),
            ["no network interface called eth0", "it has: none"],
        ),
        ("vsock_override", json!({ "guest_cid": 1 }), ["1", "cid"]),
    ] {
        let mut body = load(dir.path(), true);
        body[field] = value;
        assert_ends(body, &words);
    }
    let ended = command(&["restore", text(dir.path()), "--disk", "data"]);
    ended.expect_status(2);
}
