//! Snapshots: how long one takes, what it writes, and how soon a guest that was kept goes on, beside a boot of the same guest.
//!
//! What each figure is: docs/performance.md. All take turns, so that a noisy machine cancels out of ratios.

use crate::bench::{self, Program, Verdict, median};
use crate::bench_api::{CLIENT_PAUSE, Client, PATIENCE, Served, configure, ms_since, settled};
use crate::{bench_diffs, bench_forks, host};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// PUT /snapshot/create of 128 MiB.
const LIMIT_CREATE_MS: f64 = 5.0;
/// What it writes of a guest that has touched a few pages.
const LIMIT_CREATE_KIB: f64 = 512.0;
/// Spawn to the first byte of a guest that was kept, as a multiple of the overlapped floor.
const LIMIT_RATIO: f64 = 1.3;

/// A turn's figures.
#[derive(Default)]
pub struct Turn {
    pub floor_ms: f64,
    /// `husk run` of the payload: spawn to its first byte.
    pub boot_ms: f64,
    create_ms: f64,
    create_kib: f64,
    /// `husk restore`: spawn to the next byte.
    pub restore_ms: f64,
    /// PUT /snapshot/load to its answer.
    load_ms: f64,
    /// `husk serve` and PUT /snapshot/load: spawn to the next byte.
    served_ms: f64,
    /// PUT /snapshot/load to the next byte, where the client has paused before.
    load_to_byte_ms: f64,
}

/// What a turn needs.
pub struct Bench<'a> {
    pub husk: &'a Path,
    pub temp: &'a Path,
    payload: PathBuf,
    kept: PathBuf,
}

/// Natively, with a payload kernel that counts, and is in the middle of it when it is kept. `temp` holds the floor's program.
pub fn run(runs: u32, husk: &Path, temp: &Path, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let bench = Bench {
        husk,
        temp,
        payload: payload(temp, "ticks")?,
        kept: temp.join("kept"),
    };
    fs::create_dir_all(&bench.kept).context("cannot make a directory for snapshots")?;
    println!("\nsnapshots, 128 MiB, 1 vCPU, {runs} alternating starts:");
    let mut turns = Vec::new();
    for turn in 0..=runs {
        let taken = bench.take_turn(turn as usize)?;
        if turn > 0 {
            turns.push(taken);
        }
    }
    print_table(&turns);
    let own = |value: fn(&Turn) -> f64| median(turns.iter().map(value));
    verdicts.extend([
        Verdict::new("full snapshot, ms", own(|t| t.create_ms), LIMIT_CREATE_MS),
        Verdict::new(
            "written by it, KiB",
            own(|t| t.create_kib),
            LIMIT_CREATE_KIB,
        ),
        Verdict::new(
            "husk restore to running, times the overlapped floor",
            own(|t| t.restore_ms / t.floor_ms),
            LIMIT_RATIO,
        ),
        Verdict::new(
            "husk serve, load, to running, times the overlapped floor",
            own(|t| t.served_ms / t.floor_ms),
            LIMIT_RATIO,
        ),
    ]);
    bench_diffs::run(runs, &bench, verdicts)?;
    bench_forks::run(runs, &bench, verdicts)
}

fn print_table(turns: &[Turn]) {
    let rows: [bench::Row<Turn>; 11] = [
        ("spawn to first byte, overlapped floor, ms", |t| t.floor_ms),
        ("spawn to first byte, booting, ms", |t| t.boot_ms),
        ("  times the floor", |t| t.boot_ms / t.floor_ms),
        ("spawn to next byte, husk restore, ms", |t| t.restore_ms),
        ("  times the floor", |t| t.restore_ms / t.floor_ms),
        ("spawn to next byte, husk serve and load, ms", |t| {
            t.served_ms
        }),
        ("  times the floor", |t| t.served_ms / t.floor_ms),
        ("PUT /snapshot/load to its answer, ms", |t| t.load_ms),
        ("  to next byte, when the client paused, ms", |t| {
            t.load_to_byte_ms
        }),
        ("PUT /snapshot/create, full, ms", |t| t.create_ms),
        ("  written, KiB", |t| t.create_kib),
    ];
    bench::print_rows(turns, &rows);
}

/// A payload kernel of the tests'.
pub fn payload(temp: &Path, name: &str) -> Result<PathBuf> {
    let path = temp.join(format!("{name}.elf"));
    let mut gcc = Command::new("gcc");
    gcc.args([
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,-Ttext=0x1000000",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
        "-o",
    ]);
    let source = host::workspace_root()?.join(format!("tests/payloads/{name}.S"));
    host::run_quiet(gcc.arg(&path).arg(source))?;
    Ok(path)
}

impl Bench<'_> {
    /// Starts in an order in which each comes once behind each other one: what a program leaves to clean up, the next one pays.
    fn take_turn(&self, number: usize) -> Result<Turn> {
        let mut turn = Turn::default();
        if number == 0 {
            self.keep(&mut turn)?;
        }
        let starts: [fn(&Self, &mut Turn) -> Result<()>; 7] = [
            Self::floor,
            Self::restore,
            Self::serve,
            Self::boot,
            Self::load_later,
            Self::answer,
            Self::keep,
        ];
        for index in bench::order(starts.len(), number) {
            if let Some(start) = starts.get(index) {
                settled(|| start(self, &mut turn))?;
            }
        }
        Ok(turn)
    }

    pub fn floor(&self, turn: &mut Turn) -> Result<()> {
        let floor = self.temp.join("floor-overlap").display().to_string();
        turn.floor_ms = bench::start(&Program::new("floor", &floor), "h", PATIENCE)?.ms;
        Ok(())
    }

    pub fn boot(&self, turn: &mut Turn) -> Result<()> {
        let boot = format!("run --kernel {} --memory 128M", self.payload.display());
        turn.boot_ms = self.first_byte(&boot)?;
        Ok(())
    }

    pub fn restore(&self, turn: &mut Turn) -> Result<()> {
        turn.restore_ms = self.first_byte(&format!("restore {}", self.kept.display()))?;
        Ok(())
    }

    fn serve(&self, turn: &mut Turn) -> Result<()> {
        let mut served = Served::start(self.husk, self.temp)?;
        let mut client = served.connect_when_made()?;
        turn.served_ms = self.byte_of_load(&mut served, &mut client, None)?;
        Ok(())
    }

    /// Milliseconds until the guest goes on, from `begun`, else from the start. The client looks at its answer afterwards: woken by it, it
    /// may find the guest, which computes without end, on its processor, and wait for the host's next tick.
    fn byte_of_load(
        &self,
        served: &mut Served,
        client: &mut Client,
        begun: Option<Instant>,
    ) -> Result<f64> {
        client.send("PUT", "/snapshot/load", &self.load())?;
        let ms = byte_since(&mut served.console, begun.unwrap_or(served.begun))?;
        client.answer(204)?;
        Ok(ms)
    }

    fn answer(&self, turn: &mut Turn) -> Result<()> {
        let served = Served::start(self.husk, self.temp)?;
        let mut client = served.connect_when_made()?;
        let begun = Instant::now();
        client.put("/snapshot/load", &self.load())?;
        turn.load_ms = ms_since(begun);
        Ok(())
    }

    /// As most clients, that do something else between the start and the load.
    fn load_later(&self, turn: &mut Turn) -> Result<()> {
        let mut served = Served::start(self.husk, self.temp)?;
        let mut client = served.connect_when_made()?;
        client.get("/")?;
        std::thread::sleep(CLIENT_PAUSE);
        let begun = Instant::now();
        turn.load_to_byte_ms = self.byte_of_load(&mut served, &mut client, Some(begun))?;
        Ok(())
    }

    /// Boot, pause, keep.
    fn keep(&self, turn: &mut Turn) -> Result<()> {
        let mut served = Served::start(self.husk, self.temp)?;
        let mut client = served.connect_when_made()?;
        configure(&mut client, &self.payload, None)?;
        client.put("/actions", r#"{"action_type":"InstanceStart"}"#)?;
        byte_since(&mut served.console, Instant::now())?;
        client.patch("/vm", r#"{"state":"Paused"}"#)?;
        let kept = self.kept.display();
        let body = format!(r#"{{"snapshot_path":"{kept}/state","mem_file_path":"{kept}/memory"}}"#);
        let begun = Instant::now();
        client.put("/snapshot/create", &body)?;
        turn.create_ms = ms_since(begun);
        let mut blocks = 0;
        for name in ["state", "memory"] {
            let about = fs::metadata(self.kept.join(name)).context("a snapshot has no files")?;
            blocks += about.blocks();
        }
        turn.create_kib = blocks as f64 / 2.0;
        Ok(())
    }

    fn load(&self) -> String {
        let kept = self.kept.display();
        format!(
            r#"{{"snapshot_path":"{kept}/state","resume_vm":true,
                "mem_backend":{{"backend_type":"File","backend_path":"{kept}/memory"}}}}"#
        )
    }

    /// Milliseconds from the spawn of Husk with these arguments to the first byte on its console.
    fn first_byte(&self, arguments: &str) -> Result<f64> {
        let (mut console, writer) = std::io::pipe().context("cannot make a pipe")?;
        let mut command = Command::new(self.husk);
        command.args(arguments.split(' '));
        command.stdin(Stdio::null()).stdout(writer);
        let begun = Instant::now();
        let mut child = command.spawn().context("cannot start husk")?;
        drop(command);
        let ms = byte_since(&mut console, begun);
        let _ = child.kill();
        child.wait().context("cannot wait for husk")?;
        ms.with_context(|| format!("husk {arguments}"))
    }
}

/// Sleeps until the guest writes something; milliseconds since `begun`.
pub fn byte_since(console: &mut (impl Read + AsFd), begun: Instant) -> Result<f64> {
    let limit = Timespec::try_from(PATIENCE).context("too much patience")?;
    let mut wait = [PollFd::new(&*console, PollFlags::IN)];
    if poll(&mut wait, Some(&limit)).context("cannot wait for the guest")? == 0 {
        bail!("the guest prints nothing");
    }
    let ms = ms_since(begun);
    match console
        .read(&mut [0])
        .context("cannot read the guest's console")?
    {
        0 => bail!("the monitor ended before its guest printed anything"),
        _ => Ok(ms),
    }
}
