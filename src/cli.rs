//! The command line. Help texts, shell completions and the man page all come from here.

use clap::{Args, Parser, Subcommand, ValueEnum};
use husk_config::{BootProtocol, OnReboot};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// A thin shell around a kernel: start a Linux VM in milliseconds.
#[derive(Debug, Parser)]
#[command(name = "husk", version, propagate_version = true, max_term_width = 100, after_help = EXIT_STATUS)]
pub struct Cli {
    #[command(flatten)]
    pub log: LogArgs,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct LogArgs {
    /// How much Husk says of itself, on stderr or in --log-file; the guest's console never carries it
    /// [default: warn]
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "LEVEL",
        help_heading = "Logging"
    )]
    pub log_level: Option<Level>,

    /// Append log messages to this file instead of stderr
    #[arg(long, global = true, value_name = "PATH", help_heading = "Logging")]
    pub log_file: Option<PathBuf>,
}

/// A subcommand without the others: describing all of them to clap takes as long as all else before the first answer of
/// `husk serve`.
#[derive(Parser)]
struct Alone<A: Args> {
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    arguments: A,
}

impl Cli {
    /// The process's command line.
    pub fn of_process() -> Result<Self, clap::Error> {
        let mut words = std::env::args_os().skip(1);
        let quick = match words.next().as_deref().and_then(OsStr::to_str) {
            Some("run") => alone(words, Command::Run),
            Some("serve") => alone(words, Command::Serve),
            Some("restore") => alone(words, Command::Restore),
            _ => None,
        };
        // What is wrong, and help, is told by the whole.
        quick.map_or_else(Self::try_parse, Ok)
    }
}

fn alone<A: Args>(words: impl Iterator<Item = OsString>, kind: fn(A) -> Command) -> Option<Cli> {
    let words = std::iter::once("husk".into()).chain(words);
    let Alone { log, arguments } = Alone::try_parse_from(words).ok()?;
    Some(Cli {
        log,
        command: kind(arguments),
    })
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a kernel with its serial console on this terminal
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// Configure and steer a VM over a Unix socket, with Firecracker's API
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Send a request to a VM's API socket and print the answer
    #[command(after_help = API_EXAMPLES)]
    Api(ApiArgs),
    /// Let a VM's guest stand still
    Pause(SocketArgs),
    /// Let a paused guest run again
    Resume(SocketArgs),
    /// End a VM
    Stop(StopArgs),
    /// Say what a VM is and does
    Info(SocketArgs),
    /// Keep a VM in files, to go on from there
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = SNAPSHOT_EXAMPLES)]
    Snapshot(SnapshotArgs),
    /// Start clones of a VM that runs, which share its memory until they write to it
    #[command(after_help = FORK_EXAMPLES)]
    Fork(ForkArgs),
    /// Go on from a snapshot, with the guest's serial console on this terminal
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Restore(RestoreArgs),
    /// Measure how long a guest takes to boot
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Say what this host can do, and what to do about what it cannot
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  husk completions bash > ~/.local/share/bash-completion/completions/husk"
    )]
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the man page (roff)
    #[command(after_help = "Example:\n  husk man | man -l -")]
    Man,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Boot a guest again and again: how long it takes, where the time goes, and whether that has changed
    #[command(after_help = BOOT_EXAMPLES)]
    Boot(Box<BootArgs>),
    /// Show a report that `husk bench boot --json` wrote, or compare two
    #[command(after_help = REPORT_EXAMPLES)]
    Report(ReportArgs),
}

#[derive(Debug, Args)]
pub struct BootArgs {
    #[command(flatten)]
    pub options: BootOptions,

    #[command(flatten)]
    pub run: RunArgs,
}

/// What is not for `husk run`. Options only, without short names: what is left of the command line is the monitor's.
#[derive(Debug, Args)]
#[command(next_help_heading = "The measurement")]
pub struct BootOptions {
    /// How many runs of each monitor are measured
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub runs: u32,

    /// How many runs of each go before those, and do not count
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub warm_ups: u32,

    /// Write the report to this file: a baseline for later, and input of `husk bench report`
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,

    /// Write the report as a page for people
    #[arg(long, value_name = "PATH")]
    pub html: Option<PathBuf>,

    /// Compare with this report of `--json`; exit status 1 when it was faster
    #[arg(long, value_name = "PATH")]
    pub baseline: Option<PathBuf>,

    /// How much slower than the baseline is allowed
    #[arg(
        long,
        value_name = "PERCENT",
        default_value = "5%",
        allow_negative_numbers = true
    )]
    pub max_regression: Percent,

    /// Measure this command too, another monitor with its arguments, by turns
    #[arg(long, value_name = "COMMAND")]
    pub vs: Vec<String>,

    /// A guest is up when a line of its console matches; by default when it says so with a boot mark (docs/bench-boot.md)
    #[arg(long, value_name = "REGEX")]
    pub mark: Option<String>,

    /// Where a run ends: at the mark, or when the guest ends by itself
    /// [default: mark; exit where the guest's init is Husk's own]
    #[arg(long, value_enum, value_name = "WHERE")]
    pub until: Option<Until>,

    /// Seconds that a run may take; it has failed then
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,

    /// Let the kernel tell of its initcalls, in one run more
    #[arg(long)]
    pub profile: bool,

    /// No progress
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Until {
    /// The monitor is ended when its guest has set a mark
    Mark,
    /// The guest powers off
    Exit,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// A report
    #[arg(value_name = "REPORT")]
    pub report: PathBuf,

    /// A later one
    #[arg(value_name = "AFTER")]
    pub after: Option<PathBuf>,

    /// Write a page for people
    #[arg(long, value_name = "PATH")]
    pub html: Option<PathBuf>,

    /// Exit status 1 when the later one is slower by more
    #[arg(long, value_name = "PERCENT")]
    pub max_regression: Option<Percent>,
}

/// A share of one, from "5%", "5" or "2.5%".
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Percent(pub f64);

impl Default for Percent {
    fn default() -> Self {
        Self(0.05)
    }
}

impl std::str::FromStr for Percent {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_suffix('%').unwrap_or(text).trim();
        match number.parse() {
            Ok(percent) if (0.0..=1000.0).contains(&percent) => Ok(Self(percent / 100.0)),
            _ => Err("give per cent, 0 to 1000: 5%"),
        }
    }
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where the socket is made; only its owner may connect
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,

    /// The VM's name: letters, digits and `-`, up to 64
    #[arg(long, value_name = "NAME", default_value = "anonymous-instance", value_parser = instance_id)]
    pub id: String,

    /// Put the devices on PCI instead of MMIO
    #[arg(long)]
    pub pci: bool,

    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = husk_api::MAX_BODY)]
    pub max_payload: usize,

    /// Most bytes of metadata for the guest [default: as --max-payload]
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,

    /// Let clients configure networks of kind `user`: a thread without a seccomp filter starts passt for them
    #[arg(long, help_heading = "The sandbox")]
    pub user_networks: bool,

    #[command(flatten)]
    pub seccomp: SeccompArgs,
}

/// Which VM.
#[derive(Debug, Args)]
pub struct SocketArgs {
    /// The VM's API socket
    #[arg(long, short = 's', value_name = "PATH", env = "HUSK_API_SOCK")]
    pub api_sock: PathBuf,
}

#[derive(Debug, Args)]
pub struct ApiArgs {
    #[command(flatten)]
    pub socket: SocketArgs,

    /// GET, PUT, PATCH or DELETE
    #[arg(value_name = "METHOD")]
    pub method: String,

    /// For example /vm/config
    #[arg(value_name = "PATH")]
    pub path: String,

    /// JSON, or `-` for what comes from stdin
    #[arg(value_name = "BODY")]
    pub body: Option<String>,
}

#[derive(Debug, Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    pub command: Option<SnapshotCommand>,

    /// The VM's API socket
    #[arg(
        long,
        short = 's',
        value_name = "PATH",
        env = "HUSK_API_SOCK",
        required = true
    )]
    pub api_sock: Option<PathBuf>,

    /// Keep only what has changed since the last snapshot of the VM, or since it went on from one
    #[arg(long)]
    pub diff: bool,

    /// Where it is kept, in the files `state` and `memory`; made when there is none
    #[arg(value_name = "DIR", required = true)]
    pub dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Say what is kept in a state file
    Info {
        /// The file, or the directory that it is in
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Lay a diff over the snapshot to which it is the difference
    Merge {
        /// The directory of that snapshot, which the result replaces in one step
        #[arg(value_name = "BASE")]
        base: PathBuf,
        /// The directory of the diff, which stays as it is
        #[arg(value_name = "DIFF")]
        diff: PathBuf,
        /// Leave the base as it is, and make this directory
        #[arg(long, short, value_name = "DIR")]
        output: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub struct ForkArgs {
    #[command(flatten)]
    pub socket: SocketArgs,

    /// How many: 0 to 10000
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1)]
    pub count: u32,

    /// Their names [default: the VM's, with their number]
    #[arg(long, value_name = "NAME-{n}")]
    pub id: Option<String>,

    /// Files or named pipes for their consoles, appended to [default: dropped]
    #[arg(long, value_name = "PATH-{n}")]
    pub console: Option<PathBuf>,

    /// Files or named pipes for their log messages, appended to [default: the VM's log file, if it has one]
    #[arg(long, value_name = "PATH-{n}")]
    pub clone_log: Option<PathBuf>,

    /// Sockets on which they are steered [default: none]
    #[arg(long, value_name = "PATH-{n}")]
    pub clone_sock: Option<PathBuf>,

    /// Tap devices for a network interface; again for more interfaces
    #[arg(long = "net", value_name = "ID=TAP-{n}", value_parser = named)]
    pub nets: Vec<(String, String)>,

    /// Files for a disk [default: the disk as it was, and what is written goes with the clone]; again for more disks
    #[arg(long = "disk", value_name = "ID=PATH-{n}", value_parser = named)]
    pub disks: Vec<(String, String)>,

    /// Unix sockets for their vsock devices [default: the VM's, with - and their number]
    #[arg(long, value_name = "PATH-{n}")]
    pub vsock: Option<PathBuf>,

    /// Context ID of clone 1, which those of the others follow [default: behind the VM's]
    #[arg(long, value_name = "N")]
    pub cid: Option<u32>,

    /// Let them stand still until `husk resume`
    #[arg(long, requires = "clone_sock")]
    pub paused: bool,

    /// Keep what they go on from, for further clones; it is named in what is printed
    #[arg(long)]
    pub keep_template: bool,

    /// Go on from this, which was kept, and not from where the VM is now
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Where it is kept, in the files `state` and `memory`
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Let the guest stand still until `husk resume`
    #[arg(long, requires = "api_sock")]
    pub paused: bool,

    /// Let the guest's clocks go on as if they had never stood still
    #[arg(long)]
    pub clock_realtime: bool,

    /// Note which pages of memory the guest touches in its first 5 seconds, in the file `working-set`
    #[arg(long)]
    pub record_working_set: bool,

    /// Read the pages that were noted ahead of the guest
    #[arg(long)]
    pub prefetch: bool,

    /// Have memory filled by the handler of page faults that listens there, by Firecracker's protocol
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["record_working_set", "prefetch"])]
    pub uffd: Option<PathBuf>,

    /// Another file for a disk, not smaller than the one before; again for more disks
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = named)]
    pub disks: Vec<(String, String)>,

    /// Another tap device for a network interface; again for more
    #[arg(long = "net", value_name = "ID=TAP", value_parser = named)]
    pub nets: Vec<(String, String)>,

    /// Another Unix socket for the vsock device
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,

    /// Another context ID for the vsock device
    #[arg(long, value_name = "N")]
    pub cid: Option<u32>,

    /// Let the VM be steered over a Unix socket
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,

    /// Have KVM note which pages the guest writes, for diff snapshots that take no longer than what has changed
    #[arg(long)]
    pub track_dirty_pages: bool,

    #[command(flatten)]
    pub seccomp: SeccompArgs,
}

#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    pub socket: SocketArgs,

    /// Press the power button and let the guest shut down, instead of ending the VM at once
    #[arg(long)]
    pub power_button: bool,
}

/// A device's name, and what it is to be.
fn named(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => Ok((id.into(), value.into())),
        _ => Err("give a device's name, = and what it is to be".into()),
    }
}

/// As Firecracker checks it.
pub fn instance_id(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    match (1..=64).contains(&text.len()) && text.chars().all(plain) {
        true => Ok(text.into()),
        false => Err("give 1 to 64 letters, digits and -".into()),
    }
}

#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// Kernel: an ELF vmlinux or a bzImage, compressed in any of the usual ways
    ///
    /// Without it (and without one in --config): the kernel of $HUSK_KERNEL, else the one that `cargo xtask demo` keeps,
    /// else the newest one in /boot, with a small initramfs that gives a shell.
    #[arg(long, short, value_name = "PATH", help_heading = "What to boot")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, short, value_name = "PATH", help_heading = "What to boot")]
    pub initrd: Option<PathBuf>,

    /// Kernel parameters, added to Husk's own
    #[arg(
        long,
        value_name = "STR",
        allow_hyphen_values = true,
        help_heading = "What to boot"
    )]
    pub cmdline: Option<String>,

    /// Give the kernel nothing but --cmdline
    #[arg(long, help_heading = "What to boot")]
    pub no_default_cmdline: bool,

    /// How to enter the kernel [default: auto: PVH for an ELF file with its note, else Linux's 64-bit entry]
    #[arg(
        long,
        value_enum,
        value_name = "PROTOCOL",
        help_heading = "What to boot"
    )]
    pub boot_protocol: Option<Protocol>,

    /// Processors, 1 to 64 [default: 1]
    #[arg(
        long,
        short,
        value_name = "N",
        allow_negative_numbers = true, value_parser = cpus,
        help_heading = "The machine"
    )]
    pub cpus: Option<u32>,

    /// Memory, 32M or more: 512M, 2G, … (a bare number is MiB) [default: 256M]
    #[arg(
        long,
        short,
        value_name = "SIZE",
        allow_negative_numbers = true,
        help_heading = "The machine"
    )]
    pub memory: Option<String>,

    /// A disk, a raw image or a block device: PATH[,ro][,root][,direct][,overlay[=DIR]][,id=NAME][,cache=unsafe|writeback]
    /// [,engine=auto|sync|uring][,queues=N][,rate=BYTES][,ops=N], the last two per second; `,,` is a comma in PATH.
    /// Or a vhost-user server's: socket=PATH[,root][,id=NAME][,cache=unsafe|writeback][,queues=N]
    #[arg(long, value_name = "DISK", help_heading = "Devices")]
    pub disk: Vec<String>,

    /// A network interface: tap=NAME, fd=N or user (needs passt, no root), then [,mac=ADDRESS][,mtu=N][,queues=N]
    /// [,rx-rate=BYTES][,tx-rate=BYTES][,id=NAME]
    #[arg(long, value_name = "NET", help_heading = "Devices")]
    pub net: Vec<String>,

    /// A TCP port of the host that leads to one of the guest, HOST:GUEST, for `--net user`
    #[arg(long = "publish", short, value_name = "PORTS", value_parser = crate::devices::forward, help_heading = "Devices")]
    pub publish: Vec<husk_config::Forward>,

    /// Sockets between host and guest: cid=N,uds=PATH
    #[arg(long, value_name = "VSOCK", value_parser = crate::devices::vsock, help_heading = "Devices")]
    pub vsock: Option<husk_config::Vsock>,

    /// A source of random bytes, or rate=BYTES per second of them
    #[arg(long, value_name = "ENTROPY", value_parser = crate::devices::entropy, num_args = 0..=1, default_missing_value = "", help_heading = "Devices")]
    pub entropy: Option<husk_config::Entropy>,

    /// Memory that the guest gives back: MIB[,oom][,stats=SECONDS][,hinting][,reporting]
    #[arg(long, value_name = "BALLOON", value_parser = crate::devices::balloon, help_heading = "Devices")]
    pub balloon: Option<husk_config::Balloon>,

    /// Metadata for the guest, a file with JSON: it fetches them from http://169.254.169.254 through the interfaces that
    /// mmds-config in --config names, else through the first one
    #[arg(long, value_name = "FILE", help_heading = "Devices")]
    pub metadata: Option<PathBuf>,

    /// Most bytes of metadata [default: 51200]
    #[arg(long, value_name = "BYTES", help_heading = "Devices")]
    pub mmds_size_limit: Option<usize>,

    /// Put the devices on PCI instead of MMIO
    #[arg(long, help_heading = "Devices")]
    pub pci: bool,

    /// What a reboot by the guest does [default: exit]
    #[arg(long, value_enum, value_name = "WHAT", help_heading = "The machine")]
    pub on_reboot: Option<Reboot>,

    /// Configuration in JSON, in Firecracker's shape; flags override it
    #[arg(long, value_name = "FILE", help_heading = "The machine")]
    pub config: Option<PathBuf>,

    /// Let the VM be steered over a Unix socket too, as with `husk serve`
    #[arg(long, value_name = "PATH", help_heading = "The machine")]
    pub api_sock: Option<PathBuf>,
    /// Append metrics to this file or FIFO, a line of JSON in Firecracker's shape every 60 s and at the end
    #[arg(long, value_name = "PATH", help_heading = "Logging")]
    pub metrics_path: Option<PathBuf>,
    #[command(flatten)]
    pub seccomp: SeccompArgs,

    /// At the end, print on stderr when each phase of the boot was reached
    #[arg(long, help_heading = "Logging")]
    pub timeline: bool,

    /// At the end, write the timeline to this file, in JSON (docs/machine.md)
    #[arg(long, value_name = "PATH", help_heading = "Logging")]
    pub timeline_file: Option<PathBuf>,

    /// End the VM when its guest has set a boot mark (docs/machine.md)
    #[arg(long, help_heading = "The machine")]
    pub stop_at_mark: bool,

    /// At the end, print on stderr why and how often the guest left for the monitor
    #[arg(long, help_heading = "Logging")]
    pub exits: bool,
}

/// What Husk's threads may ask of the host's kernel.
#[derive(Debug, Default, Args)]
pub struct SeccompArgs {
    /// Let every thread make any system call: no seccomp filters. Not for guests that you do not trust
    #[arg(long, conflicts_with = "seccomp_filter", help_heading = "The sandbox")]
    pub no_seccomp: bool,

    /// Seccomp filters of your own, in JSON, instead of Husk's (docs/seccomp.md)
    #[arg(long, value_name = "FILE", help_heading = "The sandbox")]
    pub seccomp_filter: Option<PathBuf>,
}

/// The range is the configuration's to check; a file may hold the number as well.
fn cpus(text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| format!("give a number from 1 to {}", husk_config::MAX_VCPUS))
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Protocol {
    /// PVH for an ELF file with its note, else Linux's 64-bit entry
    Auto,
    /// The 64-bit Linux boot protocol
    Linux,
    /// PVH
    Pvh,
}

impl From<Protocol> for BootProtocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Auto => Self::Auto,
            Protocol::Linux => Self::Linux,
            Protocol::Pvh => Self::Pvh,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Reboot {
    /// The VM ends
    Exit,
    /// The VM boots again, in the same process
    Restart,
}

impl From<Reboot> for OnReboot {
    fn from(reboot: Reboot) -> Self {
        match reboot {
            Reboot::Exit => Self::Exit,
            Reboot::Restart => Self::Restart,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<Level> for log::LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::Off,
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

const EXIT_STATUS: &str = "\
Exit status of `husk run`:
  0      the guest powered off, rebooted or halted, or you left it with Ctrl-A x
  1      trouble with the host: no /dev/kvm, no permission, out of memory
  2      trouble with a flag, a file or the configuration
  3      the guest's kernel panicked
  4      the guest stopped with a triple fault
  5      KVM could not run the guest on (internal error)
  148    a thread made a system call that its seccomp filter does not allow
  128+N  a second signal N ended the VM at once (the first one presses the power button)";

const API_EXAMPLES: &str = "\
Examples:
  husk api -s /tmp/vm.sock GET /vm/config
  husk api -s /tmp/vm.sock PUT /boot-source '{\"kernel_image_path\": \"vmlinux\"}'
  husk api -s /tmp/vm.sock GET /husk/events            until the VM has ended
  export HUSK_API_SOCK=/tmp/vm.sock; husk pause; husk resume; husk stop

The paths are Firecracker's, and Husk's own below /husk: GET /husk/openapi.json describes all of them.
Exit status: 0, or 1 when the VM refuses or nobody answers.";

const BOOT_EXAMPLES: &str = "\
Examples:
  husk bench boot --kernel vmlinux                                    a kernel alone: Husk has an init for it
  husk bench boot -k vmlinux -i initrd.img --mark 'login:'            until a line of the console
  husk bench boot -k vmlinux --json main.json --html main.html        keep it
  husk bench boot -k vmlinux --baseline main.json --profile           has it become slower, and where
  husk bench boot -k vmlinux --vs 'firecracker --no-api --config-file vm.json' --mark 'login:'

Exit status:
  0    measured, and not slower than the baseline
  1    slower than the baseline by more than --max-regression, or trouble with the host
  2    trouble with a flag, a file or the baseline
  3    runs failed
  4    the runs are too noisy to tell whether it is slower: more --runs, or a quieter machine
  130  interrupted; what was measured until then is written";

const REPORT_EXAMPLES: &str = "\
Examples:
  husk bench report main.json                       as it was printed
  husk bench report main.json branch.json --html compare.html

Exit status: 0; 2 for files that are no reports, or cannot be compared; with --max-regression 1 for slower and 4 for too
noisy to tell.";

const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  husk snapshot -s /tmp/vm.sock kept        pauses the guest for a moment, if it runs
  husk snapshot info kept
  husk restore kept                         as often as you like, and at the same time
  husk snapshot --diff -s /tmp/vm.sock change    what has changed since; of a VM with track_dirty_pages
  husk snapshot merge kept change
  husk restore kept --disk data=copy.img --net eth0=tap1 --vsock /tmp/v1 --cid 4

Exit status of `husk snapshot`: 0, or 1 when the VM refuses or nobody answers; of `husk restore`: as of `husk run`.";

const FORK_EXAMPLES: &str = "\
Examples:
  husk fork -s /tmp/vm.sock -n 100 --console /tmp/clone-{n}.log
  husk fork -s /tmp/vm.sock --clone-sock /tmp/clone-{n}.sock --paused
  husk fork -s /tmp/vm.sock -n 0 --keep-template          freeze it once …
  husk fork -s /tmp/vm.sock --template 1 -n 10            … and start clones of that later

{n} stands for the number of each clone. A clone is a process of its own: it ends by itself, by `husk stop`, or by SIGTERM.

Exit status: 0; 1 when the VM refuses, a clone could not be started, or nobody answers.";

const SERVE_EXAMPLES: &str = "\
Example:
  husk serve --api-sock /tmp/vm.sock &
  husk api -s /tmp/vm.sock PUT /boot-source '{\"kernel_image_path\": \"vmlinux\"}'
  husk api -s /tmp/vm.sock PUT /actions '{\"action_type\": \"InstanceStart\"}'

Exit status: as of `husk run`; before a VM runs, 0 after `husk stop`, 128+N after signal N, and 1 where the
socket's path is taken.";

const RUN_EXAMPLES: &str = "\
Examples:
  husk run                                          a shell in a default guest
  husk run --kernel vmlinux --initrd initrd.img     your own
  husk run -k bzImage -c 4 -m 2G --cmdline 'quiet'  4 processors, 2 GiB
  husk run --config vm.json --memory 1G             a configuration file, and a flag over it
  echo 'uname -a; exit' | husk run                  commands for the guest's shell from a pipe

Keys on a terminal:
  Ctrl-A x   end the VM at once      Ctrl-A p   press the power button
  Ctrl-A h   help                    Ctrl-A a   send Ctrl-A to the guest

Exit status: 0 power-off or reboot, 1 host, 2 usage or files, 3 panic, 4 triple fault, 5 KVM, 6 memory lost, 148 seccomp, 128+N signal.";
