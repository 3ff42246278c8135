//! What the end-to-end tests share: Husk as a child process that is watched, and never outlives its test.

// Each test program uses its own part of this.
#![allow(dead_code)]

pub mod guest;
pub mod machine;
pub mod pages;
pub mod payload;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// The binary under test: `$HUSK_BIN`, else the one that cargo built with the tests.
pub fn husk_binary() -> PathBuf {
    match std::env::var_os("HUSK_BIN") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_husk").into(),
    }
}

/// Husk with an environment that does not depend on who runs the tests. It may keep what it unpacks in `$HUSK_CACHE`.
pub fn husk() -> Command {
    wrapped(&[])
}

/// As [`husk`], started by the program and with the arguments in `wrapper`.
pub fn wrapped(wrapper: &[&str]) -> Command {
    // Whoever runs the tests may ignore signals (a shell does so for `… &`), and Husk would, too.
    let own = ["env", "--default-signal=HUP,INT,QUIT,TERM"];
    let mut words: Vec<OsString> = own.iter().chain(wrapper).map(OsString::from).collect();
    words.push(husk_binary().into());
    let mut command = Command::new(words.remove(0));
    command
        .args(words)
        .env_remove("HUSK_KERNEL")
        .env_remove("HUSK_BUSYBOX")
        .env("RUST_BACKTRACE", "1");
    command
}

/// What a child has written so far, on one of its streams.
#[derive(Clone, Default)]
pub struct Stream(Arc<(Mutex<Received>, Condvar)>);

#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    /// Collect what comes from `source` until it ends.
    pub fn collect(mut source: impl Read + Send + 'static) -> Self {
        let stream = Self::default();
        let shared = stream.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 64 << 10];
            loop {
                // EIO is how a pseudo-terminal ends.
                let count = source.read(&mut buffer).unwrap_or(0);
                let (received, changed) = &*shared.0;
                let mut received = received.lock().unwrap();
                received.bytes.extend_from_slice(&buffer[..count]);
                received.ended = count == 0;
                changed.notify_all();
                if received.ended {
                    return;
                }
            }
        });
        stream
    }

    /// All of it so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().bytes.clone()
    }

    /// All of it so far, without carriage returns.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).replace('\r', "")
    }

    /// Nothing more will come.
    pub fn has_ended(&self) -> bool {
        self.0.0.lock().unwrap().ended
    }

    /// Wait until `done` says so of the bytes from `from` on; false when the stream ended or the time was up before.
    fn wait(&self, until: Instant, mut done: impl FnMut(&[u8]) -> bool) -> bool {
        let (received, changed) = &*self.0;
        let mut received = received.lock().unwrap();
        loop {
            if done(&received.bytes) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if received.ended || left.is_zero() {
                return false;
            }
            received = changed.wait_timeout(received, left).unwrap().0;
        }
    }

    fn wait_end(&self, until: Instant) -> bool {
        let (received, changed) = &*self.0;
        let mut received = received.lock().unwrap();
        while !received.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            received = changed.wait_timeout(received, left).unwrap().0;
        }
        true
    }
}

/// A running Husk. It is killed when this is dropped.
pub struct Vm {
    child: Child,
    stdin: Option<ChildStdin>,
    /// The guest's console.
    pub stdout: Stream,
    /// The console ends with Husk: it is no terminal or file of the test's own.
    piped: bool,
    /// Husk's own words.
    pub stderr: Stream,
    /// From where on [`Vm::expect`] looks.
    seen: usize,
    pub until: Instant,
}

/// How a Husk ended.
pub struct Ended {
    /// The process's status.
    pub status: ExitStatus,
    /// The guest's console.
    pub stdout: Vec<u8>,
    /// Husk's own words.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Vm {
    /// Start `command` with pipes on what it does not say otherwise. It must end within `limit`.
    pub fn start(command: &mut Command, limit: Duration) -> Self {
        Self::start_with(command.stdin(Stdio::piped()).stdout(Stdio::piped()), limit)
    }

    /// As [`Vm::start`], with the standard input and output that `command` has.
    pub fn start_with(command: &mut Command, limit: Duration) -> Self {
        let mut child = command
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        Self {
            stdin: child.stdin.take(),
            piped: child.stdout.is_some(),
            stdout: child.stdout.take().map(Stream::collect).unwrap_or_default(),
            stderr: child.stderr.take().map(Stream::collect).unwrap_or_default(),
            child,
            seen: 0,
            until: Instant::now() + limit,
        }
    }

    /// Use `stream` as the console: that of a pseudo-terminal, say.
    pub fn with_stdout(mut self, stream: Stream) -> Self {
        self.stdout = stream;
        self
    }

    /// The process.
    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Send a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Write to the console's input.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin.write_all(bytes).expect("Husk reads its input");
    }

    /// The console's input, to be written on another thread.
    pub fn take_stdin(&mut self) -> ChildStdin {
        self.stdin.take().expect("stdin is open")
    }

    /// Wait until the console says `text` behind what was expected before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        let (from, wanted) = (self.seen, text.as_bytes());
        let mut at = from;
        let found = self.stdout.wait(self.until, |bytes| {
            while at + wanted.len() <= bytes.len() {
                if bytes[at..].starts_with(wanted) {
                    return true;
                }
                at += 1;
            }
            false
        });
        assert!(found, "the console never said {text:?}\n{}", self.report());
        self.seen = at + wanted.len();
    }

    /// The number that the console says next, once something is behind it.
    #[track_caller]
    pub fn expect_number(&mut self) -> u64 {
        let from = self.seen;
        let mut digits = 0;
        let found = self.stdout.wait(self.until, |bytes| {
            let rest = &bytes[from..];
            digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
            digits < rest.len()
        });
        assert!(found && digits > 0, "no number\n{}", self.report());
        self.seen += digits;
        let bytes = self.stdout.bytes();
        let text = std::str::from_utf8(&bytes[from..from + digits]).unwrap();
        text.parse().unwrap()
    }

    /// Wait until the console has said so many bytes in all.
    #[track_caller]
    pub fn stdout_reaches(&mut self, length: usize) {
        let found = self.stdout.wait(self.until, |bytes| bytes.len() >= length);
        assert!(found, "not {length} bytes\n{}", self.report());
    }

    /// Wait until Husk itself says `text`.
    #[track_caller]
    pub fn expect_stderr(&mut self, text: &str) {
        let found = self.stderr.wait(self.until, |bytes| {
            String::from_utf8_lossy(bytes).contains(text)
        });
        assert!(found, "stderr never said {text:?}\n{}", self.report());
    }

    /// Close the input and wait for the end.
    #[track_caller]
    pub fn finish(mut self) -> Ended {
        drop(self.stdin.take());
        self.wait()
    }

    /// Wait for the end, with the input as it is.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() >= self.until {
                panic!("Husk did not end in time\n{}", self.report());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let until = self.until + Duration::from_secs(10);
        assert!(
            self.stderr.wait_end(until) && (!self.piped || self.stdout.wait_end(until)),
            "something holds Husk's output open\n{}",
            self.report()
        );
        Ended {
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.text(),
            took: start.elapsed(),
        }
    }

    /// The last of both streams, for a failure's message.
    pub fn report(&self) -> String {
        report(&self.stdout.bytes(), &self.stderr.text())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The console without carriage returns.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.stdout).replace('\r', "")
    }

    /// The process must have ended by itself with `status`.
    #[track_caller]
    pub fn expect_status(&self, status: i32) -> &Self {
        assert!(
            self.status.code() == Some(status),
            "ended with {} instead of exit status {status}\n{}",
            self.status,
            self.report()
        );
        self
    }

    /// The process must have been killed by `signal`.
    #[track_caller]
    pub fn expect_killed(&self, signal: i32) -> &Self {
        assert!(
            self.status.signal() == Some(signal),
            "ended with {} instead of signal {signal}\n{}",
            self.status,
            self.report()
        );
        self
    }

    /// The last of both streams, for a failure's message.
    pub fn report(&self) -> String {
        report(&self.stdout, &self.stderr)
    }
}

fn report(stdout: &[u8], stderr: &str) -> String {
    const MOST: usize = 4000;
    let tail = &stdout[stdout.len().saturating_sub(MOST)..];
    let console = String::from_utf8_lossy(tail).replace('\r', "");
    format!(
        "--- console, {} bytes ---\n{console}\n--- stderr ---\n{stderr}\n---",
        stdout.len()
    )
}

/// A new directory that only this test uses.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("husk-test-")
        .tempdir()
        .expect("a temporary directory")
}

/// A pseudo-random pattern: any lost, repeated or moved byte shows.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Both must be the same; says where the first difference is, and not all of the bytes.
#[track_caller]
pub fn assert_same_bytes(what: &str, got: &[u8], wanted: &[u8]) {
    if got == wanted {
        return;
    }
    let at = got.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    let around = |bytes: &[u8]| {
        let end = bytes.len().min(at + 16);
        format!("{:02x?}", &bytes[at.min(end)..end])
    };
    panic!(
        "{what}: {} bytes instead of {}, different from byte {at} on: {} instead of {}",
        got.len(),
        wanted.len(),
        around(got),
        around(wanted)
    );
}

/// A pseudo-terminal.
pub struct Tty {
    master: std::fs::File,
    /// The end that a program has as its terminal.
    pub slave: std::fs::File,
    found: rustix::termios::Termios,
}

impl Tty {
    /// One with settings that are neither the default nor raw, so that a restored one shows.
    pub fn new() -> Self {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = std::fs::File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let mut found = tcgetattr(&slave).unwrap();
        found.local_modes.remove(LocalModes::ECHOK);
        tcsetattr(&slave, OptionalActions::Now, &found).unwrap();
        Self {
            found: tcgetattr(&slave).unwrap(),
            master: master.into(),
            slave,
        }
    }

    /// Start Husk with this as its controlling terminal, standard input and output.
    pub fn start(&self, args: &[&str], limit: Duration) -> Vm {
        let mut command = wrapped(&["setsid", "--ctty"]);
        command
            .args(args)
            .stdin(self.slave.try_clone().unwrap())
            .stdout(self.slave.try_clone().unwrap());
        let output = Stream::collect(self.master.try_clone().unwrap());
        Vm::start_with(&mut command, limit).with_stdout(output)
    }

    /// Type.
    pub fn send(&self, bytes: &[u8]) {
        (&self.master).write_all(bytes).unwrap();
    }

    /// Is the terminal in a mode in which keys go to the program one by one?
    pub fn is_raw(&self) -> bool {
        use rustix::termios::LocalModes;
        let modes = rustix::termios::tcgetattr(&self.slave).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// The settings must be what they were at the start.
    #[track_caller]
    pub fn assert_as_found(&self) {
        let now = rustix::termios::tcgetattr(&self.slave).unwrap();
        assert_eq!(format!("{now:?}"), format!("{:?}", self.found));
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
