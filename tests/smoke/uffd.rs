//! Memory that another process fills when it is touched, natively: one that does as it should, and others.

use crate::api::Served;
use crate::common::pages::{self, Answer, Pages};
use crate::common::{Ended, temp_dir, text};
use crate::snapshots::{assert_counts, assert_ends, create, load, paused};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A guest that was kept, and what it had said before.
struct Kept {
    dir: tempfile::TempDir,
    said: Vec<u8>,
}

impl Kept {
    fn new() -> Self {
        let dir = temp_dir();
        let first = paused();
        create(&first, dir.path());
        let said = first.vm.stdout.bytes();
        Self { dir, said }
    }

    fn memory(&self) -> PathBuf {
        self.dir.path().join("memory")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("pages")
    }

    fn body(&self, resume: bool) -> Value {
        let mut body = load(self.dir.path(), resume);
        body["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": self.socket() });
        body
    }

    /// Have this done with what the monitor sends, on a thread.
    fn handle<T: Send + 'static>(
        &self,
        body: impl FnOnce(Pages, File) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let memory = File::open(self.memory()).unwrap();
        std::thread::spawn(move || body(Pages::accept(&listener), memory))
    }

    fn load(&self, resume: bool) -> Served {
        let served = Served::start(&[]);
        served.done("PUT", "/snapshot/load", self.body(resume));
        served
    }

    /// The guest has gone on where it was.
    #[track_caller]
    fn assert_goes_on(&self, mut served: Served) {
        served.vm.stdout_reaches(3000);
        let ended = served.stop();
        ended.expect_status(0);
        assert_counts(&[&self.said[..], &ended.stdout].concat());
    }
}

/// Ended for want of memory, with a line that says so.
#[track_caller]
fn assert_lost(mut served: Served, word: &str) {
    drop(served.vm.take_stdin());
    let ended = served.vm.wait();
    ended.expect_status(6);
    assert_one_line(&ended, &["memory is lost", word]);
}

#[track_caller]
fn assert_one_line(ended: &Ended, words: &[&str]) {
    let said: Vec<_> = ended
        .stderr
        .lines()
        .filter(|line| line.contains("rror"))
        .collect();
    assert_eq!(said.len(), 1, "{}", ended.stderr);
    for word in words {
        assert!(said[0].contains(word), "{}", ended.stderr);
    }
}

#[test]
fn a_guest_goes_on_with_pages_that_another_process_gives() {
    let kept = Kept::new();
    let handler = kept.handle(|pages, memory| {
        let mut count = 0;
        pages.serve(&memory, |_| {
            count += 1;
            Answer::Page
        });
        (pages.mappings.clone(), count)
    });
    kept.assert_goes_on(kept.load(true));
    let (mappings, count) = handler.join().unwrap();
    // Firecracker's names, as its handlers look for them.
    let base = mappings[0]["base_host_virt_addr"].as_u64().unwrap();
    let expected = json!([{
        "base_host_virt_addr": base,
        "size": 64 << 20,
        "offset": 0,
        "page_size": 4096,
        "page_size_kib": 4096,
    }]);
    assert_eq!(mappings, expected);
    // What the guest has not touched, nobody has asked for.
    assert!((3..100).contains(&count), "{count} pages");
}

#[test]
fn a_snapshot_of_memory_that_is_elsewhere_has_all_of_it() {
    let kept = Kept::new();
    // Nothing of this the guest ever looks at.
    let (low, high) = (0x2000000, (64 << 20) - 4096);
    {
        use std::os::unix::fs::FileExt;
        let file = File::options().write(true).open(kept.memory()).unwrap();
        file.write_all_at(&[0xa5; 10000], low).unwrap();
        file.write_all_at(&[0x5a; 4096], high).unwrap();
    }
    kept.handle(|pages, memory| pages.serve(&memory, |_| Answer::Page));
    let served = kept.load(false);
    let again = temp_dir();
    create(&served, again.path());
    let read = |dir: &Path| std::fs::read(dir.join("memory")).unwrap();
    let (mut now, mut before) = (read(again.path()), read(kept.dir.path()));
    // The VM generation ID: it is told that it is another VM.
    for memory in [&mut now, &mut before] {
        memory[0xf2000..0xf2010].fill(0);
    }
    let differs = (0..now.len()).find(|&at| now[at] != before[at]);
    assert_eq!(differs.map(|at| format!("{at:#x}")), None);
    // And it can be gone on from, by both.
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    kept.assert_goes_on(served);
    let next = Served::start(&[]);
    next.done("PUT", "/snapshot/load", load(again.path(), true));
    kept.assert_goes_on(next);
}

#[test]
fn while_a_page_is_slow_the_guest_waits_and_nobody_else() {
    let kept = Kept::new();
    kept.handle(|pages, memory| {
        pages.serve(&memory, |_| {
            std::thread::sleep(Duration::from_millis(300));
            Answer::Page
        });
    });
    let served = kept.load(true);
    for _ in 0..5 {
        let asked = Instant::now();
        assert_eq!(served.get("/")["state"], "Running");
        assert!(asked.elapsed() < Duration::from_secs(1));
    }
    served.done("PATCH", "/vm", json!({ "state": "Paused" }));
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    kept.assert_goes_on(served);
}

#[test]
fn a_handler_that_never_answers_keeps_nobody_from_ending_the_vm() {
    let kept = Kept::new();
    let over = Arc::new(Mutex::new(()));
    let holds = over.lock().unwrap();
    let waits = Arc::clone(&over);
    let handler = kept.handle(move |pages, memory| {
        pages.serve(&memory, |count| match count {
            0 => Answer::Page,
            _ => Answer::Leave,
        });
        // With everything open.
        drop(waits.lock());
        drop(pages);
    });
    let served = kept.load(true);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(served.get("/")["state"], "Running");
    // Where the host's kernel cannot interrupt such a fault, it is an error that says what may be wrong.
    let (status, said) = served.ask("PATCH", "/vm", r#"{"state":"Paused"}"#);
    if status != 204 {
        assert!(said.contains("handler of its page faults"), "{said}");
    } else {
        let said = served.refused(
            "PUT",
            "/snapshot/create",
            crate::snapshots::places(temp_dir().path()),
        );
        assert!(said.contains("has not given a page for"), "{said}");
    }
    let asked = Instant::now();
    served.stop().expect_status(0);
    assert!(asked.elapsed() < Duration::from_secs(10));
    drop(holds);
    handler.join().unwrap();
}

#[test]
#[ignore = "no test: what others start as a process"]
fn a_process() {
    pages::be_a_process();
}

#[test]
fn a_handler_that_dies_ends_the_vm_with_the_reason() {
    // The first is that in which the guest is told that it is another VM.
    for count in [1, 2, 5] {
        let kept = Kept::new();
        let mut process = pages::process("uffd::a_process", &kept.socket(), &kept.memory(), count);
        let served = kept.load(true);
        let begun = Instant::now();
        assert_lost(served, text(&kept.socket()));
        assert!(begun.elapsed() < Duration::from_secs(20));
        assert!(process.wait().unwrap().success());
    }
}

#[test]
fn a_handler_that_dies_while_memory_is_kept_leaves_no_snapshot() {
    let kept = Kept::new();
    let mut process = pages::process("uffd::a_process", &kept.socket(), &kept.memory(), 200);
    let served = kept.load(false);
    let dir = temp_dir();
    let places = crate::snapshots::places(dir.path());
    let said = served.refused("PUT", "/snapshot/create", places);
    assert!(said.contains("handler of page faults"), "{said}");
    assert_lost(served, "has gone");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    process.wait().unwrap();
}

#[test]
fn a_handler_that_takes_the_message_and_leaves_is_missed() {
    let kept = Kept::new();
    kept.handle(|pages, _| drop(pages));
    assert_ends(kept.body(true), &["handler of page faults"]);
    std::fs::remove_file(kept.socket()).unwrap();
    kept.handle(|pages, memory| {
        pages.serve(&memory, |count| match count {
            0 => Answer::Page,
            _ => Answer::Leave,
        });
    });
    assert_lost(kept.load(true), "has closed its connection");
}

#[test]
fn a_handler_need_not_keep_the_connection() {
    let kept = Kept::new();
    let gone = Arc::new(AtomicBool::new(false));
    let closed = Arc::clone(&gone);
    kept.handle(move |mut pages, memory| {
        pages.socket = None;
        closed.store(true, Ordering::Release);
        pages.serve(&memory, |_| Answer::Page);
    });
    let served = kept.load(false);
    while !gone.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    // Longer than one may be silent that is asked for a page.
    std::thread::sleep(Duration::from_millis(6000));
    served.done("PATCH", "/vm", json!({ "state": "Resumed" }));
    kept.assert_goes_on(served);
}

#[test]
fn noise_on_the_connection_is_left_to_lie() {
    let kept = Kept::new();
    kept.handle(|mut pages, memory| {
        let mut socket = pages.socket.as_ref().unwrap().try_clone().unwrap();
        std::thread::spawn(move || while socket.write_all(&[0xff; 4096]).is_ok() {});
        pages.serve(&memory, |_| Answer::Page);
        pages.socket = None;
    });
    kept.assert_goes_on(kept.load(true));
}

#[test]
fn wrong_pages_harm_their_guest_alone() {
    for (how, byte) in [("copied", 0xff), ("zero", 0)] {
        let kept = Kept::new();
        kept.handle(move |pages, memory| match how {
            "copied" => pages.serve(&memory, |_| Answer::Wrong(byte)),
            _ => {
                pages.unregister();
                pages.serve(&memory, |_| Answer::Leave);
            }
        });
        let served = kept.load(true);
        std::thread::sleep(Duration::from_millis(300));
        // It may run on in whatever it finds, or be ended by KVM.
        let mut vm = served.vm;
        let _ = husk_api::client::request(
            &served.socket,
            "PUT",
            "/husk/actions",
            r#"{"action_type":"Stop"}"#,
        );
        drop(vm.take_stdin());
        let ended = vm.wait();
        let status = ended.status.code();
        assert!(
            matches!(status, Some(0 | 4 | 5)),
            "{how}: {status:?} {}",
            ended.stderr
        );
    }
}

#[test]
fn who_cannot_fill_memory_is_said_in_one_line() {
    let kept = Kept::new();
    assert_ends(
        kept.body(true),
        &["handler of page faults", text(&kept.socket())],
    );
    std::fs::write(kept.socket(), b"no socket").unwrap();
    assert_ends(kept.body(true), &["handler of page faults", "refused"]);
    let mut body = kept.body(true);
    body["prefetch"] = "/working-set".into();
    assert_ends(body, &["prefetch with a mem_backend of type Uffd"]);
}
