//! `husk run`: from flags to a VM, and the main thread's loop while it lives.

use crate::cli::RunArgs;
use crate::{Failure, devices, guest};
use husk_config::{OnReboot, VmConfig, VmmRequest, default_boot_args, parse_mib};
use husk_console::{ConsoleEvent, Input, Output, Terminal};
use husk_loader::Cache;
use husk_vmm::{Console, ExitCounts, Host, Outcome, Timeline, Vmm};
use signal_hook::consts::signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
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

/// What the main thread waits for. Other threads only ever send; none waits for the main thread.
enum Event {
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
    let (config, _initrd) = configuration(arguments, &cache)?;

    // Handlers for what kills come first: those for what asks replace some of them.
    husk_console::install_fatal_signal_handlers().map_err(|e| trouble(&e))?;
    husk_vmm::install_kick_handler().map_err(|e| trouble(&e))?;
    let (sender, events) = channel();
    let input = Input::new().map_err(|e| trouble(&e))?;
    let output = Arc::new(Output::new(std::io::stdout()).map_err(|e| trouble(&e))?);
    let timeline = Arc::new(Timeline::new(start));
    let wake = sender.clone();
    let host = Host {
        console: Console {
            output: output.clone(),
            wire: input.wire(),
        },
        cache,
        count_exits: arguments.exits,
        timeline: Arc::clone(&timeline),
        wake: Arc::new(move || send(&wake, Event::Vm)),
    };
    let ears = Ears {
        sender: sender.clone(),
        input,
    };
    let mut session = Session {
        vmm: Vmm::new(host),
        sender,
        events,
        output,
        asked: false,
    };
    let result = session.run(config, ears);
    // Before anything is printed: no line must land in a raw terminal.
    Terminal::emergency_restore();
    let end = result?;
    if let Some(message) = end.message {
        log::error!("{message}");
    }
    if arguments.timeline {
        print_timeline(&timeline);
    }
    if let Some(exits) = end.exits {
        print_exits(&exits);
    }
    Ok(end.status)
}

/// How a session ended.
#[derive(Default)]
struct End {
    status: u8,
    message: Option<String>,
    exits: Option<ExitCounts>,
}

/// What hears signals and keys.
struct Ears {
    sender: Sender<Event>,
    input: Input,
}

impl Ears {
    /// From now on signals are kept until they are listened to, and the terminal is raw.
    fn open() -> Result<(Signals, Option<Arc<Terminal>>), Failure> {
        let mut stopping = vec![SIGINT, SIGTERM, SIGHUP, SIGQUIT];
        stopping.retain(|signal| !husk_console::is_ignored(*signal));
        let signals = Signals::new(stopping).map_err(|e| trouble(&e))?;
        Ok((signals, Terminal::open().map(Arc::new)))
    }

    /// Start to listen, on threads of its own; keep the result for as long.
    fn listen(
        self,
        mut signals: Signals,
        terminal: Option<Arc<Terminal>>,
    ) -> Result<Input, Failure> {
        let (stops, keys) = (self.sender.clone(), self.sender);
        start_thread("signals", move || {
            signals
                .forever()
                .for_each(|signal| send(&stops, Event::Signal(signal)));
        })?;
        let pressed = move |key| send(&keys, Event::Key(key));
        self.input
            .start(std::io::stdin(), terminal, pressed)
            .map_err(|e| trouble(&e))?;
        Ok(self.input)
    }
}

struct Session {
    vmm: Vmm,
    sender: Sender<Event>,
    events: Receiver<Event>,
    output: Arc<Output>,
    /// A signal has pressed the power button.
    asked: bool,
}

impl Session {
    fn run(&mut self, config: VmConfig, ears: Ears) -> Result<End, Failure> {
        let restart = config.on_reboot == OnReboot::Restart;
        self.vmm.handle(VmmRequest::Configure(Box::new(config)))?;
        self.vmm.build()?;
        // Only now: while a kernel is unpacked, say, a signal or Ctrl-C just ends the process. And not later: what the
        // guest writes and what is typed to it needs the raw terminal.
        let (signals, terminal) = Ears::open()?;
        self.vmm.start()?;
        let _input = ears.listen(signals, terminal)?;
        loop {
            let forced = self.until_ended();
            if forced.is_some() {
                self.output.abandon();
            }
            let (down, impatient) = self.take_down(restart);
            if let Some(status) = forced.or(impatient) {
                return Ok(End {
                    status,
                    ..End::default()
                });
            }
            let Some((outcome, exits)) = down else {
                return Ok(End::default());
            };
            if outcome == Outcome::Reset && restart && !self.asked {
                log::info!("the guest rebooted and starts again");
                self.vmm.handle(VmmRequest::Boot)?;
                continue;
            }
            let status = outcome.exit_status();
            return Ok(End {
                status,
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
                Ok(Event::Signal(signal)) if self.asked => return Some(exit_status_of(signal)),
                Ok(Event::Signal(_)) => {
                    self.asked = true;
                    log::info!("the power button is pressed; a second signal ends the VM at once");
                    self.press_power_button();
                }
                Ok(Event::Key(ConsoleEvent::PowerButton)) => self.press_power_button(),
                Ok(Event::Key(ConsoleEvent::Leave)) => return Some(0),
                Ok(Event::Vm | Event::Down) => {}
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
        let all = [self.give_up, press, Some(self.look)];
        let next = all.into_iter().flatten().min().unwrap_or(self.look);
        next.saturating_duration_since(Instant::now())
    }

    /// Do what is due.
    fn due(&mut self, vmm: &mut Vmm) -> Option<Chore> {
        let now = Instant::now();
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
