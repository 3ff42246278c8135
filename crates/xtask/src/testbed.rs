//! The testbed: an emulated x86-64 host with a real /dev/kvm, and commands that run there.
//!
//! QEMU's software emulation (TCG) emulates a CPU with AMD SVM; Debian's stock kernel runs on it and
//! loads kvm-amd. So Linux guests can be tested where the machine has no KVM, or one that cannot run
//! Linux. The command sees this machine's root file system read-only under a throw-away overlay.

use crate::apt;
use crate::guest;
use crate::host::{self, TempDir, shell_quote};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant, SystemTime};

/// The exit status when the time was up, as that of timeout(1).
const TIMED_OUT: u8 = 124;
/// How long the emulated host may take to come up, and how often one that does not is replaced: now and then one hangs before its
/// kernel says a word, with its processor busy.
const COME_UP: Duration = Duration::from_secs(120);
const REPLACEMENTS: usize = 2;
/// How often the emulated host is asked for a sign of life, and how long it may fail to give one: nothing that a command there
/// does may keep its init from running.
const BEAT: Duration = Duration::from_millis(500);
const SILENCE: Duration = Duration::from_secs(180);

/// What the emulated host loads, in this order, with what each depends on.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9p",
    "9pnet_virtio",
    "overlay",
    "kvm-amd",
    "tun",
    "virtio_net",
    "veth",
    "bridge",
    "vhost_net",
    "vhost_vsock",
    "loop",
    "dm_mod",
    "crc32c_generic",
    "ext4",
];

const INIT: &str = include_str!("testbed-init.sh");

/// `cargo xtask testbed`.
///
/// The command runs in the same folder, with /out shared read-write (the folder $TESTBED_OUT, else a
/// new one that is removed at the end) and the variables HUSK_*, RUST_*, CARGO_*, TESTBED_* and CI.
/// The exit status is the command's, or 124 when the time is up. As cargo's runner:
/// CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$PWD/target/x86_64-unknown-linux-gnu/debug/xtask testbed --" cargo test --test NAME
#[derive(clap::Args)]
pub struct Args {
    /// Virtual CPUs of the emulated host
    #[arg(short = 'c', long, value_name = "CPUS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of the emulated host in MiB
    #[arg(short = 'm', long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..))]
    memory: u32,
    /// Count instructions: one is one nanosecond of virtual time, on one CPU
    #[arg(short = 'i', long)]
    icount: bool,
    /// More arguments for QEMU, separated by blanks
    #[arg(
        short = 'o',
        long,
        value_name = "QEMU ARGS",
        allow_hyphen_values = true,
        default_value = ""
    )]
    qemu: String,
    /// Seconds until the emulated host is stopped (default: $TESTBED_S, else 300; none with --tty)
    #[arg(short = 't', long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Connect this terminal to the command, which gets a terminal as its standard input
    #[arg(long, conflicts_with = "stdin")]
    tty: bool,
    /// Read standard input to its end first and give it to the command
    #[arg(long)]
    stdin: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// `cargo xtask testbed`: runs the command there, its output on our standard output.
pub fn run(args: &Args) -> Result<ExitCode> {
    let command: Result<Vec<String>> = args.command.iter().map(as_text).collect();
    let limit = args
        .seconds
        .or_else(|| std::env::var("TESTBED_S").ok()?.parse().ok());
    let limit = limit.or((!args.tty).then_some(300));
    let testbed = Testbed {
        cpus: if args.icount { 1 } else { args.cpus },
        memory_mib: args.memory,
        icount: args.icount,
        qemu: args.qemu.split_whitespace().map(str::to_owned).collect(),
        limit: limit.map(Duration::from_secs),
        tty: args.tty,
        out: std::env::var_os("TESTBED_OUT").map(PathBuf::from),
        ..Testbed::default()
    };
    let stdin = if args.stdin {
        let mut input = Vec::new();
        std::io::stdin()
            .read_to_end(&mut input)
            .context("cannot read standard input")?;
        input
    } else {
        Vec::new()
    };
    let finish = testbed.run(&command?, &stdin, |text| {
        let mut stdout = std::io::stdout().lock();
        // A reader that went away (`| head`) is no reason to stop before the command does.
        let _ = stdout.write_all(text).and_then(|()| stdout.flush());
    })?;
    Ok(ExitCode::from(finish.exit_status()))
}

/// An emulated host, which exists while one command runs on it.
pub struct Testbed {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Whether time is instructions counted (needs `cpus` to be 1).
    pub icount: bool,
    /// More arguments for QEMU.
    pub qemu: Vec<String>,
    /// How long the whole may take.
    pub limit: Option<Duration>,
    /// Whether the command gets this process's terminal.
    pub tty: bool,
    /// What the command sees as /out; a folder that is removed at the end when `None`.
    pub out: Option<PathBuf>,
    /// Environment variables of the command, beside those passed on from this process.
    pub env: Vec<(String, String)>,
}

impl Default for Testbed {
    fn default() -> Self {
        Self {
            cpus: 2,
            memory_mib: 4096,
            icount: false,
            qemu: Vec::new(),
            limit: Some(Duration::from_secs(300)),
            tty: false,
            out: None,
            env: Vec::new(),
        }
    }
}

/// How a run on the emulated host came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The command ended, with this exit status.
    Status(u8),
    /// The limit was reached.
    TimeUp,
    /// The emulated host stopped giving signs of life, or ended by itself, before the command did.
    HostDied,
}

impl Finish {
    /// The command's, or 124 when it did not come to its end.
    pub fn exit_status(self) -> u8 {
        match self {
            Finish::Status(status) => status,
            Finish::TimeUp | Finish::HostDied => TIMED_OUT,
        }
    }
}

impl Testbed {
    /// Makes what every testbed needs, once, so that several can start at the same time.
    pub fn prepare() -> Result<()> {
        Machine::ensure().map(drop)
    }

    /// Runs a command on the emulated host. What keeps it from coming to its end is said on standard error.
    ///
    /// `stdin` is the command's whole standard input. `output` is called with what the command
    /// writes on standard output and standard error as it comes, but not with a terminal (`tty`),
    /// where the emulated host has ours.
    pub fn run(
        &self,
        command: &[String],
        stdin: &[u8],
        output: impl FnMut(&[u8]),
    ) -> Result<Finish> {
        let machine = Machine::ensure()?;
        let temp = TempDir::new(&std::env::temp_dir(), "husk-testbed")?;
        let control = temp.path().join("control");
        let out = match &self.out {
            Some(out) => out.clone(),
            None => temp.path().join("out"),
        };
        for dir in [&control, &out] {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let script = self.script(command)?;
        fs::write(control.join("cmd"), script)
            .and_then(|()| fs::write(control.join("stdin"), stdin))
            .with_context(|| format!("cannot write in {}", control.display()))?;
        let filter = EndFilter::new();
        let (name, content) = if self.tty {
            ("tty", &[][..])
        } else {
            ("end", filter.mark())
        };
        fs::write(control.join(name), content)
            .with_context(|| format!("cannot write in {}", control.display()))?;
        let mut output = output;
        let mut replacements = 0;
        let ended = loop {
            match self.boot(&machine, &control, &out, filter.clone(), &mut output)? {
                End::NeverUp if replacements < REPLACEMENTS => {
                    replacements += 1;
                    eprintln!(
                        "xtask: the emulated host did not come up within {} s; another one is started",
                        COME_UP.as_secs()
                    );
                }
                ended => break ended,
            }
        };
        let told = fs::read_to_string(control.join("rc")).ok();
        let last_words = || {
            let log = fs::read(control.join("kernel.log")).unwrap_or_default();
            host::last_lines(&String::from_utf8_lossy(&log), 20)
        };
        match (ended, told.and_then(|text| text.trim().parse::<u8>().ok())) {
            (End::Status(status), _) | (End::Stopped, Some(status)) => Ok(Finish::Status(status)),
            (End::TimeUp, _) => {
                eprintln!("xtask: the testbed was stopped: its time was up");
                Ok(Finish::TimeUp)
            }
            (End::NeverUp, _) => {
                eprintln!(
                    "xtask: the emulated host did not come up; its kernel's last words:\n{}",
                    last_words()
                );
                Ok(Finish::HostDied)
            }
            (End::Silent, _) => {
                eprintln!(
                    "xtask: the emulated host gave no sign of life for {} s and was stopped; its kernel's last words:\n{}",
                    SILENCE.as_secs(),
                    last_words()
                );
                Ok(Finish::HostDied)
            }
            (End::Stopped, None) => {
                eprintln!(
                    "xtask: the emulated host ended before the command did; its kernel's last words:\n{}",
                    last_words()
                );
                Ok(Finish::HostDied)
            }
        }
    }

    /// Counted instructions are not to be spent on it, and a person at a terminal sees what hangs.
    fn has_pulse(&self) -> bool {
        !self.icount && !self.tty
    }

    /// The shell script that the emulated host runs.
    fn script(&self, command: &[String]) -> Result<String> {
        let mut script = String::from("#!/bin/sh\n");
        let kept = |name: &str| {
            ["HUSK_", "RUST_", "CARGO_", "TESTBED_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
                || ["PATH", "HOME", "CI", "LANG"].contains(&name)
                || (self.tty && name == "TERM")
        };
        let ours = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        let ours = ours.filter(|(name, _)| kept(name) && !is_secret(name));
        for (name, value) in ours.chain(self.env.iter().cloned()) {
            script += &format!("export {name}={}\n", shell_quote(&value));
        }
        let folder = std::env::current_dir().context("the current folder is gone")?;
        script += &format!(
            "cd {} || exit 1\n",
            shell_quote(&as_text(folder.as_os_str())?)
        );
        let words: Vec<String> = command.iter().map(|word| shell_quote(word)).collect();
        script += &format!("{}\n", words.join(" "));
        Ok(script)
    }

    /// Boots QEMU and waits until the command ended, or the time.
    fn boot(
        &self,
        machine: &Machine,
        control: &Path,
        out: &Path,
        filter: EndFilter,
        output: impl FnMut(&[u8]),
    ) -> Result<End> {
        let mut qemu = self.command_line(machine, control, out)?;
        let saved = if self.tty { terminal_settings() } else { None };
        let mut child = qemu.spawn().context("cannot start QEMU")?;
        let pulse = Pulse::new(self.has_pulse().then(|| control.join(PULSE)));
        let up = control.join("up");
        let result = self.follow(&mut child, &up, pulse, filter, output);
        // The command has ended and its folder is unmounted: there is nothing to shut down.
        let _ = child.kill();
        let _ = child.wait();
        if let Some(saved) = saved {
            let _ = Command::new("stty").arg(saved).status();
        }
        result
    }

    /// Passes the output on until the command ends, QEMU does, or the time is up.
    fn follow(
        &self,
        child: &mut Child,
        up: &Path,
        mut pulse: Pulse,
        mut filter: EndFilter,
        mut output: impl FnMut(&[u8]),
    ) -> Result<End> {
        let end = self.limit.map(|limit| Instant::now() + limit);
        let mut up_by = Some(Instant::now() + COME_UP);
        let (sender, receiver) = std::sync::mpsc::sync_channel(16);
        if let Some(mut stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                let mut buffer = [0; 65536];
                while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                    let text = buffer.get(..count).unwrap_or_default().to_vec();
                    if sender.send(text).is_err() {
                        break;
                    }
                }
            });
        } else {
            drop(sender);
        }
        loop {
            match receiver.recv_timeout(Duration::from_millis(100)) {
                Ok(text) => {
                    if let Some(status) = filter.feed(&text, &mut output) {
                        return Ok(End::Status(status));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // With a terminal there is no output whose end would tell of QEMU's end.
                Err(RecvTimeoutError::Disconnected) => {
                    if child.try_wait().context("cannot wait for QEMU")?.is_some() {
                        return Ok(End::Stopped);
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Ok(End::TimeUp);
            }
            if let Some(by) = up_by {
                if up.exists() {
                    up_by = None;
                } else if Instant::now() >= by {
                    return Ok(End::NeverUp);
                }
            }
            if pulse.is_gone(SILENCE) {
                return Ok(End::Silent);
            }
        }
    }

    /// The emulated host's processor counts this machine's TSC ticks, but it measures their frequency while QEMU may have to
    /// wait for a processor: its clock then runs several times too fast. So it is told, where KVM tells us.
    fn kernel_parameters(&self) -> String {
        match tsc_khz().filter(|_| !self.icount) {
            Some(khz) => format!("{APPEND} tsc_early_khz={khz}"),
            None => APPEND.to_owned(),
        }
    }

    fn command_line(&self, machine: &Machine, control: &Path, out: &Path) -> Result<Command> {
        // QEMU dies with us, however we end: setpriv (util-linux) asks the kernel for that.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            // The emulated host's interrupt chip is QEMU's: there is no KVM below it to have one.
            .args(["-M", "q35,accel=tcg,kernel-irqchip=off", "-cpu", "max"])
            .args([
                "-smp",
                &self.cpus.to_string(),
                "-m",
                &self.memory_mib.to_string(),
            ])
            .arg("-kernel")
            .arg(&machine.kernel)
            .arg("-initrd")
            .arg(&machine.initrd)
            .args(["-append", &self.kernel_parameters()]);
        for (tag, path, more) in [
            ("root", Path::new("/"), ",readonly=on,multidevs=remap"),
            ("control", control, ""),
            ("out", out, ",multidevs=remap"),
        ] {
            // In QEMU's option syntax a comma is written twice.
            let path = as_text(path.as_os_str())?.replace(',', ",,");
            let share = format!("local,path={path},mount_tag={tag},security_model=none{more}");
            qemu.args(["-virtfs", &share]);
        }
        // A port takes whole buffers; a console, which costs an exit for each 16 bytes, is for people.
        let port = match self.tty {
            true => "virtconsole,chardev=console",
            false => "virtserialport,nr=1,chardev=console",
        };
        let log = as_text(control.join("kernel.log").as_os_str())?.replace(',', ",,");
        qemu.args([
            "-chardev",
            &format!("file,id=log,path={log}"),
            "-serial",
            "chardev:log",
        ])
        .args(["-device", "virtio-serial-pci", "-device", port])
        .args(["-chardev", "stdio,id=console,signal=off"]);
        if self.has_pulse() {
            let path = as_text(control.join(PULSE).as_os_str())?.replace(',', ",,");
            let pulse = format!("socket,id={PULSE},path={path},server=on,wait=off");
            let port = format!("virtserialport,nr=2,chardev={PULSE}");
            qemu.args(["-chardev", &pulse, "-device", &port]);
        }
        if self.icount {
            qemu.args(["-icount", "shift=0,sleep=off"]);
        }
        qemu.args(&self.qemu);
        if self.tty {
            qemu.stdin(Stdio::inherit()).stdout(Stdio::inherit());
        } else {
            // A pipe of our own: QEMU makes its output non-blocking, which others who share ours
            // would not expect.
            // Its input is never written to, but the end of input would be the port's hanging up.
            qemu.stdin(Stdio::piped()).stdout(Stdio::piped());
        }
        Ok(qemu)
    }
}

/// Why a run on the emulated host is over.
enum End {
    /// The command ended with this status.
    Status(u8),
    /// QEMU ended.
    Stopped,
    /// The time was up.
    TimeUp,
    /// No sign of life.
    Silent,
    /// It did not come up.
    NeverUp,
}

/// The emulated host's sign of life: it sends back what it is sent.
///
/// That also keeps it alive. QEMU 7.2 changes a vCPU's pending interrupts from two threads, and without a lock where SVM is
/// emulated, so that once in millions of guest entries the host's next timer interrupt is lost. A host that waits for
/// nothing else sleeps for ever; any interrupt makes it find the lost one.
struct Pulse {
    socket: Option<PathBuf>,
    stream: Option<UnixStream>,
    heard: Instant,
    ask: Instant,
}

impl Pulse {
    /// Without a socket it is never gone.
    fn new(socket: Option<PathBuf>) -> Self {
        let now = Instant::now();
        Self {
            socket,
            stream: None,
            heard: now,
            ask: now,
        }
    }

    /// Ask when it is time to, and listen; whether nothing was heard for `silence`. To be called often.
    fn is_gone(&mut self, silence: Duration) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let now = Instant::now();
        if now >= self.ask {
            self.ask = now + BEAT;
            if self.stream.is_none() {
                // QEMU may not have got so far.
                self.stream = UnixStream::connect(socket).ok();
                let nonblocking = |stream: &UnixStream| stream.set_nonblocking(true).is_ok();
                self.stream.take_if(|stream| !nonblocking(stream));
            }
            if let Some(stream) = &mut self.stream {
                // What does not fit was not needed: there is enough on its way.
                let _ = stream.write(b"\n");
                if let Ok(1..) = stream.read(&mut [0; 64]) {
                    self.heard = now;
                }
            }
        }
        now.duration_since(self.heard) >= silence
    }
}

/// The socket of the pulse, in the folder "control".
const PULSE: &str = "pulse";

/// Finds the end mark in the command's output, and the exit status behind it.
///
/// The emulated host writes them after the command's last byte, so all of the output has come when
/// they do.
#[derive(Clone)]
struct EndFilter {
    mark: Vec<u8>,
    /// What may be the beginning of the mark.
    held: Vec<u8>,
}

impl EndFilter {
    fn new() -> Self {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        // The first byte is one that text does not have: text is never held back.
        let mark = format!(
            "\x01husk-testbed-end-{}-{}:",
            std::process::id(),
            now.as_nanos()
        );
        Self {
            mark: mark.into_bytes(),
            held: Vec::new(),
        }
    }

    /// The mark that the emulated host is to write before the status and a line feed.
    fn mark(&self) -> &[u8] {
        &self.mark
    }

    /// Passes on what cannot be part of the mark; the status when it has come.
    fn feed(&mut self, text: &[u8], output: &mut impl FnMut(&[u8])) -> Option<u8> {
        self.held.extend_from_slice(text);
        let first = self.mark.first();
        // Where the mark is, or where what may become it begins; else the end.
        let at = (0..self.held.len()).find(|&at| {
            let rest = self.held.get(at..).unwrap_or_default();
            rest.first() == first && (rest.starts_with(&self.mark) || self.mark.starts_with(rest))
        });
        let rest = self.held.split_off(at.unwrap_or(self.held.len()));
        if !self.held.is_empty() {
            output(&self.held);
        }
        self.held = rest;
        let status = self.held.strip_prefix(self.mark.as_slice())?;
        let end = status.iter().position(|&byte| byte == b'\n')?;
        let number = std::str::from_utf8(status.get(..end)?).ok()?;
        Some(number.parse().unwrap_or(1))
    }
}

/// This machine's TSC frequency.
fn tsc_khz() -> Option<u32> {
    let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?;
    let vcpu = vm.create_vcpu(0).ok()?;
    vcpu.get_tsc_khz().ok().filter(|&khz| khz > 0)
}

/// No mitigations (no secrets here, and emulation is slow), and no self-tests of what is not used.
const APPEND: &str = "console=ttyS0 reboot=t panic=-1 quiet mitigations=off tsc=reliable \
    no_timer_check cryptomgr.notests audit=0 apparmor=0 nowatchdog random.trust_cpu=on \
    rcupdate.rcu_expedited=1";

/// The emulated host's kernel and its initrd, in the cache.
struct Machine {
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Machine {
    /// Makes what is missing: QEMU by package, the kernel, the initrd.
    fn ensure() -> Result<Self> {
        apt::need(&[
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("setpriv", "util-linux"),
            ("depmod", "kmod"),
        ])?;
        let root = host::cache_dir()?.join("testbed");
        fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
        let key = host::key(&[INIT.as_bytes(), MODULES.join(" ").as_bytes()]);
        let place = root.join(&key);
        let machine = Self {
            kernel: place.join("vmlinux"),
            initrd: place.join("initrd"),
        };
        if !machine.initrd.is_file() {
            host::step(
                "making the testbed (once): Debian's kernel, its modules, busybox",
                || {
                    let temp = TempDir::new(&root, "make")?;
                    make(temp.path())?;
                    host::rename_into_place(&temp.path().join("result"), &place)
                },
            )?;
        }
        Ok(machine)
    }
}

/// Makes the testbed's kernel and initrd in the folder `result` below `temp`.
fn make(temp: &Path) -> Result<()> {
    let result = temp.join("result");
    let debian = guest::fetch_kernel("linux-image-amd64", temp)?;
    let busybox = guest::fetch_busybox(temp)?;
    fs::create_dir(&result).with_context(|| format!("cannot create {}", result.display()))?;
    // Unpacked here: the kernel's own unpacking would take five seconds of each emulated boot.
    guest::unpack_kernel(&debian.vmlinuz, &result.join("vmlinux"))?;
    let mut initrd = husk_loader::initramfs::Builder::new(busybox);
    initrd.modules_dir = Some(debian.modules);
    initrd.modules = MODULES.iter().map(|&name| name.to_owned()).collect();
    // Our init in place of the default guest's.
    initrd
        .files
        .push(("init".to_owned(), INIT.as_bytes().to_vec(), 0o755));
    host::write_atomically(&result.join("initrd"), &initrd.build()?)
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    ["TOKEN", "SECRET", "PASSWORD", "CREDENTIAL"]
        .iter()
        .any(|word| name.contains(word))
}

fn terminal_settings() -> Option<String> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let output = Command::new("stty")
        .arg("-g")
        .stdin(Stdio::inherit())
        .output()
        .ok()?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

fn as_text(text: impl AsRef<std::ffi::OsStr>) -> Result<String> {
    let text = text.as_ref();
    text.to_str()
        .map(str::to_owned)
        .with_context(|| format!("not UTF-8: {}", text.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The output and the status of a text that comes in pieces of `size` bytes.
    fn feed(filter: &mut EndFilter, text: &[u8], size: usize) -> (Vec<u8>, Option<u8>) {
        let mut output = Vec::new();
        for piece in text.chunks(size) {
            let status = filter.feed(piece, &mut |text: &[u8]| output.extend_from_slice(text));
            if status.is_some() {
                return (output, status);
            }
        }
        (output, None)
    }

    #[test]
    fn the_end_is_found_however_it_is_cut_and_no_byte_before_it_is_lost() {
        for size in 1..80 {
            let mut filter = EndFilter::new();
            let mut text = b"one\n\x01two\x01husk-testbed-end-0:9\n\x01\x01".to_vec();
            let expected = text.clone();
            text.extend_from_slice(filter.mark());
            text.extend_from_slice(b"37\n");
            assert_eq!(
                feed(&mut filter, &text, size),
                (expected, Some(37)),
                "pieces of {size}"
            );
        }
    }

    #[test]
    fn text_is_passed_on_at_once() {
        let mut filter = EndFilter::new();
        assert_eq!(
            feed(&mut filter, b"a prompt> ", 100),
            (b"a prompt> ".to_vec(), None)
        );
    }

    #[test]
    fn a_pulse_is_gone_when_nothing_comes_back() {
        let temp = TempDir::new(&std::env::temp_dir(), "husk-pulse").unwrap();
        let path = temp.path().join(PULSE);
        let long_ago = || Instant::now() - Duration::from_secs(100);
        let silence = Duration::from_secs(60);
        let mut pulse = Pulse::new(Some(path.clone()));
        assert!(!pulse.is_gone(silence), "not at once");
        pulse.heard = long_ago();
        assert!(pulse.is_gone(silence), "not even a socket");

        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        pulse.ask = Instant::now();
        assert!(pulse.is_gone(silence), "asked, and no answer");
        let mut host = listener.accept().unwrap().0;
        let mut asked = [0; 1];
        host.read_exact(&mut asked).unwrap();
        host.write_all(&asked).unwrap();
        pulse.ask = Instant::now();
        assert!(!pulse.is_gone(silence), "an answer");
        pulse.heard = long_ago();
        pulse.ask = Instant::now();
        assert!(pulse.is_gone(silence), "no further answer");
        assert!(!Pulse::new(None).is_gone(Duration::ZERO));
    }

    #[test]
    fn secrets_stay_here() {
        assert!(is_secret("HUSK_TOKEN") && is_secret("CARGO_REGISTRIES_X_token"));
        assert!(!is_secret("HUSK_BIN"));
    }
}
