//! Reports as files.

use crate::{Error, Report, SCHEMA, VERSION};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Far more than a long measurement of many subjects.
const MAX_BYTES: u64 = 16 << 20;
/// The time that statistics take grows with it.
const MAX_RUNS: usize = 10_000;

impl Report {
    /// Reads a report.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let fault = |source| Error::Read {
            path: path.into(),
            source,
        };
        if fs::metadata(path).map_err(fault)?.len() > MAX_BYTES {
            return Err(Error::TooLarge { path: path.into() });
        }
        let text = fs::read_to_string(path).map_err(fault)?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let path = || path.to_path_buf();
        let value: Value =
            serde_json::from_slice(text.as_bytes()).map_err(|source| Error::Json {
                path: path(),
                source,
            })?;
        if value.get("schema").and_then(Value::as_str) != Some(SCHEMA) {
            return Err(Error::Foreign { path: path() });
        }
        match value.get("version").and_then(Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => {
                return Err(Error::Version {
                    path: path(),
                    version,
                });
            }
            None => return Err(Error::Foreign { path: path() }),
        }
        let report = read::report(&value).map_err(|field| Error::Field {
            path: path(),
            field,
        })?;
        if report
            .subjects
            .iter()
            .any(|subject| subject.runs.len() > MAX_RUNS)
        {
            return Err(Error::TooLarge { path: path() });
        }
        Ok(report)
    }

    /// Writes the report; a file that is there is replaced when the new one is whole.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let json = |source| Error::Json {
            path: path.into(),
            source,
        };
        let mut text = serde_json::to_string_pretty(self).map_err(json)?;
        text.push('\n');
        write_whole(path, &text)
    }
}

/// Writes a file beside its place and renames it, so that whoever opens it finds the old one or the new one, never a half.
///
/// What is no file (a pipe, a terminal) is written to as it is. A symbolic link stays one.
pub fn write_whole(path: &Path, text: &str) -> Result<(), Error> {
    let place = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let written = match fs::metadata(&place) {
        Ok(there) if !there.is_file() => File::options()
            .write(true)
            .open(&place)
            .and_then(|mut file| file.write_all(text.as_bytes())),
        _ => replace(&place, text),
    };
    written.map_err(|source| Error::Write {
        path: path.into(),
        source,
    })
}

fn replace(place: &Path, text: &str) -> io::Result<()> {
    let name = place.file_name().ok_or(io::ErrorKind::IsADirectory)?;
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(format!(".{}", std::process::id()));
    let beside = place.with_file_name(beside);
    // A name that is taken is that of a process which died, or a trap: never written through.
    let _ = fs::remove_file(&beside);
    let mut file = File::options().write(true).create_new(true).open(&beside)?;
    let done = file
        .write_all(text.as_bytes())
        // Keeps the rename from reaching the disk before the text.
        .and_then(|()| file.sync_data())
        .and_then(|()| fs::rename(&beside, place));
    if done.is_err() {
        let _ = fs::remove_file(&beside);
    }
    done
}

mod read;
#[cfg(test)]
mod tests;
