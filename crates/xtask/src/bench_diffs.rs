//! Diff snapshots: how long the VM stands still for one.
//!
//! What each figure is: docs/performance.md.

use crate::bench::{self, Verdict, median};
use crate::bench_api::{Client, Guard, PATIENCE, Served, ms_since, settled};
use crate::bench_snapshots::{Bench, payload};
use crate::host;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// From the request to pause to that to resume, with a diff of 2 GiB with 10 MB that were written in between.
const LIMIT_DIFF_MS: f64 = 10.0;
/// What the payload writes, as the file system counts it: less would be no diff of it.
const LEAST_KIB: u64 = 10 << 10;

/// A turn's figures.
struct Turn {
    create_ms: f64,
    /// From PATCH Paused to when PATCH Resumed is sent.
    pause_ms: f64,
    /// And to its answer. The guest computes without end from then on, and the client may wait for its processor until the host's next tick.
    resumed_ms: f64,
    kib: f64,
    full_ms: f64,
}

/// With a payload kernel that writes to 10 MiB of 2 GiB when it is told to.
pub fn run(runs: u32, bench: &Bench<'_>, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let kernel = payload(bench.temp, "pages")?;
    let dir = bench.temp.join("diffs");
    fs::create_dir_all(&dir).context("cannot make a directory for diffs")?;
    let mut df = Command::new("df");
    let df = host::run_quiet(df.arg("--output=fstype").arg(&dir))?;
    let system = df.lines().last().unwrap_or_default();
    println!("\ndiffs, 2 GiB, 10 MB written, 1 vCPU, on {system}, {runs} turns:");
    let (input, writer) = std::io::pipe().context("cannot make a pipe")?;
    let served = Served::start_with(bench.husk, &dir, input)?;
    let ends = Guard::new(&[i64::from(served.id())])?;
    let client = served.connect_when_made()?;
    let mut guest = Guest {
        _ends: ends,
        served,
        client,
        input: writer,
    };
    guest.boot(&kernel)?;
    let mut turns = Vec::new();
    for number in 0..=runs {
        let turn = settled(|| guest.take_turn(&dir))?;
        if number > 0 {
            turns.push(turn);
        }
    }
    print_table(&turns);
    let own = median(turns.iter().map(|t| t.pause_ms));
    let what = "pause for a diff of 10 MB of 2 GiB, ms";
    verdicts.push(Verdict::new(what, own, LIMIT_DIFF_MS));
    Ok(())
}

fn print_table(turns: &[Turn]) {
    let rows: [bench::Row<Turn>; 5] = [
        ("PUT /snapshot/create, full, ms", |t| t.full_ms),
        ("PUT /snapshot/create, diff, ms", |t| t.create_ms),
        ("  written, KiB", |t| t.kib),
        ("  PATCH Paused to PATCH Resumed, ms", |t| t.pause_ms),
        ("  PATCH Paused to the latter's answer, ms", |t| {
            t.resumed_ms
        }),
    ];
    bench::print_rows(turns, &rows);
}

struct Guest {
    _ends: Guard,
    served: Served,
    client: Client,
    input: PipeWriter,
}

impl Guest {
    fn boot(&mut self, kernel: &Path) -> Result<()> {
        let source = format!(r#"{{"kernel_image_path":"{}"}}"#, kernel.display());
        self.client.put("/boot-source", &source)?;
        let machine = r#"{"vcpu_count":1,"mem_size_mib":2048,"track_dirty_pages":true}"#;
        self.client.put("/machine-config", machine)?;
        self.client
            .put("/actions", r#"{"action_type":"InstanceStart"}"#)?;
        line(&mut self.served.console, "ready")
    }

    /// A full snapshot, what is written then, and a diff of it.
    fn take_turn(&mut self, dir: &Path) -> Result<Turn> {
        self.pause()?;
        let full_ms = self.create(dir, "Full")?;
        self.resume()?;
        remove(dir)?;
        self.input.write_all(b"d").context("the guest is gone")?;
        line(&mut self.served.console, "done")?;
        let begun = Instant::now();
        self.pause()?;
        let create_ms = self.create(dir, "Diff")?;
        let pause_ms = ms_since(begun);
        self.resume()?;
        let resumed_ms = ms_since(begun);
        let about = fs::metadata(dir.join("memory")).context("a diff has no memory")?;
        let kib = about.blocks() / 2;
        if kib < LEAST_KIB {
            bail!("a diff of 10 MiB has {kib} KiB");
        }
        remove(dir)?;
        Ok(Turn {
            create_ms,
            pause_ms,
            resumed_ms,
            kib: kib as f64,
            full_ms,
        })
    }

    fn pause(&mut self) -> Result<()> {
        self.client.patch("/vm", r#"{"state":"Paused"}"#)
    }

    fn resume(&mut self) -> Result<()> {
        self.client.patch("/vm", r#"{"state":"Resumed"}"#)
    }

    /// Milliseconds that it takes.
    fn create(&mut self, dir: &Path, kind: &str) -> Result<f64> {
        let dir = dir.display();
        let body = format!(
            r#"{{"snapshot_type":"{kind}","snapshot_path":"{dir}/state","mem_file_path":"{dir}/memory"}}"#
        );
        let begun = Instant::now();
        self.client.put("/snapshot/create", &body)?;
        Ok(ms_since(begun))
    }
}

/// So that the next one has a new name.
fn remove(dir: &Path) -> Result<()> {
    for name in ["state", "memory"] {
        fs::remove_file(dir.join(name)).context("a snapshot has no files")?;
    }
    Ok(())
}

/// Reads until this line of the guest's.
fn line(console: &mut PipeReader, wanted: &str) -> Result<()> {
    let limit = Timespec::try_from(PATIENCE).context("too much patience")?;
    let mut said = Vec::new();
    while !said.ends_with(format!("{wanted}\n").as_bytes()) {
        let mut wait = [PollFd::new(&*console, PollFlags::IN)];
        if poll(&mut wait, Some(&limit)).context("cannot wait for the guest")? == 0 {
            bail!("the guest does not say {wanted:?}");
        }
        let mut piece = [0; 64];
        let length = console
            .read(&mut piece)
            .context("cannot read its console")?;
        if length == 0 {
            bail!("the monitor ended before its guest said {wanted:?}");
        }
        said.extend_from_slice(piece.get(..length).unwrap_or_default());
    }
    Ok(())
}
