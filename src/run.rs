//! `husk run`: from flags to a VM, and the main thread's loop while it lives.

use crate::cli::RunArgs;
use crate::{Failure, devices, guest, logging, metadata, metrics};
use husk_config::{Answer, OnReboot, VmConfig, VmmRequest, default_boot_args, parse_mib};
use husk_console::{ConsoleEvent, Input, Output, Terminal};
use husk_loader::Cache;
use husk_mmds::Mmds;
use husk_vmm::{Console, ExitCounts, Host, Identity, Outcome, Timeline, Vmm};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
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

/// How long answers that are on their way to clients of the API may take at the end.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// What the main thread waits for. Other threads only ever send; none waits for the main thread.
pub enum Event {
    /// A request of the API, and who waits for the answer.
    Request(VmmRequest, husk_api::Reply),
    /// SIGINT, SIGTERM, SIGHUP or SIGQUIT.
    Signal(i32),
    /// An escape sequence on the terminal.
    Key(ConsoleEvent),
    /// The VM has ended or its kernel has panicked.
    Vm,
    /// The VM is taken down and its output is written.
    Down,
}

/// Boot a VM and stay until it ends. The exit status, unless something failed.
pub fn run(arguments: &RunArgs, start: Instant) -> Result<u8, Failure> {
    let cache = Cache::from_environment();
    let (mut config, _initrd) = configuration(arguments, &cache)?;
    let mmds = metadata::store(arguments, &mut config)?;
    if let Some(logger) = &config.logger {
        logging::configure_below_flags(logger).map_err(Failure::usage)?;
    }
    if let Some(settings) = &config.metrics {
        metrics::configure(settings)?;
    }

    let api = match &arguments.api_sock {
        Some(path) => Some(ApiSocket::bind(path, husk_api::MAX_BODY)?),
        None => None,
    };
    Session::go(
        Options {
            mmds,
            cache,
            count_exits: arguments.exits,
            print_timeline: arguments.timeline,
            start,
            identity: identity("husk", "anonymous-instance"),
            api,
            on_signal: OnSignal::PressPowerButton,
        },
        First::Boot(Box::new(config)),
    )
}

/// What the monitor says of itself.
pub fn identity(name: &'static str, id: &str) -> Identity {
    Identity {
        id: id.into(),
        name: match name {
            "firecracker" => "Firecracker",
            _ => "Husk",
        },
        version: match name {
            "firecracker" => husk_api::FIRECRACKER_VERSION,
            _ => env!("CARGO_PKG_VERSION"),
        },
        api_version: husk_api::FIRECRACKER_VERSION,
    }
}

/// What a session is started with, besides the VM.
pub struct Options {
    /// What the guest's metadata service answers from.
    pub mmds: Arc<Mmds>,
    /// Unpacked kernels.
    pub cache: Cache,
    /// Count exits by reason, and print them at the end.
    pub count_exits: bool,
    /// Print the timeline at the end.
    pub print_timeline: bool,
    /// When the process began.
    pub start: Instant,
    /// What the monitor says of itself.
    pub identity: Identity,
    /// Where requests come from.
    pub api: Option<ApiSocket>,
    /// What the first signal does to a VM that runs.
    pub on_signal: OnSignal,
}

/// What the first signal that asks for an end does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OnSignal {
    /// Presses the power button; a second one ends the VM at once.
    PressPowerButton,
    /// Ends the VM at once.
    End,
}

/// How a session begins.
pub enum First {
    /// With this VM.
    Boot(Box<VmConfig>),
    /// With requests, which add to this configuration.
    Serve(Box<VmConfig>),
}

/// How a session ended.
#[derive(Default)]
struct End {
    status: u8,
    /// In words.
    reason: String,
    message: Option<String>,
    exits: Option<ExitCounts>,
}

/// What hears signals and keys.
struct Ears {
    sender: Sender<Event>,
    input: Input,
    /// Signals that are kept until somebody listens.
    signals: Option<Signals>,
    listens: bool,
}

impl Ears {
    /// From now on signals are kept until they are listened to.
    fn hear_signals(&mut self) -> Result<(), Failure> {
        if self.signals.is_none() {
            let mut stopping = vec![SIGINT, SIGTERM, SIGHUP, SIGQUIT];
            stopping.retain(|signal| !husk_console::is_ignored(*signal));
            self.signals = Some(Signals::new(stopping).map_err(|e| trouble(&e))?);
        }
        Ok(())
    }

    /// Listen to signals, on a thread of its own.
    fn listen_to_signals(&mut self) -> Result<(), Failure> {
        self.hear_signals()?;
        let Some(mut signals) = self.signals.take_if(|_| !self.listens) else {
            return Ok(());
        };
        self.listens = true;
        let stops = self.sender.clone();
        start_thread("signals", move || {
            signals
                .forever()
                .for_each(|signal| send(&stops, Event::Signal(signal)));
        })
    }

    /// Start to listen to signals and to what is typed, on threads of their own; keep the result for as long.
    fn listen(mut self, terminal: Option<Arc<Terminal>>) -> Result<Input, Failure> {
        if !self.listens {
            self.listen_to_signals()?;
        }
        let keys = self.sender;
        let pressed = move |key| send(&keys, Event::Key(key));
        self.input
            .start(std::io::stdin(), terminal, pressed)
            .map_err(|e| trouble(&e))?;
        Ok(self.input)
    }
}

/// The API's socket, before anybody is served.
pub struct ApiSocket {
    path: PathBuf,
    listener: UnixListener,
    max_body: usize,
    /// The socket's file goes when the process does.
    pub tidy: bool,
}

/// The API, served.
struct Api {
    server: husk_api::Server,
    /// The socket's file, if it is to be removed.
    remove: Option<PathBuf>,
}

impl ApiSocket {
    /// Make the socket's file. `max_body`: bytes that a request's body may have.
    pub fn bind(path: &Path, max_body: usize) -> Result<Self, Failure> {
        let listener = husk_api::bind(path).map_err(|e| trouble(&e))?;
        Ok(Self {
            path: path.into(),
            listener,
            max_body,
            tidy: true,
        })
    }

    fn serve(self, sender: &Sender<Event>) -> Result<Api, Failure> {
        let sender = sender.clone();
        let handler = Box::new(move |request, reply| send(&sender, Event::Request(request, reply)));
        let settings = husk_api::Settings {
            max_body: self.max_body,
            prepare: Box::new(|| ()),
        };
        let server = husk_api::Server::start(self.listener, settings, handler);
        let server = server.map_err(|e| trouble(&e))?;
        Ok(Api {
            server,
            remove: self.tidy.then_some(self.path),
        })
    }
}

impl Api {
    /// Let answers that are on their way arrive, and remove the socket.
    fn stop(self) {
        // Before the end is told: who hears of it may use the path again.
        if let Some(path) = &self.remove
            && let Err(e) = std::fs::remove_file(path)
        {
            log::debug!("the API socket cannot be removed: {e}");
        }
        self.server.stop(LAST_ANSWERS);
    }
}

fn refusal(error: &husk_vmm::Error) -> husk_api::Refusal {
    husk_api::Refusal {
        message: husk_vmm::chain(error),
        too_large: error.is_too_large(),
    }
}

fn ending() -> husk_api::Refusal {
    husk_api::Refusal {
        message: "The VM is ending.".into(),
        too_large: false,
    }
}

pub struct Session {
    vmm: Vmm,
    sender: Sender<Event>,
    events: Receiver<Event>,
    output: Arc<Output>,
    /// A signal has pressed the power button.
    asked: bool,
    on_signal: OnSignal,
    watch: husk_vmm::Watch,
}

impl Session {
    /// Until the VM has ended and everything is printed and closed. The exit status.
    pub fn go(options: Options, first: First) -> Result<u8, Failure> {
        // Handlers for what kills come first: those for what asks replace some of them.
        husk_console::install_fatal_signal_handlers().map_err(|e| trouble(&e))?;
        husk_vmm::install_kick_handler().map_err(|e| trouble(&e))?;
        let (sender, events) = channel();
        let input = Input::new().map_err(|e| trouble(&e))?;
        let output = Arc::new(Output::new(std::io::stdout()).map_err(|e| trouble(&e))?);
        let timeline = Arc::new(Timeline::new(options.start));
        let wake = sender.clone();
        let api = match options.api {
            Some(socket) => Some(socket.serve(&sender)?),
            None => None,
        };
        let watch = match &api {
            Some(api) => api.server.watcher(),
            None => Arc::new(|_| ()),
        };
        let host = Host {
            identity: options.identity,
            console: Console {
                output: output.clone(),
                wire: input.wire(),
                open: Arc::new(crate::serial::open),
            },
            mmds: options.mmds,
            cache: options.cache,
            count_exits: options.count_exits,
            timeline: Arc::clone(&timeline),
            wake: Arc::new(move || send(&wake, Event::Vm)),
            watch: watch.clone(),
        };
        let ears = Ears {
            sender: sender.clone(),
            input,
            signals: None,
            listens: false,
        };
        let mut session = Session {
            vmm: Vmm::new(host),
            sender,
            events,
            output,
            asked: false,
            on_signal: options.on_signal,
            watch,
        };
        let result = session.run(first, ears);
        // Before anything is printed: no line must land in a raw terminal.
        Terminal::emergency_restore();
        metrics::flush();
        if let Some(api) = api {
            let (reason, status) = match &result {
                Ok(end) => (end.reason.clone(), end.status),
                Err(failure) => (failure.message.clone(), failure.status),
            };
            (session.watch)(husk_config::Event::Exited { reason, status });
            session.refuse_requests();
            api.stop();
        }
        let end = result?;
        if let Some(message) = end.message {
            log::error!("{message}");
        }
        if options.print_timeline {
            print_timeline(&timeline);
        }
        if let Some(exits) = end.exits {
            print_exits(&exits);
        }
        Ok(end.status)
    }

    /// Nobody answers requests that come now.
    fn refuse_requests(&self) {
        while let Ok(event) = self.events.try_recv() {
            if let Event::Request(_, reply) = event {
                reply(Err(ending()));
            }
        }
    }

    fn run(&mut self, first: First, mut ears: Ears) -> Result<End, Failure> {
        let input = match first {
            First::Boot(config) => {
                self.vmm.handle(VmmRequest::Configure(config))?;
                self.boot(ears)?
            }
            First::Serve(config) => {
                self.vmm.begin_with(*config);
                self.vmm.stand_by();
                // A signal must find the way to the socket's removal.
                ears.listen_to_signals()?;
                match self.serve(ears)? {
                    Ok(input) => input,
                    Err(end) => return Ok(end),
                }
            }
        };
        let end = self.until_over();
        drop(input);
        end
    }

    /// Build the VM and let it run; keep the result for as long.
    fn boot(&mut self, mut ears: Ears) -> Result<Input, Failure> {
        self.vmm.build()?;
        // Only now: while a kernel is unpacked, say, a signal or Ctrl-C just ends the process. And not later: what the
        // guest writes and what is typed to it needs the raw terminal.
        ears.hear_signals()?;
        let terminal = Terminal::open().map(Arc::new);
        self.vmm.start()?;
        ears.listen(terminal)
    }

    /// Answer requests until a VM runs; or the end, when it is told to end before.
    fn serve(&mut self, ears: Ears) -> Result<Result<Input, End>, Failure> {
        loop {
            match self.events.recv() {
                Ok(Event::Request(VmmRequest::Boot, reply)) => {
                    if let Err(e) = self.vmm.build() {
                        reply(Err(refusal(&e)));
                        continue;
                    }
                    let terminal = Terminal::open().map(Arc::new);
                    let started = self.vmm.start();
                    reply(started.map(|()| Answer::Done).map_err(|e| refusal(&e)));
                    return ears.listen(terminal).map(Ok);
                }
                Ok(Event::Request(VmmRequest::Stop, reply)) => {
                    reply(Ok(Answer::Done));
                    return Ok(Err(End::default()));
                }
                Ok(Event::Request(request, reply)) => {
                    if let Some(end) = self.answer(request, reply) {
                        return Ok(Err(end));
                    }
                }
                Ok(Event::Signal(signal)) => {
                    return Ok(Err(End {
                        status: exit_status_of(signal),
                        reason: "a signal".into(),
                        ..End::default()
                    }));
                }
                Ok(Event::Key(_) | Event::Vm | Event::Down) => {}
                // This session has a sender of its own.
                Err(_) => return Ok(Err(End::default())),
            }
        }
    }

    /// Answer a request; Some when the process has nothing left to do.
    fn answer(&mut self, request: VmmRequest, reply: husk_api::Reply) -> Option<End> {
        match self.vmm.handle(request) {
            Ok(answer) => {
                reply(Ok(answer));
                None
            }
            Err(e) => {
                reply(Err(refusal(&e)));
                e.is_fatal().then(|| End {
                    status: 1,
                    reason: e.to_string(),
                    message: Some(e.to_string()),
                    exits: None,
                })
            }
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
                    reason: "the VM was ended at once".into(),
                    ..End::default()
                });
            }
            let Some((outcome, exits)) = down else {
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
                reason: outcome.to_string(),
                message: (status != 0).then(|| outcome.to_string()),
                exits,
            });
        }
    }

    /// Until the guest has ended; Some when it is to be ended at once, with this exit status.
    fn until_ended(&mut self) -> Option<u8> {
        let mut chores = Chores::new();
        while self.vmm.outcome().is_none() {
            chores.plan(&self.vmm, self.asked);
            match self.events.recv_timeout(chores.pause()) {
                Ok(Event::Request(request, reply)) => {
                    self.answer(request, reply);
                }
                Ok(Event::Signal(signal)) if self.asked || self.on_signal == OnSignal::End => {
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
    fn take_down(
        &mut self,
        stays_open: bool,
    ) -> (Option<(Outcome, Option<ExitCounts>)>, Option<u8>) {
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
                let restarts = stays_open && matches!(&down, Some((Outcome::Reset, _)));
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

    fn pause(&self) -> Duration {
        let press = self.press.map(|(at, _)| at);
        let all = [
            self.give_up,
            press,
            Some(self.look),
            husk_metrics::next_flush(),
        ];
        let next = all.into_iter().flatten().min().unwrap_or(self.look);
        next.saturating_duration_since(Instant::now())
    }

    /// Do what is due.
    fn due(&mut self, vmm: &mut Vmm) -> Option<Chore> {
        let now = Instant::now();
        metrics::flush_if_due(now);
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
fn send(sender: &Sender<Event>, event: Event) {
    let _ = sender.send(event);
}

fn trouble(error: &dyn std::error::Error) -> Failure {
    Failure::host(husk_vmm::chain(error))
}

fn exit_status_of(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(128)
}

fn start_thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    thread::Builder::new()
        .name(name.into())
        .stack_size(64 << 10)
        .spawn(run)
        .map(drop)
        .map_err(|e| trouble(&e))
}

/// The configuration file, then the flags over it, then the default guest for what is still missing. The file keeps the
/// default guest's initrd open.
fn configuration(arguments: &RunArgs, cache: &Cache) -> Result<(VmConfig, Option<File>), Failure> {
    let usage = |e: &dyn std::error::Error| Failure::usage(husk_vmm::chain(e));
    let mut config = match &arguments.config {
        Some(path) => VmConfig::from_file(path).map_err(|e| usage(&e))?,
        None => VmConfig::default(),
    };
    config.pci |= arguments.pci;
    let pci = config.pci;
    let source = &mut config.boot_source;
    if let Some(kernel) = &arguments.kernel {
        source.kernel_image_path = kernel.clone();
    }
    if let Some(initrd) = &arguments.initrd {
        source.initrd_path = Some(initrd.clone());
    }
    match (&arguments.cmdline, arguments.no_default_cmdline) {
        (given, true) => source.boot_args = Some(given.clone().unwrap_or_default()),
        (Some(given), false) => {
            source.boot_args = Some(format!("{} {given}", default_boot_args(pci)))
        }
        (None, false) => {}
    }
    if let Some(protocol) = arguments.boot_protocol {
        source.boot_protocol = protocol.into();
    }
    if let Some(cpus) = arguments.cpus {
        config.machine_config.vcpu_count = cpus;
    }
    if let Some(memory) = &arguments.memory {
        config.machine_config.mem_size_mib = parse_mib(memory).map_err(|e| usage(&e))?;
    }
    if let Some(on_reboot) = arguments.on_reboot {
        config.on_reboot = on_reboot.into();
    }
    if let Some(path) = &arguments.metrics_path {
        let metrics_path = path.clone();
        config.metrics = Some(husk_config::Metrics { metrics_path });
    }
    add_devices(&mut config, arguments).map_err(Failure::usage)?;
    let (initrd, taken) = default_guest(&mut config, cache)?;
    config.validate().map_err(|e| usage(&e))?;
    say(&taken);
    Ok((config, initrd))
}

/// Disks and interfaces of the command line come behind the file's, the others replace the file's.
fn add_devices(config: &mut VmConfig, arguments: &RunArgs) -> Result<(), String> {
    let flag = |flag: &str, text: &str, why: String| format!("{flag} {text}: {why}");
    for text in &arguments.disk {
        let disk = devices::disk(text, config.drives.len());
        config
            .drives
            .push(disk.map_err(|e| flag("--disk", text, e))?);
    }
    for text in &arguments.net {
        let interface = devices::net(text, config.network_interfaces.len());
        let interface = interface.map_err(|e| flag("--net", text, e))?;
        config.network_interfaces.push(interface);
    }
    if !arguments.publish.is_empty() {
        let mut interfaces = config.network_interfaces.iter_mut();
        let user = interfaces
            .find_map(|interface| interface.user.as_mut())
            .ok_or("-p forwards a port into a guest with --net user: add that")?;
        user.forwards.extend(&arguments.publish);
    }
    let (vsock, entropy) = (&arguments.vsock, &arguments.entropy);
    config.vsock = vsock.clone().or(config.vsock.take());
    config.entropy = entropy.clone().or(config.entropy.take());
    config.balloon = arguments.balloon.clone().or(config.balloon.take());
    Ok(())
}

/// Fill in what to boot when the user named nothing; the text says what it is.
fn default_guest(config: &mut VmConfig, cache: &Cache) -> Result<(Option<File>, String), Failure> {
    let source = &mut config.boot_source;
    if !source.kernel_image_path.as_os_str().is_empty() {
        return Ok((None, String::new()));
    }
    source.kernel_image_path = guest::default_kernel().map_err(Failure::usage)?;
    let kernel = source.kernel_image_path.display().to_string();
    if let Some(initrd) = &source.initrd_path {
        let taken = format!("husk: kernel {kernel}, initrd {}\n", initrd.display());
        return Ok((None, taken));
    }
    let (file, busybox) = guest::default_initrd(config, cache).map_err(Failure::usage)?;
    let source = &mut config.boot_source;
    source.initrd_path = Some(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
    let busybox = busybox.display();
    let taken = format!("husk: kernel {kernel}, a small initramfs with the shell of {busybox}\n");
    Ok((Some(file), taken))
}

/// On stderr, in one piece. When nobody reads it, the VM's end is not to blame.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn print_timeline(timeline: &Timeline) {
    let mut text = String::from("husk: timeline, in ms since the start of the process\n");
    for (phase, at) in timeline.reached() {
        text += &format!("{:>10.3}  {phase}\n", at.as_secs_f64() * 1e3);
    }
    say(&text);
}

fn print_exits(exits: &ExitCounts) {
    let total: u64 = exits.values().sum();
    let mut text = format!("husk: {total} exits from the guest to the monitor\n");
    let mut exits: Vec<_> = exits.iter().collect();
    exits.sort_by_key(|&(_, count)| std::cmp::Reverse(*count));
    for ((reason, address), count) in exits {
        text += &format!("{count:>10}  {reason} {address:#x}\n");
    }
    say(&text);
}
