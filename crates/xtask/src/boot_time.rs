//! `cargo xtask boot-time`: Husk's own boot times, guarded by its own benchmark, on the testbed with instructions counted.

use crate::apt;
use crate::bench_boot;
use crate::cargo;
use crate::demo;
use crate::host::{self, TempDir, shell_quote};
use crate::kernel;
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

/// What is committed to compare with.
const BASELINES: &str = "resources/boot-time";
/// How much slower may pass.
const MAX_REGRESSION: &str = "5%";
/// The modules that Debian's cloud kernel needs to mount a disk.
const MODULES: [&str; 4] = ["virtio_mmio", "virtio_blk", "crc32c_generic", "ext4"];
/// What the guest does first when it has these.
const SCRIPT: &str =
    "mkdir /mnt; mount -t ext4 -o ro /dev/vda /mnt && echo 'husk: root is mounted'\n";
/// Exit status of the script when a planted regression is not caught.
const UNCAUGHT: u8 = 99;
/// The line that says so.
const MOUNTED: &str = "husk: root is mounted";

/// `cargo xtask boot-time`.
#[derive(clap::Args)]
pub struct Args {
    /// Measured boots of each guest; the virtual clock makes few enough
    #[arg(short = 'n', long, default_value_t = 4)]
    runs: u32,
    /// Only this guest: `minimal` or `debian`
    #[arg(long)]
    only: Option<String>,
    /// Let the kernels tell of their initcalls
    #[arg(long)]
    profile: bool,
    /// Make each guest slower by a kernel parameter, too, and see that this is caught and the initcall named
    #[arg(long, conflicts_with = "update")]
    planted: bool,
    /// Write reports (JSON and HTML) into this folder
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// What is measured is the new baseline
    #[arg(long)]
    update: bool,
    /// More options for `husk bench boot`
    #[arg(last = true, value_name = "OPTIONS")]
    more: Vec<String>,
}

/// A guest whose boot is guarded.
struct Guest {
    name: &'static str,
    /// Options for `husk bench boot`, but for files and kernel parameters.
    options: String,
    /// A kernel parameter that makes it slower, and the initcall in which it does. It must be caught.
    planted: Option<(&'static str, &'static str)>,
    /// Files, with the options that name them. They are copied into the emulated host's memory.
    files: Vec<(&'static str, PathBuf, &'static str)>,
}

/// Measures and compares; exit status 1 when a boot has become slower.
pub fn run(args: &Args) -> Result<ExitCode> {
    let outcome = measure(args)?;
    Ok(match outcome.iter().all(|(_, ok)| *ok) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// The guests that are guarded, and whether each is as quick as it was.
pub fn guard() -> Result<Vec<(&'static str, bool)>> {
    measure(&Args {
        runs: 4,
        only: None,
        profile: true,
        planted: true,
        out: None,
        update: false,
        more: Vec::new(),
    })
}

fn measure(args: &Args) -> Result<Vec<(&'static str, bool)>> {
    apt::need(&[("mkfs.ext4", "e2fsprogs")])?;
    let husk = host::step("building husk (release)", cargo::release_binary)?;
    let temp = TempDir::new(&std::env::temp_dir(), "husk-boot-time")?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => temp.path().join("out"),
    };
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let baselines = host::workspace_root()?.join(BASELINES);
    let all = [minimal()?, debian(temp.path())?];
    let is_chosen = |guest: &&Guest| args.only.as_deref().is_none_or(|name| name == guest.name);
    let guests: Vec<&Guest> = all.iter().filter(is_chosen).collect();
    if guests.is_empty() {
        bail!("--only takes `minimal` or `debian`");
    }
    Testbed::prepare()?;
    // Side by side: counted instructions do not mind.
    let runs: Vec<_> = std::thread::scope(|scope| {
        let start = |guest| {
            let (husk, out, baselines) = (&husk, &out, &baselines);
            scope.spawn(move || measure_guest(args, guest, husk, out, baselines))
        };
        let threads: Vec<_> = guests.into_iter().map(start).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|_| bail!("a measurement panicked"))
        };
        threads.into_iter().map(join).collect()
    });
    runs.into_iter().collect()
}

/// A guest, and whether it is as quick as it was. What there is to say is said when it is known.
fn measure_guest(
    args: &Args,
    guest: &Guest,
    husk: &Path,
    out: &Path,
    baselines: &Path,
) -> Result<(&'static str, bool)> {
    let name = guest.name;
    let baseline = baselines.join(format!("{name}.json"));
    let known = !args.update && baseline.is_file();
    if !known && !args.update {
        bail!("there is no {}: make it with --update", baseline.display());
    }
    let script = script(args, guest, husk, known.then_some(&baseline));
    println!("==> {name}: boots on the testbed, instructions counted");
    let mut said = Vec::new();
    let status = bench_boot::on_testbed(&script, out, Duration::from_secs(900), |text| {
        said.extend_from_slice(text);
    })?;
    print!("==> {name}:\n{}", String::from_utf8_lossy(&said));
    if args.update && status == 0 {
        fs::create_dir_all(baselines)
            .and_then(|()| fs::copy(out.join(format!("{name}.json")), &baseline))
            .with_context(|| format!("cannot write {}", baseline.display()))?;
        println!("==> {name}: the new baseline is {BASELINES}/{name}.json");
    }
    if status == 1 {
        println!(
            "==> {name}: slower than {BASELINES}/{name}.json by more than {MAX_REGRESSION}; where that is meant: cargo xtask boot-time --update"
        );
    }
    if let Some((parameter, initcall)) = guest.planted.filter(|_| status == UNCAUGHT) {
        println!("==> {name}: {parameter} makes {initcall} slower, and that was not told");
    }
    Ok((name, status == 0))
}

/// What the emulated host runs.
fn script(args: &Args, guest: &Guest, husk: &Path, baseline: Option<&PathBuf>) -> String {
    let quoted = |path: &Path| shell_quote(&path.display().to_string());
    let mut options = guest.options.clone();
    for (option, path, more) in &guest.files {
        options += &format!(" {option} {}{more}", quoted(path));
    }
    let files = guest.files.iter().map(|(_, path, _)| path.as_path());
    let mut script = bench_boot::bring_near(files.chain([husk]));
    let name = guest.name;
    let husk = quoted(husk);
    let bench = |cmdline: &str| format!("{husk} bench boot {options} --cmdline 'quiet {cmdline}'");
    script += &format!(
        "{} --runs {} --warm-ups 1 --json /out/{name}.json --html /out/{name}.html",
        bench(""),
        args.runs
    );
    if let Some(baseline) = baseline {
        script += &format!(
            " --baseline {} --max-regression {MAX_REGRESSION}",
            quoted(baseline)
        );
    }
    if args.profile || args.planted {
        script += " --profile";
    }
    for word in &args.more {
        script += &format!(" {}", shell_quote(word));
    }
    script += "\nstatus=$?\n";
    if let Some((parameter, initcall)) = guest.planted.filter(|_| args.planted) {
        script += &format!(
            "{} --runs 2 --warm-ups 0 --profile --quiet --baseline /out/{name}.json >told 2>&1\n\
             if [ $? = 1 ] && sed -n '/initcalls that moved/,$p' told | grep -w {initcall}; then\n\
             echo '{parameter} was caught'\n\
             else cat told; exit {UNCAUGHT}; fi\n",
            bench(parameter)
        );
    }
    script + "exit $status\n"
}

/// The minimal kernel alone, to Husk's own init.
fn minimal() -> Result<Guest> {
    Ok(Guest {
        name: "minimal",
        options: "--memory 128M".into(),
        // ip=dhcp has it sleep for 12 s in ip_auto_config, but now and then the emulated host loses a timer's interrupt in so
        // long a sleep, and stands still.
        planted: None,
        files: vec![("--kernel", kernel::ensure()?, "")],
    })
}

/// Debian's cloud kernel, with its modules, until it has mounted a disk.
fn debian(temp: &Path) -> Result<Guest> {
    let demo = demo::ensure()?;
    let disk = temp.join("root.ext4");
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F"]).arg(&disk).arg("64M");
    host::run_quiet(&mut mkfs)?;
    let mut builder = husk_loader::initramfs::Builder::new(demo.busybox);
    builder.modules_dir = Some(demo.modules);
    builder.modules.extend(MODULES.map(str::to_owned));
    builder.script = Some(SCRIPT.into());
    let initrd = temp.join("initrd");
    host::write_atomically(&initrd, &builder.build()?)?;
    Ok(Guest {
        name: "debian",
        options: format!("--memory 256M --mark '{MOUNTED}'"),
        // It tries the cryptography that is built in.
        planted: Some(("cryptomgr.notests=0", "crypto_algapi_init")),
        files: vec![
            ("--kernel", demo.vmlinuz, ""),
            ("--initrd", initrd, ""),
            ("--disk", disk, ",ro"),
        ],
    })
}
