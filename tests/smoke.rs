//! Native smoke tests: payload kernels of a few instructions in the real binary, on this machine's own /dev/kvm.
//!
//! They need /dev/kvm and `cc`, and fail without. No KVM is too slow for them: they run where Linux does not.

mod common;

use common::{
    Ended, Tty, Vm, assert_same_bytes, husk, husk_binary, pattern, temp_dir, text, wrapped,
};
use rustix::process::Signal;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
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
    Vm::start_with(&mut command, LIMIT).wait().expect_status(0);
    assert_flood(&std::fs::read(&path).unwrap(), &sent);
}

#[test]
fn a_flood_of_output_arrives_whole_at_a_fast_reader() {
    let dir = temp_dir();
    let sent = pattern(bulk(3));
    let ended = Vm::start(&mut flood(&dir, &sent), LIMIT).finish();
    assert_flood(&ended.expect_status(0).stdout, &sent);
}

#[test]
fn a_flood_of_output_arrives_whole_at_a_slow_reader() {
    use std::io::Read;
    let dir = temp_dir();
    let sent = pattern(bulk(3).max(200_000)); // more than a pipe and Husk's own buffer hold
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = flood(&dir, &sent);
    let vm = Vm::start_with(command.stdin(Stdio::null()).stdout(writer), LIMIT);
    drop(command);
    wait_until_full(&reader); // the guest waits
    let (mut received, mut chunk) = (Vec::new(), [0; 5000]);
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
    let mut vm = start(&["--kernel", &payload("echo", ""), "--initrd", text(&length)]);
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

// ---- Errors ----

#[test]
fn a_kernel_that_is_none_is_refused() {
    let dir = temp_dir();
    let good = std::fs::read(payload("linux", "")).unwrap();
    let mut elf32 = good.clone();
    elf32[4] = 1;
    let mut arm = good.clone();
    arm[18..20].copy_from_slice(&183u16.to_le_bytes());
    let mut object = good.clone();
    object[16] = 1;
    let script =
        b"#!/bin/sh\necho this is no kernel, though it is long enough to be one\n".repeat(99);
    let plain = file(&dir, "text", &script);
    let packed = Command::new("gzip")
        .arg("-c")
        .arg(&plain)
        .output()
        .unwrap()
        .stdout;
    let directory = dir.path().join("directory");
    std::fs::create_dir(&directory).unwrap();
    for (path, word) in [
        (dir.path().join("missing"), "does not exist"),
        (plain.join("below-a-file"), ""),
        (directory, "directory"),
        (file(&dir, "empty", b""), "empty"),
        (plain, "not a kernel"),
        (file(&dir, "text.gz", &packed), ""),
        (file(&dir, "zeros", &[0; 100_000]), "not a kernel"),
        (file(&dir, "elf32", &elf32), "32-bit"),
        (file(&dir, "arm64", &arm), "183"),
        (file(&dir, "object", &object), "executable"),
        ("/dev/null".into(), "regular"),
    ] {
        Refused::by(&["--kernel", text(&path)]).with(2, &[text(&path), word]);
    }
    Refused::by(&["--kernel", ""]).with(2, &["kernel"]);
}

#[test]
fn a_truncated_kernel_is_refused() {
    let dir = temp_dir();
    let whole = std::fs::read(payload("linux", "")).unwrap();
    // The end of what is loaded; behind it are only names for debuggers.
    let end = program_headers(&whole)
        .iter()
        .map(|&(offset, size)| offset + size)
        .max()
        .unwrap();
    let few = [
        1, 2, 3, 4, 5, 15, 16, 17, 18, 19, 20, 24, 32, 52, 63, 64, 65, 100, 119, 120, 200,
    ];
    let many = (1..8).map(|part| end * part / 8);
    for length in few.into_iter().chain(many).chain([end - 1]) {
        let path = file(&dir, &format!("cut-{length}"), &whole[..length]);
        Refused::by(&["--kernel", text(&path)]).with(2, &[text(&path)]);
    }
    let path = file(&dir, "cut-behind", &whole[..end]);
    run(&["--kernel", text(&path)]).expect_status(0);
}

#[test]
fn a_kernel_that_does_not_fit_memory_is_refused() {
    let dir = temp_dir();
    for (name, address, size) in [
        ("large", 0x100_0000, 64 << 20),
        ("huge", 0x100_0000, 1 << 40),
        ("behind", 0x1000_0000, 4096),
        ("across-the-end", (64 << 20) - 4096, 8192),
        ("in-the-hole", 0xd000_0000, 4096),
        ("above-4g", 0x1_0000_0000, 4096),
        ("below-1m", 0x9_0000, 4096),
        ("at-zero", 0, 4096),
        ("beyond-everything", u64::MAX - 4095, 4096),
    ] {
        let path = file(&dir, name, &small_elf(address, size));
        Refused::by(&["--kernel", text(&path), "--memory", "64M"]).with(2, &[text(&path)]);
    }
    let path = file(&dir, "good", &small_elf(0x100_0000, 4096));
    run(&["--kernel", text(&path), "--memory", "64M"]).expect_status(0);
}

#[test]
fn an_unreadable_file_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temp_dir();
    let kernel = payload("linux", "");
    let secret = dir.path().join("secret");
    std::fs::copy(&kernel, &secret).unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    let secret = text(&secret);
    // For root, too, once the right to read everything is given up.
    let without = if rustix::process::geteuid().is_root() {
        &["setpriv", "--inh-caps=-all", "--bounding-set=-all"][..]
    } else {
        &[]
    };
    let refused = |arguments: &[&str]| Refused::wrapped(without, arguments);
    refused(&["--kernel", secret]).with(2, &[secret]);
    refused(&["--kernel", &kernel, "--initrd", secret]).with(2, &[secret]);
    refused(&["--config", secret]).with(2, &[secret]);
}

#[test]
fn an_initrd_that_cannot_be_used_is_refused() {
    let dir = temp_dir();
    let kernel = payload("linux", "");
    let large = dir.path().join("large");
    File::create(&large).unwrap().set_len(64 << 20).unwrap();
    let endless = dir.path().join("endless");
    File::create(&endless).unwrap().set_len(1 << 43).unwrap();
    for (path, word) in [
        (dir.path().join("missing"), ""),
        (dir.path().to_path_buf(), "directory"),
        (file(&dir, "empty", b""), "empty"),
        ("/dev/null".into(), "empty"),
        (large, "--memory"),
        (endless, "--memory"),
        ("/dev/zero".into(), "--memory"),
    ] {
        let arguments = [
            "--kernel",
            &kernel,
            "--initrd",
            text(&path),
            "--memory",
            "64M",
        ];
        Refused::by(&arguments).with(2, &[text(&path), word]);
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let kernel = payload("linux", "");
    let more_than_the_host = format!("{}M", host_memory_mib() + 1);
    let long = "x".repeat(2048);
    let refused = |arguments: &[&str]| Refused::by(&[&["--kernel", &kernel], arguments].concat());
    for (value, word) in [
        ("0", "0 MiB"),
        ("1M", "1 MiB"),
        ("31", "31 MiB"),
        ("16777216G", ""),
        ("18446744073709551615T", "18446744073709551615T"),
        (&more_than_the_host, ""),
        ("abc", "abc"),
        ("1.5G", "1.5G"),
        ("", "memory"),
        ("-5", ""),
    ] {
        refused(&["--memory", value]).with(2, &[word]);
    }
    for value in ["0", "65", "4294967295"] {
        refused(&["--cpus", value]).with(2, &[value, "--cpus"]);
    }
    refused(&["--cpus", "-1"]).with(2, &["-1"]);
    refused(&["--cpus", "many"]).with(2, &["many"]);
    refused(&["--cpus", "4294967296"]).with(2, &["4294967296"]);
    refused(&["--no-default-cmdline", "--cmdline", &long]).with(2, &["2048"]);
    refused(&["--cmdline", &long]).with(2, &["command line"]);
}

#[test]
fn wrong_flags_are_refused() {
    let kernel = payload("linux", "");
    let refused = |arguments: &[&str]| Refused::by(&[&["--kernel", &kernel], arguments].concat());
    refused(&["--no-such-flag"]).with(2, &["--no-such-flag"]);
    refused(&["stray"]).with(2, &["stray"]);
    refused(&["--boot-protocol", "efi"]).with(2, &["efi"]);
    refused(&["--on-reboot", "maybe"]).with(2, &["maybe"]);
    refused(&["--log-level", "loud"]).with(2, &["loud"]);
    Refused::by(&["--kernel"]).with(2, &["--kernel"]);
}

#[test]
fn a_configuration_file_that_is_wrong_is_refused() {
    let dir = temp_dir();
    let deep = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
    let nested = format!("{{\"boot-source\":{}", "{\"a\":".repeat(50_000));
    let kernel = payload("linux", "");
    let with = |rest: &str| format!("{{\"boot-source\":{{\"kernel_image_path\":\"{kernel}\"{rest}");
    for (name, content, word) in [
        ("text", "vcpus = 2", ""),
        ("nothing", "", ""),
        ("half", "{\"boot-source\":", ""),
        ("twice", "{} {}", ""),
        ("list", "[]", ""),
        ("unknown", "{\"boot-sauce\":{}}", "boot-sauce"),
        ("inner", &with(",\"kernel\":1}}"), "kernel"),
        (
            "type",
            &with("},\"machine-config\":{\"vcpu_count\":\"2\",\"mem_size_mib\":64}}"),
            "",
        ),
        (
            "negative",
            &with("},\"machine-config\":{\"vcpu_count\":-1,\"mem_size_mib\":64}}"),
            "",
        ),
        (
            "fraction",
            &with("},\"machine-config\":{\"vcpu_count\":1.5,\"mem_size_mib\":64}}"),
            "",
        ),
        (
            "large",
            &with("},\"machine-config\":{\"vcpu_count\":1e30,\"mem_size_mib\":64}}"),
            "",
        ),
        ("deep", &deep, ""),
        ("nested", &nested, ""),
    ] {
        let path = file(&dir, name, content.as_bytes());
        Refused::by(&["--config", text(&path)]).with(2, &[text(&path), word]);
    }
    for (name, content, word) in [
        ("nul", with(",\"boot_args\":\"a\\u0000b\"}}"), "NUL"),
        (
            "cpus",
            with("},\"machine-config\":{\"vcpu_count\":65,\"mem_size_mib\":64}}"),
            "65",
        ),
        (
            "memory",
            with("},\"machine-config\":{\"vcpu_count\":1,\"mem_size_mib\":0}}"),
            "0 MiB",
        ),
        (
            "args",
            with(&format!(",\"boot_args\":\"{}\"}}}}", "x".repeat(2048))),
            "2048",
        ),
    ] {
        let path = file(&dir, name, content.as_bytes());
        Refused::by(&["--config", text(&path)]).with(2, &[word]);
    }
    let missing = dir.path().join("missing");
    Refused::by(&["--config", text(&missing)]).with(2, &[text(&missing)]);
    Refused::by(&["--config", text(dir.path())]).with(2, &[text(dir.path())]);
    let bytes = file(&dir, "bytes", &pattern(5000));
    Refused::by(&["--config", text(&bytes)]).with(2, &[text(&bytes)]);
    Refused::by(&["--config", "/dev/zero"]).with(2, &["/dev/zero"]);
}

#[test]
fn a_host_without_kvm_or_permission_for_it_is_named() {
    let kernel = payload("linux", "");
    let dir = temp_dir();
    let locked = file(&dir, "locked", b"");
    std::fs::set_permissions(&locked, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    // A mount namespace of its own, in a user namespace of its own where this is not root.
    let unshare = match rustix::process::geteuid().is_root() {
        true => vec!["unshare", "--mount"],
        false => vec!["unshare", "--mount", "--map-root-user"],
    };
    let no_device = "mount -t tmpfs none /dev && exec \"$@\"";
    let no_permission = format!(
        "mount --bind '{}' /dev/kvm && exec setpriv --inh-caps=-all --bounding-set=-all \"$@\"",
        locked.display()
    );
    for (script, word) in [(no_device, "there is no"), (&no_permission, "permission")] {
        let wrapper = [&unshare[..], &["sh", "-c", script, "sh"]].concat();
        Refused::wrapped(&wrapper, &["--kernel", &kernel]).with(1, &["/dev/kvm", word]);
    }
}

#[test]
fn a_log_file_that_cannot_be_written_is_refused() {
    let dir = temp_dir();
    let kernel = payload("linux", "");
    for path in [
        dir.path().join("no/such/directory"),
        dir.path().to_path_buf(),
    ] {
        Refused::by(&["--kernel", &kernel, "--log-file", text(&path)]).with(2, &[text(&path)]);
    }
}

// ---- Configuration and logging ----

#[test]
fn a_configuration_file_is_enough_and_flags_override_it() {
    let dir = temp_dir();
    let initrd = file(&dir, "initrd", b"from the file");
    let content = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{}", "initrd_path": "{}", "boot_args": "from=file"}},
            "machine-config": {{"vcpu_count": 2, "mem_size_mib": 48}}, "on-reboot": "restart"}}"#,
        payload("linux", ""),
        initrd.display()
    );
    let config = file(&dir, "vm.json", content.as_bytes());
    let found = |more: &[&str]| {
        let ended = run_bare(&[&["--config", text(&config)], more].concat());
        let console = ended.expect_status(0).console();
        let memory = console
            .lines()
            .find(|l| l.starts_with("e820 0000000000100000 "));
        let size = memory.and_then(|l| l.split(' ').nth(2)).unwrap();
        let size = u64::from_str_radix(size, 16).unwrap() + (1 << 20);
        let cpus = u64::from_str_radix(line_after(&console, "cpus ").trim(), 16).unwrap();
        let cmdline = line_after(&console, "cmdline ").to_owned();
        (size >> 20, cpus, cmdline, console)
    };
    let (memory, cpus, cmdline, console) = found(&[]);
    assert_eq!((memory, cpus, cmdline.as_str()), (48, 2, "from=file"));
    assert_eq!(line_after(&console, "initrd "), "from the file");

    let other = file(&dir, "other", b"from the flag");
    let (memory, cpus, cmdline, console) = found(&[
        "--cpus",
        "5",
        "--memory",
        "0064M",
        "--initrd",
        text(&other),
        "--cmdline",
        "from=flag",
    ]);
    assert_eq!((memory, cpus), (64, 5));
    assert!(cmdline.ends_with(" from=flag") && !cmdline.contains("from=file"));
    assert_eq!(line_after(&console, "initrd "), "from the flag");

    // One flag leaves the rest of the file as it is; a kernel may be overridden as well.
    assert_eq!(found(&["--cpus", "1"]).0, 48);
    let ended = run_bare(&[
        "--config",
        text(&config),
        "--kernel",
        &payload("end", "POWER_OFF"),
    ]);
    assert_eq!(ended.expect_status(0).console(), "go\n");
}

#[test]
fn help_version_completions_and_man_page() {
    let print = |arguments: &[&str]| {
        let output = husk().args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["help"],
        &["run", "--help"],
        &["run", "-h"],
    ] {
        let help = print(arguments);
        assert!(help.contains("Usage: husk"), "{help}");
        assert!(help.contains("xit status"), "{help}");
    }
    let help = print(&["run", "--help"]);
    for word in [
        "--kernel",
        "--initrd",
        "--cmdline",
        "--cpus",
        "--memory",
        "--config",
        "Examples",
        "Ctrl-A x",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
    let version = print(&["--version"]);
    assert_eq!(version, format!("husk {}\n", env!("CARGO_PKG_VERSION")));
    for shell in ["bash", "zsh", "fish"] {
        let script = print(&["completions", shell]);
        assert!(
            script.contains("husk") && script.contains("on-reboot"),
            "{shell}"
        );
    }
    let dir = temp_dir();
    let script = file(
        &dir,
        "husk.bash",
        print(&["completions", "bash"]).as_bytes(),
    );
    let status = Command::new("bash").arg("-n").arg(script).status().unwrap();
    assert!(status.success());
    let page = print(&["man"]);
    assert!(page.contains(".TH husk 1"), "{page}");
    assert!(page.contains(".SH SYNOPSIS"), "{page}");
}

#[test]
fn the_log_goes_to_stderr_or_its_file_and_never_to_the_console() {
    let dir = temp_dir();
    let kernel = payload("end", "TRIPLE_FAULT");
    let log = dir.path().join("log");
    let ended = run(&[
        "--kernel",
        &kernel,
        "--log-file",
        text(&log),
        "--log-level",
        "trace",
    ]);
    assert_eq!(ended.expect_status(4).console(), "go\n");
    assert_eq!(ended.stderr, "");
    let first = std::fs::read_to_string(&log).unwrap();
    assert!(first.contains("triple fault"), "{first}");
    // A second run adds to it.
    run(&["--kernel", &kernel, "--log-file", text(&log)]).expect_status(4);
    let both = std::fs::read_to_string(&log).unwrap();
    assert!(both.starts_with(&first) && both.len() > first.len());

    let ended = run(&["--kernel", &kernel, "--log-level", "trace"]);
    assert_eq!(ended.expect_status(4).console(), "go\n");
    assert!(ended.stderr.contains("triple fault"), "{}", ended.stderr);
    assert!(
        ended.stderr.lines().all(|l| l.starts_with("husk: ")),
        "{}",
        ended.stderr
    );
    let ended = run(&["--kernel", &kernel, "--log-level", "off"]);
    assert_eq!(ended.expect_status(4).stderr, "");
}

#[test]
fn the_timeline_has_every_phase_in_order() {
    let ended = run(&["--kernel", &payload("linux", ""), "--timeline"]);
    let timeline = ended.expect_status(0).stderr.clone();
    let lines: Vec<&str> = timeline.lines().collect();
    assert!(lines[0].starts_with("husk: timeline"), "{timeline}");
    let times: Vec<f64> = lines[1..]
        .iter()
        .map(|line| line.trim().split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(times.is_sorted(), "{timeline}");
    for phase in [
        "VM created",
        "kernel loaded",
        "guest entered",
        "first guest exit",
        "guest ended",
    ] {
        assert!(timeline.contains(phase), "{phase}: {timeline}");
    }
    assert!(ended.console().ends_with("end\n"));
}

// ---- Help ----

/// The path of the payload kernel `tests/payloads/NAME.S`, assembled with the macro `define` (if any) defined.
fn payload(name: &str, define: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/payloads");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("payloads");
    std::fs::create_dir_all(&target).unwrap();
    let kernel = target.join(format!("{name}{define}"));
    // Tests run at the same time: the file comes into being whole.
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let fresh = target.join(format!("{name}{define}.{}.{next}", std::process::id()));
    let mut cc = Command::new("cc");
    cc.args(["-nostdlib", "-static", "-no-pie"])
        .args([
            "-Wl,-Ttext=0x1000000",
            "-Wl,--build-id=none",
            "-Wl,-z,noexecstack",
        ])
        .args((!define.is_empty()).then(|| format!("-D{define}")))
        .arg("-o")
        .args([&fresh, &source.join(format!("{name}.S"))]);
    let output = cc.output().unwrap_or_else(|e| {
        panic!("the smoke tests need a C compiler named cc (apt-get install gcc): {e}")
    });
    assert!(
        output.status.success(),
        "{cc:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&fresh, &kernel).unwrap();
    text(&kernel).to_owned()
}

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

/// A Husk that is to refuse to start.
struct Refused {
    ended: Ended,
    arguments: String,
    cache: tempfile::TempDir,
    temporary: tempfile::TempDir,
}

impl Refused {
    fn by(arguments: &[&str]) -> Self {
        Self::wrapped(&[], arguments)
    }

    fn wrapped(wrapper: &[&str], arguments: &[&str]) -> Self {
        let (cache, temporary) = (temp_dir(), temp_dir());
        let mut command = wrapped(wrapper);
        command
            .arg("run")
            .args(arguments)
            .env("HUSK_CACHE", cache.path())
            .env("TMPDIR", temporary.path());
        let mut shown = format!("{arguments:?}");
        shown.truncate(300);
        Self {
            ended: Vm::start(&mut command, LIMIT).finish(),
            arguments: shown,
            cache,
            temporary,
        }
    }

    /// It has refused as every refusal must look: its exit status, one line on stderr that has all of `words` in it,
    /// nothing on the console and nothing left behind.
    #[track_caller]
    fn with(self, status: i32, words: &[&str]) {
        let Self {
            ended, arguments, ..
        } = &self;
        assert!(
            ended.status.code() == Some(status),
            "{arguments}: ended with {} instead of exit status {status}\n{}",
            ended.status,
            ended.report()
        );
        let said = &ended.stderr;
        assert!(said.starts_with("husk: "), "{arguments}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{arguments}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments}: no {word:?} in {said}");
        }
        assert!(!said.contains("panicked"), "{arguments}: {said}");
        assert!(!said.contains("internal error"), "{arguments}: {said}");
        assert!(ended.stdout.is_empty(), "{arguments}: {}", ended.console());
        for dir in [&self.cache, &self.temporary] {
            let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
            assert!(left.is_empty(), "{arguments}: left behind: {left:?}");
        }
    }
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
/// instructions takes about 20 µs for each, one on hardware about 1 µs.
fn bulk(seconds: u64) -> usize {
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

/// Place in the file, offset and length, of each of an ELF file's loadable segments.
fn program_headers(elf: &[u8]) -> Vec<(usize, usize)> {
    let number = |at: usize, size: usize| {
        elf[at..at + size]
            .iter()
            .rev()
            .fold(0usize, |n, &b| n << 8 | usize::from(b))
    };
    let table = number(32, 8);
    (0..number(56, 2))
        .map(|index| table + index * 56)
        .filter(|&header| number(header, 4) == 1)
        .map(|header| (number(header + 8, 8), number(header + 32, 8)))
        .collect()
}

/// An ELF kernel of one segment that takes `size` bytes of memory at `address`, and powers off.
fn small_elf(address: u64, size: u64) -> Vec<u8> {
    // mov dx, 0x600; mov al, 0x34; out dx, al; hlt; jmp to the hlt
    let code = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend(address.to_le_bytes()); // e_entry
    elf.extend(64u64.to_le_bytes()); // e_phoff
    elf.resize(52, 0);
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    elf.extend(7u32.to_le_bytes());
    for word in [120, address, address, code.len() as u64, size, 1] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Memory and swap, which is what Husk compares with.
fn host_memory_mib() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> u64 {
        let line = line_after(&info, name);
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    (kib("MemTotal:") + kib("SwapTotal:")) / 1024
}
