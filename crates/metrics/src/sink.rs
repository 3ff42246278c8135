//! Where lines of JSON go.

use crate::sections::{METRICS, Metrics};
use crate::{json, last};
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often a line is written without being asked for.
pub const PERIOD: Duration = Duration::from_secs(60);

/// Why no line of metrics could be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// open.
    #[error("the metrics file {0} cannot be opened for reading and writing")]
    Open(PathBuf, #[source] io::Error),
    /// There is one already.
    #[error("metrics are written to {0} already; that cannot be changed")]
    Configured(PathBuf),
    /// A FIFO that nobody reads is full.
    #[error("the metrics FIFO {0} is full: nobody reads it")]
    Full(PathBuf),
    /// write.
    #[error("the metrics file {0} cannot be written")]
    Write(PathBuf, #[source] io::Error),
    /// A fault of ours.
    #[error("a line of metrics cannot be made")]
    Format(#[source] serde_json::Error),
}

/// Bytes that a line from a signal's handler may have: enough for some 250 devices. Memory that is never touched unless it is
/// written there.
const LAST_LINE: usize = 256 << 10;

/// The process's, once it is configured.
static SINK: Mutex<Option<Sink>> = Mutex::new(None);

/// Write lines of metrics to the file or FIFO `path` from now on: when [`flush`] is called, and, if [`flush_if_due`] is called
/// often enough, every [`PERIOD`]. A file is made if there is none, and appended to. Once per process.
pub fn configure(path: &Path) -> Result<(), Error> {
    let mut sink = lock();
    if let Some(sink) = sink.as_ref() {
        return Err(Error::Configured(sink.path.clone()));
    }
    *sink = Some(Sink::open(path)?);
    Ok(())
}

/// This process was forked, and the file is another's, whose descriptor is closed here: no line is written any more.
pub fn forget() {
    if let Some(sink) = lock().take() {
        // What closes a descriptor is not to run: its number may be another's by now.
        std::mem::forget(sink);
    }
}

/// Write a line now; false when no file was configured. What cannot be written is counted in `logger.missed_metrics_count`,
/// and what it would have told is told by the next line. Never waits for a reader.
pub fn flush() -> Result<bool, Error> {
    match lock().as_mut() {
        Some(sink) => sink.flush(&METRICS).map(|()| true),
        None => Ok(false),
    }
}

/// [`flush`] for a process that is about to end in a panic: without waiting, in case that it came from in here.
pub fn flush_after_panic() {
    if let Ok(mut sink) = SINK.try_lock()
        && let Some(sink) = sink.as_mut()
    {
        // Nobody is left to tell.
        let _ = sink.flush(&METRICS);
    }
}

/// [`flush`] for a process that a signal is about to end, from that signal's handler: allocates nothing and waits for nothing.
/// There is no line when the signal came while one was written. A process that lives on nevertheless (a container's first one
/// does) tells all of it once more with the next line.
pub fn flush_from_handler() {
    if let Ok(mut sink) = SINK.try_lock()
        && let Some(sink) = sink.as_mut()
    {
        sink.flush_last(&METRICS);
    }
}

/// When the next line is due; None when no file was configured.
pub fn next_flush() -> Option<Instant> {
    lock().as_ref().map(|sink| sink.due)
}

/// [`flush`], if the time has come.
pub fn flush_if_due(now: Instant) -> Result<bool, Error> {
    match lock().as_mut() {
        Some(sink) if sink.due <= now => {
            // Not as many as the machine slept through.
            sink.due = now + PERIOD;
            sink.flush(&METRICS).map(|()| true)
        }
        _ => Ok(false),
    }
}

fn lock() -> MutexGuard<'static, Option<Sink>> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file or FIFO that takes lines.
struct Sink {
    path: PathBuf,
    file: File,
    due: Instant,
    /// The rest of a line of which only the beginning had room: lines stay whole.
    rest: Vec<u8>,
    /// With room for the line of [`Sink::flush_last`].
    last: Vec<u8>,
}

impl Sink {
    fn open(path: &Path) -> Result<Self, Error> {
        // For reading, too: a FIFO then opens without a reader, and a reader that goes is no SIGPIPE.
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|e| Error::Open(path.into(), e))?;
        Ok(Self {
            path: path.into(),
            file,
            due: Instant::now() + PERIOD,
            rest: Vec::new(),
            last: Vec::with_capacity(LAST_LINE),
        })
    }

    fn flush(&mut self, metrics: &'static Metrics) -> Result<(), Error> {
        let missed = |error| {
            metrics.logger.missed_metrics_count.inc();
            error
        };
        self.write_rest().map_err(missed)?;
        let groups = metrics.groups();
        let line = json::line(now_ms(), &groups).map_err(|e| {
            metrics.logger.metrics_fails.inc();
            Error::Format(e)
        })?;
        self.rest = line;
        let whole = self.rest.len();
        let written = self.write_rest();
        if self.rest.len() == whole {
            // Not a byte of it: the next line tells all of it.
            self.rest.clear();
            return written.map_err(missed);
        }
        // What is left of it follows with the next.
        groups.iter().for_each(crate::snapshot::Group::tell);
        drop(groups);
        metrics.forget_gone();
        Ok(())
    }

    /// The last line. Nothing of it is marked as told: nobody asks any more.
    fn flush_last(&mut self, metrics: &'static Metrics) {
        self.last.clear();
        if self.push_rest().is_ok() && last::line(now_ms(), metrics, &mut self.last) {
            std::mem::swap(&mut self.rest, &mut self.last);
            // Nobody is left to tell.
            let _ = self.push_rest();
        }
    }

    fn write_rest(&mut self) -> Result<(), Error> {
        self.push_rest().map_err(|e| match e.kind() {
            ErrorKind::WouldBlock => Error::Full(self.path.clone()),
            _ => Error::Write(self.path.clone(), e),
        })
    }

    /// Allocates nothing: neither do errors of the host's.
    fn push_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.rest.drain(..count)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
