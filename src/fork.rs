//! Clones of a VM: each goes on from a template in a process of its own.
//!
//! The monitor forks once for a template. That process, the *nursery*, holds the template and nothing else, and forks once more for each
//! clone, which is quick because it is small and everything is parsed and mapped already. All of them are confined as the monitor is.
//! The nursery is told over a socket, and ends with it; clones live on by themselves.

use crate::session::{Options, Session, trouble};
use crate::socket::ApiSocket;
use crate::{Failure, logging, metrics};
use husk_api::Refusal;
use husk_config::{Answer, Fork};
use husk_mmds::Mmds;
use husk_sandbox::Filters;
use husk_vmm::{CloneOf, Identity, Template, Vmm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, WaitOptions, WaitStatus};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Clones that are being made at the same time. Each sleeps most of the time that it takes, until KVM has come to it.
const AT_ONCE: usize = 48;
/// Templates that are kept at the same time: each is a process, and memory.
const MOST_TEMPLATES: usize = 16;
/// How long the nursery may say nothing while it makes clones, in ms.
const SILENCE: i64 = 30_000;
/// How often it looks for clones that have ended, in ms.
const LOOK: i64 = 500;
/// Bytes of a message, at most: what a pipe takes as a whole.
const MESSAGE: usize = 4096;
const ERROR: usize = 3000;

/// Templates of this VM.
#[derive(Default)]
pub struct Templates {
    made: u32,
    kept: BTreeMap<String, Nursery>,
}

impl Templates {
    /// Start clones; what is told of them.
    pub fn fork(
        &mut self,
        vmm: &mut Vmm,
        request: &Fork,
        (identity, filters): (&Identity, &Filters),
    ) -> Result<Answer, Refusal> {
        request.validate().map_err(|e| refused(&e))?;
        let (name, mut nursery) = match &request.template {
            Some(name) => match self.kept.remove(name) {
                Some(nursery) => (name.clone(), nursery),
                None => return Err(no_template(name)),
            },
            None => {
                if request.keep_template && self.kept.len() >= MOST_TEMPLATES {
                    return Err(refusal(format!(
                        "{MOST_TEMPLATES} templates are kept already; let go of one with DELETE /husk/fork/ID"
                    )));
                }
                let template = vmm
                    .freeze(request)
                    .map_err(|e| crate::socket::refusal(&e))?;
                let nursery = Nursery::start(template, identity, filters);
                self.made += 1;
                (self.made.to_string(), nursery.map_err(|e| refused(&e))?)
            }
        };
        let clones = nursery.order(request);
        let keep = request.template.is_some() || request.keep_template;
        let clones = clones.map_err(|e| refused(&e))?;
        let failed = |clone: &Value| {
            clone
                .get("error")
                .and_then(Value::as_str)
                .map(str::to_owned)
        };
        let first_failure = clones.iter().find_map(failed);
        let all_failed = !clones.is_empty() && clones.iter().all(|clone| failed(clone).is_some());
        let mut answer = json!({ "clones": clones });
        if keep {
            answer["template"] = name.clone().into();
            self.kept.insert(name, nursery);
        }
        match first_failure {
            Some(why) if all_failed => Err(refusal(format!("no clone could be started: {why}"))),
            _ => Ok(Answer::Value(answer)),
        }
    }

    /// Let go of a template. Its clones go on.
    pub fn drop_template(&mut self, name: &str) -> Result<Answer, Refusal> {
        match self.kept.remove(name) {
            Some(_) => Ok(Answer::Done),
            None => Err(no_template(name)),
        }
    }
}

fn refusal(message: String) -> Refusal {
    Refusal {
        message,
        too_large: false,
    }
}

fn refused(error: &dyn std::error::Error) -> Refusal {
    refusal(husk_vmm::chain(error))
}

fn no_template(name: &str) -> Refusal {
    let plain: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
    refusal(format!("there is no template {plain:?}"))
}

/// The process that holds a template, from the outside.
struct Nursery {
    control: Option<OwnedFd>,
    process: Pid,
    /// Clones that were asked for so far.
    started: u32,
}

impl Nursery {
    fn start(template: Template, identity: &Identity, filters: &Filters) -> std::io::Result<Self> {
        let (own, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let mut keep = vec![theirs.as_raw_fd()];
        keep.extend(template.descriptors());
        keep.extend(logging::descriptor());
        let mut inner = Some(Inside {
            control: theirs,
            template: Some(template),
            identity: identity.clone(),
            filters: filters.clone(),
            children: BTreeMap::new(),
        });
        let mut held = Some(logging::hold());
        let process = husk_fork::start(&keep, || {
            drop(held.take());
            metrics::forget();
            inner.take().map_or(1, Inside::run)
        })?;
        drop(held);
        Ok(Self {
            control: Some(own),
            process,
            started: 0,
        })
    }

    /// Have clones made; what each says, by number.
    fn order(&mut self, request: &Fork) -> std::io::Result<Vec<Value>> {
        let Some(control) = &self.control else {
            return Ok(Vec::new());
        };
        let mut order = (self.started + 1).to_ne_bytes().to_vec();
        order.extend(json!(request).to_string().as_bytes());
        self.started = self.started.saturating_add(request.count);
        rustix::net::send(control, &order, SendFlags::NOSIGNAL)?;
        let mut told = BTreeMap::new();
        let mut buffer = vec![0; MESSAGE];
        while told.len() < request.count as usize {
            if !wait(control, SILENCE)? {
                return Err(std::io::Error::other(
                    "the template's process does not answer",
                ));
            }
            let (length, _) =
                retry(|| rustix::net::recv(control, buffer.as_mut_slice(), RecvFlags::empty()))?;
            let message = buffer.get(..length).unwrap_or_default();
            let report: Value = serde_json::from_slice(message)
                .map_err(|_| std::io::Error::other("the template's process has ended"))?;
            told.insert(report.get("n").and_then(Value::as_u64), report);
        }
        Ok(told.into_values().collect())
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        // It ends when nobody can order any more.
        self.control = None;
        let _ = retry(|| rustix::process::waitpid(Some(self.process), WaitOptions::empty()));
    }
}

fn retry<T>(mut what: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match what() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// True when there is something to read.
fn wait(from: &OwnedFd, ms: i64) -> Result<bool, Errno> {
    let time = Timespec {
        tv_sec: ms / 1000,
        tv_nsec: ms % 1000 * 1_000_000,
    };
    let mut fds = [PollFd::new(from, PollFlags::IN)];
    Ok(retry(|| poll(&mut fds, Some(&time)))? > 0)
}

/// The same process from the inside.
struct Inside {
    control: OwnedFd,
    template: Option<Template>,
    identity: Identity,
    filters: Filters,
    /// Clones that have not told yet that they run.
    children: BTreeMap<i32, u32>,
}

impl Inside {
    fn run(mut self) -> u8 {
        // A terminal's Ctrl-C is for the VM that is seen there.
        let _ = rustix::process::setsid();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match wait(&self.control, LOOK) {
                Ok(false) => {
                    self.reap();
                    continue;
                }
                Ok(true) => {}
                Err(_) => return 1,
            }
            let length = match retry(|| {
                rustix::net::recv(&self.control, buffer.as_mut_slice(), RecvFlags::empty())
            }) {
                Ok((length @ 1.., _)) => length,
                _ => return 0,
            };
            let Some((first, fork)) = buffer.get(..length).and_then(understand) else {
                return 1;
            };
            if self.serve(first, &fork).is_err() {
                return 1;
            }
        }
    }

    /// Make the clones from `first` on.
    fn serve(&mut self, first: u32, fork: &Fork) -> std::io::Result<()> {
        let (told, tell) = std::io::pipe()?;
        let mut told = Told {
            pipe: told,
            bytes: Vec::new(),
        };
        let mut numbers = (first..).take(fork.count as usize).peekable();
        while numbers.peek().is_some() || !self.children.is_empty() {
            while self.children.len() < AT_ONCE
                && let Some(number) = numbers.next()
            {
                self.make(number, fork, &tell)?;
            }
            for report in told.wait()? {
                let process = report.get("pid").and_then(Value::as_i64).unwrap_or(0);
                // Who tells is no child that could end without a word.
                if self.children.remove(&(process as i32)).is_some() {
                    self.report(&report)?;
                }
            }
            self.reap();
        }
        Ok(())
    }

    fn make(&mut self, number: u32, fork: &Fork, tell: &PipeWriter) -> std::io::Result<()> {
        let mut keep = vec![tell.as_raw_fd()];
        keep.extend(self.template.iter().flat_map(Template::descriptors));
        keep.extend(logging::descriptor());
        let template = &mut self.template;
        let (identity, filters) = (&self.identity, &self.filters);
        let started = husk_fork::start(&keep, || {
            let Some(template) = template.take() else {
                return 1;
            };
            Clone { number, fork, tell }.live(template, identity, filters)
        });
        match started {
            Ok(process) => {
                self.children.insert(process.as_raw_nonzero().get(), number);
                Ok(())
            }
            Err(e) => self.report(&json!({ "n": number, "error": e.to_string() })),
        }
    }

    fn report(&self, report: &Value) -> std::io::Result<()> {
        rustix::net::send(
            &self.control,
            report.to_string().as_bytes(),
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Clones that have ended; one that did before it ran is told of.
    fn reap(&mut self) {
        while let Ok(Some((process, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if let Some(number) = self.children.remove(&process.as_raw_nonzero().get()) {
                let _ = self.report(&json!({ "n": number, "error": how(status) }));
            }
        }
    }
}

/// What the monitor orders: the number of the first clone, and what was asked for.
fn understand(order: &[u8]) -> Option<(u32, Fork)> {
    let (first, fork) = order.split_first_chunk()?;
    Some((u32::from_ne_bytes(*first), Fork::from_json(fork).ok()?))
}

fn how(status: WaitStatus) -> String {
    match status.terminating_signal() {
        Some(signal) => format!("its process was ended by signal {signal}"),
        None => format!(
            "its process ended with status {}",
            status.exit_status().unwrap_or(0)
        ),
    }
}

/// Reports of clones, a line each.
struct Told {
    pipe: PipeReader,
    bytes: Vec<u8>,
}

impl Told {
    fn wait(&mut self) -> std::io::Result<Vec<Value>> {
        let time = Timespec {
            tv_sec: 0,
            tv_nsec: LOOK * 1_000_000 / 10,
        };
        let mut fds = [PollFd::new(&self.pipe, PollFlags::IN)];
        if retry(|| poll(&mut fds, Some(&time)))? == 0 {
            return Ok(Vec::new());
        }
        let mut piece = [0; MESSAGE];
        let length = self.pipe.read(&mut piece)?;
        self.bytes.extend(piece.get(..length).unwrap_or_default());
        let whole = self.bytes.iter().rposition(|&byte| byte == b'\n');
        let rest = self.bytes.split_off(whole.map_or(0, |end| end + 1));
        let lines = std::mem::replace(&mut self.bytes, rest);
        let lines = lines.split(|&byte| byte == b'\n');
        Ok(lines
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect())
    }
}

/// A clone, in its own process.
struct Clone<'a> {
    number: u32,
    fork: &'a Fork,
    tell: &'a PipeWriter,
}

impl Clone<'_> {
    fn live(&self, template: Template, identity: &Identity, filters: &Filters) -> u8 {
        match self.try_live(template, identity, filters) {
            Ok(status) => status,
            Err(failure) => {
                self.tell(Some(&failure.message));
                failure.status
            }
        }
    }

    fn try_live(
        &self,
        template: Template,
        identity: &Identity,
        filters: &Filters,
    ) -> Result<u8, Failure> {
        self.own_streams()?;
        let id = match &self.fork.id {
            Some(pattern) => Fork::name(pattern, self.number),
            None => format!("{}-{}", identity.id, self.number),
        };
        logging::rename_instance(&id);
        let identity = Identity {
            id: id.clone(),
            ..identity.clone()
        };
        let api = self.fork.api_sock.as_deref().map(|path| ApiSocket {
            path: Fork::path(path, self.number),
            max_body: husk_api::MAX_BODY,
            tidy: true,
        });
        let options = Options {
            api,
            mmds: Mmds::new(template.metadata_limit()),
            ..Options::new(Instant::now(), filters.clone(), identity)
        };
        let clone = CloneOf {
            number: self.number,
            id: &id,
            fork: self.fork,
        };
        Session::be_clone(options, template, &clone, || {
            // Where its vCPU waits for this processor, it need not wait until all that are told have been, too.
            std::thread::yield_now();
            self.tell(None);
        })
    }

    /// Its console is stdout, and its log stderr, as any VM's.
    fn own_streams(&self) -> Result<(), Failure> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty()).map_err(|e| trouble(&e))?;
        rustix::stdio::dup2_stdin(&null).map_err(|e| trouble(&e))?;
        let open = |path: &Option<PathBuf>| match path
            .as_deref()
            .map(|path| Fork::path(path, self.number))
        {
            Some(path) => open_log(&path),
            None => null.try_clone().map_err(|e| trouble(&e)),
        };
        let (console, log) = (open(&self.fork.console)?, open(&self.fork.log)?);
        rustix::stdio::dup2_stdout(&console).map_err(|e| trouble(&e))?;
        // The VM's own is somebody's who waits for its end.
        rustix::stdio::dup2_stderr(&log).map_err(|e| trouble(&e))?;
        if self.fork.log.is_some() {
            logging::to_stderr();
        }
        Ok(())
    }

    fn tell(&self, error: Option<&str>) {
        // What JSON would write in six characters is nothing to read.
        let plain = |text: &str| text.replace(char::is_control, "?");
        let cut = |text: &str| plain(text).chars().take(ERROR / 4).collect::<String>();
        let mut report = json!({ "n": self.number, "pid": std::process::id() });
        if let Some(error) = error {
            report["error"] = cut(error).into();
        }
        let mut pipe = self.tell;
        // The nursery waits for it.
        let _ = pipe.write_all(format!("{report}\n").as_bytes());
    }
}

/// A file that is appended to, or a FIFO that somebody reads.
fn open_log(path: &Path) -> Result<OwnedFd, Failure> {
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fault = |e: Errno| Failure::usage(format!("cannot write to {}: {e}", path.display()));
    let file = rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)).map_err(fault)?;
    let flags = rustix::fs::fcntl_getfl(&file).map_err(fault)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(fault)?;
    Ok(file)
}
