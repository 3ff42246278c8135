//! Husk's binary: the command line, logging, and the wiring of threads. No logic of its own.
#![forbid(unsafe_code)]

mod bench;
mod cli;
mod client;
mod devices;
mod ears;
mod firecracker;
mod fork;
mod guest;
mod logging;
mod metadata;
mod metrics;
mod run;
mod serial;
mod serve;
mod session;
mod snapshot;
mod socket;
mod timeline;

use clap::CommandFactory;
use clap::error::ErrorKind;
use cli::{BenchCommand, Cli, Command};
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

/// What ends the process with a message.
pub struct Failure {
    message: String,
    status: u8,
}

impl Failure {
    /// The user can mend it: exit status 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            status: 2,
        }
    }

    /// The host is in the way: exit status 1.
    pub fn host(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            status: 1,
        }
    }
}

impl From<husk_vmm::Error> for Failure {
    fn from(error: husk_vmm::Error) -> Self {
        Self {
            message: husk_vmm::chain(&error),
            status: if error.is_host_trouble() { 1 } else { 2 },
        }
    }
}

fn main() -> ExitCode {
    let start = Instant::now();
    husk_console::install_panic_hook();
    if firecracker::is_called() {
        return firecracker::main(start);
    }
    metrics::install_panic_hook();
    let cli = match Cli::of_process() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if let Err(message) = logging::start(
        cli.log.log_level.map(Into::into),
        cli.log.log_file.as_deref(),
    ) {
        return report(Failure::usage(message));
    }
    let result = match cli.command {
        Command::Run(arguments) => run::run(&arguments, start),
        Command::Serve(arguments) => serve::serve(&arguments, start),
        Command::Api(arguments) => client::api(&arguments),
        Command::Pause(socket) => client::set_state(&socket, "Paused"),
        Command::Resume(socket) => client::set_state(&socket, "Resumed"),
        Command::Stop(arguments) => client::stop(&arguments.socket, arguments.power_button),
        Command::Info(socket) => client::info(&socket),
        Command::Snapshot(arguments) => snapshot::snapshot(&arguments),
        Command::Fork(arguments) => snapshot::fork(&arguments),
        Command::Restore(arguments) => snapshot::restore(&arguments, start),
        Command::Bench(BenchCommand::Boot(arguments)) => bench::boot(&arguments),
        Command::Bench(BenchCommand::Report(arguments)) => bench::report(&arguments),
        Command::Doctor(arguments) => doctor(arguments.json),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "husk", &mut script);
            print(&script)
        }
        Command::Man => {
            let mut page = Vec::new();
            match clap_mangen::Man::new(Cli::command()).render(&mut page) {
                Ok(()) => print(&page),
                Err(e) => Err(Failure::host(format!("cannot make the man page: {e}"))),
            }
        }
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => report(failure),
    }
}

/// Help and version go to stdout as they are; what is wrong with a flag is one line.
fn usage(error: &clap::Error) -> ExitCode {
    let text = error.to_string();
    if !error.use_stderr() {
        return match print(text.as_bytes()) {
            Ok(status) => ExitCode::from(status),
            Err(failure) => report(failure),
        };
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = std::io::stderr().write_all(text.as_bytes());
        return ExitCode::from(2);
    }
    report(Failure::usage(format!(
        "{}; see `husk --help`",
        one_line(error)
    )))
}

/// What is wrong with a flag, on one line.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let said = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .collect::<Vec<_>>()
        .join("; ")
        .replace(":; ", ": ");
    said.trim_start_matches("error: ").to_owned()
}

fn doctor(json: bool) -> Result<u8, Failure> {
    let report = husk_doctor::examine(&husk_doctor::DefaultGuest {
        kernel: guest::default_kernel(),
        busybox: guest::busybox(),
    });
    let text = match json {
        true => report.to_json(env!("CARGO_PKG_VERSION")) + "\n",
        false => report.to_string(),
    };
    print(text.as_bytes())?;
    Ok(u8::from(!report.can_run_linux))
}

fn report(failure: Failure) -> ExitCode {
    // With stderr closed there is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "husk: {}", failure.message);
    ExitCode::from(failure.status)
}

/// To stdout.
pub fn print(bytes: &[u8]) -> Result<u8, Failure> {
    match std::io::stdout().write_all(bytes) {
        // `husk man | head` has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(0),
        Err(e) => Err(Failure::host(format!("cannot write to stdout: {e}"))),
        Ok(()) => Ok(0),
    }
}
