//! Another process that fills guest memory page by page, by Firecracker's protocol: it listens on a Unix socket, is sent one message with
//! a userfaultfd and where which bytes of the memory file belong, and fills what is touched.
//!
//! **It is trusted like Husk itself**: with the descriptor it can give any bytes to the guest, and to memory of this process that was never
//! touched. But it may be slow, and it may die, and then nothing of its guest's is to be lost or made up.

use super::Error;
use super::userfault::{Userfault, peer};
use husk_arch::memory_map::Range;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, IoSlice};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use rustix::process::{PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// How long a handler that has its hands full may let a new VM wait.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a handler without a socket may leave a fault unread; how often it is looked whether it does.
const UNREAD: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// A process that ends closes its sockets a moment before it is gone.
const DEATH: Duration = Duration::from_millis(500);
/// How long a page may take when all of memory is fetched.
const PAGE_LIMIT: Duration = Duration::from_secs(5);
/// How long the main thread, which may itself wait for a page, has to take the VM down before the process ends without it.
const LAST_RESORT: Duration = Duration::from_secs(10);
/// Threads here have little to do.
const STACK_SIZE: usize = 64 << 10;

/// The handler of a VM's page faults.
#[derive(Debug)]
pub struct PageHandler {
    line: Arc<Line>,
    watch: Mutex<Option<JoinHandle<()>>>,
    fetch: Mutex<Option<JoinHandle<()>>>,
    /// No more pages are fetched.
    quit: Arc<AtomicBool>,
}

/// What connects this process and the handler.
#[derive(Debug)]
struct Line {
    /// Never read here. Open for as long as there is memory: without it, pages that are missing would be zero.
    userfault: Userfault,
    /// Host addresses and sizes of what is registered.
    slots: Vec<(u64, u64)>,
    socket: OwnedFd,
    /// The handler's process, where it can be known.
    process: Option<OwnedFd>,
    path: PathBuf,
    /// The watch is over.
    over: OwnedFd,
    /// The handler is gone.
    lost: AtomicBool,
}

impl PageHandler {
    /// Have the one that listens at `path` fill `slots`, nothing of which is there yet.
    pub fn connect(path: &Path, slots: &[(Range, u64)], page_size: u64) -> Result<Self, Error> {
        let fault = |source| Error::Handler {
            path: path.into(),
            source,
        };
        let userfault = Userfault::open()?;
        let mut offset = 0;
        let mut mappings = Vec::with_capacity(slots.len());
        for &(range, host) in slots {
            userfault.register(host, range.size)?;
            // Names are Firecracker's. The last is an older one's, and in bytes as well.
            mappings.push(format!(
                r#"{{"base_host_virt_addr":{host},"size":{},"offset":{offset},"page_size":{page_size},"page_size_kib":{page_size}}}"#,
                range.size
            ));
            offset += range.size;
        }
        let message = format!("[{}]", mappings.join(","));
        let socket = call(path).map_err(fault)?;
        let process =
            peer(socket.as_fd()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        send(&socket, message.as_bytes(), &userfault).map_err(fault)?;
        let line = Line {
            userfault,
            slots: slots
                .iter()
                .map(|(range, host)| (*host, range.size))
                .collect(),
            socket,
            process,
            path: path.into(),
            over: eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| fault(e.into()))?,
            lost: AtomicBool::new(false),
        };
        Ok(Self {
            line: Arc::new(line),
            watch: Mutex::default(),
            fetch: Mutex::default(),
            quit: Arc::default(),
        })
    }

    /// Call `lost` when the handler is gone, on a thread that begins with `prepare`. After that the VM has to be taken down
    /// soon: a main thread that does not come to call [`PageHandler::end_watch`], because it waits for a page itself, loses the process.
    pub fn watch(
        &self,
        prepare: impl FnOnce() + Send + 'static,
        lost: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<()> {
        let line = Arc::clone(&self.line);
        let body = move || {
            prepare();
            let Some(why) = line.until_lost() else {
                return;
            };
            line.lost.store(true, Ordering::Release);
            lost(why);
            if !line.is_over_within(LAST_RESORT) {
                log::error!("the VM cannot be taken down without its memory: the process ends");
                std::process::abort();
            }
        };
        let thread = std::thread::Builder::new()
            .name("pages".into())
            .stack_size(STACK_SIZE)
            .spawn(body)?;
        *lock(&self.watch) = Some(thread);
        Ok(())
    }

    /// Nobody is called any more: the VM is taken down.
    pub fn end_watch(&self) {
        if let Err(e) = rustix::io::write(&self.line.over, &1u64.to_ne_bytes()) {
            log::debug!("the watch over the handler of page faults does not end: {e}");
        }
        if let Some(thread) = lock(&self.watch).take() {
            // It waits for nothing but this.
            let _ = thread.join();
        }
    }

    /// What lets those go on that wait for pages which do not come, when the process is about to end: told whether memory is still there.
    pub fn last_resort(&self) -> impl FnOnce(bool) + use<> {
        let line = Arc::clone(&self.line);
        move |is_there| match is_there {
            true => line.userfault.abandon(&line.slots),
            false => line.userfault.wake(&line.slots),
        }
    }

    /// Wait until all pages of `ranges` are there.
    pub fn fetch(&self, memory: &GuestMemoryMmap, ranges: Vec<Range>) -> Result<(), Error> {
        let mut fetch = lock(&self.fetch);
        if fetch.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Err(self.no_answer());
        }
        let (done, finished) = channel();
        let fetched = Arc::new(AtomicU64::new(0));
        let fetcher = Fetcher {
            memory: memory.clone(),
            ranges,
            fetched: Arc::clone(&fetched),
            quit: Arc::clone(&self.quit),
            done,
        };
        // This thread has to answer, whatever becomes of the handler.
        let thread = std::thread::Builder::new()
            .name("fetch".into())
            .stack_size(STACK_SIZE);
        let thread = thread.spawn(move || fetcher.run()).map_err(|source| {
            let path = self.line.path.clone();
            Error::Handler { path, source }
        })?;
        *fetch = Some(thread);
        let mut progress = (0, Instant::now());
        loop {
            match finished.recv_timeout(LOOK_AGAIN) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(self.no_answer()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = fetched.load(Ordering::Relaxed);
            if now != progress.0 {
                progress = (now, Instant::now());
            }
            if self.line.lost.load(Ordering::Acquire) || progress.1.elapsed() >= PAGE_LIMIT {
                return Err(self.no_answer());
            }
        }
    }

    fn no_answer(&self) -> Error {
        let path = self.line.path.clone();
        match self.line.lost.load(Ordering::Acquire) {
            true => Error::HandlerLost(path),
            false => Error::NoPages(path, PAGE_LIMIT.as_secs()),
        }
    }
}

impl Drop for PageHandler {
    /// Memory goes next: nobody may look at it any more.
    fn drop(&mut self) {
        self.end_watch();
        self.quit.store(true, Ordering::Release);
        if let Some(thread) = lock(&self.fetch).take() {
            let _ = thread.join();
        }
    }
}

/// Touches each page, on a thread that may have to wait for it.
struct Fetcher {
    memory: GuestMemoryMmap,
    ranges: Vec<Range>,
    /// How many are there.
    fetched: Arc<AtomicU64>,
    quit: Arc<AtomicBool>,
    done: Sender<()>,
}

impl Fetcher {
    fn run(self) {
        for range in &self.ranges {
            for page in 0..range.size.div_ceil(super::PAGE) {
                if self.quit.load(Ordering::Acquire) {
                    return;
                }
                let address = GuestAddress(range.start + page * super::PAGE);
                if self.memory.read_obj::<u8>(address).is_err() {
                    return;
                }
                self.fetched.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Who waited may have given up.
        let _ = self.done.send(());
    }
}

impl Line {
    /// Until the handler is gone, and why; None when the watch is over before.
    fn until_lost(&self) -> Option<String> {
        // What it sends is left to lie: it has nothing to say.
        self.wait([&self.socket], PollFlags::RDHUP, None)?;
        let Some(process) = &self.process else {
            return Some(self.gone("has gone"));
        };
        if self.is_told(process, DEATH)? {
            return Some(self.gone("has gone"));
        }
        log::info!(
            "the handler of page faults at {} has closed its connection, and is counted on while it answers",
            self.path.display()
        );
        loop {
            let faults = self.userfault.as_fd();
            let before = self.userfault.resident(&self.slots);
            let (since, mut is_waited) = (Instant::now(), false);
            while since.elapsed() < UNREAD {
                if self.is_told(process, LOOK_AGAIN)? {
                    return Some(self.gone("has gone"));
                }
                is_waited |= self.is_told(&faults, Duration::ZERO)?;
            }
            // One vCPU that is kicked meanwhile asks again and again. So it counts whether any page came.
            if is_waited && self.userfault.resident(&self.slots) == before {
                return Some(self.gone("has closed its connection and answers no more"));
            }
            if !is_waited {
                // Faults that were read and never answered are told anew: somebody who answers reads them again.
                self.userfault.wake(&self.slots);
            }
        }
    }

    fn gone(&self, how: &str) -> String {
        format!(
            "the handler of page faults at {} {how}",
            self.path.display()
        )
    }

    fn is_told(&self, descriptor: &impl AsFd, limit: Duration) -> Option<bool> {
        let told = self.wait([descriptor], PollFlags::IN, Some(limit))?;
        Some(told.iter().any(|told| told.contains(PollFlags::IN)))
    }

    /// What each of `descriptors` has to tell within `limit`; None when the watch is over.
    fn wait<const N: usize>(
        &self,
        descriptors: [&impl AsFd; N],
        flags: PollFlags,
        limit: Option<Duration>,
    ) -> Option<Vec<PollFlags>> {
        let mut polled = vec![PollFd::new(&self.over, PollFlags::IN)];
        polled.extend(descriptors.map(|descriptor| PollFd::new(descriptor, flags)));
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: i64::from(limit.subsec_nanos()),
        });
        while let Err(e) = poll(&mut polled, limit.as_ref()) {
            if e != Errno::INTR {
                log::error!("the handler of page faults cannot be watched: {e}");
                return None;
            }
        }
        let mut told = polled.iter().map(PollFd::revents);
        let over = told.next()?;
        over.is_empty().then(|| told.collect())
    }

    fn is_over_within(&self, limit: Duration) -> bool {
        let nothing: [&OwnedFd; 0] = [];
        self.wait(nothing, PollFlags::IN, Some(limit)).is_none()
    }
}

/// Connect, and wait a little for one that has its hands full.
fn call(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let until = Instant::now() + PATIENCE;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // Its queue of connections is full.
            Err(Errno::AGAIN) if Instant::now() < until => std::thread::sleep(LOOK_AGAIN),
            Err(Errno::AGAIN) => return Err(io::Error::other("it takes no connection")),
            Err(e) => return Err(e.into()),
        }
    }
}

fn send(socket: &OwnedFd, message: &[u8], userfault: &Userfault) -> io::Result<()> {
    let descriptors = [userfault.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let parts = [IoSlice::new(message)];
    let sent = sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
    match sent == message.len() {
        true => Ok(()),
        false => Err(io::Error::other("it does not take the whole message")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
