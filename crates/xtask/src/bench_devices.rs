//! Throughput of devices, side by side with QEMU microvm, on the testbed with instructions counted.

use crate::bench::{Verdict, median};
use crate::host;
use crate::kernel;
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

/// How much more than QEMU microvm.
const LEAST_RATIO: f64 = 1.3;
/// What the guest's tool prints, in this order.
const MEASURED: [&str; 5] = [
    "sequential_read",
    "random_read",
    "random_write",
    "net_send",
    "net_receive",
];

/// `cargo xtask bench-devices-inner`.
#[derive(clap::Args)]
pub struct InnerArgs {
    husk: String,
    vmlinux: String,
    initrd: String,
}

/// Runs the same guest with the same disk under both and prints the ratios of their times.
pub fn run(husk: &Path, temp: &Path, verdicts: &mut Vec<Verdict>) -> Result<()> {
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
    let own = std::env::current_exe().context("this program's path is unknown")?;
    let command: Vec<String> = [
        own.as_path(),
        Path::new("bench-devices-inner"),
        husk,
        &vmlinux,
        &initrd,
    ]
    .iter()
    .map(|path| path.display().to_string())
    .collect();
    println!("\ndevices, minimal kernel, 1 vCPU, virtual ms on the testbed:");
    let testbed = Testbed {
        cpus: 1,
        icount: true,
        limit: Some(Duration::from_secs(1200)),
        ..Testbed::default()
    };
    let mut output = Vec::new();
    let finish = testbed.run(&command, &[], |text| {
        output.extend_from_slice(text);
        let _ = std::io::stdout().lock().write_all(text);
    })?;
    if finish.exit_status() != 0 {
        bail!("the measurement of devices on the testbed failed");
    }
    let output = String::from_utf8_lossy(&output);
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
    let mut times: BTreeMap<(&str, String), Vec<f64>> = BTreeMap::new();
    for _ in 0..3 {
        for (name, command) in [("husk", &husk[..]), ("qemu", &qemu[..])] {
            for (what, us) in measure(command)? {
                times.entry((name, what)).or_default().push(us / 1e3);
            }
        }
    }
    println!("{:16} {:>9} {:>9} {:>7}", "", "husk ms", "qemu ms", "ratio");
    for what in MEASURED {
        let own = |name| {
            times
                .get(&(name, what.to_owned()))
                .cloned()
                .unwrap_or_default()
        };
        let (husk, qemu) = (
            median(own("husk").into_iter()),
            median(own("qemu").into_iter()),
        );
        println!("{what:16} {husk:9.2} {qemu:9.2} {:7.2}", qemu / husk);
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes all that a connection sends, then sends `bytes` and closes; connection by connection.
fn serve(port: u16, bytes: usize) -> Result<()> {
    let listener = TcpListener::bind(("10.231.0.1", port)).context("cannot listen")?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = match bytes {
                0 => std::io::copy(&mut stream, &mut std::io::sink()).map(drop),
                more => stream.write_all(&vec![0; more]),
            };
        }
    });
    Ok(())
}

/// Starts a monitor, reads what its guest measured, and kills it.
fn measure(command: &[String]) -> Result<Vec<(String, f64)>> {
    let (program, words) = command.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut found = Vec::new();
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout.take(1 << 20));
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap_or(0) > 0 {
            text += &line;
            if line.trim() == "end" {
                break;
            }
            if let Some((name, value)) = line.trim().split_once('=')
                && MEASURED.contains(&name)
                && let Ok(us) = value.parse()
            {
                found.push((name.to_owned(), us));
            }
            line.clear();
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    if found.len() != MEASURED.len() {
        bail!(
            "{program} did not measure all:\n{}",
            host::last_lines(&text, 20)
        );
    }
    Ok(found)
}
