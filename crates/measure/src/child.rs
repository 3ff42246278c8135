//! One run of a monitor, from its spawn to its end.

use crate::clock::now;
use crate::console::{Console, Marks, Shown};
use crate::{Error, Kind, Plan, Program, Until, timeline};
use husk_bench::{Failed, Phase, PhaseCounts, Run};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often it is looked whether the user wants an end.
const LOOK: Duration = Duration::from_millis(200);
/// How long a monitor has to end when it is told to, before it is killed.
pub const STOPPED_AFTER: Duration = Duration::from_secs(3);
/// A monitor's own exit status for what it was not given right.
const USAGE: i32 = 2;

/// How a run ended.
pub enum Ended {
    /// It can be reported.
    Seen(Box<Seen>),
    /// The monitor does not take what it was given, and says why.
    Refused(String),
    /// By the user: it does not count.
    Interrupted,
}

/// What was seen of a run.
pub struct Seen {
    pub run: Run,
    pub costs: Vec<PhaseCounts>,
    pub console: Vec<u8>,
}

/// Run `program` once.
pub fn watch(
    program: &Program,
    kind: Kind,
    plan: &Plan,
    marks: &Marks,
    timeout: Duration,
    interrupted: &AtomicBool,
) -> Result<Ended, Error> {
    let mut file = None;
    let mut words = program.command.clone();
    if let Some(husk) = &program.husk {
        match kind {
            Kind::Profile => words.clone_from(&husk.profiled),
            Kind::Counting => words.clone_from(&husk.counted),
            Kind::WarmUp | Kind::Measured => {}
        }
        words.extend(husk.more.iter().cloned());
        let memory = memfd_create("timeline", MemfdFlags::CLOEXEC);
        let memory = File::from(memory.map_err(|e| Error::Watch(e.into()))?);
        words.extend(arguments(kind, plan, marks, &memory));
        file = Some(memory);
    }
    let Some((name, arguments)) = words.split_first() else {
        return Ok(Ended::Refused("it is no command".into()));
    };
    let mut command = Command::new(name);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C is for who measures.
        .process_group(0);
    let begin = now();
    let child = command
        .spawn()
        .map_err(|e| Error::Spawn(name.to_string_lossy().into_owned(), e))?;
    let mut watched = Watched {
        begin,
        phases: Run::default().phases,
        console: Console::default(),
        errors: Console::default(),
        ends_at_mark: plan.until == Until::Mark,
        is_foreign: program.husk.is_none(),
        child,
    };
    let ending = watched.until_its_end(marks, timeout, interrupted)?;
    let status = watched.child.wait().map_err(Error::Watch)?;
    let end = now();
    if ending == Ending::Interrupted {
        return Ok(Ended::Interrupted);
    }
    let mut costs = Vec::new();
    if let Some(mut file) = file {
        let mut text = String::new();
        let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
        read.map_err(Error::Watch)?;
        let own;
        (own, costs) = timeline::read(&text, ns(begin));
        watched.add(own, marks);
    }
    if program.husk.is_some() && status.code() == Some(USAGE) && watched.phases.len() <= 1 {
        let said = watched.errors.last_lines().pop().unwrap_or_default();
        let said = said.strip_prefix("husk: ").unwrap_or(&said);
        return Ok(Ended::Refused(said.to_owned()));
    }
    // A monitor that was told to end at its mark has ended, but not as its guest wanted.
    let by_itself = ending == Ending::ByItself
        && !(watched.ends_at_mark && watched.phases.contains_key(&Phase::Mark));
    if by_itself {
        watched
            .phases
            .insert(Phase::Exit, ns(end.saturating_sub(begin)));
    }
    let reason = watched.fault(ending, status, marks, timeout);
    let console = watched.console.kept();
    let run = Run {
        phases: watched.phases,
        failed: reason.map(|reason| Failed {
            reason,
            console: watched.console.last_lines(),
        }),
    };
    Ok(Ended::Seen(Box::new(Seen {
        run,
        costs,
        console,
    })))
}

/// What Husk's own `run` is told beside what the user wants.
fn arguments(kind: Kind, plan: &Plan, marks: &Marks, timeline: &File) -> Vec<OsString> {
    let file = format!("/proc/{}/fd/{}", std::process::id(), timeline.as_raw_fd());
    let mut words: Vec<OsString> = vec!["--timeline-file".into(), file.into()];
    if plan.until == Until::Mark && !marks.is_chosen() {
        words.push("--stop-at-mark".into());
    }
    if kind == Kind::Counting {
        // Threads look into /proc then, which filters do not allow them.
        words.extend(["--exits".into(), "--no-seccomp".into()]);
    }
    words
}

/// Why a run is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    ByItself,
    AtMark,
    TimeOut,
    Interrupted,
}

struct Watched {
    begin: Duration,
    phases: std::collections::BTreeMap<Phase, u64>,
    console: Console,
    errors: Console,
    ends_at_mark: bool,
    is_foreign: bool,
    child: Child,
}

impl Watched {
    /// Until the process has closed its streams. It is told to end when its time is over.
    fn until_its_end(
        &mut self,
        marks: &Marks,
        timeout: Duration,
        interrupted: &AtomicBool,
    ) -> Result<Ending, Error> {
        let (mut stdout, mut stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let mut ending = Ending::ByItself;
        let mut limit = self.begin.saturating_add(timeout);
        let mut killed = false;
        let mut buffer = vec![0; 64 << 10];
        while stdout.is_some() || stderr.is_some() {
            let left = limit.saturating_sub(now());
            wait(&stdout, &stderr, left.min(LOOK))?;
            if let Some(count) = read_ready(&mut stdout, &mut buffer)? {
                let at = ns(now().saturating_sub(self.begin));
                self.show(buffer.get(..count).unwrap_or_default(), at, marks);
            }
            if let Some(count) = read_ready(&mut stderr, &mut buffer)? {
                self.errors
                    .take(buffer.get(..count).unwrap_or_default(), marks);
            }
            let next = if interrupted.load(Ordering::Acquire) {
                Ending::Interrupted
            } else if self.ends_at_mark && self.phases.contains_key(&Phase::Mark) {
                Ending::AtMark
            } else if now() >= limit {
                Ending::TimeOut
            } else {
                continue;
            };
            if ending == Ending::ByItself {
                ending = next;
                limit = now().saturating_add(STOPPED_AFTER);
                self.stop();
            } else if now() >= limit {
                if killed {
                    // A stranger holds its streams open.
                    break;
                }
                killed = true;
                limit = now().saturating_add(STOPPED_AFTER);
                self.kill();
            }
        }
        Ok(ending)
    }

    fn show(&mut self, bytes: &[u8], at: u64, marks: &Marks) {
        if self.is_foreign && !bytes.is_empty() {
            self.phases.entry(Phase::FirstConsoleByte).or_insert(at);
        }
        let Shown { mark, hands_over } = self.console.take(bytes, marks);
        if hands_over {
            self.phases.entry(Phase::HandsOver).or_insert(at);
        }
        if mark {
            self.phases.entry(Phase::Mark).or_insert(at);
        }
    }

    /// Phases that the process itself has told of count before what its console showed, but for a mark that the user chose.
    fn add(&mut self, own: std::collections::BTreeMap<Phase, u64>, marks: &Marks) {
        for (phase, at) in own {
            if phase != Phase::Mark || !marks.is_chosen() {
                self.phases.insert(phase, at);
            }
        }
    }

    /// Twice: at the first, Husk asks its guest.
    fn stop(&self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
            std::thread::sleep(Duration::from_millis(10));
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    fn kill(&self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    /// Why the run does not count.
    fn fault(
        &self,
        ending: Ending,
        status: ExitStatus,
        marks: &Marks,
        timeout: Duration,
    ) -> Option<String> {
        let has_mark = self.phases.contains_key(&Phase::Mark);
        // Of a foreign monitor nobody knows whether its guest marks.
        let must_mark = !self.is_foreign || marks.is_chosen();
        if ending == Ending::TimeOut {
            let what = match has_mark || !must_mark {
                true => "did not end",
                false => "set no mark",
            };
            let seconds = timeout.as_secs();
            return Some(format!("it {what} within {seconds} s"));
        }
        let ended = match (status.code(), status.signal()) {
            (_, Some(signal)) => format!("signal {signal}"),
            (code, None) => format!("exit status {}", code.unwrap_or_default()),
        };
        let said = match self.errors.last_line() {
            Some(line) => format!("{line} ({ended})"),
            None => ended,
        };
        if !has_mark && must_mark {
            return Some(format!("it ended before its mark: {said}"));
        }
        (ending == Ending::ByItself && !status.success()).then_some(said)
    }
}

/// Until one of the streams has something, or its other end is closed.
fn wait(
    stdout: &Option<ChildStdout>,
    stderr: &Option<ChildStderr>,
    time: Duration,
) -> Result<(), Error> {
    let streams = [
        stdout.as_ref().map(AsFd::as_fd),
        stderr.as_ref().map(AsFd::as_fd),
    ];
    let streams = streams.iter().flatten();
    let mut streams: Vec<_> = streams
        .map(|stream| PollFd::new(stream, PollFlags::IN))
        .collect();
    let time = Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    });
    match poll(&mut streams, Some(&time)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(Error::Watch(e.into())),
    }
}

/// Read if that does not block; at its end the stream is closed.
fn read_ready<S: Read + AsFd>(
    stream: &mut Option<S>,
    buffer: &mut [u8],
) -> Result<Option<usize>, Error> {
    let Some(open) = stream else { return Ok(None) };
    let mut ready = [PollFd::new(&*open, PollFlags::IN)];
    let none = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut ready, Some(&none)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
        Ok(_) => {}
        Err(e) => return Err(Error::Watch(e.into())),
    }
    match open.read(buffer) {
        Ok(0) => {
            *stream = None;
            Ok(None)
        }
        Ok(count) => Ok(Some(count)),
        Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Ok(None),
        Err(e) => Err(Error::Watch(e)),
    }
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
