//! Snapshots whose making is ended, or whose files are not what was written.

use crate::common::{Vm, husk, temp_dir, text};
use crate::snapshots::{command, create, paused, places};
use crate::{LIMIT, snapshot_hosts};
use serde_json::json;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// How often the process is killed while it makes a snapshot.
const KILLS: u64 = 50;

/// The numbers that a guest has said from some place on: the first that is whole and the last.
pub fn numbers(said: &[u8]) -> (u64, u64) {
    let said = String::from_utf8_lossy(said);
    let lines: Vec<&str> = said.lines().collect();
    let whole = &lines[1..lines.len() - 1];
    let number = |line: &str| u64::from_str_radix(line.trim(), 16);
    let all: Vec<u64> = whole
        .iter()
        .map(|line| number(line).unwrap_or_else(|_| panic!("{line:?}")))
        .collect();
    assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 1), "{all:?}");
    (all[0], all[all.len() - 1])
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A guest that compares what it counts in a register, which is in the state, with what it counts in memory.
#[test]
fn a_process_that_is_killed_leaves_the_old_snapshot_or_the_new_one() {
    let (dir, own) = (temp_dir(), temp_dir());
    // In memory, where a file is synchronised at once: what is killed is Husk at work, not Husk that waits for a disk.
    let _small = Small::mount(dir.path(), 4096);
    let first = paused();
    create(&first, dir.path());
    let begun = Instant::now();
    create(&first, dir.path());
    let usual = begun.elapsed();
    drop(first);
    // Where the old one goes on, and what its guest has said when the new one was begun.
    let mut before: Option<(u64, u64)> = None;
    let mut random = begun.elapsed().as_nanos() as u64 | 1;
    // Around the moment from which on it is the new one.
    let mut span = 2.0 * usual.as_secs_f64();
    let mut replaced = 0;
    for turn in 0..KILLS {
        let socket = own.path().join(format!("api{turn}"));
        let arguments = ["restore", text(dir.path()), "--api-sock", text(&socket)];
        let mut vm = Vm::start(husk().args(arguments), LIMIT);
        crate::api::wait_for(&socket, &vm);
        vm.stdout_reaches(200);
        let ask = |method, path, body: serde_json::Value| {
            husk_api::client::request(&socket, method, path, &body.to_string()).unwrap()
        };
        let paused = ask("PATCH", "/vm", json!({ "state": "Paused" }));
        assert_eq!(paused.status, 204, "{}", paused.body);
        let (from, to) = numbers(&vm.stdout.bytes());
        if let Some((old, new)) = before {
            // The first line may be cut, and the last may still be on its way.
            let (is_old, is_new) = (from == old, from + 1 >= new);
            assert!(is_old || is_new, "{from}: {old} or {new}");
            replaced += u64::from(is_new);
            span *= if is_new { 0.8 } else { 1.25 };
        }
        before = Some((from, to));
        let body = places(dir.path()).to_string();
        let mut stream = UnixStream::connect(&socket).unwrap();
        let length = body.len();
        write!(
            stream,
            "PUT /snapshot/create HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        // xorshift64.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_secs_f64(
            span * (random % 1000) as f64 / 1000.0,
        ));
        vm.signal(rustix::process::Signal::KILL);
        drop(vm.take_stdin());
        vm.wait();
    }
    println!("{replaced} of {KILLS} were complete in time; one takes {usual:?}");
    assert!((1..KILLS).contains(&replaced), "{replaced}: {usual:?}");
    // What they left goes with the next one.
    let socket = own.path().join("last");
    let arguments = ["restore", text(dir.path()), "--api-sock", text(&socket)];
    let mut vm = Vm::start(husk().args(arguments), LIMIT);
    crate::api::wait_for(&socket, &vm);
    vm.stdout_reaches(200);
    command(&["snapshot", "-s", text(&socket), text(dir.path())]).expect_status(0);
    assert_eq!(names(dir.path()), ["memory", "state"]);
    command(&["stop", "-s", text(&socket)]).expect_status(0);
    drop(vm.take_stdin());
    vm.wait().expect_status(0);
}

/// A file system of a few pages.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(place: &'a Path, kib: u32) -> Self {
        let mut mount = Command::new("mount");
        mount.args([
            "-t",
            "tmpfs",
            "-o",
            &format!("size={kib}k"),
            "none",
            text(place),
        ]);
        let status = mount.status().expect("this test needs mount");
        assert!(
            status.success(),
            "this test mounts a file system: run it as root"
        );
        Self(place)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", text(self.0)]).status();
    }
}

#[test]
fn a_full_disk_changes_nothing_of_what_was_kept() {
    let dir = temp_dir();
    let _small = Small::mount(dir.path(), 256);
    let mut served = paused();
    create(&served, dir.path());
    let whole = |name| std::fs::read(dir.path().join(name)).unwrap();
    let before = [whole("state"), whole("memory")];
    for left_kib in [0, 4, 40] {
        let filler = dir.path().join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        let full = file.metadata().unwrap().len();
        file.set_len(full - left_kib * 1024).unwrap();
        let said = served.refused("PUT", "/snapshot/create", places(dir.path()));
        assert!(
            said.contains("cannot write") && said.contains("No space"),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(names(dir.path()), ["filler", "memory", "state"]);
        assert!(before == [whole("state"), whole("memory")]);
        std::fs::remove_file(filler).unwrap();
    }
    // The VM goes on, and can be kept again.
    let length = served.vm.stdout.bytes().len();
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    served.vm.stdout_reaches(length + 1000);
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    create(&served, dir.path());
    assert!(before != [whole("state"), whole("memory")]);
    served.stop().expect_status(0);
}

#[test]
fn files_that_are_torn_or_changed_are_refused_in_one_line() {
    let kept = temp_dir();
    create(&paused(), kept.path());
    let (state, memory) = (kept.path().join("state"), kept.path().join("memory"));
    let whole = std::fs::read(&state).unwrap();
    let refused = |what: String| {
        let begun = Instant::now();
        let ended = command(&["restore", text(kept.path())]);
        println!("{what}: {}", ended.stderr);
        ended.expect_status(2);
        assert_eq!(ended.stderr.lines().count(), 1, "{what}: {}", ended.stderr);
        assert_eq!(ended.stdout, b"", "{what}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}");
    };
    let line = whole.iter().position(|&byte| byte == b'\n').unwrap();
    let lengths = [
        0,
        1,
        line / 2,
        line,
        line + 1,
        line + 2,
        4096,
        whole.len() - 1,
    ];
    for length in lengths
        .into_iter()
        .chain((1..8).map(|n| whole.len() * n / 8))
    {
        std::fs::write(&state, &whole[..length]).unwrap();
        refused(format!("{length} bytes of state"));
    }
    for at in (line + 1..whole.len()).step_by(whole.len() / 12) {
        let mut changed = whole.clone();
        changed[at] ^= 1 << (at % 8);
        std::fs::write(&state, changed).unwrap();
        refused(format!("byte {at} of the state"));
    }
    // With a checksum that is right: what KVM gets is not what it has told.
    for part in ["cpuid", "sregs", "xsave", "xcrs", "msrs"] {
        std::fs::write(&state, &whole).unwrap();
        snapshot_hosts::change(kept.path(), |state| {
            let vcpu = &mut state["vcpus"][1][part];
            match vcpu.as_str().map(str::len) {
                Some(length) => *vcpu = "ff".repeat(length / 2).into(),
                None => *vcpu = json!([[0xffff_ffff_u32, u64::MAX]]),
            }
        });
        refused(part.into());
    }
    std::fs::write(&state, &whole).unwrap();
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    let length = file.metadata().unwrap().len();
    for size in [0, 1, 4096, length / 2, length - 1, length + 1] {
        file.set_len(size).unwrap();
        refused(format!("{size} bytes of memory"));
    }
}
