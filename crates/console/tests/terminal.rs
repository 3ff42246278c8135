//! The terminal is as it was found after every end of the process, shown on pseudo-terminals.
//!
//! This program starts itself again, with a role as its argument, as the process under test.

use husk_console::{ConsoleEvent, Input, Output, Terminal};
use husk_devices::serial::Output as _;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

fn main() {
    if let Some(role) = std::env::args()
        .nth(1)
        .filter(|arg| arg.starts_with("role-"))
    {
        return play(&role);
    }
    let tests: [(&str, fn()); 7] = [
        ("leaving_restores", leaving_restores),
        (
            "a_panic_restores_and_is_one_line",
            a_panic_restores_and_is_one_line,
        ),
        (
            "a_killing_signal_restores_and_kills",
            a_killing_signal_restores_and_kills,
        ),
        (
            "an_ignored_signal_stays_ignored",
            an_ignored_signal_stays_ignored,
        ),
        (
            "stopping_restores_and_going_on_is_raw",
            stopping_restores_and_going_on_is_raw,
        ),
        (
            "in_the_background_nothing_is_touched",
            in_the_background_nothing_is_touched,
        ),
        (
            "closed_descriptors_are_survived",
            closed_descriptors_are_survived,
        ),
    ];
    // What waits for a process that does not do its part must not wait for ever.
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(120));
        eprintln!("the test above has not ended in two minutes");
        std::process::exit(1);
    });
    for (name, test) in tests {
        print!("test {name} ... ");
        test();
        println!("ok");
    }
}

// ---- the process under test

fn play(role: &str) {
    husk_console::install_panic_hook();
    husk_console::install_fatal_signal_handlers().unwrap();
    let terminal = Terminal::open().map(Arc::new);
    let (tell, told) = mpsc::channel();
    let output = Arc::new(Output::new(std::io::stdout()).unwrap());
    let input = Input::new().unwrap();
    input
        .start(
            std::io::stdin(),
            terminal.clone(),
            move |event| tell.send(event).unwrap(),
            || (),
        )
        .unwrap();
    output.write(format!("pid {}\n", std::process::id()).as_bytes());
    match role {
        "role-panic" => std::thread::spawn(|| panic!("first\nsecond"))
            .join()
            .unwrap(),
        "role-closed" => while input.wire().service().is_some() {},
        _ => while told.recv().unwrap() != ConsoleEvent::Leave {},
    }
    output.close();
    drop(terminal);
    Terminal::emergency_restore();
}

// ---- the tests

fn leaving_restores() {
    let tty = Tty::new();
    let mut child = tty.start(&[&me(), "role-run"]);
    pid(&mut child);
    tty.wait_raw(true);
    tty.type_in(b"abc\x01p\x01x");
    assert!(child.wait().unwrap().success());
    tty.assert_as_found();
}

fn a_panic_restores_and_is_one_line() {
    let tty = Tty::new();
    let mut child = tty.start(&[&me(), "role-panic"]);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    tty.assert_as_found();
    let text = stderr(&mut child);
    assert!(
        text.starts_with("husk: internal error: first second ("),
        "{text}"
    );
    assert!(text.ends_with("; please report it\n"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

fn a_killing_signal_restores_and_kills() {
    for (signal, line) in [
        (Signal::SEGV, "SIGSEGV"),
        (Signal::BUS, "has shrunk"),
        (Signal::ABORT, "SIGABRT"),
        (Signal::ILL, "SIGILL"),
        (Signal::FPE, "SIGFPE"),
    ] {
        let tty = Tty::new();
        let mut child = tty.start(&[&me(), "role-run"]);
        let pid = pid(&mut child);
        tty.wait_raw(true);
        kill_process(pid, signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal.as_raw()));
        tty.assert_as_found();
        let text = stderr(&mut child);
        assert!(
            text.contains(line) && text.trim().lines().count() <= 1,
            "{text}"
        );
    }
}

fn an_ignored_signal_stays_ignored() {
    let tty = Tty::new();
    let script = "trap '' ALRM; exec \"$0\" role-run";
    let mut child = tty.start(&["sh", "-c", script, &me()]);
    let pid = pid(&mut child);
    tty.wait_raw(true);
    kill_process(pid, Signal::ALARM).unwrap();
    tty.type_in(b"\x01x");
    assert!(child.wait().unwrap().success());
}

fn stopping_restores_and_going_on_is_raw() {
    let tty = Tty::new();
    // A shell with job control: only such a parent makes a process stop at SIGTSTP.
    let script = "\"$0\" role-run; echo stopped >&2; read go; fg >/dev/null; echo \"ended $?\" >&2";
    let mut child = tty.start(&["bash", "--norc", "-ic", script, &me()]);
    let pid = pid(&mut child);
    tty.wait_raw(true);
    kill_process(pid, Signal::TSTP).unwrap();
    tty.wait_raw(false);
    tty.assert_as_found();
    tty.type_in(b"go\n");
    tty.wait_raw(true);
    tty.type_in(b"\x01x");
    assert!(child.wait().unwrap().success());
    tty.assert_as_found();
    let text = stderr(&mut child);
    assert!(
        text.contains("stopped") && text.contains("ended 0"),
        "{text}"
    );
}

fn in_the_background_nothing_is_touched() {
    let tty = Tty::new();
    let script =
        "\"$0\" role-run & read line; echo \"line $line\" >&2; kill -0 %1 && fg >/dev/null";
    let mut child = tty.start(&["bash", "--norc", "-ic", script, &me()]);
    pid(&mut child);
    tty.assert_as_found();
    tty.type_in(b"for the shell\n");
    // The shell read it, and now brings the process to the foreground.
    tty.wait_raw(true);
    tty.type_in(b"\x01x");
    assert!(child.wait().unwrap().success());
    tty.assert_as_found();
    assert!(stderr(&mut child).contains("line for the shell"));
}

fn closed_descriptors_are_survived() {
    for script in [
        "exec \"$0\" role-closed <&-",
        "exec \"$0\" role-closed >&-",
        "exec \"$0\" role-closed <&- >&- 2>&-",
        "exec \"$0\" role-closed </dev/null >/dev/full",
    ] {
        let status = Command::new("sh")
            .args(["-c", script, &me()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{script}: {status}");
    }
}

// ---- help

struct Tty {
    master: OwnedFd,
    slave: File,
    found: Termios,
}

impl Tty {
    fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        // Something that is neither the default nor raw: it must come back, not "sane" modes.
        let mut found = tcgetattr(&slave).unwrap();
        found.local_modes.remove(LocalModes::ECHOK);
        tcsetattr(&slave, OptionalActions::Now, &found).unwrap();
        let found = tcgetattr(&slave).unwrap();
        Self {
            master,
            slave,
            found,
        }
    }

    /// Start `command` in a session of its own with this as its terminal.
    fn start(&self, command: &[&str]) -> Child {
        Command::new("setsid")
            .arg("--ctty")
            .args(command)
            .stdin(self.slave.try_clone().unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env_remove("RUST_BACKTRACE")
            .spawn()
            .unwrap()
    }

    fn type_in(&self, bytes: &[u8]) {
        File::from(self.master.try_clone().unwrap())
            .write_all(bytes)
            .unwrap();
    }

    fn wait_raw(&self, raw: bool) {
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        loop {
            let modes = tcgetattr(&self.slave).unwrap().local_modes;
            if modes.intersects(cooked) != raw {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn assert_as_found(&self) {
        let now = tcgetattr(&self.slave).unwrap();
        assert_eq!(format!("{now:?}"), format!("{:?}", self.found));
    }
}

fn me() -> String {
    std::env::current_exe()
        .unwrap()
        .into_os_string()
        .into_string()
        .unwrap()
}

/// The id that the process under test writes when it is set up.
fn pid(child: &mut Child) -> Pid {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut byte)
            .unwrap();
        line.push(byte[0]);
    }
    let text = String::from_utf8(line).unwrap();
    Pid::from_raw(text.trim().trim_start_matches("pid ").parse().unwrap()).unwrap()
}

fn stderr(child: &mut Child) -> String {
    let mut text = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    text
}
