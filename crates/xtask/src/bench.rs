//! `cargo xtask bench`: start-up time, memory and size, beside the floor and QEMU microvm.
//!
//! The floor (benches/floor.c) is the least that any monitor must do before a guest runs. Ratios are
//! taken pair by pair within one run of alternating starts, so that a noisy machine cancels out.

use crate::apt;
use crate::bench_api;
use crate::bench_devices;
use crate::bench_linux;
use crate::bench_snapshots;
use crate::cargo;
use crate::host::{self, TempDir};
use crate::kernel;
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// First byte, as a multiple of the overlapped floor.
const LIMIT_RATIO: f64 = 1.5;
/// Resident memory beyond the floor's, whose guest touches one page.
const LIMIT_RSS_KIB: u64 = 2560;
/// The stripped release binary.
const LIMIT_SIZE: u64 = 4_000_000;
/// First byte with five devices, as a multiple of that without.
const LIMIT_DEVICES_RATIO: f64 = 1.1;
/// Resident memory beyond the floor's with five devices.
const LIMIT_DEVICES_RSS_KIB: u64 = 3072;
/// Virtual milliseconds from spawn to init with the minimal kernel on the testbed.
const LIMIT_INIT_MS: f64 = 140.0;
/// How long one start may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// On the testbed a virtual minute passes at once while the only CPU waits for a file (the clock
/// leaps to the next timer), so the limit there is the testbed's, in real time.
const NO_END: Duration = Duration::from_secs(1_000_000);

/// `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Args {
    /// Measured starts of each program, after one that warms up
    #[arg(short = 'n', long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Leave out the boots to init on the testbed
    #[arg(long)]
    no_boot: bool,
    /// Leave out the devices' throughput on the testbed
    #[arg(long)]
    no_devices: bool,
    /// Devices: the testbed's processor has ERMS, and each byte that is copied counts as an instruction (by default Linux
    /// copies eight with one, which is nearer to what hardware does)
    #[arg(long)]
    copy_by_byte: bool,
    /// Leave out the first byte on this machine
    #[arg(long)]
    no_first_byte: bool,
    /// Leave out the REST socket (its boots on the testbed: with --no-boot)
    #[arg(long)]
    no_api: bool,
    /// Leave out snapshots
    #[arg(long)]
    no_snapshots: bool,
}

/// `cargo xtask bench-inner`.
#[derive(clap::Args)]
pub struct InnerArgs {
    /// Measured starts of each program, after one that warms up
    #[arg(short = 'n', long, default_value_t = 5)]
    runs: u32,
    /// The line that ends a start
    #[arg(short = 'm', long, default_value = "h")]
    mark: String,
    /// NAME=COMMAND, its words separated by blanks
    #[arg(required = true, value_name = "NAME=COMMAND")]
    programs: Vec<String>,
}

/// A program whose start is timed.
pub struct Program {
    name: String,
    command: Vec<String>,
}

/// One measured start.
pub struct Sample {
    pub ms: f64,
    rss_kib: u64,
}

/// Measures and prints; a limit that was missed is said, and the exit status is 1 then.
pub fn run(args: &Args) -> Result<ExitCode> {
    apt::need(&[
        ("gcc", "gcc"),
        ("/usr/include/stdio.h", "libc6-dev"),
        ("/usr/include/linux/kvm.h", "linux-libc-dev"),
        ("ip", "iproute2"),
        ("qemu-system-x86_64", "qemu-system-x86"),
    ])?;
    let husk = host::step("building husk (release)", cargo::release_binary)?;
    let temp = TempDir::new(&std::env::temp_dir(), "husk-bench")?;
    let mut verdicts = Vec::new();
    build_programs(temp.path())?;
    if !args.no_first_byte {
        first_byte(args.runs, &husk, temp.path(), &mut verdicts)?;
    }
    if !args.no_api {
        bench_api::run(args.runs, &husk, temp.path(), &mut verdicts)?;
    }
    if !args.no_snapshots {
        bench_snapshots::run(args.runs, &husk, temp.path(), &mut verdicts)?;
    }
    if !args.no_boot {
        boot_to_init(&husk, temp.path(), &mut verdicts)?;
    }
    if !args.no_boot && !args.no_snapshots {
        bench_linux::run(&husk, temp.path())?;
    }
    if !args.no_boot && !args.no_api {
        bench_api::run_boots(&husk, temp.path(), &mut verdicts)?;
    }
    if !args.no_devices {
        bench_devices::run(&husk, temp.path(), !args.copy_by_byte, &mut verdicts)?;
    }
    let size = fs::metadata(&husk)
        .with_context(|| format!("cannot read {}", husk.display()))?
        .len();
    verdicts.push(Verdict::new(
        "stripped binary, MB",
        size as f64 / 1e6,
        LIMIT_SIZE as f64 / 1e6,
    ));
    println!();
    for verdict in &verdicts {
        println!("{verdict}");
    }
    let reached = verdicts.iter().all(Verdict::reached);
    Ok(if reached {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What runs inside the testbed, where the clock counts instructions.
pub fn run_inner(args: &InnerArgs) -> Result<ExitCode> {
    let parse = |text: &String| {
        let (name, command) = text
            .split_once('=')
            .with_context(|| format!("not NAME=COMMAND: {text}"))?;
        Ok(Program::new(name, command))
    };
    let programs: Result<Vec<Program>> = args.programs.iter().map(parse).collect();
    let programs = programs?;
    for program in &programs {
        program.bring_near()?;
    }
    let samples = measure(&programs, args.runs, &args.mark, NO_END)?;
    print!("{}", table(&programs, &samples));
    Ok(ExitCode::SUCCESS)
}

/// The floor's programs, and the payload that stays.
fn build_programs(temp: &Path) -> Result<()> {
    let benches = host::workspace_root()?.join("benches");
    let floor = benches.join("floor.c");
    for (name, define) in [("floor-overlap", "-DOVERLAP"), ("floor", "-UOVERLAP")] {
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-static", "-pthread", define, "-o"])
            .arg(temp.join(name));
        host::run_quiet(gcc.arg(&floor))?;
    }
    let mut gcc = Command::new("gcc");
    gcc.args([
        "-DSTAY",
        "-nostdlib",
        "-static",
        "-Wl,-Ttext=0x1000000",
        "-Wl,--build-id=none",
        "-o",
    ]);
    host::run_quiet(
        gcc.arg(temp.join("payload.elf"))
            .arg(benches.join("payload.S")),
    )?;
    Ok(())
}

/// Spawn to the guest's first byte on this machine's KVM, with a payload of a few instructions.
fn first_byte(runs: u32, husk: &Path, temp: &Path, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let dir = temp.display();
    let tap = Tap::new()?;
    let husk_command = format!(
        "{} run --boot-protocol pvh --kernel {dir}/payload.elf --memory 128M",
        husk.display()
    );
    let disk = temp.join("disk");
    fs::File::create(&disk)
        .and_then(|file| file.set_len(64 << 20))
        .with_context(|| format!("cannot write {}", disk.display()))?;
    let devices = format!(
        "{husk_command} --disk {} --net tap={} --vsock cid=3,uds={dir}/vsock --entropy --balloon 0",
        disk.display(),
        tap.0
    );
    let programs = [
        Program::new("floor-overlap", &format!("{dir}/floor-overlap")),
        Program::new("floor", &format!("{dir}/floor")),
        Program::new("husk", &husk_command),
        Program::new("husk 5 devices", &devices),
        Program::new(
            "qemu microvm",
            &microvm(
                // Some hosts' KVM names IA32_ARCH_CAPABILITIES but takes no value for it, and QEMU gives up.
                "microvm,acpi=off",
                "host,-arch-capabilities",
                &format!("-m 128 -kernel {dir}/payload.elf"),
            ),
        ),
    ];
    println!("spawn to the guest's first byte, 128 MiB, 1 vCPU, {runs} alternating starts:");
    let samples = measure(&programs, runs, "h", PATIENCE)?;
    print!("{}", table(&programs, &samples));
    if let [floor, _, husk, devices, ..] = samples.as_slice() {
        let kib = |samples: &[Sample]| median(samples.iter().map(|s| s.rss_kib as f64));
        let rss = kib(husk) - kib(floor);
        verdicts.push(Verdict::new(
            "first byte, times the overlapped floor",
            ratio(husk, floor),
            LIMIT_RATIO,
        ));
        verdicts.push(Verdict::new(
            "peak RSS beyond the floor's, KiB",
            rss,
            LIMIT_RSS_KIB as f64,
        ));
        verdicts.push(Verdict::new(
            "first byte with five devices, times that without",
            ratio(devices, husk),
            LIMIT_DEVICES_RATIO,
        ));
        verdicts.push(Verdict::new(
            "peak RSS with five devices beyond the floor's, KiB",
            kib(devices) - kib(floor),
            LIMIT_DEVICES_RSS_KIB as f64,
        ));
    }
    Ok(())
}

/// A tap device, removed at the end.
struct Tap(String);

impl Tap {
    fn new() -> Result<Self> {
        let name = format!("huskb{}", std::process::id());
        let mut ip = Command::new("ip");
        ip.args(["tuntap", "add", &name, "mode", "tap"]);
        host::run_quiet(&mut ip).context("the bench makes a tap device: run it as root")?;
        Ok(Self(name))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

/// Spawn to init with the minimal kernel on the testbed, in virtual time.
fn boot_to_init(husk: &Path, temp: &Path, verdicts: &mut Vec<Verdict>) -> Result<()> {
    let vmlinux = kernel::ensure()?;
    let initrd = init_archive(temp)?;
    let (vmlinux, initrd) = (vmlinux.display(), initrd.display());
    let husk = format!(
        "husk={} run --kernel {vmlinux} --initrd {initrd} --memory 128M --cmdline quiet",
        husk.display()
    );
    let more = format!(
        "-m 128 -kernel {vmlinux} -initrd {initrd} -append console=ttyS0\u{a0}quiet\u{a0}reboot=t"
    );
    let qemu = format!("qemu microvm={}", microvm("microvm", "host", &more));
    let words = ["-m".to_owned(), MARK.to_owned(), husk, qemu];
    println!("\nspawn to init, minimal kernel, 128 MiB, 1 vCPU, virtual ms on the testbed:");
    let testbed = Testbed {
        cpus: 1,
        icount: true,
        limit: Some(Duration::from_secs(1200)),
        ..Testbed::default()
    };
    let output = inner(&testbed, "bench-inner", &words)?;
    let median = parse_median(&output, "husk").context("the testbed printed no median of husk")?;
    verdicts.push(Verdict::new(
        "spawn to init, virtual ms",
        median,
        LIMIT_INIT_MS,
    ));
    Ok(())
}

/// Has this program measure on a testbed, by its subcommand `name`; what it prints, which is shown as it comes.
pub fn inner(testbed: &Testbed, name: &str, words: &[String]) -> Result<String> {
    let own = std::env::current_exe().context("this program's path is unknown")?;
    let mut command = vec![own.display().to_string(), name.to_owned()];
    command.extend_from_slice(words);
    let mut output = Vec::new();
    let finish = testbed.run(&command, &[], |text| {
        output.extend_from_slice(text);
        let _ = std::io::stdout().lock().write_all(text);
    })?;
    match finish.exit_status() {
        0 => Ok(String::from_utf8_lossy(&output).into_owned()),
        status => bail!("{name} failed on the testbed (exit status {status})"),
    }
}

/// An initramfs of one program; its path.
pub fn init_archive(temp: &Path) -> Result<PathBuf> {
    archive_of_init(temp, "init", INIT)
}

/// The same of a program in C.
pub fn archive_of_init(temp: &Path, name: &str, program: &str) -> Result<PathBuf> {
    let init = temp.join(name);
    let source = temp.join(format!("{name}.c"));
    fs::write(&source, program).with_context(|| format!("cannot write {}", source.display()))?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-Os", "-static", "-o"]).arg(&init).arg(&source);
    host::run_quiet(&mut gcc)?;
    let mut archive = husk_loader::initramfs::Archive::new();
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.file(
        "init",
        0o755,
        &fs::read(&init).context("cannot read the init that gcc made")?,
    )?;
    let initrd = temp.join(format!("{name}.cpio"));
    host::write_atomically(&initrd, &archive.finish()?)?;
    Ok(initrd)
}

/// The guest's first process: says so and stays.
const INIT: &str = "\
#include <unistd.h>
int main(void) { (void)!write(1, \"husk-init\\n\", 10); for (;;) pause(); }
";
pub const MARK: &str = "husk-init";

fn microvm(machine: &str, cpu: &str, more: &str) -> String {
    format!(
        "qemu-system-x86_64 -M {machine} -enable-kvm -cpu {cpu} -nodefaults -no-user-config \
         -display none -serial stdio -no-reboot {more}"
    )
}

impl Program {
    /// Words are separated by blanks; a no-break space is a blank inside a word.
    pub fn new(name: &str, command: &str) -> Self {
        let command = command.split(' ').filter(|word| !word.is_empty());
        let command = command.map(|word| word.replace('\u{a0}', " ")).collect();
        Self {
            name: name.to_owned(),
            command,
        }
    }
}

impl Program {
    /// On the testbed, has the overlay copy the program, its libraries and the files that it is given into memory. Each
    /// opening of a file that is still this machine's asks for it over 9p; the only CPU is idle meanwhile, and the virtual
    /// clock leaps to the next timer, mostly 4 ms ahead: it would be noise that belongs to nobody.
    fn bring_near(&self) -> Result<()> {
        let Some(name) = self.command.first() else {
            return Ok(());
        };
        let mut files: Vec<PathBuf> = self.command.iter().map(PathBuf::from).collect();
        if let Some(program) = host::find_tool(name) {
            // A static program makes it fail, and has no libraries.
            let ldd = Command::new("ldd").arg(&program).output();
            let output = ldd.context("cannot run ldd")?.stdout;
            let words = String::from_utf8_lossy(&output);
            files.extend(words.split_whitespace().map(PathBuf::from));
            files.push(program);
        }
        // Its firmware is named nowhere on its command line.
        if name.contains("qemu") {
            for folder in ["/usr/share/qemu", "/usr/share/seabios"] {
                let entries =
                    fs::read_dir(folder).with_context(|| format!("cannot read {folder}"))?;
                files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
            }
        }
        for file in files {
            if file.is_absolute() && file.is_file() {
                // Opening for writing is what makes an overlay copy.
                let opened = fs::OpenOptions::new().append(true).open(&file);
                opened.with_context(|| format!("cannot copy {}", file.display()))?;
            }
        }
        Ok(())
    }
}

/// Starts the programs in turns, `runs` times after one that warms up; samples of each.
fn measure(
    programs: &[Program],
    runs: u32,
    mark: &str,
    patience: Duration,
) -> Result<Vec<Vec<Sample>>> {
    let mut samples: Vec<Vec<Sample>> = programs.iter().map(|_| Vec::new()).collect();
    for turn in 0..=runs {
        for index in order(programs.len(), turn as usize) {
            let (Some(program), Some(samples)) = (programs.get(index), samples.get_mut(index))
            else {
                continue;
            };
            let sample = start(program, mark, patience)?;
            if turn > 0 {
                samples.push(sample);
            }
            std::thread::sleep(SETTLE);
        }
    }
    Ok(samples)
}

/// Time for the host's kernel to finish with a program that was killed (grace periods, freeing memory).
pub const SETTLE: Duration = Duration::from_millis(20);

/// The order of `count` programs in a turn: a row of Williams's square. Who starts behind a program that leaves much to
/// clean up pays for it, so in `count` turns each comes once behind each other (if `count` is even), and once first.
pub fn order(count: usize, turn: usize) -> Vec<usize> {
    let zigzag = (0..count).map(|i| match i % 2 {
        0 => (count - i / 2) % count,
        _ => i / 2 + 1,
    });
    zigzag.map(|place| (place + turn) % count).collect()
}

/// Starts a program, waits for the mark alone on a line, and kills it.
pub fn start(program: &Program, mark: &str, patience: Duration) -> Result<Sample> {
    for socket in program
        .command
        .iter()
        .filter_map(|word| Some(word.split_once("uds=")?.1))
    {
        // A program that was killed leaves its socket.
        let _ = fs::remove_file(socket);
    }
    let (path, args) = program.command.split_first().context("an empty command")?;
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut command = Command::new(path);
    command
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(writer);
    let (sender, receiver) = std::sync::mpsc::channel();
    let mark_bytes = mark.as_bytes().to_vec();
    // The reader takes the time itself: handing a line to another thread would be in it otherwise.
    let waiter = std::thread::spawn(move || {
        let _ = sender.send(wait_for_mark(reader, &[&mark_bytes]));
    });
    let begin = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {path}"))?;
    drop(command);
    let seen = receiver.recv_timeout(patience);
    let rss_kib = memory(child.id(), "VmHWM:").unwrap_or_default();
    let _ = child.kill();
    let mut errors = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut errors);
    }
    child.wait().context("cannot wait for a measured program")?;
    let _ = waiter.join();
    let (at, output) = match seen {
        Ok(seen) => seen,
        Err(_) => (
            None,
            format!("nothing that ends a start in {} s", patience.as_secs()),
        ),
    };
    match at {
        Some(at) => Ok(Sample {
            ms: at.duration_since(begin).as_secs_f64() * 1e3,
            rss_kib,
        }),
        None => bail!(
            "{} did not print {mark:?}; it printed: {}\n{}",
            program.command.join(" "),
            host::last_lines(&output, 10),
            host::last_lines(&errors, 10)
        ),
    }
}

/// Reads until one of the marks is alone on a line; when that was (`None`: not before the end) and the text.
pub fn wait_for_mark(mut reader: impl Read, marks: &[&[u8]]) -> (Option<Instant>, String) {
    let mut output = Vec::new();
    let mut buffer = [0; 4096];
    let mut at = None;
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        let now = Instant::now();
        output.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if marks.iter().any(|mark| has_mark(&output, mark)) {
            at = Some(now);
            break;
        }
    }
    (at, String::from_utf8_lossy(&output).into_owned())
}

/// Whether a whole line is the mark.
fn has_mark(output: &[u8], mark: &[u8]) -> bool {
    let Some(end) = output.iter().rposition(|&byte| byte == b'\n') else {
        return false;
    };
    let lines = output
        .get(..end)
        .unwrap_or_default()
        .split(|&byte| byte == b'\n');
    lines.map(|line| line.trim_ascii()).any(|line| line == mark)
}

/// A living process's memory in KiB: a field of /proc/PID/status, with its colon.
pub fn memory(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// One line for each program; ratios are to the first.
fn table(programs: &[Program], samples: &[Vec<Sample>]) -> String {
    let mut text = format!(
        "{:14} {:>9} {:>9} {:>9} {:>9} {:>7}\n",
        "", "min ms", "median", "max", "rss KiB", "ratio"
    );
    let Some(first) = samples.first() else {
        return text;
    };
    for (program, own) in programs.iter().zip(samples) {
        let ms = || own.iter().map(|sample| sample.ms);
        text += &format!(
            "{:14} {:9.2} {:9.2} {:9.2} {:9.0} {:7.2}\n",
            program.name.replace(' ', "-"),
            ms().fold(f64::INFINITY, f64::min),
            median(ms()),
            ms().fold(0.0, f64::max),
            median(own.iter().map(|sample| sample.rss_kib as f64)),
            ratio(own, first),
        );
    }
    text
}

/// The median that a table printed for a program.
fn parse_median(table: &str, name: &str) -> Option<f64> {
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == name).then(|| words.nth(1)?.parse().ok())?
    })
}

/// The median of the ratios of starts that were neighbours in time.
fn ratio(own: &[Sample], base: &[Sample]) -> f64 {
    median(own.iter().zip(base).map(|(own, base)| own.ms / base.ms))
}

/// What a row is called, and how it is told of a turn.
pub type Row<T> = (&'static str, fn(&T) -> f64);

/// A line for each of `rows`: the least, the middle and the most of what it says of `turns`.
pub fn print_rows<T>(turns: &[T], rows: &[Row<T>]) {
    println!("{:44} {:>9} {:>9} {:>9}", "", "min", "median", "max");
    for (name, value) in rows {
        let values = || turns.iter().map(value);
        println!(
            "{name:44} {:9.2} {:9.2} {:9.2}",
            values().fold(f64::INFINITY, f64::min),
            median(values()),
            values().fold(0.0, f64::max)
        );
    }
}

/// The middle value, or the mean of the middle two; not a number when there are none.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied().unwrap_or(f64::NAN);
    match values.len() % 2 {
        0 => {
            (upper
                + values
                    .get(middle.wrapping_sub(1))
                    .copied()
                    .unwrap_or(f64::NAN))
                / 2.0
        }
        _ => upper,
    }
}

/// What was measured, and the most, or least, that it may be.
pub struct Verdict {
    what: &'static str,
    value: f64,
    limit: f64,
    at_least: bool,
}

impl Verdict {
    /// At most `limit`.
    pub fn new(what: &'static str, value: f64, limit: f64) -> Self {
        Self {
            what,
            value,
            limit,
            at_least: false,
        }
    }

    /// At least `limit`.
    pub fn at_least(what: &'static str, value: f64, limit: f64) -> Self {
        Self {
            at_least: true,
            ..Self::new(what, value, limit)
        }
    }

    /// A value that is not a number has not reached anything.
    fn reached(&self) -> bool {
        match self.at_least {
            true => self.value >= self.limit,
            false => self.value <= self.limit,
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = if self.reached() { "reached" } else { "MISSED" };
        let bound = if self.at_least { "least" } else { "most" };
        let Self {
            what, value, limit, ..
        } = self;
        write!(f, "{word:8} {what}: {value:.2} (at {bound} {limit})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ms: f64) -> Sample {
        Sample { ms, rss_kib: 700 }
    }

    #[test]
    fn the_mark_counts_only_as_a_whole_line() {
        assert!(has_mark(b"h\n", b"h"));
        assert!(has_mark(b"SeaBIOS\r\nh\r\nmore", b"h"));
        assert!(!has_mark(b"h", b"h"));
        assert!(!has_mark(b"oh\nhh\n", b"h"));
    }

    #[test]
    fn medians_and_ratios() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median(std::iter::empty()).is_nan());
        // Pair by pair: a machine that is slow for one pair does not count.
        let own = [sample(2.0), sample(40.0), sample(2.0)];
        let base = [sample(1.0), sample(20.0), sample(1.0)];
        assert_eq!(ratio(&own, &base), 2.0);
    }

    #[test]
    fn each_program_starts_once_behind_each_other_one() {
        for count in [2, 4] {
            let mut pairs = std::collections::BTreeSet::new();
            let mut firsts = std::collections::BTreeSet::new();
            for turn in 0..count {
                let order = order(count, turn);
                let mut sorted = order.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..count).collect::<Vec<_>>());
                firsts.insert(order[0]);
                pairs.extend(order.windows(2).map(|pair| (pair[0], pair[1])));
            }
            assert_eq!(pairs.len(), count * (count - 1));
            assert_eq!(firsts.len(), count);
        }
        assert_eq!(order(1, 5), [0]);
        assert_eq!(order(3, 0).len(), 3);
    }

    #[test]
    fn a_table_is_read_back() {
        let programs = [Program::new("husk", "a"), Program::new("qemu microvm", "b")];
        let text = table(&programs, &[vec![sample(120.0)], vec![sample(300.0)]]);
        assert_eq!(parse_median(&text, "husk"), Some(120.0));
        assert_eq!(parse_median(&text, "qemu-microvm"), Some(300.0));
        assert_eq!(parse_median(&text, "other"), None);
    }

    #[test]
    fn a_limit_is_missed_by_more_and_by_no_value() {
        assert!(Verdict::new("x", 1.5, 1.5).reached());
        assert!(!Verdict::new("x", 1.6, 1.5).reached());
        assert!(!Verdict::new("x", f64::NAN, 1.5).reached());
        assert!(Verdict::at_least("x", 1.5, 1.5).reached());
        assert!(!Verdict::at_least("x", 1.4, 1.5).reached());
    }

    #[test]
    fn a_program_without_a_mark_is_an_error_with_its_words() {
        let program = Program::new("x", "sh -c echo\u{a0}why;echo\u{a0}hm\u{a0}>&2");
        let error = start(&program, "h", PATIENCE).err().unwrap().to_string();
        assert!(error.contains("why") && error.contains("hm"), "{error}");
        let program = Program::new("x", "sh -c echo\u{a0}h;sleep\u{a0}9");
        assert!(start(&program, "h", PATIENCE).unwrap().rss_kib > 0);
    }
}
