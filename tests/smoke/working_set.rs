//! Working sets that are recorded and read ahead, natively.

use crate::common::{Ended, Vm, husk, temp_dir, text};
use crate::snapshots::{assert_counts, create, paused};
use crate::{LIMIT, file};
use std::path::Path;

fn restore(dir: &Path, arguments: &[&str]) -> Vm {
    let mut command = husk();
    Vm::start(command.args(["restore", text(dir)]).args(arguments), LIMIT)
}

/// Two signals of one kind may become one.
fn end(mut vm: Vm) -> Ended {
    vm.signal(rustix::process::Signal::TERM);
    vm.signal(rustix::process::Signal::INT);
    drop(vm.take_stdin());
    vm.wait()
}

/// The runs of pages that a file names.
fn runs(path: &Path) -> Vec<(u64, u64)> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().skip(1);
    assert_eq!(lines.next(), Some("working set of 67108864 bytes"));
    let run = |line: &str| {
        let (first, count) = line.split_once(' ').unwrap();
        (first.parse().unwrap(), count.parse().unwrap())
    };
    lines.map(run).collect()
}

#[test]
fn what_a_guest_touches_is_recorded_and_read_ahead() {
    let dir = temp_dir();
    let first = paused();
    create(&first, dir.path());
    let said = first.vm.stdout.bytes();
    drop(first);
    let set = dir.path().join("working-set");
    // At its end, and while it runs.
    let mut vm = restore(dir.path(), &["--record-working-set"]);
    vm.stdout_reaches(3000);
    assert!(!set.exists());
    end(vm);
    let at_end = runs(&set);
    std::fs::remove_file(&set).unwrap();
    let mut vm = restore(dir.path(), &["--record-working-set"]);
    vm.stdout_reaches(3000);
    let until = std::time::Instant::now() + LIMIT;
    while !set.exists() {
        assert!(std::time::Instant::now() < until, "{}", vm.report());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    end(vm);
    for runs in [at_end, runs(&set)] {
        // Where the guest counts, and few others: up to 16 pages come with each that is touched.
        let counts = |&(first, count): &(u64, u64)| (first..first + count).contains(&0x3000);
        assert!(runs.iter().any(counts), "{runs:?}");
        let pages: u64 = runs.iter().map(|(_, count)| count).sum();
        assert!(pages < 1000, "{runs:?}");
    }
    let mut vm = restore(dir.path(), &["--prefetch"]);
    vm.stdout_reaches(3000);
    assert_counts(&[&said[..], &end(vm).stdout].concat());
}

#[test]
fn a_strange_working_set_is_refused_in_one_line() {
    let dir = temp_dir();
    create(&paused(), dir.path());
    let state = std::fs::read(dir.path().join("state")).unwrap();
    for (bytes, word) in [
        (None, "No such file"),
        (Some(&b"{}\n"[..]), "no snapshot"),
        (Some(&state[..]), "something else"),
        (Some(&state[..state.len() - 1]), "not whole"),
    ] {
        if let Some(bytes) = bytes {
            file(&dir, "working-set", bytes);
        }
        let mut vm = restore(dir.path(), &["--prefetch"]);
        drop(vm.take_stdin());
        let ended = vm.wait();
        ended.expect_status(2);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(ended.stderr.contains("working-set"), "{}", ended.stderr);
        assert!(ended.stderr.contains(word), "{}", ended.stderr);
    }
}
