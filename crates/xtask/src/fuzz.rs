//! `cargo xtask fuzz`: the fuzz targets of fuzz/, each for a bounded time.
//!
//! They are built with coverage instrumentation by the stable compiler, without cargo-fuzz, whose layout fuzz/ has all the same.

use crate::apt;
use crate::cargo;
use crate::host::{self, TempDir};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// libFuzzer is C++.
const TOOLS: &[(&str, &str)] = &[("g++", "g++")];

/// What makes LLVM count edges and show libFuzzer what is compared. The C++ runtime is linked dynamically.
const RUSTFLAGS: &str = "-Ctarget-feature=-crt-static --cfg fuzzing \
    -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Inputs that run longer are hangs. Long, because machines that run this are busy.
const HANG: &str = "-timeout=25";
const MEMORY: &str = "-rss_limit_mb=1024";
/// Bytes: some hundred actions of a guest.
const LONGEST: &str = "-max_len=2048";
/// What a target may take beyond its time: its start, the committed inputs, the last input.
const GRACE: Duration = Duration::from_secs(120);

/// `cargo xtask fuzz`.
#[derive(clap::Args)]
pub struct Args {
    /// How long each target runs
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    seconds: u64,
    /// Run only this input, with the target that is named: to reproduce a finding
    #[arg(long, value_name = "FILE", conflicts_with = "merge")]
    input: Option<PathBuf>,
    /// Bring what was found into fuzz/corpus, with no more inputs than needed
    #[arg(long)]
    merge: bool,
    /// Targets: files of fuzz/fuzz_targets (default: all)
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// A target that cargo built.
#[derive(Debug, PartialEq)]
struct Target {
    name: String,
    executable: PathBuf,
}

/// How a run ended.
#[derive(Debug, PartialEq)]
struct Report {
    executions: u64,
    new_inputs: u64,
    /// The input that led to a finding.
    input: Option<PathBuf>,
}

/// Builds the targets and runs them one after the other; one line for each.
pub fn run(args: &Args) -> Result<ExitCode> {
    let folder = host::workspace_root()?.join("fuzz");
    let names = choose(&known(&folder)?, &args.targets)?;
    if args.input.is_some() && names.len() != 1 {
        bail!(
            "an input belongs to one target: name it, as in  cargo xtask fuzz vsock --input FILE"
        );
    }
    apt::need(TOOLS)?;
    let targets = host::step("building the fuzz targets", || build(&folder, &names))?;
    if let (Some(input), [target]) = (&args.input, targets.as_slice()) {
        return reproduce(target, input);
    }
    let mut sound = true;
    for target in &targets {
        sound &= fuzz(target, &folder, args)?;
    }
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The targets that there are.
fn known(folder: &Path) -> Result<Vec<String>> {
    let targets = folder.join("fuzz_targets");
    let entries = fs::read_dir(&targets)
        .with_context(|| format!("cannot read the folder {}", targets.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// Those of `known` that `wanted` names, all when it names none.
fn choose(known: &[String], wanted: &[String]) -> Result<Vec<String>> {
    if let Some(name) = wanted.iter().find(|name| !known.contains(name)) {
        bail!(
            "no fuzz target is called {name}: say one of {}",
            known.join(", ")
        );
    }
    let chosen = known
        .iter()
        .filter(|name| wanted.is_empty() || wanted.contains(name));
    Ok(chosen.cloned().collect())
}

fn build(folder: &Path, names: &[String]) -> Result<Vec<Target>> {
    let mut command = cargo::cargo()?;
    command
        .args(["build", "--release", "--target", TRIPLE])
        .arg("--message-format=json-render-diagnostics")
        .arg("--manifest-path")
        .arg(folder.join("Cargo.toml"))
        .env("RUSTFLAGS", RUSTFLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    for name in names {
        command.args(["--bin", name]);
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the fuzz targets cannot be built ({})", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let built: Vec<Target> = text
        .lines()
        .filter_map(|line| built_target(&serde_json::from_str(line).ok()?))
        .collect();
    let of = |name: &String| {
        let found = built.iter().find(|target| target.name == *name);
        let executable = found.map(|target| target.executable.clone());
        executable.with_context(|| format!("cargo built no {name}: is it in fuzz/Cargo.toml?"))
    };
    let target = |name: &String| {
        Ok(Target {
            name: name.clone(),
            executable: of(name)?,
        })
    };
    names.iter().map(target).collect()
}

fn built_target(message: &Value) -> Option<Target> {
    Some(Target {
        name: message.pointer("/target/name")?.as_str()?.to_owned(),
        executable: message.get("executable")?.as_str()?.into(),
    })
}

/// Runs one target, says what came of it, and whether it is sound.
fn fuzz(target: &Target, folder: &Path, args: &Args) -> Result<bool> {
    let Target { name, executable } = target;
    let own = TempDir::new(&std::env::temp_dir(), "husk-fuzz")?;
    let corpus = folder.join("corpus").join(name);
    let artifacts = folder.join("artifacts").join(name);
    let new = own.path().join("new");
    for made in [&corpus, &artifacts, &new] {
        fs::create_dir_all(made)
            .with_context(|| format!("cannot create the folder {}", made.display()))?;
    }
    let log = own.path().join("log");
    let mut command = command(executable, own.path(), &log)?;
    command
        .args([
            HANG,
            MEMORY,
            LONGEST,
            "-len_control=0",
            "-print_final_stats=1",
        ])
        .arg(format!("-max_total_time={}", args.seconds))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args([&new, &corpus]);
    let status = wait(&mut command, Duration::from_secs(args.seconds) + GRACE)?;
    let text = fs::read(&log).context("cannot read what the fuzz target said")?;
    let text = String::from_utf8_lossy(&text);
    let report = report(&text);
    if status.is_some_and(|status| status.success()) {
        println!(
            "{name}: {} executions, {} new inputs",
            report.executions, report.new_inputs
        );
        if args.merge {
            merge(target, own.path(), &new, &corpus)?;
        }
        return Ok(true);
    }
    eprintln!("{}", host::last_lines(&without_progress(&text), 40));
    let ended = status.map_or("did not end".into(), |status| status.to_string());
    match report.input {
        Some(input) => println!(
            "{name}: FOUND after {} executions: {}\n    reproduce it:  cargo xtask fuzz {name} --input {}",
            report.executions,
            input.display(),
            host::shell_quote(&input.display().to_string())
        ),
        None => println!("{name}: FAILED without an input ({ended})"),
    }
    Ok(false)
}

fn command(executable: &Path, folder: &Path, log: &Path) -> Result<Command> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(executable);
    command
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("cannot share a log file")?)
        .stderr(file);
    Ok(command)
}

/// Waits for a target that ends by itself; None when it did not, and was ended.
fn wait(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
    let mut child = command.spawn().context("cannot start the fuzz target")?;
    let until = Instant::now() + limit;
    while Instant::now() < until {
        if let Some(status) = child
            .try_wait()
            .context("cannot wait for the fuzz target")?
        {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().context("cannot end the fuzz target")?;
    child.wait().context("cannot wait for the fuzz target")?;
    Ok(None)
}

/// libFuzzer's words.
fn report(text: &str) -> Report {
    let after = |what: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| Some(line.split_once(what)?.1.trim().to_owned()))
    };
    let number = |what: &str| {
        let value = after(what);
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    Report {
        executions: number("stat::number_of_executed_units:"),
        new_inputs: number("stat::new_units_added:"),
        input: after("Test unit written to ").map(PathBuf::from),
    }
}

/// Without the lines that tell of each new input.
fn without_progress(text: &str) -> String {
    let noise = |line: &&str| !line.starts_with('#') && !line.trim_start().starts_with("NEW_FUNC");
    text.lines().filter(noise).collect::<Vec<_>>().join("\n")
}

/// The committed inputs, and those that were found, become as few as reach the same.
fn merge(target: &Target, own: &Path, new: &Path, corpus: &Path) -> Result<()> {
    let merged = own.join("merged");
    fs::create_dir_all(&merged).context("cannot create a folder")?;
    let mut command = command(&target.executable, own, &own.join("merge-log"))?;
    command
        .args([
            "-set_cover_merge=1",
            "-use_counters=0",
            HANG,
            MEMORY,
            LONGEST,
        ])
        .args([merged.as_path(), corpus, new]);
    let status = wait(&mut command, 10 * GRACE)?;
    if !status.is_some_and(|status| status.success()) {
        bail!("the corpora of {} cannot be merged", target.name);
    }
    let files = |folder: &Path| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(folder).context("cannot read a corpus")?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    };
    for old in files(corpus)? {
        fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    let found = files(&merged)?;
    for input in &found {
        let to = corpus.join(input.file_name().unwrap_or_default());
        fs::copy(input, &to).with_context(|| format!("cannot write {}", to.display()))?;
    }
    println!("{}: {} inputs in fuzz/corpus", target.name, found.len());
    Ok(())
}

/// Runs one input, with all that the target says.
fn reproduce(target: &Target, input: &Path) -> Result<ExitCode> {
    let own = TempDir::new(&std::env::temp_dir(), "husk-fuzz")?;
    let status = Command::new(&target.executable)
        .args([HANG, MEMORY])
        .arg(input)
        .env("TMPDIR", own.path())
        .status()
        .with_context(|| format!("cannot start {}", target.executable.display()))?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DONE: &str = "#2\tINITED cov: 15\n#9\tDONE   cov: 1517 ft: 2093\n\
        stat::number_of_executed_units: 2186\nstat::average_exec_per_sec:     168\n\
        stat::new_units_added:          58\n";
    const FOUND: &str = "#99\tNEW    cov: 4\n\tNEW_FUNC[1/1]: 0x561a6ab209d1\n\
        thread 'io' panicked at src/x.rs:1:1:\n==1== ERROR: libFuzzer: deadly signal\n\
        artifact_prefix='a/'; Test unit written to a/crash-0b\nstat::number_of_executed_units: 7\n";

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let wanted = Report {
            executions: 2186,
            new_inputs: 58,
            input: None,
        };
        assert_eq!(report(DONE), wanted);
        let found = report(FOUND);
        assert_eq!(
            (found.executions, found.input),
            (7, Some("a/crash-0b".into()))
        );
    }

    #[test]
    fn a_finding_is_shown_without_the_progress_before() {
        let shown = without_progress(FOUND);
        assert!(shown.starts_with("thread 'io' panicked"), "{shown}");
    }

    #[test]
    fn targets_are_chosen_by_name_and_an_unknown_one_is_an_error() {
        let known = ["net".to_owned(), "vsock".to_owned()];
        assert_eq!(choose(&known, &[]).unwrap(), known);
        assert_eq!(choose(&known, &["vsock".into()]).unwrap(), ["vsock"]);
        let error = choose(&known, &["nte".into()]).unwrap_err().to_string();
        assert!(
            error.contains("nte") && error.contains("net, vsock"),
            "{error}"
        );
    }

    #[test]
    fn cargo_tells_where_a_target_is() {
        let message = serde_json::json!({
            "reason": "compiler-artifact", "target": {"name": "net"}, "executable": "/t/net",
        });
        let target = built_target(&message).unwrap();
        assert_eq!(
            (target.name.as_str(), target.executable),
            ("net", "/t/net".into())
        );
        let library = serde_json::json!({"target": {"name": "x"}, "executable": null});
        assert_eq!(built_target(&library), None);
    }
}
