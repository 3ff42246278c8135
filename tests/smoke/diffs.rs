//! Diff snapshots, natively: what a guest has written is what they have, and laid over their base they are the guest.

use crate::LIMIT;
use crate::api::Served;
use crate::common::payload::payload;
use crate::common::{Ended, Vm, husk, husk_binary, temp_dir, text};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// A guest that writes to its memory as it is told: see tests/payloads/pages.S.
struct Guest(Served);

impl Guest {
    fn boot(track: bool) -> Self {
        Self::boot_in(Served::start(&[]), track)
    }

    fn boot_in(mut served: Served, track: bool) -> Self {
        let source = json!({ "kernel_image_path": payload("pages", "SMALL") });
        served.done("PUT", "/boot-source", source);
        let machine = json!({ "vcpu_count": 1, "mem_size_mib": 48, "track_dirty_pages": track });
        served.done("PUT", "/machine-config", machine);
        served.done("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
        served.vm.expect("ready\n");
        Self(served)
    }

    fn load(dir: &Path, track: bool) -> Self {
        let served = Served::start(&[]);
        let mut body = load(dir);
        body["track_dirty_pages"] = track.into();
        served.done("PUT", "/snapshot/load", body);
        Self(served)
    }

    /// Have it do something; what it says.
    #[track_caller]
    fn tell(&mut self, what: &str) -> String {
        let vm = &mut self.0.vm;
        let before = vm.stdout.bytes().len();
        vm.send(what.as_bytes());
        let until = Instant::now() + LIMIT;
        loop {
            let said = vm.stdout.bytes().split_off(before);
            if said.ends_with(b"\n") {
                return String::from_utf8(said).unwrap().trim().into();
            }
            assert!(
                Instant::now() < until,
                "{what:?} is not done\n{}",
                vm.report()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn pause(&self) {
        self.0.done("PATCH", "/vm", json!({ "state": "Paused" }));
    }

    fn resume(&self) {
        self.0.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    }

    /// Keep it in `dir`, which is made; it goes on.
    fn keep(&self, dir: &Path, kind: &str) {
        std::fs::create_dir(dir).unwrap();
        self.pause();
        self.0.done("PUT", "/snapshot/create", places(dir, kind));
        self.resume();
    }
}

fn places(dir: &Path, kind: &str) -> Value {
    let (state, memory) = (dir.join("state"), dir.join("memory"));
    json!({ "snapshot_path": state, "mem_file_path": memory, "snapshot_type": kind })
}

fn load(dir: &Path) -> Value {
    let backend = json!({ "backend_type": "File", "backend_path": dir.join("memory") });
    json!({ "snapshot_path": dir.join("state"), "mem_backend": backend, "resume_vm": true })
}

fn snapshot(arguments: &[&str]) -> Ended {
    Vm::start(husk().arg("snapshot").args(arguments), LIMIT).finish()
}

#[track_caller]
fn merge(base: &Path, diff: &Path) {
    snapshot(&["merge", text(base), text(diff)]).expect_status(0);
}

#[track_caller]
fn info(dir: &Path) -> String {
    let told = snapshot(&["info", text(dir)]);
    told.expect_status(0);
    told.console()
}

/// Bytes that a directory's memory file takes.
fn taken(dir: &Path) -> u64 {
    std::fs::metadata(dir.join("memory")).unwrap().blocks() * 512
}

#[track_caller]
fn assert_same_memory(one: &Path, two: &Path) {
    let read = |dir: &Path| std::fs::read(dir.join("memory")).unwrap();
    let (one, two) = (read(one), read(two));
    let differs = one
        .chunks(4096)
        .zip(two.chunks(4096))
        .position(|(a, b)| a != b);
    assert_eq!((one.len(), differs), (two.len(), None));
}

/// Ten diffs, each laid over the base that the one before has made; each time the result goes on as the guest did.
fn ten_diffs(mut guest: Guest, dir: &Path, base: &Path) {
    for turn in 0..10 {
        for what in ["d", "s", "z", "dz", "zs"][turn % 5].chars() {
            assert_eq!(guest.tell(&what.to_string()), "done");
        }
        let diff = dir.join(format!("diff{turn}"));
        guest.keep(&diff, "Diff");
        let told = info(&diff);
        assert!(told.contains("a diff of "), "{told}");
        merge(base, &diff);
        let told = info(base);
        assert!(told.contains("complete, called "), "{told}");
        if turn % 3 == 0 {
            let sum = guest.tell("c");
            let mut other = Guest::load(base, false);
            assert_eq!(other.tell("c"), sum, "turn {turn}");
            // It goes on, and not only stands there.
            assert_eq!(other.tell("d"), guest.tell("d"));
            assert_eq!(other.tell("c"), guest.tell("c"), "turn {turn}");
        }
    }
    // All that there is at one moment, as a diff to the one before, and as a whole.
    guest.tell("s");
    guest.pause();
    let (diff, whole) = (dir.join("diff"), dir.join("whole"));
    for (place, kind) in [(&diff, "Diff"), (&whole, "Full")] {
        std::fs::create_dir(place).unwrap();
        guest.0.done("PUT", "/snapshot/create", places(place, kind));
    }
    merge(base, &diff);
    assert_same_memory(base, &whole);
}

#[test]
fn a_guest_that_booted_is_its_base_and_ten_diffs() {
    let dir = temp_dir();
    let base = dir.path().join("base");
    let mut guest = Guest::boot(true);
    guest.tell("s");
    guest.keep(&base, "Full");
    ten_diffs(guest, dir.path(), &base);
}

#[test]
fn a_guest_that_went_on_is_its_base_and_ten_diffs_tracked_or_not() {
    let dir = temp_dir();
    let first = dir.path().join("first");
    let mut guest = Guest::boot(false);
    guest.tell("s");
    guest.keep(&first, "Full");
    drop(guest);
    for track in [true, false] {
        let dir = dir.path().join(track.to_string());
        let base = dir.join("base");
        std::fs::create_dir_all(&base).unwrap();
        for name in ["state", "memory"] {
            std::fs::copy(first.join(name), base.join(name)).unwrap();
        }
        ten_diffs(Guest::load(&base, track), &dir, &base);
    }
}

#[test]
fn a_fork_between_two_diffs_loses_nothing() {
    let dir = temp_dir();
    let place = |name: &str| dir.path().join(name);
    let mut guest = Guest::boot(false);
    guest.tell("s");
    guest.keep(&place("base"), "Full");
    drop(guest);
    for track in [true, false] {
        let mut guest = Guest::load(&place("base"), track);
        guest.tell("d");
        // Its memory is mapped anew, from a file that has these changes.
        let console = place("console");
        let clones = guest.0.answer(
            "PUT",
            "/husk/fork",
            json!({ "count": 1, "console": console }),
        );
        let pid = clones["clones"][0]["pid"].as_i64().unwrap();
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        guest.tell("z");
        let diff = place(&format!("diff-{track}"));
        guest.keep(&diff, "Diff");
        let both = place(&format!("both-{track}"));
        let base = place("base");
        snapshot(&["merge", text(&base), text(&diff), "-o", text(&both)]).expect_status(0);
        let sum = guest.tell("c");
        assert_eq!(Guest::load(&both, false).tell("c"), sum, "{track}");
    }
}

#[test]
fn a_diff_takes_what_was_written_and_no_more() {
    let dir = temp_dir();
    let place = |name: &str| dir.path().join(name);
    let mut guest = Guest::boot(true);
    // The first has nothing to be the difference to: it is complete, and goes on by itself.
    guest.tell("s");
    guest.keep(&place("first"), "Diff");
    assert!(info(&place("first")).contains("complete"));
    let sum = guest.tell("c");
    assert_eq!(Guest::load(&place("first"), false).tell("c"), sum);
    guest.tell("d");
    guest.keep(&place("row"), "Diff");
    let row = taken(&place("row"));
    assert!((MIB..MIB + 100_000).contains(&row), "{row}");
    // Pages that have become zero are in it, and take no room.
    guest.tell("z");
    guest.keep(&place("zero"), "Diff");
    assert!(taken(&place("zero")) < 40_000);
    let told = info(&place("zero"));
    let count = told.trim().rsplit_once("with ").unwrap().1;
    let count: u64 = count.trim_end_matches(" pages").parse().unwrap();
    assert!((64..70).contains(&count), "{told}");
    // A complete one is where the next begins.
    guest.tell("d");
    guest.keep(&place("whole"), "Full");
    guest.keep(&place("nothing"), "Diff");
    assert!(taken(&place("nothing")) < 40_000);
    // Diffs of diffs, from the newest to the oldest.
    guest.tell("z");
    guest.tell("s");
    guest.keep(&place("one"), "Diff");
    guest.tell("z");
    guest.keep(&place("two"), "Diff");
    merge(&place("one"), &place("two"));
    assert!(info(&place("one")).contains("a diff of"));
    merge(&place("nothing"), &place("one"));
    merge(&place("whole"), &place("nothing"));
    let sum = guest.tell("c");
    assert_eq!(Guest::load(&place("whole"), false).tell("c"), sum);
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    let dir = temp_dir();
    let place = |name: &str| dir.path().join(name);
    let guest = Guest::boot(false);
    guest.keep(&place("other"), "Full");
    guest.pause();
    let body = places(&place("other"), "Diff");
    let said = guest.0.refused("PUT", "/snapshot/create", body);
    assert!(said.contains("track_dirty_pages"), "{said}");
    drop(guest);
    let guest = Guest::boot(true);
    guest.keep(&place("base"), "Full");
    guest.keep(&place("one"), "Diff");
    guest.keep(&place("two"), "Diff");
    guest.pause();
    // Over its own base it would be worth nothing.
    for (state, memory) in [("two", "new"), ("new", "two")] {
        let mut body = places(&place(state), "Diff");
        body["mem_file_path"] = json!(place(memory).join("memory"));
        let said = guest.0.refused("PUT", "/snapshot/create", body);
        assert!(said.contains("another place"), "{said}");
    }
    for (base, diff, word) in [
        ("base", "two", "another snapshot"),
        ("other", "one", "another snapshot"),
        ("base", "other", "is complete"),
        ("base", "nowhere", "cannot read"),
    ] {
        let ended = snapshot(&["merge", text(&place(base)), text(&place(diff))]);
        ended.expect_status(2);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(word), "{}", ended.stderr);
    }
    let mut served = Served::start(&[]);
    let said = served.refused("PUT", "/snapshot/load", load(&place("one")));
    assert!(said.contains("husk snapshot merge"), "{said}");
    drop(served.vm.take_stdin());
    served.vm.wait().expect_status(1);
}

#[test]
fn a_diff_is_kept_from_the_command_line() {
    let dir = temp_dir();
    let place = |name: &str| dir.path().join(name);
    let mut guest = Guest::boot(true);
    let socket = guest.0.socket.clone();
    snapshot(&["-s", text(&socket), text(&place("base"))]).expect_status(0);
    guest.tell("d");
    snapshot(&["-s", text(&socket), "--diff", text(&place("diff"))]).expect_status(0);
    let sum = guest.tell("c");
    let [base, diff, both] = ["base", "diff", "both"].map(place);
    let ended = snapshot(&["merge", text(&base), text(&diff), "-o", text(&both)]);
    ended.expect_status(0);
    assert!(
        ended.console().contains("it is complete"),
        "{}",
        ended.console()
    );
    assert!(info(&place("base")).contains("complete"));
    let mut other = Guest::load(&place("both"), true);
    assert_eq!(other.tell("c"), sum);
}

/// A command with a file system of its own of so many KiB on `place`, which only it and its children see.
fn on_small_disk(place: &Path, kib: u64, command: &[&str]) -> Command {
    let script = format!("mount -t tmpfs -o size={kib}k none \"$0\" && exec \"$@\"");
    let mut all = Command::new("unshare");
    all.args([
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        &script,
        text(place),
    ]);
    all.args(command);
    all
}

#[test]
fn a_snapshot_that_fails_loses_no_change() {
    let dir = temp_dir();
    let place = |name: &str| dir.path().join(name);
    let small = place("small");
    std::fs::create_dir(&small).unwrap();
    let socket = place("api");
    let binary = husk_binary();
    let serve = [text(&binary), "serve", "--api-sock", text(&socket)];
    let served = Served::of(&mut on_small_disk(&small, 512, &serve), socket.clone());
    let mut guest = Guest::boot_in(served, true);
    guest.keep(&place("base"), "Full");
    for what in ["d", "s"] {
        guest.tell(what);
        guest.pause();
        for (kind, to, word) in [
            ("Diff", &small, "No space left"),
            ("Full", &small, "No space left"),
            ("Diff", &place("nowhere"), "No such file"),
        ] {
            let said = guest.0.refused("PUT", "/snapshot/create", places(to, kind));
            assert!(said.contains(word), "{said}");
        }
        guest.resume();
    }
    guest.keep(&place("diff"), "Diff");
    merge(&place("base"), &place("diff"));
    let sum = guest.tell("c");
    assert_eq!(Guest::load(&place("base"), false).tell("c"), sum);
}

/// A base, a diff to it, and what comes of them.
fn pair(dir: &Path) -> [PathBuf; 3] {
    let [base, diff, both] = ["base", "diff", "both"].map(|name| dir.join(name));
    let mut guest = Guest::boot(true);
    guest.tell("d");
    guest.keep(&base, "Full");
    guest.tell("s");
    guest.tell("z");
    guest.keep(&diff, "Diff");
    let arguments = ["merge", text(&base), text(&diff), "-o", text(&both)];
    snapshot(&arguments).expect_status(0);
    [base, diff, both]
}

#[test]
fn a_merge_on_a_full_disk_leaves_the_base_as_it_was() {
    let dir = temp_dir();
    let [base, diff, both] = pair(dir.path());
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    // With room for the base, and hardly more.
    let script = "cp -r --sparse=always \"$1\" \"$3/base\" && \"$0\" snapshot merge \"$3/base\" \"$2\"
        echo status $?; ls -A \"$3\"; cmp \"$1/memory\" \"$3/base/memory\" && cmp \"$1/state\" \"$3/base/state\" && echo whole";
    let binary = husk_binary();
    let words = [
        "sh",
        "-c",
        script,
        text(&binary),
        text(&base),
        text(&diff),
        text(&small),
    ];
    let ended = Vm::start(&mut on_small_disk(&small, 1700, &words), LIMIT).finish();
    assert_eq!(
        ended.console(),
        "status 1\nbase\nwhole\n",
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("No space left"), "{}", ended.stderr);
    let ended = Vm::start(&mut on_small_disk(&small, 50_000, &words), LIMIT).finish();
    assert!(
        ended.console().contains("status 0\nbase\n"),
        "{}",
        ended.console()
    );
    drop(both);
}

#[test]
fn a_merge_that_is_killed_leaves_the_base_or_the_result() {
    let dir = temp_dir();
    let [base, diff, both] = pair(dir.path());
    let [old, new] = [&base, &both].map(|dir| std::fs::read(dir.join("state")).unwrap());
    let place = dir.path().join("place");
    let begun = Instant::now();
    std::fs::create_dir(&place).unwrap();
    let renew = || {
        for name in ["state", "memory"] {
            let mut copy = Command::new("cp");
            copy.arg("--sparse=always").arg(base.join(name)).arg(&place);
            assert!(copy.status().unwrap().success());
        }
    };
    renew();
    snapshot(&["merge", text(&place), text(&diff)]).expect_status(0);
    let whole = begun.elapsed();
    let mut came = [0, 0];
    for turn in 0..20u32 {
        renew();
        let arguments = ["snapshot", "merge", text(&place), text(&diff)];
        let mut merge = husk();
        let mut child = merge.args(arguments).stdout(Stdio::null()).spawn().unwrap();
        // The last of them may end by itself.
        if turn < 19 {
            std::thread::sleep(whole * turn / 20);
            let _ = child.kill();
        }
        child.wait().unwrap();
        let state = std::fs::read(place.join("state")).unwrap();
        let at = usize::from(state != old);
        came[at] += 1;
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 2);
        match at {
            0 => assert_same_memory(&place, &base),
            _ => {
                assert_eq!(state.len(), new.len());
                assert_same_memory(&place, &both);
            }
        }
    }
    assert!(came.iter().all(|&times| times > 0), "{came:?}");
    // What the last ones have left is no hindrance.
    renew();
    snapshot(&["merge", text(&place), text(&diff)]).expect_status(0);
    assert_same_memory(&place, &both);
    assert!(!dir.path().join(".place.merge").exists());
}
