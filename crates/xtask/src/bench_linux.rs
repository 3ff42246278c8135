//! Snapshots and clones of Linux, beside a boot of it, on the testbed with instructions counted.
//!
//! What each figure is: docs/performance.md.

use crate::bench::{self, median};
use crate::bench_api::{Client, Served, configure, ms_since};
use crate::bench_forks::{fifo, kill, pids};
use crate::bench_snapshots::byte_since;
use crate::host::TempDir;
use crate::kernel;
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The guest's first process: prints all the time, and computes in between.
const INIT: &str = "\
#include <unistd.h>
int main(void) { for (;;) { (void)!write(1, \"line\\n\", 5); for (volatile int i = 0; i < 50000; i++); } }
";
const MARK: &str = "line";

/// The guest runs for so long between a complete snapshot and a diff.
const BETWEEN: Duration = Duration::from_millis(20);
/// What was just written is hashed when it is first used. Virtual.
const AGE: Duration = Duration::from_secs(10);

/// `cargo xtask bench-linux-inner`.
#[derive(clap::Args)]
pub struct InnerArgs {
    husk: PathBuf,
    vmlinux: PathBuf,
    initrd: PathBuf,
    #[arg(short = 'n', long, default_value_t = 3)]
    runs: u32,
}

/// A turn's figures.
#[derive(Default)]
struct Turn {
    /// `husk run`: spawn to the first line of the guest's first process.
    boot_ms: f64,
    full_ms: f64,
    full_kib: f64,
    diff_ms: f64,
    diff_kib: f64,
    /// `husk restore` of the complete snapshot: spawn to what the guest prints next.
    restore_ms: f64,
    /// PUT /husk/fork of the VM, which becomes a template, to what the clone prints next.
    first_clone_ms: f64,
    /// The same of the template.
    clone_ms: f64,
}

/// The minimal kernel's snapshots.
pub fn run(husk: &Path, temp: &Path) -> Result<()> {
    let vmlinux = kernel::ensure()?;
    let initrd = bench::archive_of_init(temp, "lines", INIT)?;
    println!(
        "\nsnapshots and clones of the minimal kernel, 128 MiB, 1 vCPU, virtual ms on the testbed:"
    );
    let testbed = Testbed {
        cpus: 1,
        icount: true,
        limit: Some(Duration::from_secs(1200)),
        ..Testbed::default()
    };
    let files = [husk, &vmlinux, &initrd].map(|path| path.display().to_string());
    bench::inner(&testbed, "bench-linux-inner", &files).map(drop)
}

/// What runs inside the testbed.
pub fn run_inner(args: &InnerArgs) -> Result<ExitCode> {
    let temp = TempDir::new(&std::env::temp_dir(), "husk-bench-linux")?;
    // In this host's memory: each opening of a file of another host's takes until the next timer.
    let near = |path: &Path| -> Result<PathBuf> {
        let name = path.file_name().context("a file without a name")?;
        let copy = temp.path().join(name);
        fs::copy(path, &copy).with_context(|| format!("cannot copy {}", path.display()))?;
        Ok(copy)
    };
    let bench = Bench {
        husk: near(&args.husk)?,
        vmlinux: near(&args.vmlinux)?,
        initrd: near(&args.initrd)?,
        kept: temp.path().join("kept"),
        temp: temp.path(),
    };
    fs::create_dir(&bench.kept).context("cannot make a directory for snapshots")?;
    thread::sleep(AGE);
    let mut turns = Vec::new();
    for number in 0..=args.runs {
        let turn = bench.take_turn()?;
        if number > 0 {
            turns.push(turn);
        }
    }
    let rows: [bench::Row<Turn>; 9] = [
        ("spawn to first line, booting", |t| t.boot_ms),
        ("spawn to next line, husk restore", |t| t.restore_ms),
        ("fork of a VM to its clone's next line", |t| {
            t.first_clone_ms
        }),
        ("fork of a template to its clone's next line", |t| {
            t.clone_ms
        }),
        ("PUT /snapshot/create, full", |t| t.full_ms),
        ("  written, KiB", |t| t.full_kib),
        ("PUT /snapshot/create, diff, 20 ms later", |t| t.diff_ms),
        ("  written, KiB", |t| t.diff_kib),
        ("booting, times husk restore", |t| t.boot_ms / t.restore_ms),
    ];
    bench::print_rows(&turns, &rows);
    let own = |value: fn(&Turn) -> f64| median(turns.iter().map(value));
    if own(|t| t.restore_ms) >= own(|t| t.boot_ms) {
        bail!("a guest that was kept goes on later than one that boots");
    }
    Ok(ExitCode::SUCCESS)
}

struct Bench<'a> {
    husk: PathBuf,
    vmlinux: PathBuf,
    initrd: PathBuf,
    kept: PathBuf,
    temp: &'a Path,
}

/// A process that ends with its owner.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bench<'_> {
    fn take_turn(&self) -> Result<Turn> {
        let mut turn = Turn {
            boot_ms: self.boot()?,
            ..Turn::default()
        };
        self.keep(&mut turn)?;
        turn.restore_ms = self.restore()?;
        self.fork(&mut turn)?;
        Ok(turn)
    }

    fn boot(&self) -> Result<f64> {
        let mut command = Command::new(&self.husk);
        command.args(["run", "--memory", "128M", "--cmdline", "quiet", "--kernel"]);
        command.arg(&self.vmlinux).arg("--initrd").arg(&self.initrd);
        self.spawned(&mut command, |console, begun| {
            let (at, output) = bench::wait_for_mark(console, &[MARK.as_bytes()]);
            let at = at.with_context(|| format!("the guest printed no line, but: {output}"))?;
            Ok(at.duration_since(begun).as_secs_f64() * 1e3)
        })
    }

    fn restore(&self) -> Result<f64> {
        let mut command = Command::new(&self.husk);
        command.arg("restore").arg(&self.kept);
        self.spawned(&mut command, |mut console, begun| {
            byte_since(&mut console, begun)
        })
    }

    fn spawned(
        &self,
        command: &mut Command,
        wait: impl FnOnce(std::process::ChildStdout, Instant) -> Result<f64>,
    ) -> Result<f64> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let begun = Instant::now();
        let mut child = Killed(command.spawn().context("cannot start husk")?);
        let console = child.0.stdout.take().context("husk has no console")?;
        wait(console, begun)
    }

    /// A VM whose guest prints lines.
    fn served(&self, track_dirty_pages: bool) -> Result<(Served, Client)> {
        let mut served = Served::start(&self.husk, self.temp)?;
        let mut client = served.connect_when_made()?;
        configure(&mut client, &self.vmlinux, Some(&self.initrd))?;
        let track = format!(r#"{{"track_dirty_pages":{track_dirty_pages}}}"#);
        client.patch("/machine-config", &track)?;
        client.put("/actions", r#"{"action_type":"InstanceStart"}"#)?;
        let (at, output) = bench::wait_for_mark(&mut served.console, &[MARK.as_bytes()]);
        at.with_context(|| format!("the guest printed no line, but: {output}"))?;
        Ok((served, client))
    }

    fn keep(&self, turn: &mut Turn) -> Result<()> {
        let (served, mut client) = self.served(false)?;
        (turn.full_ms, turn.full_kib) = self.create(&mut client, "Full", &self.kept)?;
        drop(served);
        let (_served, mut client) = self.served(true)?;
        let [base, diff] = ["base", "diff"].map(|name| self.temp.join(name));
        for dir in [&base, &diff] {
            fs::create_dir_all(dir).context("cannot make a directory for a snapshot")?;
        }
        self.create(&mut client, "Full", &base)?;
        client.patch("/vm", r#"{"state":"Resumed"}"#)?;
        thread::sleep(BETWEEN);
        (turn.diff_ms, turn.diff_kib) = self.create(&mut client, "Diff", &diff)?;
        Ok(())
    }

    /// Pauses; milliseconds that the snapshot takes, and KiB that its files do.
    fn create(&self, client: &mut Client, kind: &str, dir: &Path) -> Result<(f64, f64)> {
        client.patch("/vm", r#"{"state":"Paused"}"#)?;
        let place = dir.display();
        let body = format!(
            r#"{{"snapshot_type":"{kind}","snapshot_path":"{place}/state","mem_file_path":"{place}/memory"}}"#
        );
        let begun = Instant::now();
        client.put("/snapshot/create", &body)?;
        let ms = ms_since(begun);
        let mut blocks = 0;
        for name in ["state", "memory"] {
            let about = fs::metadata(dir.join(name)).context("a snapshot has no files")?;
            blocks += about.blocks();
        }
        Ok((ms, blocks as f64 / 2.0))
    }

    /// Of a VM that stands still afterwards: there is but one processor.
    fn fork(&self, turn: &mut Turn) -> Result<()> {
        let (_served, mut client) = self.served(false)?;
        client.patch("/vm", r#"{"state":"Paused"}"#)?;
        turn.first_clone_ms = self.clone_of(&mut client, r#""keep_template":true"#)?;
        turn.clone_ms = self.clone_of(&mut client, r#""template":"1""#)?;
        // With it goes the process that makes clones.
        client.send("DELETE", "/husk/fork/1", "")?;
        client.answer(204).map(drop)
    }

    fn clone_of(&self, client: &mut Client, more: &str) -> Result<f64> {
        let path = self.temp.join("console");
        let mut console = fifo(&path)?;
        let order = format!(r#"{{"count":1,{more},"console":"{}"}}"#, path.display());
        let begun = Instant::now();
        client.send("PUT", "/husk/fork", &order)?;
        let ms = byte_since(&mut console, begun)?;
        for clone in pids(&client.answer(200)?, 1)? {
            kill(clone)?;
        }
        fs::remove_file(&path).context("cannot remove a FIFO")?;
        Ok(ms)
    }
}
