//! Throughput of devices, side by side with QEMU microvm, on the testbed with instructions counted.

use crate::bench::{self, Verdict, median};
use crate::host;
use crate::kernel;
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// How much more than QEMU microvm.
const LEAST_RATIO: f64 = 1.3;
/// All exits of all VMs of this host: the testbed has one at a time.
const EXITS: &str = "/sys/kernel/debug/kvm/exits";
/// What the host's end of a TCP connection takes or gives at a time, as iperf3 does.
const BLOCK: usize = 128 << 10;
/// What the guest's tool prints, in this order, behind START and NOTHING.
const MEASURED: [&str; 5] = [
    "sequential_read",
    "random_read",
    "random_write",
    "net_send",
    "net_receive",
];

/// What it prints first, and for nothing: the exits in between are those of printing.
const START: &str = "start";
const NOTHING: &str = "nothing";

/// `cargo xtask bench-devices-inner`.
#[derive(clap::Args)]
pub struct InnerArgs {
    husk: String,
    vmlinux: String,
    initrd: String,
}

/// Runs the same guest with the same disk under both and prints the ratios of their times.
///
/// The testbed counts a byte that `rep movsb` copies as an instruction, a nanosecond, which no hardware takes. With
/// `copy_by_word` its processor has no ERMS: Linux then copies eight bytes with each.
pub fn run(
    husk: &Path,
    temp: &Path,
    copy_by_word: bool,
    verdicts: &mut Vec<Verdict>,
) -> Result<()> {
    let vmlinux = kernel::ensure()?;
    let tool = temp.join("tool");
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-O2", "-o"])
        .arg(&tool)
        .arg(host::workspace_root()?.join("tests/guest/tool.c"));
    host::run_quiet(&mut gcc)?;
    let mut archive = husk_loader::initramfs::Archive::new();
    archive.directory("dev", 0o755)?;
    archive.character_device("dev/console", 0o600, 5, 1)?;
    let tool = fs::read(&tool).context("cannot read the tool that gcc made")?;
    archive.file("init", 0o755, &tool)?;
    let initrd = temp.join("speed.cpio");
    host::write_atomically(&initrd, &archive.finish()?)?;
    let (how, qemu) = match copy_by_word {
        true => ("by word", vec!["-cpu".to_owned(), "max,-erms".to_owned()]),
        false => ("by byte", Vec::new()),
    };
    println!("\ndevices, minimal kernel, 1 vCPU, virtual ms on the testbed, which copies {how}:");
    let testbed = Testbed {
        cpus: 1,
        icount: true,
        qemu,
        limit: Some(Duration::from_secs(1200)),
        ..Testbed::default()
    };
    let files = [husk, &vmlinux, &initrd].map(|path| path.display().to_string());
    let output = bench::inner(&testbed, "bench-devices-inner", &files)?;
    for name in MEASURED {
        let line = output.lines().find(|line| line.starts_with(name));
        let ratio = line.and_then(|line| line.split_whitespace().last()?.parse().ok());
        verdicts.push(Verdict::at_least(
            name,
            ratio.context("the testbed printed no ratio")?,
            LEAST_RATIO,
        ));
    }
    Ok(())
}

/// What runs inside the testbed.
pub fn run_inner(args: &InnerArgs) -> Result<ExitCode> {
    if !Path::new(EXITS).exists() {
        let mut mount = Command::new("mount");
        mount.args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"]);
        host::run_quiet(&mut mount)?;
    }
    let tap = "huskb0";
    for words in [
        &["tuntap", "add", tap, "mode", "tap"][..],
        &["addr", "add", "10.231.0.1/24", "dev", tap],
        &["link", "set", tap, "up"],
    ] {
        host::run_quiet(Command::new("ip").args(words))?;
    }
    serve(5001, 0)?;
    serve(5002, 8 << 20)?;
    let disk = "/tmp/speed.img";
    fs::write(disk, vec![1; 64 << 20]).context("cannot write a disk image")?;
    let (kernel, initrd) = (&args.vmlinux, &args.initrd);
    let ip = "ip=10.231.0.2:::255.255.255.0::eth0:off";
    let husk = [
        args.husk.as_str(),
        "run",
        "--kernel",
        kernel,
        "--initrd",
        initrd,
        "--memory",
        "128M",
        "--cmdline",
        &format!("quiet {ip}"),
        "--disk",
        disk,
        "--net",
        &format!("tap={tap}"),
    ]
    .map(str::to_owned);
    let qemu = [
        "qemu-system-x86_64",
        "-M",
        "microvm",
        "-enable-kvm",
        "-cpu",
        "host",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-m",
        "128",
        "-kernel",
        kernel,
        "-initrd",
        initrd,
        "-append",
        &format!("console=ttyS0 quiet reboot=t {ip}"),
        "-drive",
        &format!("file={disk},if=none,id=d,format=raw,cache=unsafe"),
        "-device",
        "virtio-blk-device,drive=d",
        "-netdev",
        &format!("tap,id=n,ifname={tap},script=no,downscript=no"),
        "-device",
        "virtio-net-device,netdev=n",
    ]
    .map(str::to_owned);
    let mut all: BTreeMap<(&str, String), Vec<Transfer>> = BTreeMap::new();
    for _ in 0..3 {
        for (name, command) in [("husk", &husk[..]), ("qemu", &qemu[..])] {
            let transfers = measure(command)?;
            // Each takes minutes: whoever waits sees that it goes on.
            let ms: Vec<_> = transfers
                .iter()
                .map(|(_, t)| format!("{:.1}", t.ms))
                .collect();
            println!("{name}: {} ms", ms.join(", "));
            for (what, transfer) in transfers {
                all.entry((name, what)).or_default().push(transfer);
            }
        }
    }
    println!(
        "{:16} {:>9} {:>9} {:>11} {:>11} {:>7}",
        "", "husk ms", "qemu ms", "husk exits", "qemu exits", "ratio"
    );
    for what in MEASURED {
        let own = |name, value: fn(&Transfer) -> f64| {
            let transfers = all.get(&(name, what.to_owned()));
            median(transfers.into_iter().flatten().map(value))
        };
        let (husk, qemu) = (own("husk", |t| t.ms), own("qemu", |t| t.ms));
        let (few, many) = (
            own("husk", Transfer::exits_each),
            own("qemu", Transfer::exits_each),
        );
        println!(
            "{what:16} {husk:9.2} {qemu:9.2} {few:11.2} {many:11.2} {:7.2}",
            qemu / husk
        );
    }
    println!("exits: all that KVM counts (also of timers and interrupts), per request or packet");
    Ok(ExitCode::SUCCESS)
}

/// What a guest has measured of one transfer, and the host beside it.
struct Transfer {
    ms: f64,
    /// Requests or packets.
    units: f64,
    exits: f64,
}

impl Transfer {
    fn exits_each(&self) -> f64 {
        self.exits / self.units
    }
}

/// Takes all that a connection sends, then sends `bytes` and closes; connection by connection.
fn serve(port: u16, bytes: usize) -> Result<()> {
    let listener = TcpListener::bind(("10.231.0.1", port)).context("cannot listen")?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = match bytes {
                0 => swallow(&mut stream),
                more => pour(&mut stream, more),
            };
        }
    });
    Ok(())
}

/// From a block that is in memory already, or the time would be that of the host's page faults.
fn pour(stream: &mut TcpStream, bytes: usize) -> std::io::Result<()> {
    let block = vec![1; BLOCK];
    (0..bytes / BLOCK).try_for_each(|_| stream.write_all(&block))
}

fn swallow(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut block = vec![0; BLOCK];
    while stream.read(&mut block)? > 0 {}
    Ok(())
}

fn exits() -> Result<f64> {
    let text = fs::read_to_string(EXITS).with_context(|| format!("cannot read {EXITS}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{EXITS} holds {text:?}"))
}

/// Starts a monitor, reads what its guest measured, and kills it.
fn measure(command: &[String]) -> Result<Vec<(String, Transfer)>> {
    let (program, words) = command.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut text = String::new();
    let found = match child.stdout.take() {
        Some(stdout) => listen(BufReader::new(stdout.take(1 << 20)), &mut text),
        None => Ok(Vec::new()),
    };
    let _ = child.kill();
    let _ = child.wait();
    let found = found?;
    if found.len() != MEASURED.len() {
        bail!(
            "{program} did not measure all:\n{}",
            host::last_lines(&text, 20)
        );
    }
    Ok(found)
}

/// What a guest says until it says that it has come to its end. All of it goes to `text`.
fn listen(mut console: impl BufRead, text: &mut String) -> Result<Vec<(String, Transfer)>> {
    let mut found = Vec::new();
    let (mut before, mut printing) = (0.0, 0.0);
    let mut line = String::new();
    while console.read_line(&mut line).unwrap_or(0) > 0 && line.trim() != "end" {
        let now = exits()?;
        text.push_str(&line);
        if let Some((name, us, units)) = numbers(line.trim()) {
            match name {
                START => {}
                NOTHING => printing = now - before,
                name if MEASURED.contains(&name) => found.push((
                    name.to_owned(),
                    Transfer {
                        ms: us / 1e3,
                        units,
                        exits: now - before - printing,
                    },
                )),
                _ => {}
            }
            before = now;
        }
        line.clear();
    }
    Ok(found)
}

/// `name=microseconds units`.
fn numbers(line: &str) -> Option<(&str, f64, f64)> {
    let (name, values) = line.split_once('=')?;
    let (us, units) = values.split_once(' ')?;
    Some((name, us.parse().ok()?, units.parse().ok()?))
}
