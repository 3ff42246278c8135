//! Log messages to stderr, a file or a FIFO. Never to stdout, which is the guest's console.
//!
//! `husk run` starts it with [`start`]. Firecracker's flags and its API call [`configure`], any number of times, and messages
//! look like Firecracker's from then on.

use husk_config::{LogLevel, Logger as Settings};
use husk_console::Terminal;
use husk_metrics::METRICS;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{StderrLock, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockWriteGuard};
use std::time::SystemTime;

/// What messages of a VM without a name say.
const ANONYMOUS: &str = "anonymous-instance";

static LOGGER: Logger = Logger(RwLock::new(State::new()));
static INSTANCE: OnceLock<RwLock<String>> = OnceLock::new();

struct Logger(RwLock<State>);

/// Where messages go and what they look like.
struct State {
    file: Option<File>,
    /// As Firecracker's; as Husk's own, when None.
    format: Option<Format>,
    module: Option<String>,
    /// Level and file that flags have set: a configuration file does not change them.
    flags: (bool, bool),
}

/// What a message says beside its text, in Firecracker's format.
#[derive(Clone, Copy, Default)]
struct Format {
    level: bool,
    origin: bool,
}

impl State {
    const fn new() -> Self {
        Self {
            file: None,
            format: None,
            module: None,
            flags: (false, false),
        }
    }
}

/// Start logging, in Husk's own format. An error is one line for the user.
pub fn start(level: Option<log::LevelFilter>, path: Option<&Path>) -> Result<(), String> {
    let file = path.map(open).transpose()?;
    log::set_logger(&LOGGER).map_err(|e| format!("cannot start logging: {e}"))?;
    log::set_max_level(level.unwrap_or(log::LevelFilter::Warn));
    let mut state = LOGGER.0.write().unwrap_or_else(PoisonError::into_inner);
    state.flags = (level.is_some(), file.is_some());
    state.file = file;
    Ok(())
}

/// Messages say this instead of `anonymous-instance`. Once.
pub fn set_instance(id: &str) {
    // A second name is not heard.
    let _ = INSTANCE.set(RwLock::new(id.to_owned()));
}

/// This process was forked, and is another VM's from now on.
pub fn rename_instance(id: &str) {
    if let Some(instance) = INSTANCE.get() {
        id.clone_into(&mut instance.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Messages go to stderr again.
pub fn to_stderr() {
    let mut state = LOGGER.0.write().unwrap_or_else(PoisonError::into_inner);
    state.file = None;
}

/// The log file's descriptor.
pub fn descriptor() -> Option<RawFd> {
    let state = LOGGER.0.read().unwrap_or_else(PoisonError::into_inner);
    state.file.as_ref().map(AsRawFd::as_raw_fd)
}

/// While this is there, no other thread is in the middle of a message. A process that is forked meanwhile can log when it has dropped
/// its own.
pub struct Held {
    _state: RwLockWriteGuard<'static, State>,
    _stderr: StderrLock<'static>,
}

/// Wait until no other thread is in the middle of a message, and keep them out.
pub fn hold() -> Held {
    Held {
        _state: LOGGER.0.write().unwrap_or_else(PoisonError::into_inner),
        _stderr: std::io::stderr().lock(),
    }
}

/// Change logging, to Firecracker's format; what `settings` do not say stays as it is. An error is one line for the user, and
/// changes nothing.
pub fn configure(settings: &Settings) -> Result<(), String> {
    let file = settings.log_path.as_deref().map(open).transpose()?;
    if let Some(level) = settings.level {
        log::set_max_level(filter(level));
    }
    let mut state = LOGGER.0.write().unwrap_or_else(PoisonError::into_inner);
    if file.is_some() {
        state.file = file;
    }
    let mut format = state.format.unwrap_or_default();
    format.level = settings.show_level.unwrap_or(format.level);
    format.origin = settings.show_log_origin.unwrap_or(format.origin);
    state.format = Some(format);
    if settings.module.is_some() {
        state.module.clone_from(&settings.module);
    }
    Ok(())
}

/// As [`configure`], from a configuration file: what flags have said has precedence.
pub fn configure_below_flags(settings: &Settings) -> Result<(), String> {
    let state = LOGGER.0.read().unwrap_or_else(PoisonError::into_inner);
    let (level, path) = state.flags;
    drop(state);
    let mut settings = settings.clone();
    settings.level = settings.level.filter(|_| !level);
    settings.log_path = settings.log_path.filter(|_| !path);
    configure(&settings)
}

fn filter(level: LogLevel) -> log::LevelFilter {
    match level {
        LogLevel::Off => log::LevelFilter::Off,
        LogLevel::Error => log::LevelFilter::Error,
        LogLevel::Warn => log::LevelFilter::Warn,
        LogLevel::Info => log::LevelFilter::Info,
        LogLevel::Debug => log::LevelFilter::Debug,
        LogLevel::Trace => log::LevelFilter::Trace,
    }
}

/// A file is made if there is none. A FIFO neither waits for a reader now, nor do messages later: it is open for reading, too,
/// and what it has no room for is lost, and counted.
fn open(path: &Path) -> Result<File, String> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let open = |read| {
        let mut options = File::options();
        options.create(true).append(true).read(read);
        options.custom_flags(flags).open(path)
    };
    // A file that may be written only is as good.
    open(true)
        .or_else(|_| open(false))
        .map_err(|e| format!("cannot write the log file {}: {e}", path.display()))
}

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        // Several threads log at once; only a change of the settings is alone.
        let state = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = &state.module
            && !record.module_path().unwrap_or_default().starts_with(module)
        {
            return;
        }
        // One write for a line, so that the lines of several threads do not mix.
        let written = match &state.file {
            None => {
                let mut line = match state.format {
                    Some(format) => firecracker_line(format, record, SystemTime::now()),
                    None => short_line(record),
                };
                // A raw terminal takes a newline at its word.
                line += if Terminal::is_raw() { "\r\n" } else { "\n" };
                std::io::stderr().write_all(line.as_bytes())
            }
            Some(file) => {
                let mut line = match state.format {
                    Some(format) => firecracker_line(format, record, SystemTime::now()),
                    None => long_line(record),
                };
                line.push('\n');
                let mut file = file;
                file.write_all(line.as_bytes())
            }
        };
        // A log that cannot be written has nowhere to say so.
        if written.is_err() {
            METRICS.logger.missed_log_count.inc();
        }
    }

    fn flush(&self) {}
}

fn short_line(record: &log::Record) -> String {
    let level = record.level().as_str().to_ascii_lowercase();
    format!("husk: {level}: {}", record.args())
}

fn long_line(record: &log::Record) -> String {
    let level = record.level().as_str().to_ascii_lowercase();
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    format!(
        "{}.{:06} {level} {}: {}",
        since.as_secs(),
        since.subsec_micros(),
        record.target(),
        record.args()
    )
}

/// `2024-01-31T12:00:00.000000000 [instance:thread:LEVEL:file.rs:7] message`, in UTC.
fn firecracker_line(format: Format, record: &log::Record, now: SystemTime) -> String {
    let now = humantime::format_rfc3339_nanos(now).to_string();
    let instance = INSTANCE
        .get()
        .map(|own| own.read().unwrap_or_else(PoisonError::into_inner));
    let instance = instance.as_ref().map_or(ANONYMOUS, |own| own.as_str());
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("-");
    let mut line = format!("{} [{instance}:{thread}", now.trim_end_matches('Z'));
    // Writing to a string does not fail.
    if format.level {
        let _ = write!(line, ":{}", record.level());
    }
    if format.origin {
        let file = record.file().unwrap_or("?");
        let _ = match record.line() {
            Some(number) => write!(line, ":{file}:{number}"),
            None => write!(line, ":{file}:?"),
        };
    }
    let _ = write!(line, "] {}", record.args());
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Log;
    use std::time::Duration;

    fn record<'a>(arguments: std::fmt::Arguments<'a>) -> log::Record<'a> {
        log::Record::builder()
            .args(arguments)
            .level(log::Level::Error)
            .file(Some("dir/app.rs"))
            .line(Some(200))
            .module_path(Some("husk_vmm::vm"))
            .build()
    }

    #[test]
    fn lines_look_like_firecrackers() {
        let now = SystemTime::UNIX_EPOCH + Duration::new(1_541_568_865, 180_751_152);
        let line = |level, origin| {
            let format = Format { level, origin };
            firecracker_line(format, &record(format_args!("Oh {}", 7)), now)
        };
        let thread = std::thread::current();
        let thread = thread.name().unwrap();
        let time = "2018-11-07T05:34:25.180751152";
        assert_eq!(
            line(true, true),
            format!("{time} [anonymous-instance:{thread}:ERROR:dir/app.rs:200] Oh 7")
        );
        assert_eq!(
            line(false, false),
            format!("{time} [anonymous-instance:{thread}] Oh 7")
        );
    }

    /// One test, because there is one logger in a process.
    #[test]
    fn it_can_be_changed_and_what_is_not_said_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        std::fs::write(&first, "before\n").unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        configure(&Settings {
            log_path: Some(first.clone()),
            level: Some(LogLevel::Info),
            show_level: Some(true),
            ..Settings::default()
        })
        .unwrap();
        assert_eq!(log::max_level(), log::LevelFilter::Info);
        LOGGER.log(&record(format_args!("one")));
        let text = read(&first);
        assert!(text.starts_with("before\n2"), "{text}");
        assert!(text.ends_with(":ERROR] one\n"), "{text}");

        configure(&Settings {
            log_path: Some(second.clone()),
            module: Some("husk_vmm".into()),
            ..Settings::default()
        })
        .unwrap();
        assert_eq!(log::max_level(), log::LevelFilter::Info);
        LOGGER.log(&record(format_args!("two")));
        let other = log::Record::builder()
            .args(format_args!("three"))
            .module_path(Some("husk_api"))
            .build();
        LOGGER.log(&other);
        let text = read(&second);
        assert!(
            text.ends_with(":ERROR] two\n") && text.lines().count() == 1,
            "{text}"
        );

        // What cannot be, changes nothing.
        let nowhere = dir.path().join("no/log");
        let error = configure(&Settings {
            log_path: Some(nowhere.clone()),
            level: Some(LogLevel::Off),
            ..Settings::default()
        })
        .unwrap_err();
        assert!(error.contains(nowhere.to_str().unwrap()), "{error}");
        assert_eq!(log::max_level(), log::LevelFilter::Info);

        // A FIFO that nobody reads: messages are lost, nothing waits.
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        configure(&Settings {
            log_path: Some(fifo),
            ..Settings::default()
        })
        .unwrap();
        let missed = &METRICS.logger.missed_log_count;
        let long = "x".repeat(1000);
        for _ in 0..200 {
            LOGGER.log(&record(format_args!("{long}")));
        }
        assert!((100..200).contains(&missed.total()), "{}", missed.total());
    }
}
