//! A VM in the test's own process: what a program that embeds the monitor asks of it.

use super::Stream;
use husk_config::{VmConfig, VmmRequest};
use husk_devices::serial::{Output, Wire};
use husk_loader::Cache;
use husk_vmm::{Console, Host, Outcome, Timeline, Vmm};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

impl Output for Stream {
    fn write(&self, bytes: &[u8]) {
        let (received, changed) = &*self.0;
        received.lock().unwrap().bytes.extend_from_slice(bytes);
        changed.notify_all();
    }
}

/// A VM whose guest runs. It is stopped when this is dropped.
pub struct Machine {
    /// The monitor.
    pub vmm: Vmm,
    /// The guest's console.
    pub console: Stream,
    /// When each phase was reached.
    pub timeline: Arc<Timeline>,
    wire: Arc<Wire>,
    woken: Receiver<()>,
    seen: usize,
    until: Instant,
}

impl Machine {
    /// Boot what `config` describes. Nothing that is waited for may take longer than `limit` in all.
    pub fn boot(config: VmConfig, limit: Duration) -> Self {
        let mut machine = Self::new(limit);
        machine.request(VmmRequest::Configure(Box::new(config)));
        machine.request(VmmRequest::Boot);
        machine
    }

    /// What is said of a configuration that cannot be booted.
    #[track_caller]
    pub fn refused_boot(config: VmConfig) -> String {
        let mut machine = Self::new(Duration::from_secs(60));
        machine.request(VmmRequest::Configure(Box::new(config)));
        machine.refused(VmmRequest::Boot)
    }

    fn new(limit: Duration) -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            husk_vmm::install_kick_handler().unwrap();
            // The VM's threads are confined, as those of the program are.
            husk_sandbox::catch_violations(|| (), || ()).unwrap();
        });
        let (wake, woken) = channel();
        let console = Stream::default();
        let wire = Arc::new(Wire::new(|| ()));
        let timeline = Arc::new(Timeline::new(Instant::now()));
        let host = Host::new(
            Console::new(Arc::new(console.clone()), Arc::clone(&wire)),
            Cache::from_environment(),
            Arc::clone(&timeline),
            Arc::new(move || {
                // Nobody listens any more when the test is over.
                let _ = wake.send(());
            }),
        );
        Self {
            vmm: Vmm::new(host),
            console,
            timeline,
            wire,
            woken,
            seen: 0,
            until: Instant::now() + limit,
        }
    }

    /// Ask for something that works.
    #[track_caller]
    pub fn request(&mut self, request: VmmRequest) {
        let what = format!("{request:?}");
        let result = self.vmm.handle(request);
        result.unwrap_or_else(|e| panic!("{what}: {}", husk_vmm::chain(&e)));
    }

    /// Ask for something that does not; what is said of it.
    #[track_caller]
    pub fn refused(&mut self, request: VmmRequest) -> String {
        let what = format!("{request:?}");
        match self.vmm.handle(request) {
            Ok(_) => panic!("{what} was done"),
            Err(e) => husk_vmm::chain(&e),
        }
    }

    /// Type. The guest has to read it, or the next one waits.
    #[track_caller]
    pub fn send(&self, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() || !self.wire.is_empty() {
            rest = &rest[self.wire.offer(rest)..];
            let pause = self.wire.service().unwrap_or(Duration::from_millis(1));
            std::thread::sleep(pause.min(Duration::from_millis(1)));
            assert!(
                Instant::now() < self.until,
                "the guest does not read\n{}",
                self.report()
            );
        }
    }

    /// Wait until the console says `text` behind what was expected before.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        let (from, wanted) = (self.seen, text.as_bytes());
        let mut end = from;
        let found = self.console.wait(self.until, |bytes| {
            let at = bytes[from..]
                .windows(wanted.len())
                .position(|part| part == wanted);
            end = from + at.unwrap_or(0) + wanted.len();
            at.is_some()
        });
        assert!(found, "the console never said {text:?}\n{}", self.report());
        self.seen = end;
    }

    /// Wait until the console has said so many bytes in all.
    #[track_caller]
    pub fn console_reaches(&self, length: usize) {
        let found = self.console.wait(self.until, |bytes| bytes.len() >= length);
        assert!(found, "not {length} bytes\n{}", self.report());
    }

    /// Wait until the monitor says so.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, done: impl Fn(&Vmm) -> bool) {
        while !done(&self.vmm) {
            assert!(
                Instant::now() < self.until,
                "never {what}\n{}",
                self.report()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Wait until the guest has ended, as a main thread does.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.vmm.outcome() {
                return outcome;
            }
            assert!(Instant::now() < self.until, "no end\n{}", self.report());
            let _ = self.woken.recv_timeout(Duration::from_secs(1));
            if self.vmm.is_press_pending() {
                self.request(VmmRequest::PressPowerButton);
            }
            self.vmm.look_for_halt();
        }
    }

    /// The last of the console.
    pub fn report(&self) -> String {
        super::report(&self.console.bytes(), "")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vmm.take_down();
    }
}
