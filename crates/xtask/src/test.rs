//! `cargo xtask test`: every test of the project.

use crate::apt;
use crate::boot_time;
use crate::cargo::{self, TestProgram};
use crate::clients;
use crate::demo::{self, Demo};
use crate::host::{self, TempDir, shell_quote};
use crate::kernel;
use crate::testbed::{Finish, Testbed};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How long all end-to-end tests together may take on the testbed.
const TESTBED_LIMIT: Duration = Duration::from_secs(45 * 60);
/// Enough for a guest of 6 GiB of which little is touched, and for what tests write to the overlay.
const TESTBED_MIB: u32 = 8192;

/// Emulated hosts at a time.
const TESTBEDS: usize = 2;

/// What tests call: beside what each step installs for itself.
const TOOLS: &[(&str, &str)] = &[
    ("chromium", "chromium"),
    ("curl", "curl"),
    ("gcc", "gcc"),
    ("/usr/include/stdio.h", "libc6-dev"),
    ("debugfs", "e2fsprogs"),
    ("dmsetup", "dmsetup"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("ldd", "libc-bin"),
    ("losetup", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.erofs", "erofs-utils"),
    ("nsenter", "util-linux"),
    ("passt", "passt"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("setpriv", "util-linux"),
    ("setsid", "util-linux"),
];

/// How often an emulated host that hangs or ends by itself is replaced. The tests that it had not come to run on the next.
const REPLACEMENTS: usize = 2;

/// As many tests are told to be the slowest.
const SLOWEST: usize = 12;

/// Boot times against those that are committed.
const BOOT_TIME: &str = "boot-time";

/// The tests that drive Husk by clients of others.
const CLIENTS: &str = "clients";

/// `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {
    /// Run the end-to-end tests on this machine's KVM
    #[arg(long, conflicts_with = "testbed")]
    native: bool,
    /// Run the end-to-end tests on the testbed
    #[arg(long)]
    testbed: bool,
    /// Only these: `unit`, `smoke`, `boot-time`, a file of tests/, or a package (default: all)
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Arguments for the test programs, such as a filter
    #[arg(last = true, value_name = "ARGS")]
    program_args: Vec<String>,
}

/// Where a test program runs.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Unit,
    Smoke,
    EndToEnd,
}

/// What the test programs said: the sums of their `test result:` lines.
#[derive(Default, Debug, PartialEq)]
struct Tally {
    passed: u64,
    failed: u64,
}

/// Builds and runs them; the last line is `N passed, N failed`.
pub fn run(args: &Args) -> Result<ExitCode> {
    apt::need(TOOLS)?;
    let husk = host::step("building husk (release)", cargo::release_binary)?;
    let programs = host::step("building the tests", cargo::test_programs)?;
    let chosen = choose(&programs, &args.names)?;
    let of = |kind: Kind| {
        chosen
            .iter()
            .filter(move |program| kind_of(program) == kind)
            .copied()
    };
    let mut tally = Tally::default();
    for program in of(Kind::Unit) {
        run_native(program, &[], &args.program_args, &mut tally)?;
    }
    if args.names.is_empty() || args.names.iter().any(|name| name == "unit") {
        run_doc_tests(&mut tally)?;
    }
    for program in of(Kind::Smoke) {
        if !Path::new("/dev/kvm").exists() {
            bail!(
                "the native smoke tests need /dev/kvm, and this machine has none: enable virtualisation, or name the tests to run without them"
            );
        }
        let mut env = vec![("HUSK_BIN".to_owned(), husk.display().to_string())];
        if program.target == CLIENTS {
            let place = clients::ensure()?.display().to_string();
            env.push(("HUSK_TEST_CLIENTS".into(), place));
        }
        run_native(program, &env, &args.program_args, &mut tally)?;
    }
    let end_to_end: Vec<&TestProgram> = of(Kind::EndToEnd).collect();
    if !end_to_end.is_empty() {
        let mut env = environment(&husk, &demo::ensure()?, &kernel::ensure()?)?;
        let native = args.native || (!args.testbed && demo::runs_linux(&husk)?);
        if native {
            for program in end_to_end {
                run_native(program, &env, &args.program_args, &mut tally)?;
            }
        } else {
            env.push(("HUSK_TEST_EMULATED".into(), "1".into()));
            run_on_testbed(&end_to_end, &env, &args.program_args, &mut tally)?;
        }
    }
    if args.names.is_empty() || args.names.iter().any(|name| name == BOOT_TIME) {
        for (guest, ok) in boot_time::guard()? {
            let outcome = if ok { "ok" } else { "FAILED" };
            println!("test {BOOT_TIME}: {guest} ... {outcome}");
            tally.passed += u64::from(ok);
            tally.failed += u64::from(!ok);
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn kind_of(program: &TestProgram) -> Kind {
    match (
        program.package == "husk" && program.integration,
        program.target.as_str(),
    ) {
        (true, "smoke" | CLIENTS) => Kind::Smoke,
        (true, _) => Kind::EndToEnd,
        (false, _) => Kind::Unit,
    }
}

/// The programs that `names` ask for; a name that nothing has is an error.
fn choose<'a>(programs: &'a [TestProgram], names: &[String]) -> Result<Vec<&'a TestProgram>> {
    let is = |program: &TestProgram, name: &str| match name {
        "unit" => kind_of(program) == Kind::Unit,
        _ if program.integration => program.target == name,
        _ => program.package == name,
    };
    for name in names {
        let is_ours = ["unit", BOOT_TIME].contains(&name.as_str());
        if !is_ours && !programs.iter().any(|program| is(program, name)) {
            let known: Vec<&str> = programs
                .iter()
                .filter(|p| p.integration)
                .map(|p| p.target.as_str())
                .collect();
            bail!(
                "no tests are called {name}: say unit, {BOOT_TIME}, a package, or one of {}",
                known.join(", ")
            );
        }
    }
    let wanted =
        |program: &&TestProgram| names.is_empty() || names.iter().any(|name| is(program, name));
    Ok(programs.iter().filter(wanted).collect())
}

/// What the end-to-end tests find their kernels by.
fn environment(husk: &Path, demo: &Demo, minimal: &Path) -> Result<Vec<(String, String)>> {
    let paths: [(&str, PathBuf); 7] = [
        ("HUSK_TEST_TOOL", guest_tool()?),
        ("HUSK_BIN", husk.to_path_buf()),
        ("HUSK_TEST_DEBIAN_KERNEL", demo.vmlinuz.clone()),
        ("HUSK_TEST_MINIMAL_KERNEL", minimal.to_path_buf()),
        ("HUSK_TEST_BUSYBOX", demo.busybox.clone()),
        ("HUSK_TEST_MODULES", demo.modules.clone()),
        ("HUSK_CACHE", host::cache_dir()?),
    ];
    let text = |(name, path): (&str, PathBuf)| {
        let value = path
            .to_str()
            .with_context(|| format!("not UTF-8: {}", path.display()))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    paths.into_iter().map(text).collect()
}

/// What tests run in guests, as a static program.
fn guest_tool() -> Result<PathBuf> {
    let root = host::workspace_root()?;
    let tool = root.join("target/guest-tool");
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-O2", "-o"])
        .arg(&tool)
        .arg(root.join("tests/guest/tool.c"));
    host::run_quiet(&mut gcc)?;
    Ok(tool)
}

fn run_native(
    program: &TestProgram,
    env: &[(String, String)],
    args: &[String],
    tally: &mut Tally,
) -> Result<()> {
    eprintln!("==> {} {}", program.package, program.target);
    let mut command = Command::new(&program.executable);
    command
        .args(args)
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .envs(env.iter().cloned());
    follow(&mut command, &program.target, tally)
}

fn run_doc_tests(tally: &mut Tally) -> Result<()> {
    eprintln!("==> documentation");
    let mut command = cargo::cargo()?;
    command.args(["test", "--workspace", "--doc", "--quiet"]);
    follow(&mut command, "documentation", tally)
}

/// Shows what a native test program prints and counts its results.
fn follow(command: &mut Command, name: &str, tally: &mut Tally) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start the tests of {name}"))?;
    let before = tally.failed;
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .context("cannot read the tests' output")?
            > 0
        {
            show(&line);
            tally.add(&String::from_utf8_lossy(&line));
            line.clear();
        }
    }
    let status = child.wait().context("cannot wait for the tests")?;
    if !status.success() && tally.failed == before {
        eprintln!("xtask: the tests of {name} ended with {status} before they had a result");
        tally.failed += 1;
    }
    Ok(())
}

/// Runs the tests of all programs on emulated hosts of one processor each. Whichever is free takes the next test.
///
/// Two such hosts are as fast as one with two processors. And QEMU then emulates each on one thread: on two, guests of four
/// vCPUs were seen to fault or hang in one boot of thirty.
fn run_on_testbed(
    programs: &[&TestProgram],
    env: &[(String, String)],
    args: &[String],
    tally: &mut Tally,
) -> Result<()> {
    let mut shares = Vec::new();
    for program in programs {
        let tests = list(program, args)?;
        shares.push(Share { program, tests });
    }
    let all: usize = shares.iter().map(|share| share.tests.len()).sum();
    let hosts = TESTBEDS.min(all);
    eprintln!("==> {all} tests on {hosts} testbeds");
    Testbed::prepare()?;
    let claims = TempDir::new(&std::env::temp_dir(), "husk-claims")?;
    let results: Vec<Result<Results>> = std::thread::scope(|scope| {
        let start = || scope.spawn(|| run_host(&shares, claims.path(), env));
        let started: Vec<_> = (0..hosts).map(|_| start()).collect();
        let joined = started.into_iter().map(|thread| thread.join());
        joined
            .map(|result| result.unwrap_or_else(|_| bail!("a testbed's thread panicked")))
            .collect()
    });
    let mut sum = Results::default();
    for result in results {
        let result = result?;
        sum.ended.extend(result.ended);
        sum.took.extend(result.took);
    }
    sum.took.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
    let slowest = sum.took.iter().take(SLOWEST);
    let slowest: Vec<_> = slowest
        .map(|(took, test)| format!("{test} {} s", took.as_secs()))
        .collect();
    eprintln!("==> the slowest of them: {}", slowest.join(", "));
    for (share, left) in shares.iter().zip(sum.left(&shares)) {
        for test in left {
            eprintln!(
                "xtask: {} {test} did not come to an end",
                share.program.target
            );
        }
    }
    let passed = sum.ended.values().filter(|&&ok| ok).count();
    tally.passed += passed as u64;
    tally.failed += (all - passed) as u64;
    Ok(())
}

/// The tests of one program, by their full names.
struct Share<'a> {
    program: &'a TestProgram,
    tests: Vec<String>,
}

/// The names of a program's tests, as its filter in `args` leaves them; without those that are no tests by themselves.
fn list(program: &TestProgram, args: &[String]) -> Result<Vec<String>> {
    let ask = |more: &[&str]| -> Result<Vec<String>> {
        let output = Command::new(&program.executable)
            .args(args)
            .args(["--list", "--format", "terse"])
            .args(more)
            .output()
            .with_context(|| format!("cannot start {}", program.executable.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    };
    let ignored = ask(&["--ignored"])?;
    let all = ask(&[])?.into_iter();
    Ok(all.filter(|name| !ignored.contains(name)).collect())
}

/// Runs what no other host has claimed, on an emulated host. One that dies is replaced: a program cannot hang a sound kernel,
/// and software emulation of a processor is not always sound. A test during which that happens twice has failed.
fn run_host(shares: &[Share], claims: &Path, env: &[(String, String)]) -> Result<Results> {
    let mut results = Results::default();
    let mut suspects: Vec<(usize, String)> = Vec::new();
    for boot in 0..=REPLACEMENTS {
        if boot > 0 {
            eprintln!("==> another emulated host, for the tests that are left");
        }
        let testbed = Testbed {
            cpus: 1,
            memory_mib: TESTBED_MIB,
            limit: Some(TESTBED_LIMIT),
            out: Some(claims.to_path_buf()),
            env: env.to_vec(),
            ..Testbed::default()
        };
        let script = testbed_script(shares)?;
        let finish = testbed.run(&["sh".into(), "-c".into(), script], &[], |output| {
            show(&results.feed(output));
        })?;
        if finish != Finish::HostDied {
            break;
        }
        let Some(suspect) = results.running.take() else {
            continue;
        };
        eprintln!("xtask: the emulated host died while {} ran", suspect.1);
        if suspects.contains(&suspect) {
            results.ended.insert(suspect, false);
            continue;
        }
        let claim = claims.join(claim(suspect.0, &suspect.1));
        std::fs::remove_dir(&claim)
            .with_context(|| format!("cannot remove {}", claim.display()))?;
        suspects.push(suspect);
    }
    Ok(results)
}

/// The folder by which a host claims a test: only one can make it.
fn claim(program: usize, test: &str) -> String {
    format!("{program}-{}", test.replace("::", "-"))
}

/// Runs each test that this host is the first to claim, in its program's folder, and says of which program it is.
fn testbed_script(shares: &[Share]) -> Result<String> {
    let mut script = String::new();
    for (index, Share { program, tests }) in shares.iter().enumerate() {
        let folder = shell_quote(program.folder.to_str().context("a folder is not UTF-8")?);
        let path = shell_quote(program.executable.to_str().context("a path is not UTF-8")?);
        script +=
            &format!("cd {folder}; export CARGO_MANIFEST_DIR={folder}; echo {PROGRAM}{index}\n");
        for test in tests {
            let claim = shell_quote(&format!("/out/{}", claim(index, test)));
            let test = shell_quote(test);
            script +=
                &format!("mkdir {claim} 2>/dev/null && {path} --test-threads=1 --exact {test}\n");
        }
    }
    script += "true\n";
    Ok(script)
}

const PROGRAM: &str = "husk-test-program:";

/// Cuts the testbed's output into lines and finds the tests' results in them.
#[derive(Default)]
struct Results {
    line: Vec<u8>,
    /// Which of the programs prints.
    program: usize,
    /// The test that has begun last and has not ended.
    running: Option<(usize, String)>,
    /// When it began.
    since: Option<Instant>,
    /// Program, test, and whether it passed.
    ended: BTreeMap<(usize, String), bool>,
    /// How long each took.
    took: Vec<(Duration, String)>,
}

impl Results {
    /// Returns the lines that `output` completes: several testbeds print, and lines must not mix.
    fn feed(&mut self, output: &[u8]) -> Vec<u8> {
        let mut complete = Vec::new();
        for &byte in output {
            self.line.push(byte);
            // A test's name is there as soon as it begins, its result ends the line.
            if byte == b' ' && self.line.ends_with(b" ... ") {
                let line = String::from_utf8_lossy(&self.line);
                let name = line
                    .strip_prefix("test ")
                    .map(|rest| rest.replace(" ... ", ""));
                self.running = name.map(|name| (self.program, name));
                self.since = Some(Instant::now());
            }
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                if self.take(String::from_utf8_lossy(&line).trim_end()) {
                    complete.extend_from_slice(&line);
                }
            }
        }
        complete
    }

    /// Whether the line is to be shown.
    fn take(&mut self, line: &str) -> bool {
        if let Some(index) = line.strip_prefix(PROGRAM) {
            self.program = index.parse().unwrap_or(usize::MAX);
            return false;
        }
        let passed = match line.rsplit_once(" ... ") {
            Some((_, "ok")) => true,
            Some((_, "FAILED")) => false,
            // What a program says of its one test is said already.
            _ => {
                return !["", "running 1 test"].contains(&line)
                    && !line.starts_with("test result: ok");
            }
        };
        if let Some(test) = self.running.take() {
            let took = self.since.take().map(|since| since.elapsed());
            self.took.push((took.unwrap_or_default(), test.1.clone()));
            self.ended.insert(test, passed);
        }
        true
    }

    /// The tests that have not ended, program by program.
    fn left(&self, shares: &[Share]) -> Vec<Vec<String>> {
        let left = |(index, share): (usize, &Share)| {
            let tests = share.tests.iter();
            let left = tests.filter(|&test| !self.ended.contains_key(&(index, test.clone())));
            left.cloned().collect()
        };
        shares.iter().enumerate().map(left).collect()
    }
}

impl Tally {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 0 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some((_, result)) = line.split_once("test result: ") else {
            return;
        };
        let number = |what: &str| {
            let mut parts = result.split([';', '.']).map(str::trim);
            parts.find_map(|part| part.strip_suffix(what)?.trim().parse::<u64>().ok())
        };
        if let (Some(passed), Some(failed)) = (number("passed"), number("failed")) {
            self.passed += passed;
            self.failed += failed;
        }
    }
}

fn show(output: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(output).and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str = "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.31s\n";
    const BAD: &str =
        "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out\n";

    fn program(package: &str, target: &str, integration: bool) -> TestProgram {
        TestProgram {
            package: package.into(),
            target: target.into(),
            integration,
            executable: "/t/x".into(),
            folder: "/src".into(),
        }
    }

    #[test]
    fn results_add_up() {
        let mut tally = Tally::default();
        tally.add(OK);
        tally.add("test some::test ... ok");
        tally.add(BAD);
        assert_eq!(
            tally,
            Tally {
                passed: 14,
                failed: 3
            }
        );
    }

    const OUTPUT: &str = "husk-test-program:1\n\nrunning 1 test\ntest a::one ... ok\n\ntest result: ok. 1 passed; 0 failed\n\n\
        running 1 test\ntest a::two ... FAILED\ntest three ... ";

    #[test]
    fn results_are_found_however_the_console_cuts_them() {
        for cut in 0..OUTPUT.len() {
            let mut results = Results::default();
            let mut shown = results.feed(&OUTPUT.as_bytes()[..cut]);
            shown.extend(results.feed(&OUTPUT.as_bytes()[cut..]));
            assert_eq!(
                String::from_utf8(shown).unwrap(),
                "test a::one ... ok\ntest a::two ... FAILED\n"
            );
            let key = |name: &str| (1, name.to_owned());
            let ended = BTreeMap::from([(key("a::one"), true), (key("a::two"), false)]);
            assert_eq!(results.ended, ended);
            assert_eq!(results.running, Some(key("three")));
        }
    }

    #[test]
    fn each_test_is_run_by_the_host_that_claims_it() {
        let (first, second) = (program("husk", "boot", true), program("husk", "net", true));
        let share = |program, tests: &[&str]| Share {
            program,
            tests: tests.iter().map(|&test| test.to_owned()).collect(),
        };
        let shares = [
            share(&first, &["three"]),
            share(&second, &["a::one", "a::two", "three"]),
        ];
        let mut results = Results::default();
        results.feed(OUTPUT.as_bytes());
        assert_eq!(results.left(&shares), [["three"], ["three"]]);
        // Run twice, as by two hosts that share a folder, with a program that says what it is called with.
        let claims = TempDir::new(&std::env::temp_dir(), "husk-claims").unwrap();
        let script = testbed_script(&shares).unwrap();
        let script = script
            .replace("/out", claims.path().to_str().unwrap())
            .replace("/t/x", "echo")
            .replace("/src", "/");
        let said = host::run_quiet(Command::new("sh").args(["-c", &script, "sh"])).unwrap();
        assert_eq!(said.matches("--exact").count(), 4, "{said}");
        std::fs::remove_dir(claims.path().join(claim(1, "a::two"))).unwrap();
        let again = host::run_quiet(Command::new("sh").args(["-c", &script, "sh"])).unwrap();
        let lines: Vec<&str> = again.lines().filter(|l| l.contains("--exact")).collect();
        assert_eq!(lines, ["--test-threads=1 --exact a::two"]);
    }

    #[test]
    fn a_programs_place_follows_from_its_package_and_name() {
        assert_eq!(kind_of(&program("husk", "husk", false)), Kind::Unit);
        assert_eq!(kind_of(&program("husk-virtio", "kit", true)), Kind::Unit);
        assert_eq!(kind_of(&program("husk", "smoke", true)), Kind::Smoke);
        assert_eq!(kind_of(&program("husk", "clients", true)), Kind::Smoke);
        assert_eq!(kind_of(&program("husk", "boot", true)), Kind::EndToEnd);
    }

    #[test]
    fn names_choose_programs_and_an_unknown_one_is_an_error() {
        let programs = [
            program("husk", "boot", true),
            program("husk-bus", "husk_bus", false),
        ];
        let chosen = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
            choose(&programs, &names).map(|chosen| chosen.len())
        };
        assert_eq!(chosen(&[]).unwrap(), 2);
        assert_eq!(chosen(&["unit"]).unwrap(), 1);
        assert_eq!(chosen(&["boot"]).unwrap(), 1);
        assert_eq!(chosen(&["husk-bus", "boot"]).unwrap(), 2);
        assert!(chosen(&["bot"]).unwrap_err().to_string().contains("boot"));
    }
}
