//! Clones of a VM: how soon one runs, what it takes, and how long a thousand of them do.
//!
//! What each figure is: docs/performance.md.

use crate::bench::{self, Verdict, median};
use crate::bench_api::{
    CLIENT_PAUSE, Client, Guard, PATIENCE, Served, configure, ms_since, settled,
};
use crate::bench_snapshots::{Bench, Turn as Start, byte_since, payload};
use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The request to a clone's first byte (the median), as a multiple of the overlapped floor's median.
const LIMIT_RATIO: f64 = 1.0;
/// Private memory of a clone that has begun to run, in units of 1000 bytes.
const LIMIT_PRIVATE_KB: f64 = 300.0;
/// Clones of one request, and how long all of them may take.
const MANY: usize = 1000;
const LIMIT_MANY_S: f64 = 1.5;
/// How often that is done.
const MANY_RUNS: u32 = 3;
/// Turns at least: p99 of fewer would be the slowest.
const LEAST_TURNS: u32 = 100;
/// Between looks whether a process is gone.
const LOOK: Duration = Duration::from_millis(1);

/// A turn's figures.
#[derive(Default)]
struct Turn {
    /// The floor, a boot, and `husk restore`.
    other: Start,
    /// PUT /husk/fork of a VM that runs, to its answer: a template, and no clone.
    freeze_ms: f64,
    /// PUT /husk/fork of a template, to the clone's first byte.
    clone_ms: f64,
    /// What no other process has of the clone's memory, while there is another clone.
    private_kb: f64,
}

/// With a payload kernel that waits until it is a clone, says so, and halts. The snapshot of `bench` is there.
pub fn run(runs: u32, bench: &Bench<'_>, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let waits = payload(bench.temp, "waits")?;
    let dir = bench.temp.join("forks");
    fs::create_dir_all(&dir).context("cannot make a directory for clones")?;
    let runs = runs.max(LEAST_TURNS);
    println!("\nforks, 128 MiB, 1 vCPU, {runs} alternating starts:");
    let mut parent = Parent::start(bench.husk, &dir, &waits)?;
    let mut turns = Vec::new();
    for number in 0..=runs {
        let turn = take_turn(bench, &mut parent, &waits, number as usize)?;
        if number > 0 {
            turns.push(turn);
        }
    }
    print_table(&turns);
    let mut many = Vec::new();
    for _ in 0..MANY_RUNS {
        many.push(settled(|| parent.many())?);
    }
    let many_s = median(many.iter().copied());
    println!("{MANY} clones of one request, s: {many:.2?}");
    let own = |value: fn(&Turn) -> f64| median(turns.iter().map(value));
    verdicts.extend([
        Verdict::new(
            "fork to a clone's first byte, times the overlapped floor",
            own(|t| t.clone_ms) / own(|t| t.other.floor_ms),
            LIMIT_RATIO,
        ),
        Verdict::new(
            "private memory of a clone, KB",
            own(|t| t.private_kb),
            LIMIT_PRIVATE_KB,
        ),
        Verdict::new("1000 clones of one request, s", many_s, LIMIT_MANY_S),
    ]);
    Ok(())
}

fn print_table(turns: &[Turn]) {
    type Row = (&'static str, fn(&Turn) -> f64);
    let rows: [Row; 7] = [
        ("spawn to first byte, overlapped floor, ms", |t| {
            t.other.floor_ms
        }),
        ("spawn to first byte, booting, ms", |t| t.other.boot_ms),
        ("spawn to next byte, husk restore, ms", |t| {
            t.other.restore_ms
        }),
        ("fork of a template to first byte, ms", |t| t.clone_ms),
        ("  times the floor", |t| t.clone_ms / t.other.floor_ms),
        ("  private memory, KB", |t| t.private_kb),
        ("fork that makes a template of a VM, ms", |t| t.freeze_ms),
    ];
    println!(
        "{:44} {:>9} {:>9} {:>9} {:>9}",
        "", "min", "median", "p99", "max"
    );
    for (name, value) in rows {
        let mut values: Vec<f64> = turns.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let at = |rank: usize| values.get(rank).copied().unwrap_or(f64::NAN);
        // Nearest rank: the least that no more than a hundredth of the values exceed.
        let p99 = (values.len() * 99).div_ceil(100).saturating_sub(1);
        println!(
            "{name:44} {:9.2} {:9.2} {:9.2} {:9.2}",
            at(0),
            median(values.iter().copied()),
            at(p99),
            at(values.len().saturating_sub(1))
        );
    }
}

fn take_turn(bench: &Bench<'_>, parent: &mut Parent, waits: &Path, number: usize) -> Result<Turn> {
    let mut turn = Turn::default();
    for index in bench::order(5, number) {
        settled(|| match index {
            0 => bench.floor(&mut turn.other),
            1 => parent.one(number, &mut turn),
            2 => bench.boot(&mut turn.other),
            3 => freeze(bench, waits, &mut turn),
            _ => bench.restore(&mut turn.other),
        })?;
    }
    Ok(turn)
}

/// A VM that runs, as it is there for its first template.
fn freeze(bench: &Bench<'_>, waits: &Path, turn: &mut Turn) -> Result<()> {
    let (_served, mut client) = waiting(bench.husk, bench.temp, waits)?;
    turn.freeze_ms = make_template(&mut client)?;
    Ok(())
}

/// A VM that waits to be a clone.
fn waiting(husk: &Path, dir: &Path, waits: &Path) -> Result<(Served, Client)> {
    let mut served = Served::start(husk, dir)?;
    let mut client = served.connect_when_made()?;
    configure(&mut client, waits, None)?;
    client.put("/actions", r#"{"action_type":"InstanceStart"}"#)?;
    byte_since(&mut served.console, Instant::now())?;
    Ok((served, client))
}

/// Milliseconds that it takes.
fn make_template(client: &mut Client) -> Result<f64> {
    let begun = Instant::now();
    client.send("PUT", "/husk/fork", r#"{"count":0,"keep_template":true}"#)?;
    client.answer(200)?;
    Ok(ms_since(begun))
}

/// A VM with a template. It is paused itself, for it would never stop spinning.
struct Parent {
    _ends: Guard,
    client: Client,
    dir: PathBuf,
    last: Vec<Pid>,
    _served: Served,
}

impl Parent {
    fn start(husk: &Path, dir: &Path, waits: &Path) -> Result<Self> {
        let (served, mut client) = waiting(husk, dir, waits)?;
        make_template(&mut client)?;
        let ends = Guard::new(&[
            i64::from(served.id()),
            -i64::from(group_of_child(served.id())?),
        ])?;
        client.patch("/vm", r#"{"state":"Paused"}"#)?;
        Ok(Self {
            _ends: ends,
            client,
            dir: dir.to_owned(),
            last: Vec::new(),
            _served: served,
        })
    }

    fn one(&mut self, number: usize, turn: &mut Turn) -> Result<()> {
        let path = self.dir.join(format!("console-{number}"));
        let mut console = fifo(&path)?;
        let order = format!(
            r#"{{"template":"1","count":1,"console":"{}"}}"#,
            path.display()
        );
        let begun = Instant::now();
        self.client.send("PUT", "/husk/fork", &order)?;
        turn.clone_ms = byte_since(&mut console, begun)?;
        let clones = pids(&self.client.answer(200)?, 1)?;
        // The rest of its line, and the end of what its threads do beside it.
        thread::sleep(CLIENT_PAUSE);
        turn.private_kb = clones
            .iter()
            .copied()
            .map(private_kb)
            .sum::<Result<f64>>()?;
        // The last one was still there: pages of code that none but clones run are no clone's own, but would seem to be.
        for clone in std::mem::replace(&mut self.last, clones) {
            kill(clone)?;
        }
        fs::remove_file(&path).context("cannot remove a FIFO")
    }

    /// Seconds until all of them run, as the answer tells.
    fn many(&mut self) -> Result<f64> {
        let order = format!(r#"{{"template":"1","count":{MANY}}}"#);
        let begun = Instant::now();
        self.client.send("PUT", "/husk/fork", &order)?;
        let answer = self.client.answer(200)?;
        let taken = begun.elapsed();
        let clones = pids(&answer, MANY)?;
        clones.iter().copied().try_for_each(kill)?;
        let begun = Instant::now();
        while clones.iter().any(|pid| is_there(*pid)) {
            if begun.elapsed() > PATIENCE {
                bail!("clones that were killed do not go away");
            }
            thread::sleep(LOOK);
        }
        Ok(taken.as_secs_f64())
    }
}

/// A named pipe that is new, to be read from.
pub fn fifo(path: &Path) -> Result<fs::File> {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path, FileType::Fifo, mode, 0).context("cannot make a FIFO")?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let pipe = rustix::fs::open(path, flags, Mode::empty()).context("cannot open a FIFO")?;
    Ok(fs::File::from(pipe))
}

/// Process IDs of as many clones; each must have started.
pub fn pids(answer: &str, count: usize) -> Result<Vec<Pid>> {
    let answer: Value = serde_json::from_str(answer).context("the answer to a fork is no JSON")?;
    let clones = answer.get("clones").and_then(Value::as_array);
    let pid = |clone: &Value| {
        let pid = clone.get("pid").and_then(Value::as_i64);
        let pid = pid.filter(|_| clone.get("error").is_none());
        let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        pid.with_context(|| format!("a clone did not start: {clone}"))
    };
    let pids: Result<Vec<Pid>> = clones.into_iter().flatten().map(pid).collect();
    let pids = pids?;
    match pids.len() == count {
        true => Ok(pids),
        false => bail!("{} clones instead of {count}", pids.len()),
    }
}

pub fn kill(pid: Pid) -> Result<()> {
    kill_process(pid, Signal::KILL).context("a clone has ended by itself")
}

fn is_there(pid: Pid) -> bool {
    fs::exists(format!("/proc/{}", pid.as_raw_nonzero())).unwrap_or(true)
}

/// What no other process has, in units of 1000 bytes.
fn private_kb(pid: Pid) -> Result<f64> {
    let path = format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero());
    let text = fs::read(&path).with_context(|| format!("cannot read {path}"))?;
    let mut kib = 0;
    for line in text.lines() {
        let line = line.context("smaps_rollup is no text")?;
        let mut words = line.split_whitespace();
        if let Some("Private_Clean:" | "Private_Dirty:") = words.next() {
            let value = words.next().and_then(|word| word.parse::<u64>().ok());
            kib += value.with_context(|| format!("no number in {path}: {line}"))?;
        }
    }
    Ok(kib as f64 * 1.024)
}

/// The process group of a template's process, and of its clones, which are nobody's children.
fn group_of_child(parent: u32) -> Result<u32> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let found = fs::read_dir("/proc")
            .context("cannot read /proc")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .find(|pid| is_leader_of(*pid, parent));
        match found {
            Some(pid) => return Ok(pid),
            // It leads a group a moment after it was forked.
            None if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            None => bail!("husk serve has no process for its template"),
        }
    }
}

/// Whether it is a child of `parent`, and leads a group of its own.
fn is_leader_of(pid: u32, parent: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before may have blanks and parentheses.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let mut fields = fields.split_whitespace().skip(1);
    let mut is = |number: u32| fields.next() == Some(number.to_string().as_str());
    is(parent) && is(pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[test]
    fn clones_that_did_not_start_are_an_error() {
        let pid = |answer: &str, count| pids(answer, count).map(|pids| pids.len()).ok();
        let answer = r#"{"clones":[{"n":1,"pid":7},{"n":2,"pid":8}]}"#;
        assert_eq!(pid(answer, 2), Some(2));
        assert_eq!(pid(answer, 3), None);
        assert_eq!(pid(r#"{"clones":[{"n":1,"pid":7,"error":"x"}]}"#, 1), None);
        assert_eq!(pid(r#"{"clones":[{"n":1,"error":"x"}]}"#, 1), None);
    }

    #[test]
    fn a_group_ends_with_its_guard() {
        let mut sleep = Command::new("sleep");
        let mut sleep = sleep.arg("60").process_group(0).spawn().unwrap();
        let group = group_of_child(std::process::id()).unwrap();
        assert_eq!(group, sleep.id());
        let guard = Guard::new(&[-i64::from(group)]).unwrap();
        assert!(sleep.try_wait().unwrap().is_none());
        drop(guard);
        assert!(!sleep.wait().unwrap().success());
    }

    #[test]
    fn this_process_has_memory_of_its_own() {
        let kb = private_kb(rustix::process::getpid()).unwrap();
        assert!((100.0..10e6).contains(&kb), "{kb}");
    }
}
