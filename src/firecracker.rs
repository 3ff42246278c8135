//! The binary under the name `firecracker`: Firecracker's flags, messages and exit statuses.

use crate::session::{First, OnSignal, Options, Session};
use crate::socket::ApiSocket;
use crate::{Failure, logging, metrics};
use clap::{ArgAction, Parser};
use husk_config::{LogLevel, Logger, VmConfig};
use husk_mmds::Mmds;
use husk_sandbox::Filters;
use husk_vmm::Identity;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Exit statuses that programs look for.
const GENERIC_ERROR: u8 = 1;
const BAD_CONFIGURATION: u8 = 152;
const ARG_PARSING: u8 = 153;

/// Memory of a VM whose client does not say, in MiB.
const MEMORY_MIB: u64 = 128;

/// Firecracker's flags.
#[derive(Debug, Parser)]
#[command(name = "firecracker", disable_version_flag = true)]
struct Flags {
    /// Path to the unix domain socket of the API
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Name of the microVM
    #[arg(long, default_value = "anonymous-instance", value_parser = crate::cli::instance_id)]
    id: String,
    /// Seccomp filter: a JSON file (docs/seccomp.md)
    #[arg(long, value_name = "PATH", conflicts_with = "no_seccomp")]
    seccomp_filter: Option<PathBuf>,
    /// Run without seccomp filters
    #[arg(long)]
    no_seccomp: bool,
    /// When the process was started, in microseconds of the monotonic clock
    #[arg(long, value_name = "US")]
    start_time_us: Option<u64>,
    /// The same in microseconds of the process's CPU time
    #[arg(long, value_name = "US")]
    start_time_cpu_us: Option<u64>,
    /// CPU time of the parent process in microseconds
    #[arg(long, value_name = "US")]
    parent_cpu_time_us: Option<u64>,
    /// The microVM's configuration, in JSON
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// Metadata for the guest, in JSON
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// No API; needs --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// File or FIFO for the log
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,
    /// Error, Warning, Info, Debug, Trace or Off
    #[arg(long)]
    level: Option<String>,
    /// Log only messages of this module
    #[arg(long)]
    module: Option<String>,
    /// Log each message's level
    #[arg(long)]
    show_level: bool,
    /// Log each message's source file and line
    #[arg(long)]
    show_log_origin: bool,
    /// File or FIFO for metrics
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<PathBuf>,
    /// Log how long the guest took to boot (it writes 123 to the boot timer's address)
    #[arg(long)]
    boot_timer: bool,
    /// Print the version
    #[arg(long, action = ArgAction::SetTrue)]
    version: bool,
    /// Print the version of snapshots
    #[arg(long)]
    snapshot_version: bool,
    /// Print the version of this snapshot
    #[arg(long, value_name = "PATH")]
    describe_snapshot: Option<PathBuf>,
    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = husk_api::MAX_BODY)]
    http_api_max_payload_size: usize,
    /// Most bytes of metadata [default: as --http-api-max-payload-size]
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Put devices on PCI
    #[arg(long)]
    enable_pci: bool,
}

/// The program was started by this name.
pub fn is_called() -> bool {
    let name = std::env::args_os().next();
    let name = name.as_deref().map(Path::new).and_then(Path::file_name);
    name == Some(OsStr::new("firecracker"))
}

/// What Firecracker's main does.
pub fn main(start: Instant) -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) if !error.use_stderr() => {
            let text = format!("Firecracker v{}\n\n{error}", husk_api::FIRECRACKER_VERSION);
            return finish(crate::print(text.as_bytes()));
        }
        Err(error) => {
            let said = crate::one_line(&error);
            let message = format!("Arguments parsing error: {said}; see --help");
            return finish(Err(Failure {
                message,
                status: ARG_PARSING,
            }));
        }
    };
    if let Err(message) = logging::start(Some(log::LevelFilter::Info), None) {
        return finish(Err(Failure::host(message)));
    }
    finish(run(flags, start))
}

fn finish(result: Result<u8, Failure>) -> ExitCode {
    match result {
        Ok(0) => ExitCode::SUCCESS,
        Ok(status) => {
            log::error!("Firecracker exiting with error. exit_code={status}");
            ExitCode::from(status)
        }
        Err(failure) => {
            use std::io::Write;
            // With stderr closed there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "Error: {}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

fn run(flags: Flags, start: Instant) -> Result<u8, Failure> {
    if flags.version {
        let text = format!(
            "Firecracker v{}\n\nHusk v{}\n",
            husk_api::FIRECRACKER_VERSION,
            env!("CARGO_PKG_VERSION")
        );
        return crate::print(text.as_bytes());
    }
    if flags.snapshot_version {
        let version = husk_vmm::SNAPSHOT_VERSION;
        return crate::print(format!("v{version}.0.0\n").as_bytes());
    }
    if let Some(path) = &flags.describe_snapshot {
        let version = husk_vmm::snapshot_version(path);
        let version = version.map_err(|e| generic(husk_vmm::chain(&e)))?;
        return crate::print(format!("v{version}.0.0\n").as_bytes());
    }
    set_up_process(&flags)?;
    let filters = match &flags.seccomp_filter {
        _ if flags.no_seccomp => Filters::none(),
        Some(path) => Filters::from_file(path).map_err(|e| generic(husk_vmm::chain(&e)))?,
        None => Filters::built_in(),
    };
    let mmds = Mmds::new(
        flags
            .mmds_size_limit
            .unwrap_or(flags.http_api_max_payload_size),
    );
    if let Some(path) = &flags.metadata {
        let why = crate::metadata::fill(&mmds, path);
        why.map_err(|why| generic(format!("--metadata {}: {why}", path.display())))?;
    }
    let first = first(&flags)?;
    let api = (!flags.no_api).then(|| ApiSocket {
        path: flags.api_sock.clone(),
        max_body: flags.http_api_max_payload_size,
        // Its clients remove it.
        tidy: false,
    });
    let identity = Identity {
        id: flags.id,
        name: "Firecracker",
        version: husk_api::FIRECRACKER_VERSION,
        api_version: husk_api::FIRECRACKER_VERSION,
    };
    let options = Options {
        mmds,
        api,
        on_signal: OnSignal::AsFirecracker,
        // Its clients know no user networks.
        ..Options::new(start, filters, identity)
    };
    let from_file = matches!(first, First::Boot(_));
    match Session::go(options, first) {
        // A configuration that cannot be booted.
        Err(failure) if from_file && failure.status == 2 => Err(Failure {
            status: BAD_CONFIGURATION,
            ..failure
        }),
        Err(failure) => Err(Failure {
            status: GENERIC_ERROR,
            ..failure
        }),
        // How a guest ends is no error of the monitor's, but for one that KVM could not run on.
        Ok(0 | 3 | 4) => Ok(0),
        Ok(5) => Ok(GENERIC_ERROR),
        Ok(status) => Ok(status),
    }
}

/// The log, the metrics, and what they say of the start.
fn set_up_process(flags: &Flags) -> Result<(), Failure> {
    let level = match &flags.level {
        Some(text) => Some(level(text)?),
        None => None,
    };
    logging::set_instance(&flags.id);
    let settings = Logger {
        log_path: flags.log_path.clone(),
        level,
        show_level: flags.show_level.then_some(true),
        show_log_origin: flags.show_log_origin.then_some(true),
        module: flags.module.clone(),
    };
    logging::configure(&settings).map_err(generic)?;
    log::info!(
        "Running Firecracker v{} (Husk v{})",
        husk_api::FIRECRACKER_VERSION,
        env!("CARGO_PKG_VERSION")
    );
    if let Some(path) = &flags.metrics_path {
        let settings = husk_config::Metrics {
            metrics_path: path.clone(),
        };
        metrics::configure(&settings).map_err(|f| generic(f.message))?;
    }
    husk_metrics::start_times(
        flags.start_time_us,
        flags.start_time_cpu_us,
        flags.parent_cpu_time_us,
    );
    Ok(())
}

fn level(text: &str) -> Result<LogLevel, Failure> {
    let value = serde_json::Value::String(text.into());
    serde_json::from_value(value).map_err(|_| Failure {
        message: format!(
            "Invalid value for logger level: {text}. Possible values: [Off, Trace, Debug, Info, Warning, Error]"
        ),
        status: BAD_CONFIGURATION,
    })
}

/// The VM of `--config-file`, or an empty one for requests to fill.
fn first(flags: &Flags) -> Result<First, Failure> {
    let mut config = VmConfig::default();
    config.machine_config.mem_size_mib = MEMORY_MIB;
    let booted = match &flags.config_file {
        Some(path) => {
            config = VmConfig::from_firecracker_file(path, config)
                .map_err(|e| bad_configuration(husk_vmm::chain(&e)))?;
            if let Some(logger) = &config.logger {
                logging::configure(logger).map_err(bad_configuration)?;
            }
            if let Some(settings) = &config.metrics {
                metrics::configure(settings).map_err(|f| bad_configuration(f.message))?;
            }
            true
        }
        None => false,
    };
    config.pci |= flags.enable_pci;
    config.boot_timer |= flags.boot_timer;
    config.keyboard = true;
    let config = Box::new(config);
    Ok(match booted {
        true => First::Boot(config),
        false => First::Serve(config),
    })
}

fn generic(message: String) -> Failure {
    Failure {
        message,
        status: GENERIC_ERROR,
    }
}

fn bad_configuration(message: String) -> Failure {
    Failure {
        message,
        status: BAD_CONFIGURATION,
    }
}
