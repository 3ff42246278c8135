//! Native smoke tests: payload kernels of a few instructions in the real binary, on this machine's own /dev/kvm.
//!
//! They need /dev/kvm and `cc`, and fail without. No KVM is too slow for them: they run where Linux does not.

#[path = "../crates/api/src/parse/any_json.rs"]
mod any_json;
#[path = "smoke/api.rs"]
mod api;
#[path = "smoke/bad_clients.rs"]
mod bad_clients;
#[path = "smoke/bench.rs"]
mod bench;
mod common;
#[path = "smoke/diffs.rs"]
mod diffs;
#[path = "smoke/errors.rs"]
mod errors;
#[path = "smoke/firecracker.rs"]
mod firecracker;
#[path = "smoke/forks.rs"]
mod forks;
#[path = "smoke/identity.rs"]
mod identity;
#[path = "smoke/machine.rs"]
mod machine;
#[path = "smoke/metrics.rs"]
mod metrics;
#[path = "smoke/overlays.rs"]
mod overlays;
#[path = "smoke/seccomp.rs"]
mod seccomp;
#[path = "smoke/served.rs"]
mod served;
#[path = "smoke/settings.rs"]
mod settings;
#[path = "smoke/snapshot_crashes.rs"]
mod snapshot_crashes;
#[path = "smoke/snapshot_hosts.rs"]
mod snapshot_hosts;
#[path = "smoke/snapshots.rs"]
mod snapshots;
#[path = "smoke/uffd.rs"]
mod uffd;
#[path = "smoke/working_set.rs"]
mod working_set;

use common::payload::payload;
use common::{Ended, Tty, Vm, assert_same_bytes, husk, husk_binary, pattern, temp_dir, text};
use errors::Refused;
use rustix::process::Signal;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// No test waits longer than this for one Husk to end, however slow the machine.
const LIMIT: Duration = Duration::from_secs(60);

// ---- What a guest finds ----

#[test]
fn linux_protocol_passes_command_line_memory_map_processors_and_initrd() {
    let dir = temp_dir();
    let initrd = file(&dir, "initrd", b"contents of the initrd");
    let ended = run(&[
        "--kernel",
        &payload("linux", ""),
        "--initrd",
        text(&initrd),
        "--cpus",
        "3",
        "--memory",
        "4G",
        "--cmdline",
        "first 'second third'",
    ]);
    let console = ended.expect_status(0).console();
    for line in [
        "linux ok",
        "initrd contents of the initrd",
        "cpus 0000000000000003 ",
        "e820 0000000000000000 000000000009fc00 0000000000000001 ",
        "e820 0000000000100000 00000000bff00000 0000000000000001 ",
        "e820 0000000100000000 0000000040000000 0000000000000001 ",
        "end",
    ] {
        assert!(console.lines().any(|l| l == line), "{line}\n{console}");
    }
    let cmdline = line_after(&console, "cmdline ");
    assert!(cmdline.starts_with("console=ttyS0 "), "{cmdline}");
    assert!(cmdline.ends_with(" first 'second third'"), "{cmdline}");
    assert_eq!(ended.stderr, "");
}

#[test]
fn pvh_passes_command_line_and_initrd() {
    let dir = temp_dir();
    let initrd = file(&dir, "initrd", b"contents of the initrd");
    let kernel = payload("pvh", "");
    let arguments = ["--kernel", &kernel, "--initrd", text(&initrd)];
    for protocol in ["auto", "pvh"] {
        let more = ["--boot-protocol", protocol, "--cmdline", "one two"];
        let ended = run(&[&arguments[..], &more[..]].concat());
        let console = ended.expect_status(0).console();
        assert!(console.starts_with("pvh ok\n"), "{console}");
        assert!(line_after(&console, "cmdline ").ends_with(" one two"));
        assert_eq!(
            line_after(&console, "initrd "),
            "contents of the initrd",
            "{console}"
        );
    }
    let ended = run(&[&arguments[..], &["--boot-protocol", "linux"]].concat());
    assert_eq!(ended.expect_status(0).console(), "64-bit entry\n");
}

#[test]
fn no_default_cmdline_gives_the_kernel_nothing_else() {
    let kernel = payload("linux", "");
    let arguments = ["--kernel", &kernel, "--no-default-cmdline"];
    let ended = run(&arguments);
    assert_eq!(
        line_after(&ended.expect_status(0).console(), "cmdline "),
        ""
    );
    let ended = run(&[&arguments[..], &["--cmdline", "-x  y "]].concat());
    assert_eq!(
        line_after(&ended.expect_status(0).console(), "cmdline "),
        "-x  y "
    );
    // The longest that Linux takes.
    let long = "x".repeat(2047);
    let ended = run(&[&arguments[..], &["--cmdline", &long]].concat());
    assert_eq!(
        line_after(&ended.expect_status(0).console(), "cmdline "),
        long
    );
}

#[test]
fn sixty_four_processors_start() {
    let kernel = payload("linux", "");
    let ended = run(&["--kernel", &kernel, "--cpus", "64", "--memory", "64M"]);
    let console = ended.expect_status(0).console();
    assert!(console.contains("\ncpus 0000000000000040 \n"), "{console}");
}

#[test]
fn a_kernel_without_a_pvh_entry_is_not_entered_by_pvh() {
    let kernel = payload("linux", "");
    Refused::by(&["--kernel", &kernel, "--boot-protocol", "pvh"]).with(2, &[&kernel, "PVH"]);
}

// ---- Ends ----

#[test]
fn orderly_ends_have_exit_status_0() {
    for end in ["I8042_RESET", "ACPI_RESET_REGISTER", "POWER_OFF"] {
        let ended = run(&["--kernel", &payload("end", end)]);
        assert_eq!(ended.expect_status(0).console(), "go\n", "{end}");
        assert_eq!(ended.stderr, "", "{end}");
    }
}

#[test]
fn a_triple_fault_has_exit_status_4() {
    let ended = run(&["--kernel", &payload("end", "TRIPLE_FAULT")]);
    assert_eq!(ended.expect_status(4).console(), "go\n");
    assert!(ended.stderr.contains("triple fault"), "{}", ended.stderr);
}

#[test]
fn a_panic_said_by_pvpanic_has_exit_status_3() {
    let ended = run(&["--kernel", &payload("end", "PANIC")]);
    assert_eq!(ended.expect_status(3).console(), "go\n");
    assert!(ended.stderr.contains("panic"), "{}", ended.stderr);
}

#[test]
fn a_warm_reset_is_a_panic_only_where_the_command_line_says_so() {
    let kernel = payload("end", "WARM_RESET");
    run(&["--kernel", &kernel]).expect_status(3);
    let bare = ["--kernel", &kernel, "--no-default-cmdline"];
    run(&bare).expect_status(0);
    run(&[&bare[..], &["--cmdline", "reboot=panic_warm"]].concat()).expect_status(3);
}

#[test]
fn a_restarted_guest_finds_a_fresh_machine_and_reads_on() {
    let kernel = payload("boots", "");
    let restart = ["--kernel", &kernel, "--on-reboot", "restart"];
    let mut vm = start(&restart);
    vm.send(b"abcq");
    let ended = vm.finish();
    assert_eq!(
        ended.expect_status(0).console(),
        "clean a\nclean b\nclean c\nclean q\n"
    );
    let mut vm = start(&restart[..2]);
    vm.send(b"abcq");
    let ended = vm.finish();
    assert_eq!(ended.expect_status(0).console(), "clean a\n");
}

#[test]
fn a_first_signal_presses_the_power_button() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut vm = start(&["--kernel", &payload("end", "POWER_BUTTON")]);
        vm.expect("go\n");
        vm.signal(signal);
        let ended = vm.wait();
        assert_eq!(ended.expect_status(0).console(), "go\npressed\n");
        assert_eq!(ended.stderr, "");
    }
}

#[test]
fn a_second_signal_ends_the_vm_at_once() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::QUIT, 131)] {
        let mut vm = start(&["--kernel", &payload("end", "DEAF")]);
        vm.expect("go\n");
        vm.signal(signal);
        vm.expect("pressed\n");
        vm.signal(signal);
        vm.wait().expect_status(status);
    }
}

#[test]
fn a_guest_that_never_leaves_can_be_ended() {
    let mut vm = start(&[
        "--kernel",
        &payload("end", "SPIN"),
        "--cpus",
        "4",
        "--log-level",
        "info",
    ]);
    vm.expect("go\n");
    vm.signal(Signal::TERM);
    vm.expect_stderr("power button is pressed");
    vm.signal(Signal::TERM);
    vm.wait().expect_status(143);
}

#[test]
fn a_guest_that_halts_for_good_has_ended() {
    for cpus in ["1", "4"] {
        let ended = run(&["--kernel", &payload("end", "HALT"), "--cpus", cpus]);
        assert_eq!(ended.expect_status(0).console(), "go\n");
    }
}

#[test]
fn two_signals_end_a_vm_whose_output_nobody_reads() {
    let dir = temp_dir();
    let initrd = file(&dir, "initrd", &pattern(1 << 20));
    let mut command = husk();
    command.args([
        "run",
        "--kernel",
        &payload("linux", ""),
        "--initrd",
        text(&initrd),
        "--log-level",
        "info",
    ]);
    let (reader, writer) = std::io::pipe().unwrap();
    let mut vm = Vm::start_with(command.stdin(Stdio::null()).stdout(writer), LIMIT);
    drop(command); // and with it this process's copy of the pipe's end
    wait_until_full(&reader);
    vm.signal(Signal::TERM);
    vm.expect_stderr("power button is pressed");
    vm.signal(Signal::TERM);
    vm.wait().expect_status(143);
}

// ---- A hostile guest ----

#[test]
fn ports_and_memory_without_a_device_read_as_ones_and_take_writes() {
    let ended = run(&["--kernel", &payload("absent", ""), "--memory", "64M"]);
    assert_eq!(
        ended.expect_status(0).console(),
        "go\nports ok\nmemory ok\n"
    );
    assert_eq!(ended.stderr, "");
}

#[test]
fn a_guest_that_destroys_its_own_tables_only_ends_itself() {
    for end in [
        "PAGE_TABLES_ZEROED",
        "PAGE_TABLES_ONES",
        "PAGE_TABLES_GARBAGE",
        "PAGE_TABLES_TO_NOWHERE",
        "IDT_GARBAGE",
        "IDT_OVER_ITSELF",
        "GDT_GARBAGE",
    ] {
        let ended = run(&["--kernel", &payload("end", end)]);
        let status = ended.status.code();
        assert!(
            matches!(status, Some(4 | 5)),
            "{end}: {}\n{}",
            ended.status,
            ended.report()
        );
        assert_eq!(ended.console(), "go\n", "{end}");
        assert_quiet_failure(&ended);
    }
}

#[test]
fn what_kvm_cannot_emulate_has_exit_status_5() {
    for end in ["JUMP_INTO_HOLE", "EMULATION"] {
        let ended = run(&["--kernel", &payload("end", end)]);
        assert_eq!(ended.expect_status(5).console(), "go\n", "{end}");
        assert!(ended.stderr.contains("KVM"), "{}", ended.stderr);
        assert_quiet_failure(&ended);
    }
}

// ---- The console ----

#[test]
fn a_flood_of_output_arrives_whole_in_a_file() {
    let dir = temp_dir();
    let sent = pattern(bulk(8));
    let path = dir.path().join("out");
    let mut command = flood(&dir, &sent);
    command
        .stdin(Stdio::null())
        .stdout(File::create(&path).unwrap());
    Vm::start_with(&mut command, bulk_limit())
        .wait()
        .expect_status(0);
    assert_flood(&std::fs::read(&path).unwrap(), &sent);
}

#[test]
fn a_flood_of_output_arrives_whole_at_a_fast_reader() {
    let dir = temp_dir();
    let sent = pattern(bulk(3));
    let ended = Vm::start(&mut flood(&dir, &sent), bulk_limit()).finish();
    assert_flood(&ended.expect_status(0).stdout, &sent);
}

#[test]
fn a_flood_of_output_arrives_whole_at_a_slow_reader() {
    use std::io::Read;
    let dir = temp_dir();
    let sent = pattern(bulk(3).max(200_000)); // more than a pipe and Husk's own buffer hold
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = flood(&dir, &sent);
    let vm = Vm::start_with(command.stdin(Stdio::null()).stdout(writer), bulk_limit());
    drop(command);
    wait_until_full(&reader); // the guest waits
    let (mut received, mut chunk) = (Vec::new(), [0; 50_000]);
    loop {
        match reader.read(&mut chunk).unwrap() {
            0 => break,
            count => received.extend_from_slice(&chunk[..count]),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    vm.wait().expect_status(0);
    assert_flood(&received, &sent);
}

#[test]
fn a_paste_comes_back_whole() {
    use std::io::Write;
    let dir = temp_dir();
    let sent = pattern(bulk(2));
    eprintln!("{} bytes are pasted", sent.len());
    let length = file(&dir, "initrd", &(sent.len() as u64).to_le_bytes());
    let mut command = husk();
    command.args([
        "run",
        "--kernel",
        &payload("echo", ""),
        "--initrd",
        text(&length),
    ]);
    let mut vm = Vm::start(&mut command, bulk_limit());
    let mut stdin = vm.take_stdin();
    let paste = sent.clone();
    let sending = std::thread::spawn(move || stdin.write_all(&paste).unwrap());
    let ended = vm.wait();
    ended.expect_status(0);
    sending.join().unwrap();
    let echoed = ended.stdout.strip_prefix(b"go\n").unwrap();
    assert_same_bytes("the echo", echoed, &sent);
}

#[test]
fn input_may_come_from_a_file_and_may_end_early() {
    let dir = temp_dir();
    let sent = pattern(5000);
    let length = file(&dir, "initrd", &5000u64.to_le_bytes());
    let input = file(&dir, "input", &sent);
    let arguments = [
        "run",
        "--kernel",
        &payload("echo", ""),
        "--initrd",
        text(&length),
    ];
    let mut command = husk();
    command
        .args(arguments)
        .stdin(File::open(&input).unwrap())
        .stdout(Stdio::piped());
    let ended = Vm::start_with(&mut command, LIMIT).wait();
    assert_same_bytes("the echo", &ended.expect_status(0).stdout[3..], &sent);

    // At the end of its input a guest gets no more, and goes on.
    let input = file(&dir, "short", &sent[..100]);
    let mut command = husk();
    command
        .args(arguments)
        .args(["--log-level", "info"])
        .stdin(File::open(&input).unwrap())
        .stdout(Stdio::piped());
    let mut vm = Vm::start_with(&mut command, LIMIT);
    vm.expect("go\n");
    vm.stdout_reaches(103);
    vm.signal(Signal::TERM);
    vm.expect_stderr("power button is pressed");
    vm.signal(Signal::TERM);
    let ended = vm.wait();
    ended.expect_status(143);
    assert_same_bytes("the echo", &ended.stdout[3..], &sent[..100]);
}

#[test]
fn standard_streams_may_be_closed_null_or_full() {
    let dir = temp_dir();
    let mark = dir.path().join("log");
    let kernel = payload("linux", "");
    for (redirection, console) in [
        ("</dev/null", true),
        ("<&-", true),
        ("</dev/null >&-", false),
        ("<&- >&-", false),
        ("<&- >&- 2>&-", false),
        ("</dev/null 2>&-", true),
        ("</dev/null >/dev/full", false),
        ("</dev/null >/dev/full 2>/dev/full", false),
        ("</dev/full", true),
        ("</", true),
    ] {
        let script = format!("exec \"$0\" \"$@\" {redirection}");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script])
            .arg(husk_binary())
            .args(["run", "--kernel", &kernel, "--memory", "32M"])
            .args(["--timeline", "--log-file", text(&mark)]);
        let ended = Vm::start(&mut command, LIMIT).finish();
        assert_eq!(ended.status.code(), Some(0), "{redirection}");
        let text = ended.console();
        if console {
            assert!(text.ends_with("end\n"), "{redirection}: {text}");
        } else {
            assert_eq!(text, "", "{redirection}");
        }
        assert!(
            !ended.stderr.contains("internal error"),
            "{redirection}: {}",
            ended.stderr
        );
    }
}

#[test]
fn output_that_fails_is_said_once() {
    let mut command = husk();
    command
        .args(["run", "--kernel", &payload("linux", "")])
        .stdin(Stdio::null())
        .stdout(File::options().write(true).open("/dev/full").unwrap());
    let ended = Vm::start_with(&mut command, LIMIT).wait();
    ended.expect_status(0);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.starts_with("husk: "), "{}", ended.stderr);
}

// ---- The terminal ----

#[test]
fn keys_reach_the_guest_and_ctrl_a_x_leaves() {
    let dir = temp_dir();
    let tty = Tty::new();
    let length = file(&dir, "initrd", &1000u64.to_le_bytes());
    let kernel = payload("echo", "");
    let mut vm = tty.start(
        &["run", "--kernel", &kernel, "--initrd", text(&length)],
        LIMIT,
    );
    vm.expect("go\n");
    assert!(tty.is_raw());
    // Interrupt, end of file, suspend, flow control: all of them the guest's. Ctrl-A a is one Ctrl-A.
    tty.send(b"key \x03\x04\x1a\x11\x13\x1c\x01a\x01z\r.");
    vm.expect("key \x03\x04\x1a\x11\x13\x1c\x01\x01z\r.");
    tty.send(b"\x01h");
    vm.expect_stderr("Ctrl-A x");
    tty.send(b"\x01x");
    vm.wait().expect_status(0);
    tty.assert_as_found();
}

#[test]
fn ctrl_a_p_presses_the_power_button() {
    let tty = Tty::new();
    let mut vm = tty.start(&["run", "--kernel", &payload("end", "POWER_BUTTON")], LIMIT);
    vm.expect("go\n");
    tty.send(b"\x01p");
    vm.expect("pressed\n");
    vm.wait().expect_status(0);
    tty.assert_as_found();
}

#[test]
fn the_terminal_is_restored_after_every_end() {
    for (end, status) in [
        ("POWER_OFF", 0),
        ("I8042_RESET", 0),
        ("TRIPLE_FAULT", 4),
        ("WARM_RESET", 3),
        ("JUMP_INTO_HOLE", 5),
    ] {
        let tty = Tty::new();
        let vm = tty.start(&["run", "--kernel", &payload("end", end)], LIMIT);
        vm.wait().expect_status(status);
        tty.assert_as_found();
    }
    // An error after the terminal was opened.
    let tty = Tty::new();
    let vm = tty.start(&["run", "--kernel", "/nonexistent/vmlinux"], LIMIT);
    vm.wait().expect_status(2);
    tty.assert_as_found();
}

#[test]
fn the_terminal_is_restored_after_two_signals_and_a_killing_one() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let tty = Tty::new();
        let mut vm = tty.start(&["run", "--kernel", &payload("end", "DEAF")], LIMIT);
        vm.expect("go\n");
        assert!(tty.is_raw());
        vm.signal(signal);
        vm.expect("pressed\n");
        vm.signal(signal);
        vm.wait().expect_status(128 + signal.as_raw());
        tty.assert_as_found();
    }
    for signal in [Signal::SEGV, Signal::BUS, Signal::ABORT, Signal::ILL] {
        let tty = Tty::new();
        let mut vm = tty.start(&["run", "--kernel", &payload("end", "DEAF")], LIMIT);
        vm.expect("go\n");
        assert!(tty.is_raw());
        vm.signal(signal);
        let ended = vm.wait();
        ended.expect_killed(signal.as_raw());
        assert!(ended.stderr.starts_with("husk: "), "{}", ended.stderr);
        tty.assert_as_found();
    }
}

// ---- Help ----

fn file(dir: &tempfile::TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// Start `husk run` with little memory, unless `arguments` say how much.
#[track_caller]
fn start(arguments: &[&str]) -> Vm {
    assert!(
        Path::new("/dev/kvm").exists(),
        "the smoke tests need /dev/kvm, and this machine has none"
    );
    let mut command = husk();
    command.arg("run").args(arguments);
    if !arguments.contains(&"--memory") {
        command.args(["--memory", "64M"]);
    }
    Vm::start(&mut command, LIMIT)
}

#[track_caller]
fn run(arguments: &[&str]) -> Ended {
    start(arguments).finish()
}

/// As [`run`], with no memory size.
#[track_caller]
fn run_bare(arguments: &[&str]) -> Ended {
    let mut command = husk();
    Vm::start(command.arg("run").args(arguments), LIMIT).finish()
}

/// What Husk says of a guest's failure is no failure of Husk's own.
#[track_caller]
fn assert_quiet_failure(ended: &Ended) {
    for word in ["panicked", "internal error:", "backtrace"] {
        assert!(!ended.stderr.contains(word), "{}", ended.stderr);
    }
    assert!(
        ended.stderr.lines().all(|l| l.starts_with("husk: ")),
        "{}",
        ended.stderr
    );
}

#[track_caller]
fn line_after<'a>(console: &'a str, start: &str) -> &'a str {
    console
        .lines()
        .find_map(|line| line.strip_prefix(start))
        .unwrap_or_else(|| panic!("no line {start:?} in\n{console}"))
}

/// A guest that writes `sent` to its console.
fn flood(dir: &tempfile::TempDir, sent: &[u8]) -> Command {
    let initrd = file(dir, "initrd", sent);
    let mut command = husk();
    command
        .args(["run", "--kernel", &payload("linux", ""), "--memory", "64M"])
        .args(["--initrd", text(&initrd)]);
    command
}

#[track_caller]
fn assert_flood(console: &[u8], sent: &[u8]) {
    let mark = b"\ninitrd ";
    let start = console
        .windows(mark.len())
        .position(|window| window == mark)
        .expect("the guest came to the initrd");
    let flood = console[start + mark.len()..].strip_suffix(b"\nend\n");
    assert_same_bytes(
        "the console",
        flood.expect("the guest came to its end"),
        sent,
    );
}

/// How many bytes pass the console of a guest in about `seconds` here, at most 10 million: a KVM that emulates
/// instructions takes about 20 µs for each, one on hardware about 1 µs. `$HUSK_TEST_BULK` says another number.
fn bulk(seconds: u64) -> usize {
    if let Some(bytes) = forced_bulk() {
        return bytes;
    }
    static PER_SECOND: OnceLock<u64> = OnceLock::new();
    let rate = *PER_SECOND.get_or_init(|| {
        let dir = temp_dir();
        let sent = pattern(20_000);
        let start = Instant::now();
        Vm::start(&mut flood(&dir, &sent), LIMIT)
            .finish()
            .expect_status(0);
        sent.len() as u64 * 1_000_000 / (start.elapsed().as_micros() as u64).max(1)
    });
    (rate * seconds).clamp(50_000, 10_000_000) as usize
}

fn forced_bulk() -> Option<usize> {
    let bytes = std::env::var("HUSK_TEST_BULK").ok()?;
    Some(bytes.parse().expect("HUSK_TEST_BULK is a number of bytes"))
}

/// As [`LIMIT`], and 100 µs more for each byte that was asked for.
fn bulk_limit() -> Duration {
    LIMIT + Duration::from_micros(100) * forced_bulk().unwrap_or(0) as u32
}

/// Wait until nothing more is written to a pipe that has something in it.
fn wait_until_full(pipe: &std::io::PipeReader) {
    let start = Instant::now();
    let mut before = 0;
    loop {
        let now = rustix::io::ioctl_fionread(pipe).unwrap();
        if now > 0 && now == before {
            return;
        }
        assert!(start.elapsed() < LIMIT, "the pipe never filled");
        before = now;
        std::thread::sleep(Duration::from_millis(500));
    }
}
