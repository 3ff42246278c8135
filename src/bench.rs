//! `husk bench`: from flags to a plan, and from a report to paper. What is measured is `husk-measure`'s, what it means
//! `husk-bench`'s.

use crate::cli::{BootArgs, BootOptions, ReportArgs, RunArgs, Until};
use crate::{Failure, guest, print};
use clap::{Args, Command};
use husk_bench::compare::{self, Comparison, Verdict};
use husk_bench::{Report, html, text};
use husk_config::VmConfig;
use husk_measure::{Husk, Kind, Plan, Program, Progress};
use regex_lite::Regex;
use signal_hook::consts::signal::{SIGINT, SIGTERM};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// What a measurement of `husk run` is called in reports.
const HUSK: &str = "husk";
/// What makes a kernel tell of its initcalls, and its console show it whatever came before.
const TELL_INITCALLS: &str = "initcall_debug loglevel=8";

/// It is slower than the baseline by more than is allowed.
const SLOWER: u8 = 1;
/// Runs failed.
const FAILED: u8 = 3;
/// The runs cannot tell whether it is slower.
const TOO_NOISY: u8 = 4;
/// As of a program that SIGINT ends.
const INTERRUPTED: u8 = 128 + SIGINT as u8;

/// Measure boots. The exit status, unless nothing could be measured.
pub fn boot(arguments: &BootArgs) -> Result<u8, Failure> {
    let options = &arguments.options;
    let baseline = match &options.baseline {
        Some(path) => Some(self::baseline(path)?),
        None => None,
    };
    for path in options.json.iter().chain(&options.html) {
        check_place(path)?;
    }
    let config = match &arguments.run.config {
        Some(path) => VmConfig::from_file(path).map_err(|e| usage(&e))?,
        None => VmConfig::default(),
    };
    let init = match has_root(&arguments.run, &config) {
        true => None,
        false => Some(own_init()?),
    };
    let plan = plan(arguments, &config, init.as_ref())?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let status = 128 + signal;
        let twice = signal_hook::flag::register_conditional_shutdown(
            signal,
            status,
            Arc::clone(&interrupted),
        );
        twice
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
            .map_err(|e| Failure::host(format!("cannot listen to signals: {e}")))?;
    }
    let teller = Teller::new(options.quiet);
    let report = husk_measure::run(&plan, &interrupted, |progress| teller.tell(progress));
    teller.end();
    let report = report.map_err(|e| usage(&e))?;
    conclude(options, &report, baseline.as_ref())
}

/// Show what was measured, and write it down. The exit status.
fn conclude(
    options: &BootOptions,
    report: &Report,
    baseline: Option<&Report>,
) -> Result<u8, Failure> {
    let mut comparisons = Vec::new();
    let mut trouble = None;
    let with = baseline.map(|before| compare::reports(before, report, options.max_regression.0));
    let has_others = report.subjects.len() > 1;
    let among = has_others.then(|| compare::pairs(report, options.max_regression.0));
    let mut verdicts = Vec::new();
    for (result, counts) in [(with, true), (among, false)] {
        match result {
            Some(Ok(more)) => {
                if counts {
                    verdicts.extend(more.iter().map(Comparison::verdict));
                }
                comparisons.extend(more);
            }
            Some(Err(e)) => trouble = trouble.or(Some(husk_vmm::chain(&e))),
            None => {}
        }
    }
    // First what cannot be had again.
    if let Some(path) = &options.json {
        report.write(path).map_err(|e| host(&e))?;
    }
    if let Some(path) = &options.html {
        let page = match baseline {
            Some(before) => html::render(&[("before", before), ("after", report)], &comparisons),
            None => html::render(&[("", report)], &comparisons),
        };
        husk_bench::write_whole(path, &page).map_err(|e| host(&e))?;
    }
    let mut shown = text::summary(report);
    for comparison in &comparisons {
        shown += &format!("\n{}", text::comparison(comparison));
    }
    print(shown.as_bytes())?;
    let failed: usize = report.subjects.iter().map(|subject| subject.failed()).sum();
    if let Some(trouble) = trouble {
        warn(&format!("no comparison: {trouble}"));
    }
    if failed > 0 {
        let all: usize = report
            .subjects
            .iter()
            .map(|subject| subject.runs.len())
            .sum();
        warn(&format!("{failed} of {all} runs failed"));
    }
    Ok(match report.interrupted {
        true => INTERRUPTED,
        false if verdicts.contains(&Verdict::Slower) => SLOWER,
        false if failed > 0 => FAILED,
        false if verdicts.contains(&Verdict::TooNoisy) => TOO_NOISY,
        false => 0,
    })
}

/// Show reports that were written before. The exit status, unless they cannot be compared.
pub fn report(arguments: &ReportArgs) -> Result<u8, Failure> {
    let read = |path: &PathBuf| Report::read(path).map_err(|e| usage(&e));
    let first = read(&arguments.report)?;
    let second = arguments.after.as_ref().map(read).transpose()?;
    if let Some(path) = &arguments.html {
        check_place(path)?;
    }
    let limit = arguments.max_regression.unwrap_or_default().0;
    let (page, mut shown, comparisons);
    match &second {
        None => {
            comparisons = compare::pairs(&first, limit).map_err(|e| usage(&e))?;
            page = html::render(&[("", &first)], &comparisons);
            shown = text::summary(&first);
        }
        Some(second) => {
            comparisons = compare::reports(&first, second, limit).map_err(|e| usage(&e))?;
            page = html::render(&[("before", &first), ("after", second)], &comparisons);
            shown = String::new();
        }
    }
    for comparison in &comparisons {
        shown += &format!("\n{}", text::comparison(comparison));
    }
    if let Some(path) = &arguments.html {
        husk_bench::write_whole(path, &page).map_err(|e| host(&e))?;
    }
    print(shown.trim_start().as_bytes())?;
    let is = |verdict| comparisons.iter().any(|one| one.verdict() == verdict);
    Ok(
        match arguments.max_regression.is_some() && second.is_some() {
            true if is(Verdict::Slower) => SLOWER,
            true if is(Verdict::TooNoisy) => TOO_NOISY,
            _ => 0,
        },
    )
}

/// Read a baseline, and see that what will be measured can be compared with it.
fn baseline(path: &Path) -> Result<Report, Failure> {
    let baseline = Report::read(path).map_err(|e| usage(&e))?;
    let path = path.display();
    if !baseline.subjects.iter().any(|subject| subject.name == HUSK) {
        let message = format!("the baseline {path} has no measurement of {HUSK}");
        return Err(Failure::usage(message));
    }
    let clock = husk_measure::clock();
    if baseline.clock != clock {
        let (then, now) = (baseline.clock.label(), clock.label());
        return Err(Failure::usage(format!(
            "the baseline {path} was timed by the {then} clock, and here is the {now} clock: measure a baseline on such a host"
        )));
    }
    Ok(baseline)
}

/// A measurement takes minutes, so what cannot be written is better known before.
fn check_place(path: &Path) -> Result<(), Failure> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match path.is_dir() {
        true => Err(format!("{} is a directory", path.display())),
        false if !directory.is_dir() => {
            Err(format!("there is no directory {}", directory.display()))
        }
        false => Ok(()),
    }
    .map_err(|why| Failure::usage(format!("cannot write the report: {why}")))
}

/// The guest has something to run.
fn has_root(run: &RunArgs, config: &VmConfig) -> bool {
    let is_root = |disk: &String| disk.split(',').skip(1).any(|word| word == "root");
    let names_root = |line: &str| {
        line.split_whitespace()
            .any(|word| word.starts_with("root="))
    };
    run.initrd.is_some()
        || config.boot_source.initrd_path.is_some()
        || run.disk.iter().any(is_root)
        || config.drives.iter().any(|drive| drive.is_root_device)
        || run.cmdline.as_deref().is_some_and(names_root)
        || config
            .boot_source
            .boot_args
            .as_deref()
            .is_some_and(names_root)
}

/// An initramfs whose init marks, in memory.
fn own_init() -> Result<File, Failure> {
    let archive = husk_loader::initramfs::marking().map_err(|e| host(&e))?;
    let made = rustix::fs::memfd_create("init", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(std::io::Error::from)
        .map(File::from)
        .and_then(|mut file| file.write_all(&archive).map(|()| file));
    made.map_err(|e| Failure::host(format!("cannot keep an initramfs in memory: {e}")))
}

fn plan(arguments: &BootArgs, config: &VmConfig, init: Option<&File>) -> Result<Plan, Failure> {
    let options = &arguments.options;
    let own = std::env::current_exe()
        .map_err(|e| Failure::host(format!("this program's path is unknown: {e}")))?;
    let mut command = vec![own.into_os_string(), "run".into()];
    command.extend(without_run_options(&words_of_run(), &OF_MEASUREMENTS));
    let mut more = Vec::new();
    let of_file = &config.boot_source.kernel_image_path;
    let kernel = match &arguments.run.kernel {
        Some(kernel) => kernel.clone(),
        None if !of_file.as_os_str().is_empty() => of_file.clone(),
        None => {
            let kernel = guest::default_kernel().map_err(Failure::usage)?;
            command.extend(["--kernel".into(), kernel.clone().into_os_string()]);
            kernel
        }
    };
    if let Some(init) = init {
        // Kept open until all runs are over.
        let path = format!("/proc/{}/fd/{}", std::process::id(), init.as_raw_fd());
        more.extend(["--initrd".into(), path.into()]);
    }
    let husk = Husk {
        more,
        counted: without_run_options(&command, &["no-seccomp", "seccomp-filter"]),
        profiled: profiled(&command, &arguments.run, config),
        kernel,
    };
    let mut programs = vec![Program {
        name: HUSK.into(),
        command,
        husk: Some(husk),
    }];
    for other in &options.vs {
        let words = shlex::split(other).filter(|words| !words.is_empty());
        let words = words.ok_or_else(|| {
            Failure::usage(format!(
                "--vs {other}: this is no command, or a quote is not closed"
            ))
        })?;
        programs.push(Program {
            name: name_of(&words, &programs),
            command: words.into_iter().map(OsString::from).collect(),
            husk: None,
        });
    }
    let mark = options.mark.as_deref().map(Regex::new).transpose();
    let mark = mark.map_err(|e| Failure::usage(format!("--mark: {e}")))?;
    let until = match options.until {
        Some(Until::Mark) => husk_measure::Until::Mark,
        Some(Until::Exit) => husk_measure::Until::Exit,
        // A guest of the user's may run for ever.
        None if init.is_some() => husk_measure::Until::Exit,
        None => husk_measure::Until::Mark,
    };
    Ok(Plan {
        programs,
        runs: options.runs,
        warm_ups: options.warm_ups,
        mark,
        until,
        timeout: Duration::from_secs(options.timeout),
        profile: options.profile,
    })
}

/// The program's name, and a number where there is another of that name.
fn name_of(words: &[String], others: &[Program]) -> String {
    let program = words.first().map(Path::new).and_then(Path::file_name);
    let name = program.unwrap_or(OsStr::new("other")).to_string_lossy();
    let is_free = |name: &str| others.iter().all(|other| other.name != name);
    let numbered = (2..).map(|number| format!("{name} {number}"));
    std::iter::once(name.clone().into_owned())
        .chain(numbered)
        .find(|name| is_free(name))
        .unwrap_or_default()
}

/// The same with a kernel that tells of its initcalls.
fn profiled(command: &[OsString], run: &RunArgs, config: &VmConfig) -> Vec<OsString> {
    let (line, alone) = match (&run.cmdline, &config.boot_source.boot_args) {
        (Some(line), _) => (line.as_str(), run.no_default_cmdline),
        (None, Some(line)) if !run.no_default_cmdline => (line.as_str(), true),
        (None, _) => ("", run.no_default_cmdline),
    };
    let mut words = without_run_options(command, &["cmdline", "no-default-cmdline"]);
    let line = format!("{line} {TELL_INITCALLS}");
    words.extend(["--cmdline".into(), line.trim_start().into()]);
    if alone {
        words.push("--no-default-cmdline".into());
    }
    words
}

/// Options of `husk run` that a measurement gives itself, or that say what it says better.
const OF_MEASUREMENTS: [&str; 4] = ["timeline", "timeline-file", "exits", "stop-at-mark"];

/// `words` without some options of `husk run`, by their long names.
fn without_run_options(words: &[OsString], names: &[&str]) -> Vec<OsString> {
    let run = RunArgs::augment_args(Command::new(HUSK));
    let options = run.get_arguments();
    let options =
        options.filter(|option| option.get_long().is_some_and(|name| names.contains(&name)));
    without_options(words.iter().cloned(), &options.collect::<Vec<_>>())
}

/// The words of this process's command line that are for `husk run`.
fn words_of_run() -> Vec<OsString> {
    let mut words = std::env::args_os();
    for command in ["bench", "boot"] {
        words.by_ref().find(|word| word == command);
    }
    let own = BootOptions::augment_args(Command::new(HUSK));
    without_options(words, &own.get_arguments().collect::<Vec<_>>())
}

/// `words` without some options and their values. All are options of `husk run` or among those.
fn without_options(words: impl Iterator<Item = OsString>, options: &[&clap::Arg]) -> Vec<OsString> {
    let run = RunArgs::augment_args(Command::new(HUSK));
    let mut kept = Vec::new();
    let mut words = words;
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        let long = text
            .strip_prefix("--")
            .map(|rest| rest.split('=').next().unwrap_or(rest));
        let mut letters = text.strip_prefix('-').unwrap_or_default().chars();
        let short = letters.next().filter(|_| letters.next().is_none());
        let is_it = |option: &&clap::Arg| match long {
            Some(_) => option.get_long() == long,
            None => short.is_some() && option.get_short() == short,
        };
        let dropped = options.iter().copied().find(is_it);
        let known = dropped.or_else(|| run.get_arguments().find(is_it));
        // One that may do without a value has it behind `=`, or it is a word that no option looks like.
        let takes_next = known.is_some_and(|option| {
            option.get_action().takes_values()
                && option
                    .get_num_args()
                    .is_none_or(|count| count.min_values() > 0)
        }) && !text.contains('=');
        let value = if takes_next { words.next() } else { None };
        if dropped.is_none() {
            kept.push(word);
            kept.extend(value);
        }
    }
    kept
}

/// Tells how far the runs are, on stderr.
struct Teller {
    quiet: bool,
    /// One line that is written again and again, instead of a line for each run.
    on_terminal: bool,
    /// Of the host's clock.
    unit: &'static str,
}

impl Teller {
    fn new(quiet: bool) -> Self {
        Self {
            quiet,
            on_terminal: std::io::stderr().is_terminal(),
            unit: husk_measure::clock().unit(),
        }
    }

    fn tell(&self, progress: &Progress<'_>) {
        if self.quiet {
            return;
        }
        let Progress {
            done,
            of,
            program,
            kind,
            run,
        } = progress;
        let what = match kind {
            Kind::WarmUp => "warming up",
            Kind::Counting => "counting",
            Kind::Profile => "profiling",
            Kind::Measured => "measuring",
        };
        let how = match (&run.failed, run.figure()) {
            (Some(failed), _) => format!("failed: {}", failed.reason),
            (None, Some((phase, ns))) => format!(
                "{} after {:.2} {}",
                phase.label(),
                ns as f64 / 1e6,
                self.unit
            ),
            (None, None) => "done".into(),
        };
        let line = husk_bench::plain(&format!("{done}/{of} {what} {program}: {how}"));
        match self.on_terminal {
            true => crate::session::say(&format!("\r\x1b[K{line}")),
            false => crate::session::say(&format!("{line}\n")),
        }
    }

    fn end(&self) {
        if !self.quiet && self.on_terminal {
            crate::session::say("\r\x1b[K");
        }
    }
}

fn warn(message: &str) {
    crate::session::say(&format!("husk: {message}\n"));
}

fn usage(error: &dyn std::error::Error) -> Failure {
    Failure::usage(husk_vmm::chain(error))
}

fn host(error: &dyn std::error::Error) -> Failure {
    Failure::host(husk_vmm::chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn split(words: &str) -> String {
        let own = BootOptions::augment_args(Command::new(HUSK));
        let words = words.split(' ').map(OsString::from);
        let kept = without_options(words, &own.get_arguments().collect::<Vec<_>>());
        kept.join(OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn what_is_not_for_the_measurement_is_for_the_monitor() {
        for (given, kept) in [
            ("--kernel k --runs 30", "--kernel k"),
            ("--runs=30 -k k --json=a --html b -c 2", "-k k -c 2"),
            (
                "--quiet --cmdline --json --disk a,root",
                "--cmdline --json --disk a,root",
            ),
            ("--cmdline=--runs --profile -m 1G", "--cmdline=--runs -m 1G"),
            (
                "--vs firecracker --entropy --mark x --pci",
                "--entropy --pci",
            ),
            ("-m64 --timeout 3 --entropy rate=5", "-m64 --entropy rate=5"),
        ] {
            assert_eq!(split(given), kept, "{given}");
        }
    }

    #[test]
    fn a_kernel_is_profiled_with_the_parameters_it_is_measured_with() {
        let profile = |words: &str, boot_args: Option<&str>| {
            let command: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            let mut config = VmConfig::default();
            config.boot_source.boot_args = boot_args.map(str::to_owned);
            let crate::cli::Command::Run(run) = Cli::try_parse_from(&command).unwrap().command
            else {
                panic!("{words}")
            };
            let words = profiled(&command, &run, &config);
            words.join(OsStr::new(" ")).into_string().unwrap()
        };
        let tell = TELL_INITCALLS;
        assert_eq!(
            profile("husk run -k k", None),
            format!("husk run -k k --cmdline {tell}")
        );
        assert_eq!(
            profile("husk run --cmdline=quiet -k k", None),
            format!("husk run -k k --cmdline quiet {tell}")
        );
        assert_eq!(
            profile("husk run --no-default-cmdline -k k", Some("a")),
            format!("husk run -k k --cmdline {tell} --no-default-cmdline")
        );
        assert_eq!(
            profile("husk run --config f", Some("a b")),
            format!("husk run --config f --cmdline a b {tell} --no-default-cmdline")
        );
    }

    #[test]
    fn two_monitors_of_one_name_are_told_apart() {
        let words = ["/usr/bin/husk".to_owned()];
        let other = |name: &str| Program {
            name: name.into(),
            command: Vec::new(),
            husk: None,
        };
        assert_eq!(name_of(&words, &[]), "husk");
        assert_eq!(name_of(&words, &[other("husk")]), "husk 2");
    }
}
