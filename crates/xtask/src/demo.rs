//! `cargo xtask demo`: from nothing but Rust to a Linux guest.

use crate::cargo;
use crate::guest;
use crate::host::{self, TempDir};
use crate::testbed::Testbed;
use anyhow::{Context, Result};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What the guest runs where there is no terminal to give a shell to.
const SCRIPT: &str = "\
echo \"hello from a guest of Husk: $(uname -sr)\"
echo \"CPUs: $(nproc)\"
free -m
uptime
";

/// `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Args {
    /// Run on the testbed even where this machine's KVM can run Linux
    #[arg(long)]
    testbed: bool,
    /// Run the short script even on a terminal
    #[arg(long)]
    script: bool,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the guest, as `husk run` takes it
    #[arg(long, default_value = "512M")]
    memory: String,
}

/// Debian's cloud kernel and busybox in the cache, where `husk run` finds them as well.
pub struct Demo {
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// `lib/modules/RELEASE` of that kernel.
    pub modules: PathBuf,
    /// Debian's static busybox.
    pub busybox: PathBuf,
}

/// Builds, fetches, boots; the exit status is husk's.
pub fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let husk = host::step("building husk (release)", cargo::release_binary)?;
    let demo = ensure()?;
    let interactive =
        !args.script && std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let temp = TempDir::new(&std::env::temp_dir(), "husk-demo")?;
    let initrd = temp.path().join("initramfs");
    host::step("making the initramfs (busybox)", || {
        let script = (!interactive).then(|| SCRIPT.to_owned());
        let mut builder = husk_loader::initramfs::Builder::new(demo.busybox.clone());
        builder.modules_dir = Some(demo.modules.clone());
        builder.script = script;
        std::fs::write(&initrd, builder.build()?)
            .with_context(|| format!("cannot write {}", initrd.display()))
    })?;
    let native = !args.testbed && runs_linux(&husk)?;
    let mut command = vec![text(&husk)?, "run".into(), "--timeline".into()];
    for (flag, value) in [
        ("--kernel", text(&demo.vmlinuz)?),
        ("--initrd", text(&initrd)?),
        ("--cpus", args.cpus.to_string()),
        ("--memory", args.memory.clone()),
    ] {
        command.extend([flag.to_owned(), value]);
    }
    eprintln!(
        "==> {} (ready after {:.1} s)",
        command.join(" "),
        start.elapsed().as_secs_f64()
    );
    let status = if native {
        run_native(&command, interactive)?
    } else {
        run_testbed(&command, interactive)?
    };
    eprintln!("==> husk ended with exit status {status}");
    Ok(ExitCode::from(status))
}

/// Fetches the kernel and busybox unless the cache has them.
pub fn ensure() -> Result<Demo> {
    let cache = host::cache_dir()?;
    let place = cache.join("demo");
    if !place.join("busybox").is_file() {
        host::step(
            "fetching Debian's cloud kernel and busybox (about 30 MB)",
            || {
                let temp = TempDir::new(&cache, "demo-make")?;
                fetch(temp.path())?;
                host::rename_into_place(&temp.path().join("result"), &place)
            },
        )?;
    }
    let lib = place.join("lib/modules");
    let entries =
        std::fs::read_dir(&lib).with_context(|| format!("cannot read {}", lib.display()))?;
    let modules = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.join("modules.dep").is_file())
        .with_context(|| {
            format!(
                "no modules in {}: remove {} and run this again",
                lib.display(),
                place.display()
            )
        })?;
    Ok(Demo {
        vmlinuz: place.join("vmlinuz"),
        busybox: place.join("busybox"),
        modules,
    })
}

/// Whether this machine's KVM can run Linux, as `husk doctor` says by its exit status.
pub fn runs_linux(husk: &Path) -> Result<bool> {
    let doctor = Command::new(husk)
        .args(["doctor", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let able = doctor
        .with_context(|| format!("cannot run {} doctor", husk.display()))?
        .success();
    if !able {
        eprintln!(
            "    this machine's KVM cannot run Linux (`husk doctor` says why): the testbed runs it instead"
        );
    }
    Ok(able)
}

/// Puts vmlinuz, lib/modules/RELEASE and busybox into the folder `result` below `temp`.
fn fetch(temp: &Path) -> Result<()> {
    crate::apt::need(&[("depmod", "kmod")])?;
    let kernel = guest::fetch_kernel("linux-image-cloud-amd64", temp)?;
    let busybox = guest::fetch_busybox(temp)?;
    let result = temp.join("result");
    let lib = result.join("lib/modules");
    std::fs::create_dir_all(&lib).with_context(|| format!("cannot create {}", lib.display()))?;
    let release = kernel
        .modules
        .file_name()
        .context("the modules have no release")?;
    for (from, to) in [
        (&kernel.modules, lib.join(release)),
        (&kernel.vmlinuz, result.join("vmlinuz")),
        (&busybox, result.join("busybox")),
    ] {
        std::fs::rename(from, &to).with_context(|| format!("cannot create {}", to.display()))?;
    }
    Ok(())
}

fn run_native(command: &[String], interactive: bool) -> Result<u8> {
    let (program, args) = command.split_first().context("no command")?;
    let mut husk = Command::new(program);
    husk.args(args);
    if !interactive {
        husk.stdin(Stdio::null());
    }
    let status = husk
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

fn run_testbed(command: &[String], interactive: bool) -> Result<u8> {
    let testbed = Testbed {
        tty: interactive,
        limit: (!interactive).then_some(Duration::from_secs(300)),
        ..Testbed::default()
    };
    eprintln!(
        "    booting the emulated host first (some seconds; everything there is about 20 times slower)"
    );
    let finish = testbed.run(command, &[], |output| {
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(output).and_then(|()| stdout.flush());
    })?;
    Ok(finish.exit_status())
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("not UTF-8: {}", path.display()))
}
