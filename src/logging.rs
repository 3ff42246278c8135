//! Log messages to stderr or a file. Never to stdout, which is the guest's console.

use husk_console::Terminal;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

struct Logger {
    file: Option<Mutex<File>>,
}

/// Start logging. An error is one line for the user.
pub fn start(level: log::LevelFilter, path: Option<&Path>) -> Result<(), String> {
    let file = path
        .map(|path| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .map(Mutex::new)
                .map_err(|e| format!("cannot write the log file {}: {e}", path.display()))
        })
        .transpose()?;
    log::set_boxed_logger(Box::new(Logger { file }))
        .map_err(|e| format!("cannot start logging: {e}"))?;
    log::set_max_level(level);
    Ok(())
}

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let level = record.level().as_str().to_ascii_lowercase();
        // One write for a line, so that the lines of several threads do not mix. A log that cannot be written has
        // nowhere to say so.
        match &self.file {
            None => {
                // A raw terminal takes a newline at its word.
                let end = if Terminal::is_raw() { "\r\n" } else { "\n" };
                let line = format!("husk: {level}: {}{end}", record.args());
                let _ = std::io::stderr().write_all(line.as_bytes());
            }
            Some(file) => {
                let since = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .unwrap_or_default();
                let line = format!(
                    "{}.{:06} {level} {}: {}\n",
                    since.as_secs(),
                    since.subsec_micros(),
                    record.target(),
                    record.args()
                );
                if let Ok(mut file) = file.lock() {
                    let _ = file.write_all(line.as_bytes());
                }
            }
        }
    }

    fn flush(&self) {}
}
