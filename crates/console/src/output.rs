//! The guest's output: a bounded buffer, drained by a thread that may block on the host.

use crate::Error;
use husk_metrics::METRICS;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, major, minor, open};
use rustix::io::Errno;
use rustix::termios::isatty;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most bytes that wait for the host before a vCPU does.
const CAPACITY: usize = 64 * 1024;
/// How long the thread stays awake after a write, so that a stream of single bytes costs neither a wake-up
/// nor a write each. The first byte after a silence never waits.
const LINGER: Duration = Duration::from_millis(1);
const STACK: usize = 128 * 1024;

/// The guest's output on its way to a file descriptor, in order and complete.
///
/// To a pipe or a terminal that has room, or to /dev/null, it goes at once, without waking a thread: through a description of its own
/// that is non-blocking, because that of standard output is shared with other processes and must stay as it is. All else
/// goes through a buffer and the thread "console-out", which starts when it is first needed and may block.
///
/// When the descriptor fails for good (a closed pipe, a full disk) there is one warning in the log, and what
/// follows is discarded: the VM goes on.
pub struct Output {
    shared: Arc<Shared>,
    prepare: Arc<dyn Fn() + Send + Sync>,
}

struct Shared {
    target: OwnedFd,
    direct: Option<OwnedFd>,
    buffer: Mutex<Buffer>,
    filled: Condvar,  // the thread waits: there are bytes, or the end
    drained: Condvar, // writers and `close` wait
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    started: bool,  // there is a thread
    asleep: bool,   // the thread needs a wake-up
    waiters: usize, // on `drained`
    closing: bool,  // the thread ends when it has written everything
    discard: bool,  // bytes go nowhere: the descriptor failed, or the VM is being ended
    done: bool,     // the thread has ended
}

impl Output {
    /// Write to `target`, which is duplicated.
    pub fn new(target: impl AsFd) -> Result<Self, Error> {
        Self::new_prepared(target, || ())
    }

    /// The same; `prepare` runs first on the thread, should there be one: a seccomp filter, say.
    pub fn new_prepared(
        target: impl AsFd,
        prepare: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let duplicate = target.as_fd().try_clone_to_owned();
        let shared = Shared {
            direct: own_description(target.as_fd()),
            target: duplicate.map_err(Error::Duplicate)?,
            buffer: Mutex::default(),
            filled: Condvar::new(),
            drained: Condvar::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            prepare: Arc::new(prepare),
        })
    }

    /// Wait until everything is written (or [`Output::abandon`] is called), and end the thread. What is
    /// written to a closed output is dropped.
    pub fn close(&self) {
        let mut buffer = self.shared.lock();
        buffer.closing = true;
        buffer.done |= !buffer.started;
        self.shared.filled.notify_one();
        while !(buffer.done || buffer.discard && buffer.bytes.is_empty()) {
            buffer = self.shared.wait_drained(buffer);
        }
    }

    /// Give up: drop what waits, release every thread that waits in [`husk_devices::serial::Output::write`] or
    /// [`Output::close`]. A thread that the host blocks in a write is left behind.
    pub fn abandon(&self) {
        let mut buffer = self.shared.lock();
        buffer.discard();
        buffer.closing = true;
        self.shared.filled.notify_one();
        self.shared.drained.notify_all();
    }

    /// Start the thread. When there can be none, output is discarded.
    fn start(&self, buffer: &mut Buffer) {
        let (shared, prepare) = (Arc::clone(&self.shared), Arc::clone(&self.prepare));
        let thread = std::thread::Builder::new()
            .name("console-out".into())
            .stack_size(STACK)
            .spawn(move || {
                prepare();
                drain(&shared);
            });
        match thread {
            Ok(_) => buffer.started = true,
            Err(error) => {
                buffer.discard();
                log::error!(
                    "no thread for the guest's console output, it is discarded from now on: {error}"
                );
            }
        }
    }
}

impl Drop for Output {
    /// The thread ends by itself when it has written everything.
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.filled.notify_one();
    }
}

impl husk_devices::serial::Output for Output {
    fn write(&self, mut bytes: &[u8]) {
        let mut buffer = self.shared.lock();
        if buffer.is_idle() {
            bytes = self.shared.write_directly(bytes);
        }
        while !bytes.is_empty() && !buffer.discard && !buffer.done {
            let room = CAPACITY.saturating_sub(buffer.bytes.len());
            if room == 0 {
                self.shared.filled.notify_one(); // it may linger
                buffer = self.shared.wait_drained(buffer);
                continue;
            }
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            buffer.bytes.extend_from_slice(now);
            bytes = later;
            if !buffer.started {
                self.start(&mut buffer);
            } else if buffer.asleep {
                buffer.asleep = false;
                self.shared.filled.notify_one();
            }
        }
    }
}

/// A non-blocking description of the pipe or terminal behind `target`. None for anything else, and where the host does
/// not let it be opened anew.
fn own_description(target: BorrowedFd<'_>) -> Option<OwnedFd> {
    let stat = fstat(target).ok()?;
    let fifo = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
    if !fifo && !is_null(&stat) && !isatty(target) {
        return None;
    }
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).ok()
}

/// /dev/null, which takes everything at once.
fn is_null(stat: &Stat) -> bool {
    let device = (major(stat.st_rdev), minor(stat.st_rdev));
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && device == (1, 3)
}

impl Buffer {
    /// Nothing waits to be written before what comes now.
    fn is_idle(&self) -> bool {
        let thread_idle = !self.started || self.asleep;
        thread_idle && self.bytes.is_empty() && !self.discard && !self.done
    }

    fn discard(&mut self) {
        self.discard = true;
        self.bytes = Vec::new();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Write what there is room for. Returns the rest; an error is left to the thread to find.
    fn write_directly<'a>(&self, mut bytes: &'a [u8]) -> &'a [u8] {
        let Some(direct) = &self.direct else {
            return bytes;
        };
        while !bytes.is_empty() {
            match rustix::io::write(direct, bytes) {
                Ok(written @ 1..) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => break,
            }
        }
        bytes
    }

    fn wait_drained<'a>(&'a self, mut buffer: MutexGuard<'a, Buffer>) -> MutexGuard<'a, Buffer> {
        buffer.waiters += 1;
        let mut buffer = self
            .drained
            .wait(buffer)
            .unwrap_or_else(PoisonError::into_inner);
        buffer.waiters = buffer.waiters.saturating_sub(1);
        buffer
    }

    /// Exchange `chunk`, which is empty, for what waits; `None` at the end.
    fn next(&self, mut chunk: Vec<u8>, linger: bool) -> Option<Vec<u8>> {
        let mut buffer = self.lock();
        if linger && buffer.bytes.is_empty() && !buffer.closing {
            let (lingered, _) = self
                .filled
                .wait_timeout(buffer, LINGER)
                .unwrap_or_else(PoisonError::into_inner);
            buffer = lingered;
        }
        while buffer.bytes.is_empty() {
            if buffer.closing {
                return None;
            }
            buffer.asleep = true;
            buffer = self
                .filled
                .wait(buffer)
                .unwrap_or_else(PoisonError::into_inner);
        }
        buffer.asleep = false;
        std::mem::swap(&mut buffer.bytes, &mut chunk);
        if buffer.waiters > 0 {
            self.drained.notify_all();
        }
        Some(chunk)
    }
}

fn drain(shared: &Shared) {
    let (mut chunk, mut wrote) = (Vec::new(), false);
    while let Some(full) = shared.next(chunk, wrote) {
        if let Err(error) = write_all(&shared.target, &full) {
            METRICS.uart.error_count.inc();
            let mut buffer = shared.lock();
            if !buffer.discard {
                buffer.discard();
                shared.drained.notify_all();
                drop(buffer);
                log::warn!(
                    "cannot write the guest's console output, it is discarded from now on: {error}"
                );
            }
        }
        chunk = full;
        chunk.clear();
        wrote = true;
    }
    shared.lock().done = true;
    shared.drained.notify_all();
}

/// Write all of `bytes`, waiting as long as it takes, whether or not the descriptor is non-blocking.
fn write_all(target: &impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(target, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(target, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_devices::serial::Output as _;
    use rustix::pipe::{PipeFlags, pipe, pipe_with};
    use std::fs::File;
    use std::io::Read;
    use std::sync::mpsc;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
    }

    /// 10 MB byte by byte and in strings, to a reader that now and then dawdles.
    fn flood(flags: PipeFlags) {
        let (reader, writer) = pipe_with(flags).unwrap();
        rustix::io::ioctl_fionbio(&reader, false).unwrap();
        let sent = pattern(10_000_000);
        let reading = std::thread::spawn(move || {
            let (mut reader, mut received, mut chunk) =
                (File::from(reader), Vec::<u8>::new(), [0; 50_000]);
            for round in 0.. {
                match reader.read(&mut chunk).unwrap() {
                    0 => return received,
                    len => received.extend(&chunk[..len]),
                }
                if round % 50 == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            received
        });
        let output = Output::new(writer).unwrap();
        let (single, strings) = sent.split_at(2_000_000);
        single.iter().for_each(|&byte| output.write(&[byte]));
        strings
            .chunks(100_001)
            .for_each(|string| output.write(string));
        output.close();
        drop(output);
        assert!(reading.join().unwrap() == sent);
    }

    #[test]
    fn ten_megabytes_arrive_whole_at_a_slow_reader() {
        flood(PipeFlags::empty());
    }

    #[test]
    fn a_non_blocking_target_loses_nothing() {
        flood(PipeFlags::NONBLOCK);
    }

    #[test]
    fn what_is_dropped_needs_no_thread() {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let output = Output::new(null).unwrap();
        (0..3).for_each(|_| output.write(&pattern(100_000)));
        assert!(!output.shared.lock().started);
        output.close();
        // What may block has one.
        let zero = File::options().write(true).open("/dev/zero").unwrap();
        let output = Output::new(zero).unwrap();
        output.write(b"x");
        assert!(output.shared.lock().started);
        output.close();
    }

    #[test]
    fn a_byte_after_a_silence_arrives_by_itself() {
        let (reader, writer) = pipe().unwrap();
        let output = Output::new(writer).unwrap();
        let mut byte = [0];
        for sent in 0..20 {
            output.write(&[sent]);
            File::from(reader.try_clone().unwrap())
                .read_exact(&mut byte)
                .unwrap();
            assert_eq!(byte, [sent]);
            std::thread::sleep(LINGER * u32::from(sent % 3));
        }
    }

    #[test]
    fn a_closed_pipe_and_a_full_disk_do_not_stop_the_guest() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let read_only = File::open("/dev/null").unwrap();
        for target in [writer, full.into(), read_only.into()] {
            let output = Output::new(target).unwrap();
            for _ in 0..10 {
                output.write(&pattern(CAPACITY));
            }
            output.close();
        }
    }

    #[test]
    fn abandoning_releases_whoever_a_stuck_host_blocks() {
        let (_reader, writer) = pipe().unwrap();
        let output = Arc::new(Output::new(writer).unwrap());
        let (tell, told) = mpsc::channel();
        let vcpu = {
            let (output, tell) = (Arc::clone(&output), tell.clone());
            std::thread::spawn(move || {
                output.write(&pattern(1_000_000)); // more than pipe and buffer hold
                tell.send("vcpu").unwrap();
            })
        };
        assert!(
            told.recv_timeout(Duration::from_millis(50)).is_err(),
            "back-pressure"
        );
        let closing = {
            let output = Arc::clone(&output);
            std::thread::spawn(move || {
                output.close();
                tell.send("close").unwrap();
            })
        };
        output.abandon();
        vcpu.join().unwrap();
        closing.join().unwrap();
        output.write(b"dropped");
    }
}
