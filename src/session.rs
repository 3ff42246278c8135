//! The main thread while there is a VM, or is to be one: requests, signals, keys, and the VM's end.

use crate::ears::Ears;
use crate::fork::Templates;
use crate::socket::{Api, ApiSocket, ending, refusal};
use crate::{Failure, logging, metrics, timeline};
use husk_config::{Answer, LoadSnapshot, OnReboot, Part, VmConfig, VmmRequest};
use husk_console::{ConsoleEvent, Input, Output, Terminal};
use husk_loader::Cache;
use husk_mmds::Mmds;
use husk_sandbox::{Filters, Kind};
use husk_vmm::{CloneOf, Console, Counting, Host, Identity, Outcome, Template, Timeline, Vmm};
use signal_hook::consts::signal::{
    SIGBUS, SIGHUP, SIGILL, SIGINT, SIGQUIT, SIGSEGV, SIGTERM, SIGXCPU, SIGXFSZ,
};
use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a kernel that has said through pvpanic that it panicked may go on (it prints, and restarts if it was told to).
const PANIC_GRACE: Duration = Duration::from_secs(3);

/// How soon the power button is pressed again when the guest has not looked.
const PRESS_AGAIN: Duration = Duration::from_millis(500);

/// How soon when it has looked, and a signal asked: whoever acts on the button may not have been there yet.
const PRESS_LATER: Duration = Duration::from_secs(5);

/// How often it is looked whether the guest has halted for good: soon at first, then seldom, so that an idle VM is left idle.
const LOOK_FIRST: Duration = Duration::from_secs(1);
const LOOK_LAST: Duration = Duration::from_secs(8);
/// How soon it is looked again when it seems to have.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How long the first request is waited for before other threads are started and a machine is made.
const FIRST_ANSWER: Duration = Duration::from_millis(1);

/// What the main thread waits for. Other threads only ever send; none waits for the main thread.
pub enum Event {
    /// A request of the API, and who waits for the answer.
    Request(VmmRequest, husk_api::Reply),
    /// SIGINT, SIGTERM, SIGHUP or SIGQUIT.
    Signal(i32),
    /// An escape sequence on the terminal.
    Key(ConsoleEvent),
    /// The VM has ended or its kernel has panicked, or the guest has let a device go.
    Vm,
    /// The VM is taken down and its output is written.
    Down,
}

/// What a session is started with, besides the VM.
pub struct Options {
    /// What threads may ask of the host's kernel.
    pub filters: Filters,
    /// VMs that are built under filters may have user networks, and so may devices that are plugged in.
    pub user_networks: bool,
    /// What the guest's metadata service answers from.
    pub mmds: Arc<Mmds>,
    /// Unpacked kernels.
    pub cache: Cache,
    /// Print exits by reason at the end.
    pub print_exits: bool,
    /// Print the timeline at the end.
    pub print_timeline: bool,
    /// Write the timeline to this file at the end.
    pub timeline_file: Option<File>,
    /// The VM ends when its guest has set a boot mark.
    pub ends_at_mark: bool,
    /// When the process began.
    pub start: Instant,
    /// What the monitor says of itself.
    pub identity: Identity,
    /// Where requests come from.
    pub api: Option<ApiSocket>,
    /// What the first signal does to a VM that runs.
    pub on_signal: OnSignal,
}

impl Options {
    /// What most sessions are started with: no user networks, no metadata, nothing printed at the end, no API.
    pub fn new(start: Instant, filters: Filters, identity: Identity) -> Self {
        Self {
            filters,
            user_networks: false,
            mmds: Mmds::new(husk_api::MAX_BODY),
            cache: Cache::from_environment(),
            print_exits: false,
            print_timeline: false,
            timeline_file: None,
            ends_at_mark: false,
            start,
            identity,
            api: None,
            on_signal: OnSignal::PressPowerButton,
        }
    }
}

/// What the first signal that asks for an end does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// Presses the power button; a second one ends the VM at once.
    PressPowerButton,
    /// What it does by itself, or what Firecracker has for it ([`FIRECRACKER_SIGNALS`]).
    AsFirecracker,
}

/// How Firecracker's process ends by a signal: with this status, or as any process does.
const FIRECRACKER_SIGNALS: [(i32, Option<u8>); 9] = [
    (SIGBUS, Some(149)),
    (SIGSEGV, Some(150)),
    (SIGXFSZ, Some(151)),
    (SIGXCPU, Some(154)),
    (SIGHUP, Some(156)),
    (SIGILL, Some(157)),
    (SIGINT, None),
    (SIGTERM, None),
    (SIGQUIT, None),
];

/// How a session begins.
pub enum First {
    /// With this VM.
    Boot(Box<VmConfig>),
    /// With requests, which add to this configuration.
    Serve(Box<VmConfig>),
    /// With a VM that was kept.
    Restore(Box<LoadSnapshot>),
}

/// How a session ended.
#[derive(Default)]
struct End {
    status: u8,
    /// In words.
    reason: String,
    message: Option<String>,
}

impl End {
    fn because(reason: &str) -> Self {
        Self {
            reason: reason.into(),
            ..Self::default()
        }
    }
}

/// The main thread's work.
pub struct Session {
    vmm: Vmm,
    sender: Sender<Event>,
    events: Receiver<Event>,
    output: Arc<Output>,
    filters: Filters,
    user_networks: bool,
    /// A signal has pressed the power button.
    asked: bool,
    watch: husk_vmm::Watch,
    /// Somebody may plug devices into the VM.
    has_api: bool,
    identity: Identity,
    templates: Templates,
}

impl Session {
    /// Until the VM has ended and everything is printed and closed. The exit status.
    pub fn go(mut options: Options, first: First) -> Result<u8, Failure> {
        logging::set_instance(&options.identity.id);
        husk_vmm::share_heap();
        if let First::Boot(_) = first {
            // What parses the command line is not needed any more. Who serves answers first: it is let go of when a VM runs.
            husk_vmm::forget_code();
        }
        // Handlers for what kills come first: those for what asks replace some of them.
        husk_console::install_fatal_signal_handlers().map_err(|e| trouble(&e))?;
        husk_sandbox::catch_violations(Terminal::emergency_restore, metrics::count_violation)
            .map_err(|e| trouble(&e))?;
        husk_vmm::install_kick_handler().map_err(|e| trouble(&e))?;
        if options.on_signal == OnSignal::AsFirecracker {
            husk_console::install_exit_statuses(&FIRECRACKER_SIGNALS).map_err(|e| trouble(&e))?;
        }
        let counting = Counting {
            exits: options.print_exits,
            // The filters of the VM's threads do not allow it.
            costs: options.print_exits
                && options.timeline_file.is_some()
                && !options.filters.are_any(),
        };
        let timeline = Arc::new(Timeline::counting(options.start, counting));
        let (print_timeline, print_exits) = (options.print_timeline, options.print_exits);
        let timeline_file = options.timeline_file.take();
        let (mut session, ears, api) = Self::new(options, &timeline)?;
        let result = session.run(first, ears);
        // Before anything is printed: no line must land in a raw terminal.
        Terminal::emergency_restore();
        metrics::flush();
        if let Some(api) = api {
            session.close(api, &result);
        }
        let end = result?;
        if let Some(message) = end.message {
            log::error!("{message}");
        }
        if print_timeline {
            timeline::print(&timeline);
        }
        if let Some(exits) = timeline.exits().filter(|_| print_exits) {
            timeline::print_exits(&exits.lock().unwrap_or_else(PoisonError::into_inner));
        }
        if let Some(mut file) = timeline_file {
            timeline::write(&timeline, &mut file)?;
        }
        Ok(end.status)
    }

    /// The whole life of a clone, in a process that was forked for it: what is the process's is set up already. `ready` is called when
    /// its guest runs, or is paused. The exit status.
    pub fn be_clone(
        options: Options,
        template: Template,
        clone: &CloneOf<'_>,
        ready: impl FnOnce(),
    ) -> Result<u8, Failure> {
        let timeline = Arc::new(Timeline::new(options.start));
        let (mut session, _ears, api) = Self::new(options, &timeline)?;
        session.vmm.be_clone(template, clone)?;
        ready();
        let result = session.until_over();
        if let Some(api) = api {
            session.close(api, &result);
        }
        let end = result?;
        if let Some(message) = end.message {
            log::error!("{message}");
        }
        Ok(end.status)
    }

    fn new(
        options: Options,
        timeline: &Arc<Timeline>,
    ) -> Result<(Self, Ears, Option<Api>), Failure> {
        let (sender, events) = channel();
        let filters = options.filters;
        let api = match options.api {
            Some(socket) => Some(socket.serve(&sender, &filters)?),
            None => None,
        };
        let input = Input::new().map_err(|e| trouble(&e))?;
        let confined = filters.clone();
        let output =
            Output::new_prepared(std::io::stdout(), move || confined.confine(Kind::Console));
        let output = Arc::new(output.map_err(|e| trouble(&e))?);
        let watch: husk_vmm::Watch = match &api {
            Some(api) => api.watcher(),
            None => Arc::new(|_| ()),
        };
        let wake = sender.clone();
        let host = Host {
            identity: options.identity.clone(),
            console: Console {
                output: output.clone(),
                wire: input.wire(),
                open: Arc::new(crate::serial::open),
            },
            mmds: options.mmds,
            cache: options.cache,
            filters: filters.clone(),
            ends_at_mark: options.ends_at_mark,
            timeline: Arc::clone(timeline),
            wake: Arc::new(move || send(&wake, Event::Vm)),
            watch: watch.clone(),
            // Otherwise nobody can ask for it.
            hotplug: api.is_some(),
        };
        let ears = Ears::new(sender.clone(), input, filters.clone(), options.on_signal);
        let session = Self {
            vmm: Vmm::new(host),
            sender,
            events,
            output,
            filters,
            user_networks: options.user_networks,
            asked: false,
            watch,
            has_api: api.is_some(),
            identity: options.identity,
            templates: Templates::default(),
        };
        Ok((session, ears, api))
    }

    /// Tell clients of the API how it ended, and end the API.
    fn close(&self, api: Api, result: &Result<End, Failure>) {
        let (reason, status) = match result {
            Ok(end) => (end.reason.clone(), end.status),
            Err(failure) => (failure.message.clone(), failure.status),
        };
        (self.watch)(husk_config::Event::Exited { reason, status });
        // Nobody answers requests that come now.
        while let Ok(event) = self.events.try_recv() {
            if let Event::Request(_, reply) = event {
                reply(Err(ending()));
            }
        }
        api.stop();
    }

    fn run(&mut self, first: First, mut ears: Ears) -> Result<End, Failure> {
        let input = match first {
            First::Boot(config) => {
                self.vmm.handle(VmmRequest::Configure(config))?;
                self.boot(ears)?
            }
            First::Restore(load) => {
                self.provide_for_programs()?;
                // Its files are strangers'.
                self.filters
                    .install(Kind::Builder)
                    .map_err(|e| trouble(&e))?;
                ears.hear_signals()?;
                let terminal = Terminal::open().map(Arc::new);
                self.vmm.handle(VmmRequest::LoadSnapshot(load))?;
                husk_vmm::give_way();
                ears.listen(terminal)?
            }
            First::Serve(config) => {
                self.vmm.await_requests(*config);
                // A signal must find the way to the socket's removal.
                ears.hear_signals()?;
                // Before a request is looked at.
                self.provide_for_programs()?;
                self.filters
                    .install(Kind::Builder)
                    .map_err(|e| trouble(&e))?;
                match self.serve(ears)? {
                    Ok(input) => input,
                    Err(end) => return Ok(end),
                }
            }
        };
        husk_vmm::forget_code();
        let end = self.until_over();
        drop(input);
        end
    }

    /// The main thread will be confined, and then a device that needs a program of the host's cannot start it.
    fn provide_for_programs(&self) -> Result<(), Failure> {
        if !self.filters.are_any() {
            return Ok(());
        }
        if self.user_networks {
            return husk_devices::net::start_launcher().map_err(|e| trouble(&e));
        }
        husk_devices::net::refuse_programs();
        Ok(())
    }

    /// Build the VM and let it run; keep the result for as long.
    fn boot(&mut self, mut ears: Ears) -> Result<Input, Failure> {
        self.vmm.build()?;
        // Only now: while a kernel is unpacked, say, a signal or Ctrl-C just ends the process. And not later: what the
        // guest writes and what is typed to it needs the raw terminal.
        ears.hear_signals()?;
        let builds = self.has_api || self.vmm.config().on_reboot == OnReboot::Restart;
        if builds {
            self.provide_for_programs()?;
        }
        let terminal = Terminal::open().map(Arc::new);
        self.vmm.start()?;
        husk_vmm::give_way();
        // The guest's first instructions run already: its vCPUs and devices are confined, and nothing of it has come
        // here. A restart builds the VM anew, in this process, and a device that is plugged in is opened.
        self.filters.confine(match builds {
            true => Kind::Builder,
            false => Kind::Main,
        });
        ears.listen(terminal)
    }

    /// Answer requests until a VM runs; or the end, when it is told to end before.
    fn serve(&mut self, mut ears: Ears) -> Result<Result<Input, End>, Failure> {
        // Whoever starts the process wants an answer first. Other threads would compete with that for the processors.
        let mut first = true;
        loop {
            let received = match husk_metrics::next_flush() {
                _ if first => husk_vmm::spin_for(&self.events, FIRST_ANSWER),
                Some(at) => {
                    let pause = at.saturating_duration_since(Instant::now());
                    self.events.recv_timeout(pause)
                }
                None => self.events.recv().map_err(RecvTimeoutError::from),
            };
            match received {
                Err(RecvTimeoutError::Timeout) => metrics::flush_if_due(Instant::now()),
                Ok(Event::Request(VmmRequest::Boot, reply)) => {
                    if let Err(e) = self.vmm.build() {
                        reply(Err(refusal(&e)));
                        continue;
                    }
                    let terminal = Terminal::open().map(Arc::new);
                    let started = self.vmm.start();
                    reply(started.map(|()| Answer::Done).map_err(|e| refusal(&e)));
                    husk_vmm::give_way();
                    return ears.listen(terminal).map(Ok);
                }
                Ok(Event::Request(request @ VmmRequest::LoadSnapshot(_), reply)) => {
                    let terminal = Terminal::open().map(Arc::new);
                    if let Some(end) = self.answer(request, reply) {
                        return Ok(Err(end));
                    }
                    if self.vmm.is_booted() {
                        husk_vmm::give_way();
                        return ears.listen(terminal).map(Ok);
                    }
                }
                Ok(Event::Request(VmmRequest::Stop, reply)) => {
                    reply(Ok(Answer::Done));
                    return Ok(Err(End::because("a client asked for it")));
                }
                Ok(Event::Request(request, reply)) => {
                    if let Some(end) = self.answer(request, reply) {
                        return Ok(Err(end));
                    }
                }
                Ok(Event::Signal(signal)) => {
                    return Ok(Err(End {
                        status: exit_status_of(signal),
                        ..End::because("a signal")
                    }));
                }
                Ok(Event::Key(_) | Event::Vm | Event::Down) => {}
                // This session has a sender of its own.
                Err(RecvTimeoutError::Disconnected) => return Ok(Err(End::default())),
            }
            if std::mem::take(&mut first) {
                ears.listen_to_signals()?;
                self.vmm.stand_by();
            }
        }
    }

    /// Answer a request; Some when the process has nothing left to do.
    fn answer(&mut self, request: VmmRequest, reply: husk_api::Reply) -> Option<End> {
        if let Err(refused) = self.configure_process(&request) {
            reply(Err(refused));
            return None;
        }
        let request = match request {
            VmmRequest::Fork(fork) if self.vmm.is_booted() => {
                let own = (&self.identity, &self.filters);
                reply(self.templates.fork(&mut self.vmm, &fork, own));
                return None;
            }
            VmmRequest::DropTemplate(name) if self.vmm.is_booted() => {
                reply(self.templates.drop_template(&name));
                return None;
            }
            other => other,
        };
        match self.vmm.handle(request) {
            Ok(answer) => {
                reply(Ok(answer));
                None
            }
            Err(e) => {
                reply(Err(refusal(&e)));
                e.is_fatal().then(|| End {
                    status: 1,
                    message: Some(e.to_string()),
                    ..End::because(&e.to_string())
                })
            }
        }
    }

    /// The log and the metrics are the process's: do what `request` wants of them. What it wants of the VM is left.
    fn configure_process(&self, request: &VmmRequest) -> Result<(), husk_api::Refusal> {
        let refused = |message| husk_api::Refusal {
            message,
            too_large: false,
        };
        match request {
            VmmRequest::FlushMetrics if self.vmm.is_booted() => {
                metrics::flush_now().map_err(refused)
            }
            VmmRequest::Put(part) if !self.vmm.is_booted() => match part.as_ref() {
                Part::Logger(settings) => logging::configure(settings).map_err(refused),
                Part::Metrics(settings) => {
                    metrics::configure(settings).map_err(|f| refused(f.message))
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// A VM runs: until it has ended for good.
    fn until_over(&mut self) -> Result<End, Failure> {
        let restart = self.vmm.config().on_reboot == OnReboot::Restart;
        loop {
            let forced = self.until_ended();
            if forced.is_some() {
                self.output.abandon();
            }
            let (down, impatient) = self.take_down(restart);
            if let Some(status) = forced.or(impatient) {
                return Ok(End {
                    status,
                    ..End::because("it was ended at once")
                });
            }
            let Some(outcome) = down else {
                return Ok(End::default());
            };
            if outcome == Outcome::Reset && restart && !self.asked {
                log::info!("the guest rebooted and starts again");
                (self.watch)(husk_config::Event::Restarted);
                self.vmm.handle(VmmRequest::Boot)?;
                continue;
            }
            let status = outcome.exit_status();
            return Ok(End {
                status,
                message: (status != 0).then(|| outcome.to_string()),
                ..End::because(&outcome.to_string())
            });
        }
    }

    /// Until the guest has ended; Some when it is to be ended at once, with this exit status.
    fn until_ended(&mut self) -> Option<u8> {
        let mut chores = Chores::new();
        while self.vmm.outcome().is_none() {
            chores.plan(&self.vmm, self.asked);
            match self.events.recv_timeout(chores.pause(&self.vmm)) {
                Ok(Event::Request(request, reply)) => {
                    self.answer(request, reply);
                }
                Ok(Event::Signal(signal)) if self.asked => {
                    return Some(exit_status_of(signal));
                }
                Ok(Event::Signal(_)) => {
                    self.asked = true;
                    log::info!("the power button is pressed; a second signal ends the VM at once");
                    self.press_power_button();
                }
                Ok(Event::Key(ConsoleEvent::PowerButton)) => self.press_power_button(),
                Ok(Event::Key(ConsoleEvent::Leave)) => return Some(0),
                Ok(Event::Vm | Event::Down) => drop(self.vmm.collect_ejected()),
                Err(_) => match chores.due(&mut self.vmm) {
                    Some(Chore::GiveUp) => self.vmm.give_up_after_panic(),
                    Some(Chore::Press) => self.press_power_button(),
                    None => {}
                },
            }
        }
        None
    }

    fn press_power_button(&mut self) {
        if let Err(e) = self.vmm.handle(VmmRequest::PressPowerButton) {
            log::debug!("no power button: {e}");
        }
    }

    /// Take the VM down and write all of its output, on another thread, because either may have to wait for a slow reader
    /// of the output, and signals must be heard meanwhile. With Some exit status, the user did not want to wait.
    fn take_down(&mut self, stays_open: bool) -> (Option<Outcome>, Option<u8>) {
        let Self {
            vmm,
            sender,
            events,
            output,
            asked,
            ..
        } = self;
        thread::scope(|scope| {
            let taking = scope.spawn(|| {
                let down = vmm.take_down();
                let restarts = stays_open && matches!(&down, Some(Outcome::Reset));
                if !restarts {
                    output.close();
                }
                send(sender, Event::Down);
                down
            });
            let mut impatient = None;
            loop {
                match events.recv() {
                    Ok(Event::Down) | Err(_) => break,
                    Ok(Event::Request(_, reply)) => reply(Err(ending())),
                    Ok(Event::Key(ConsoleEvent::Leave)) => impatient = Some(0),
                    Ok(Event::Signal(signal)) if *asked => impatient = Some(exit_status_of(signal)),
                    Ok(Event::Signal(_)) => *asked = true,
                    Ok(Event::Vm | Event::Key(ConsoleEvent::PowerButton)) => {}
                }
                if impatient.is_some() {
                    output.abandon();
                }
            }
            (taking.join().ok().flatten(), impatient)
        })
    }
}

/// What the main thread has to do when nothing happens, and when.
struct Chores {
    /// The guest's kernel has panicked and is given up.
    give_up: Option<Instant>,
    /// The power button is pressed again, `true`: only if the guest has not looked by then.
    press: Option<(Instant, bool)>,
    /// It is looked whether the guest has halted for good.
    look: Instant,
    look_pause: Duration,
}

/// What a chore leaves to the session.
enum Chore {
    GiveUp,
    Press,
}

impl Chores {
    fn new() -> Self {
        Self {
            give_up: None,
            press: None,
            look: Instant::now() + LOOK_FIRST,
            look_pause: LOOK_FIRST,
        }
    }

    /// Look at the VM for what is to come. `asked`: a signal wants the guest to shut down.
    fn plan(&mut self, vmm: &Vmm, asked: bool) {
        let now = Instant::now();
        if vmm.has_panicked() {
            self.give_up.get_or_insert(now + PANIC_GRACE);
        }
        // A press that the guest has not seen is repeated soon. One that it has seen may still have come before the
        // program that would have acted on it, so it is repeated later.
        if vmm.is_press_pending() && self.press.is_none_or(|(_, unseen)| !unseen) {
            self.press = Some((now + PRESS_AGAIN, true));
        } else if asked {
            self.press.get_or_insert((now + PRESS_LATER, false));
        }
    }

    fn pause(&self, vmm: &Vmm) -> Duration {
        let press = self.press.map(|(at, _)| at);
        let all = [
            self.give_up,
            press,
            Some(self.look),
            husk_metrics::next_flush(),
            vmm.recording_due(),
        ];
        let next = all.into_iter().flatten().min().unwrap_or(self.look);
        next.saturating_duration_since(Instant::now())
    }

    /// Do what is due.
    fn due(&mut self, vmm: &mut Vmm) -> Option<Chore> {
        let now = Instant::now();
        metrics::flush_if_due(now);
        if vmm.recording_due().is_some_and(|at| at <= now) {
            vmm.record_working_set();
        }
        if self.give_up.is_some_and(|at| at <= now) {
            return Some(Chore::GiveUp);
        }
        if let Some((_, unseen)) = self.press.take_if(|(at, _)| *at <= now) {
            return (vmm.is_press_pending() || !unseen).then_some(Chore::Press);
        }
        if self.look <= now {
            self.look_pause = match vmm.look_for_halt() {
                true => LOOK_AGAIN,
                false => (self.look_pause * 2).clamp(LOOK_FIRST, LOOK_LAST),
            };
            self.look = now + self.look_pause;
        }
        None
    }
}

/// The receiver lives as long as the process, so sending fails only while it ends.
pub fn send(sender: &Sender<Event>, event: Event) {
    let _ = sender.send(event);
}

/// The host is in the way.
pub fn trouble(error: &dyn std::error::Error) -> Failure {
    Failure::host(husk_vmm::chain(error))
}

fn exit_status_of(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(128)
}

/// On stderr, in one piece. When nobody reads it, the VM's end is not to blame.
pub fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
