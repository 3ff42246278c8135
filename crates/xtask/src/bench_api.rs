//! The REST socket's speed: the first answer, the first byte behind InstanceStart, memory, and many requests.
//!
//! What each figure is: docs/performance.md. All programs take turns, so that a noisy machine cancels out of ratios.

use crate::bench::{self, MARK, Program, Verdict, median};
use crate::host;
use crate::kernel;
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const LIMIT_ANSWER_MS: f64 = 1.7;
const LIMIT_BYTE_MS: f64 = 1.0;
const LIMIT_RUNNING_MB: f64 = 3.0;
const LEAST_GETS: f64 = 5000.0;
/// A boot under requests may take so many times that without, for noise's sake.
const LIMIT_UNDER_LOAD: f64 = 1.1;
/// What a client is taken to need between its configuration and InstanceStart.
pub const CLIENT_PAUSE: Duration = Duration::from_millis(10);
/// Between attempts to connect to a socket that is not there yet.
const RETRY: Duration = Duration::from_micros(20);
/// How long a program has for all that is asked of it.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// GETs that are timed, in all, over one connection and over several.
const GETS: usize = 2000;
const CONNECTIONS: usize = 10;
/// A boot of the minimal kernel where time is instructions; 5,000 GETs a second are so many in it.
const BOOT_S: f64 = 0.11;

/// `cargo xtask bench-api-inner`.
#[derive(clap::Args)]
pub struct InnerArgs {
    husk: String,
    vmlinux: String,
    initrd: String,
    #[arg(short = 'n', long, default_value_t = 5)]
    runs: u32,
}

/// A turn's figures.
#[derive(Default)]
struct Turn {
    /// Spawn to the end of a program that does nothing.
    nothing_ms: f64,
    /// Spawn to the end of `husk --version`.
    version_ms: f64,
    /// Spawn to the guest's first byte of the overlapped floor.
    floor_ms: f64,
    answer_ms: f64,
    /// The same when the client does not sleep until the socket is there, but tries each [`RETRY`].
    answer_polled_ms: f64,
    byte_ms: f64,
    /// The same when the client does not pause.
    byte_at_once_ms: f64,
    idle_kib: f64,
    running_kib: f64,
    peak_kib: f64,
    gets: f64,
    gets_of_many: f64,
}

/// Natively, with a payload kernel. `temp` holds it, and the floor's program.
pub fn run(runs: u32, husk: &Path, temp: &Path, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let nothing = temp.join("nothing");
    let source = temp.join("nothing.c");
    fs::write(&source, "int main(void) { return 0; }\n").context("cannot write nothing.c")?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-o"]).arg(&nothing);
    host::run_quiet(gcc.arg(&source))?;
    println!("\nthe REST socket, 128 MiB, 1 vCPU, {runs} alternating starts:");
    let mut turns = Vec::new();
    for turn in 0..=runs {
        let taken = take_turn(husk, &nothing, temp)?;
        if turn > 0 {
            turns.push(taken);
        }
    }
    print_table(&turns);
    let own = |value: fn(&Turn) -> f64| median(turns.iter().map(value));
    let most = Verdict::new;
    verdicts.extend([
        most(
            "start to first answer, ms",
            own(|t| t.answer_ms),
            LIMIT_ANSWER_MS,
        ),
        most(
            "InstanceStart to first byte, ms",
            own(|t| t.byte_ms),
            LIMIT_BYTE_MS,
        ),
        most(
            "RSS running with the API, MB",
            own(|t| t.running_kib) * 1024.0 / 1e6,
            LIMIT_RUNNING_MB,
        ),
        Verdict::at_least("GETs per second", own(|t| t.gets), LEAST_GETS),
    ]);
    Ok(())
}

fn print_table(turns: &[Turn]) {
    let rows: [bench::Row<Turn>; 13] = [
        ("spawn to end, program of nothing, ms", |t| t.nothing_ms),
        ("spawn to end, husk --version, ms", |t| t.version_ms),
        ("spawn to first byte, overlapped floor, ms", |t| t.floor_ms),
        ("spawn to first answer, ms", |t| t.answer_ms),
        ("  times husk --version", |t| t.answer_ms / t.version_ms),
        ("  when the client polls for the socket, ms", |t| {
            t.answer_polled_ms
        }),
        ("InstanceStart to first byte, ms", |t| t.byte_ms),
        ("  when the client does not pause, ms", |t| {
            t.byte_at_once_ms
        }),
        ("RSS idle, KiB", |t| t.idle_kib),
        ("RSS running, KiB", |t| t.running_kib),
        ("RSS at most, KiB", |t| t.peak_kib),
        ("GETs per second, 1 connection", |t| t.gets),
        ("GETs per second, 10 connections", |t| t.gets_of_many),
    ];
    bench::print_rows(turns, &rows);
}

fn take_turn(husk: &Path, nothing: &Path, temp: &Path) -> Result<Turn> {
    let floor = Program::new("floor", &temp.join("floor-overlap").display().to_string());
    let mut turn = Turn {
        floor_ms: settled(|| Ok(bench::start(&floor, "h", PATIENCE)?.ms))?,
        nothing_ms: settled(|| time_to_end(&mut Command::new(nothing)))?,
        version_ms: settled(|| time_to_end(Command::new(husk).arg("--version")))?,
        ..Turn::default()
    };
    let payload = temp.join("payload.elf");
    settled(|| {
        let mut served = Served::start(husk, temp)?;
        let mut client = served.connect_when_made()?;
        client.get("/")?;
        turn.answer_ms = ms_since(served.begun);
        configure(&mut client, &payload, None)?;
        // KVM's part is done by then, as with any client that is not a benchmark.
        thread::sleep(CLIENT_PAUSE);
        turn.idle_kib = served.memory("VmRSS:")?;
        turn.byte_ms = served.start_guest(&mut client, "h")?;
        thread::sleep(CLIENT_PAUSE);
        turn.running_kib = served.memory("VmRSS:")?;
        turn.peak_kib = served.memory("VmHWM:")?;
        turn.gets = gets_per_second(&served, 1)?;
        turn.gets_of_many = gets_per_second(&served, CONNECTIONS)?;
        Ok(())
    })?;
    turn.answer_polled_ms = settled(|| {
        let served = Served::start(husk, temp)?;
        served.connect()?.get("/")?;
        Ok(ms_since(served.begun))
    })?;
    turn.byte_at_once_ms = settled(|| {
        let mut served = Served::start(husk, temp)?;
        let mut client = served.connect()?;
        configure(&mut client, &payload, None)?;
        served.start_guest(&mut client, "h")
    })?;
    Ok(turn)
}

/// Measure, and let the host's kernel finish with what was measured.
pub fn settled<T>(measure: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = measure();
    thread::sleep(bench::SETTLE);
    result
}

pub fn ms_since(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

fn time_to_end(command: &mut Command) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let begin = Instant::now();
    let status = command.status().context("cannot start a program")?;
    let ms = ms_since(begin);
    match status.success() {
        true => Ok(ms),
        false => bail!("a program that was to be timed failed ({status})"),
    }
}

pub fn configure(client: &mut Client, kernel: &Path, initrd: Option<&Path>) -> Result<()> {
    let kernel = kernel.display();
    let more = match initrd {
        Some(initrd) => format!(
            r#","initrd_path":"{}","boot_args":"console=ttyS0 quiet""#,
            initrd.display()
        ),
        None => String::new(),
    };
    let source = format!(r#"{{"kernel_image_path":"{kernel}"{more}}}"#);
    client.put("/boot-source", &source)?;
    client.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#)
}

/// All clients at once, while the guest runs.
fn gets_per_second(served: &Served, connections: usize) -> Result<f64> {
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(served.connect()?);
    }
    let begin = Instant::now();
    let done = thread::scope(|scope| {
        let work =
            |mut client: Client| move || (0..GETS / connections).try_for_each(|_| client.get("/"));
        let threads: Vec<_> = clients
            .into_iter()
            .map(|client| scope.spawn(work(client)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a client failed")))
    });
    done?;
    Ok(GETS as f64 / begin.elapsed().as_secs_f64())
}

/// Boots of the minimal kernel, with and without requests.
pub fn run_boots(husk: &Path, temp: &Path, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let vmlinux = kernel::ensure()?;
    let initrd = bench::init_archive(temp)?;
    println!(
        "\nInstanceStart to init, minimal kernel, 1 vCPU, with and without GETs, testbed of 2 CPUs, real time:"
    );
    let testbed = Testbed {
        cpus: 2,
        limit: Some(Duration::from_secs(600)),
        ..Testbed::default()
    };
    let files = [husk, &vmlinux, &initrd].map(|path| path.display().to_string());
    let output = bench::inner(&testbed, "bench-api-inner", &files)?;
    let ratio = output
        .lines()
        .find_map(|line| line.trim().strip_prefix("ratio "));
    let ratio = ratio.and_then(|ratio| ratio.trim().parse().ok());
    verdicts.push(Verdict::new(
        "boot under GETs, times that without",
        ratio.context("the testbed printed no ratio")?,
        LIMIT_UNDER_LOAD,
    ));
    Ok(())
}

/// What runs inside the testbed. Its CPUs are many times slower than any real one, so what 5,000 a second are there is a
/// matter of proportion: as many requests in a boot as in one of a real machine.
pub fn run_inner(args: &InnerArgs) -> Result<ExitCode> {
    let temp = host::TempDir::new(&std::env::temp_dir(), "husk-bench-api")?;
    let boot = |pace| boot(args, temp.path(), pace);
    boot(None)?;
    let (mut quiet, mut loaded, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs {
        quiet.push(boot(None)?.0);
        let usual = median(quiet.iter().copied());
        let pace = Duration::from_secs_f64(usual / 1e3 / (LEAST_GETS * BOOT_S));
        let (ms, count) = boot(Some(pace))?;
        loaded.push(ms);
        counts.push(count as f64);
    }
    let pairs = quiet
        .iter()
        .zip(&loaded)
        .map(|(quiet, loaded)| loaded / quiet);
    println!("without, ms: {quiet:.0?}\nwith, ms:    {loaded:.0?}\nGETs in it:  {counts:?}");
    println!("ratio {:.3}", median(pairs));
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds to init, and how many requests were answered meanwhile.
fn boot(args: &InnerArgs, temp: &Path, pace: Option<Duration>) -> Result<(f64, u64)> {
    let mut served = Served::start(Path::new(&args.husk), temp)?;
    let mut client = served.connect()?;
    configure(
        &mut client,
        Path::new(&args.vmlinux),
        Some(Path::new(&args.initrd)),
    )?;
    let mut other = served.connect()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| -> Result<u64> {
            let (mut count, mut next) = (0, Instant::now());
            while let Some(pace) = pace.filter(|_| !over.load(Ordering::Relaxed)) {
                other.get("/")?;
                count += 1;
                next += pace;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            Ok(count)
        });
        let ms = served.start_guest(&mut client, MARK);
        over.store(true, Ordering::Relaxed);
        let count = load.join().unwrap_or_else(|_| bail!("a client failed"));
        Ok((ms?, count?))
    })
}

/// `husk serve`, killed at the end.
pub struct Served {
    child: Child,
    socket: std::path::PathBuf,
    pub console: std::io::PipeReader,
    /// Told when a file is made beside the socket.
    made: OwnedFd,
    /// When it was spawned.
    pub begun: Instant,
}

impl Served {
    pub fn start(husk: &Path, temp: &Path) -> Result<Self> {
        Self::start_with(husk, temp, Stdio::null())
    }

    /// With an input.
    pub fn start_with(husk: &Path, temp: &Path, input: impl Into<Stdio>) -> Result<Self> {
        let socket = temp.join("api.sock");
        // A program that was killed leaves it.
        let _ = fs::remove_file(&socket);
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let made = inotify::init(flags).context("cannot watch for files")?;
        inotify::add_watch(&made, temp, inotify::WatchFlags::CREATE)
            .with_context(|| format!("cannot watch {}", temp.display()))?;
        let (console, writer) = std::io::pipe().context("cannot make a pipe")?;
        let mut command = Command::new(husk);
        command.args(["serve", "--api-sock"]).arg(&socket);
        command.stdin(input).stdout(writer);
        let begun = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", husk.display()))?;
        Ok(Self {
            child,
            socket,
            console,
            made,
            begun,
        })
    }

    /// Sleeps until the socket's file is there: a client that tries again and again takes time from the processor on which
    /// Husk starts, usually its own.
    pub fn connect_when_made(&self) -> Result<Client> {
        let limit = Timespec::try_from(PATIENCE).context("too much patience")?;
        let mut wait = [PollFd::new(&self.made, PollFlags::IN)];
        if poll(&mut wait, Some(&limit)).context("cannot wait for the socket")? == 0 {
            bail!("husk serve makes no socket");
        }
        self.connect()
    }

    fn connect(&self) -> Result<Client> {
        let begin = Instant::now();
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => {
                    let limit = Some(PATIENCE);
                    stream
                        .set_read_timeout(limit)
                        .context("cannot limit a client's patience")?;
                    return Ok(Client(stream));
                }
                Err(_) if begin.elapsed() < PATIENCE => thread::sleep(RETRY),
                Err(e) => return Err(e).context("nobody listens on the socket of husk serve"),
            }
        }
    }

    /// InstanceStart; milliseconds until the guest has written a line that is `mark`.
    fn start_guest(&mut self, client: &mut Client, mark: &str) -> Result<f64> {
        let begin = Instant::now();
        client.send("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#)?;
        let (at, output) = bench::wait_for_mark(
            &mut self.console,
            &[mark.as_bytes(), &mark.to_uppercase().into_bytes()],
        );
        let at = at.with_context(|| format!("the guest did not print {mark:?}, but: {output}"))?;
        client.answer(204)?;
        Ok(at.duration_since(begin).as_secs_f64() * 1e3)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn memory(&self, field: &str) -> Result<f64> {
        let kib = bench::memory(self.child.id(), field).context("husk serve has ended")?;
        Ok(kib as f64)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills processes (a negative number: a process group) when it is dropped, or when this process has ended, however it did: clones are
/// nobody's children, and a VM that is told of Ctrl-C presses its power button, which payloads do not hear.
pub struct Guard(Child);

impl Guard {
    /// A shell waits for the end of its input, and then kills.
    pub fn new(targets: &[i64]) -> Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", r#"read -r line; kill -s KILL -- "$@""#, "sh"]);
        shell.args(targets.iter().map(i64::to_string));
        // They may be gone already.
        shell.stdin(Stdio::piped()).stdout(Stdio::null());
        let shell = shell.stderr(Stdio::null()).process_group(0).spawn();
        Ok(Self(shell.context("cannot start a shell")?))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A connection that is kept.
pub struct Client(UnixStream);

impl Client {
    pub fn get(&mut self, path: &str) -> Result<()> {
        self.send("GET", path, "")?;
        self.answer(200).map(drop)
    }

    pub fn put(&mut self, path: &str, body: &str) -> Result<()> {
        self.send("PUT", path, body)?;
        self.answer(204).map(drop)
    }

    pub fn patch(&mut self, path: &str, body: &str) -> Result<()> {
        self.send("PATCH", path, body)?;
        self.answer(204).map(drop)
    }

    pub fn send(&mut self, method: &str, path: &str, body: &str) -> Result<()> {
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0
            .write_all(text.as_bytes())
            .context("cannot send a request")
    }

    /// Reads a whole answer, whose status must be this one; its body.
    pub fn answer(&mut self, status: u16) -> Result<String> {
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !is_complete(&answer) {
            match self.0.read(&mut buffer).context("no answer")? {
                0 => bail!(
                    "the connection was closed: {}",
                    String::from_utf8_lossy(&answer)
                ),
                count => answer.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            }
        }
        match answer.starts_with(format!("HTTP/1.1 {status} ").as_bytes()) {
            true => Ok(body(&answer)),
            false => bail!("not {status}: {}", String::from_utf8_lossy(&answer)),
        }
    }
}

/// The head, and as much of a body as the head tells.
fn is_complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse().ok())?
    });
    body.len() >= length.unwrap_or(0)
}

fn body(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    let parts = text.split_once("\r\n\r\n");
    parts.map(|(_, body)| body.to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_complete_with_its_body() {
        assert!(is_complete(b"HTTP/1.1 204 No Content\r\nserver: x\r\n\r\n"));
        assert!(!is_complete(
            b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}"
        ));
        assert!(is_complete(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        ));
        assert!(!is_complete(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"));
    }
}
