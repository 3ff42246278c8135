//! What the host sends to the guest: a thread that reads, filters and paces.

use crate::escape::{Action, Filter, HELP};
use crate::{ConsoleEvent, Error, Terminal};
use husk_devices::serial::Wire;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const STACK: usize = 128 * 1024;
const READ_SIZE: usize = 4096;
/// How often a process in the background looks whether it has come to the foreground.
const BACKGROUND_TICK: Duration = Duration::from_secs(1);

/// The console's input and the thread "console-in" that feeds it.
///
/// At the end of the source the thread delivers what is left and ends; the VM goes on. The [`Wire`] outlives
/// any one UART: connect the next guest's to the same one.
///
/// A guest that does not read holds at most [`husk_devices::serial::CAPACITY`] bytes; then the source is
/// not read any more, so that an escape sequence behind so many unread bytes is not seen.
pub struct Input {
    wire: Arc<Wire>,
    shared: Arc<Shared>,
}

struct Shared {
    wake: OwnedFd,
    stop: AtomicBool,
}

impl Input {
    /// A line on which nothing is sent yet.
    pub fn new() -> Result<Self, Error> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::EventFd(error.into()))?;
        let shared = Arc::new(Shared {
            wake,
            stop: AtomicBool::new(false),
        });
        let waker = Arc::clone(&shared);
        let wire = Arc::new(Wire::new(move || waker.wake()));
        Ok(Self { wire, shared })
    }

    /// Start the thread "console-in", which reads `source`. Call it once; a guest need not be there yet, nor wait for it.
    /// `prepare` runs on the thread first: a seccomp filter, say.
    ///
    /// With `terminal` (then `source` is standard input) it is read only in the terminal's foreground, and escape
    /// sequences are taken out and reported to `on_event`, on the new thread; without it every byte goes to the guest.
    pub fn start(
        &self,
        source: impl AsFd + Send + 'static,
        terminal: Option<Arc<Terminal>>,
        on_event: impl Fn(ConsoleEvent) + Send + 'static,
        prepare: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let reader = Reader {
            source,
            filter: terminal.is_some().then(Filter::default),
            terminal,
            on_event,
            wire: Arc::clone(&self.wire),
            shared: Arc::clone(&self.shared),
            bytes: Vec::new(),
        };
        std::thread::Builder::new()
            .name("console-in".into())
            .stack_size(STACK)
            .spawn(move || {
                prepare();
                reader.run();
            })
            .map(drop)
            .map_err(|source| Error::Thread {
                name: "console-in",
                source,
            })
    }

    /// The line to connect a UART to.
    pub fn wire(&self) -> Arc<Wire> {
        Arc::clone(&self.wire)
    }
}

impl Drop for Input {
    /// The thread ends soon after.
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
    }
}

impl Shared {
    /// It fails only when the counter is full, and then the thread has a wake-up to come.
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

struct Reader<S, F> {
    source: S,
    terminal: Option<Arc<Terminal>>,
    filter: Option<Filter>,
    on_event: F,
    wire: Arc<Wire>,
    shared: Arc<Shared>,
    bytes: Vec<u8>,
}

/// What a wait ended with.
enum Ready {
    Source,
    Other,
}

impl<S: AsFd, F: Fn(ConsoleEvent)> Reader<S, F> {
    fn run(mut self) {
        let mut open = true;
        while !self.shared.stop.load(Ordering::Acquire) {
            let due = self.wire.service();
            if !open && self.wire.is_empty() {
                return;
            }
            // The filter may put out one byte more than it takes.
            let room = self.wire.room().saturating_sub(1).min(READ_SIZE);
            let foreground = self
                .terminal
                .as_ref()
                .is_none_or(|terminal| terminal.claim());
            let tick = (open && !foreground).then_some(BACKGROUND_TICK);
            let timeout = [due, tick].into_iter().flatten().min();
            if let Ready::Source = self.wait(open && foreground && room > 0, timeout) {
                open = self.read(room);
            }
        }
    }

    fn wait(&self, source: bool, timeout: Option<Duration>) -> Ready {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        if source {
            fds.push(PollFd::new(&self.source, PollFlags::IN));
        }
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return Ready::Other; // EINTR; with valid arguments there is nothing else but a moment's lack of memory
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        if ready.next() == Some(true) {
            // Non-blocking: that another wake-up comes in between is as good.
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        }
        match ready.next() {
            Some(true) => Ready::Source,
            _ => Ready::Other,
        }
    }

    /// Read once, at most `room` bytes; false at the end of the source.
    fn read(&mut self, room: usize) -> bool {
        // Foreground or not may have changed while this thread waited.
        if self
            .terminal
            .as_ref()
            .is_some_and(|terminal| !terminal.claim())
        {
            return true;
        }
        let mut buffer = [0; READ_SIZE];
        let Some(space) = buffer.get_mut(..room) else {
            return true;
        };
        match rustix::io::read(&self.source, &mut *space) {
            Ok(0) => false,
            Ok(len) => {
                self.send(space.get(..len).unwrap_or_default());
                true
            }
            Err(Errno::INTR | Errno::AGAIN) => true,
            // A hung-up terminal: the end, as for a closed pipe.
            Err(Errno::IO) => false,
            Err(error) => {
                log::warn!("cannot read the console's input, the guest gets no more: {error}");
                false
            }
        }
    }

    fn send(&mut self, typed: &[u8]) {
        let Some(filter) = &mut self.filter else {
            self.wire.offer(typed);
            return;
        };
        let on_event = &self.on_event;
        filter.filter(typed, &mut self.bytes, |action| match action {
            Action::Leave => on_event(ConsoleEvent::Leave),
            Action::PowerButton => on_event(ConsoleEvent::PowerButton),
            Action::Help => {
                let _ = rustix::io::write(rustix::stdio::stderr(), HELP.as_bytes());
            }
        });
        self.wire.offer(&self.bytes);
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use husk_devices::serial::{Output, Serial};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use rustix::pipe::{PipeFlags, pipe, pipe_with};
    use std::fs::File;
    use std::io::Write;
    use vmm_sys_util::eventfd::EventFd;

    const RBR: u64 = 0;
    const FCR: u64 = 2;
    const LSR: u64 = 5;

    struct Nowhere;

    impl Output for Nowhere {
        fn write(&self, _: &[u8]) {}
    }

    fn guest(wire: Arc<Wire>) -> Arc<Serial> {
        Serial::new(EventFd::new(0).unwrap(), Arc::new(Nowhere), wire)
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
    }

    fn start(source: impl AsFd + Send + 'static) -> Input {
        let input = Input::new().unwrap();
        let unexpected = |event| panic!("{event:?} from a pipe");
        input.start(source, None, unexpected, || ()).unwrap();
        input
    }

    /// A guest that polls and resets the FIFO now and then reads `len` bytes.
    fn poll_guest(serial: &Serial, len: usize) -> Vec<u8> {
        let mut received = Vec::with_capacity(len);
        while received.len() < len {
            if serial.read_register(LSR) & 1 == 0 {
                std::thread::yield_now();
                continue;
            }
            received.push(serial.read_register(RBR));
            if received.len().is_multiple_of(100_000) {
                serial.write_register(FCR, 7);
            }
        }
        received
    }

    #[test]
    fn ten_megabytes_arrive_whole_from_a_pipe_and_a_file_ends() {
        let (reader, writer) = pipe().unwrap();
        let sent = pattern(10_000_000);
        let input = start(reader);
        let serial = guest(input.wire());
        std::thread::scope(|scope| {
            let all = &sent;
            scope.spawn(move || File::from(writer).write_all(all).unwrap());
            assert!(poll_guest(&serial, sent.len()) == sent);
        });
    }

    #[test]
    fn sockets_and_non_blocking_pipes_are_read_too() {
        let sent = pattern(100_000);
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        rustix::io::ioctl_fionbio(&writer, false).unwrap();
        let flags = SocketFlags::NONBLOCK;
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::io::ioctl_fionbio(&far, false).unwrap();
        for (source, sender) in [(reader, writer), (near, far)] {
            let input = start(source);
            let serial = guest(input.wire());
            std::thread::scope(|scope| {
                let all = &sent;
                scope.spawn(move || File::from(sender).write_all(all).unwrap());
                assert!(poll_guest(&serial, sent.len()) == sent);
            });
        }
    }

    #[test]
    fn a_pipe_passes_what_would_be_an_escape_sequence_on_a_terminal() {
        let (reader, writer) = pipe().unwrap();
        let input = start(reader);
        let serial = guest(input.wire());
        File::from(writer).write_all(b"\x01x\x01p\0\xff").unwrap();
        assert_eq!(poll_guest(&serial, 6), b"\x01x\x01p\0\xff");
    }

    #[test]
    fn the_next_guest_reads_on_where_the_last_one_stopped() {
        let sent = pattern(300_000); // more than line, pipe and burst hold together
        let (reader, writer) = pipe().unwrap();
        let input = start(reader);
        std::thread::scope(|scope| {
            let all = &sent;
            scope.spawn(move || File::from(writer).write_all(all).unwrap());
            let mut received = poll_guest(&guest(input.wire()), 100_001);
            received.extend(poll_guest(&guest(input.wire()), 199_999));
            assert!(received == sent);
        });
    }

    #[test]
    fn the_thread_ends_at_the_end_of_its_source_and_on_drop() {
        let (quiet, _writer) = pipe().unwrap();
        for (source, ends_alone) in [
            (File::open("/dev/null").unwrap().into(), true),
            (quiet, false),
        ] {
            let input = start(source);
            let (wire, shared) = (Arc::downgrade(&input.wire), Arc::downgrade(&input.shared));
            if ends_alone {
                while wire.strong_count() > 1 {
                    std::thread::yield_now();
                }
            }
            drop(input);
            while wire.strong_count() + shared.strong_count() > 0 {
                std::thread::yield_now();
            }
        }
    }
}
