use crate::{Clock, VERSION};
use std::path::PathBuf;

/// Why a report could not be read, written or compared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// open or read.
    #[error("cannot read the report {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// More than anybody measures.
    #[error("the report {} is larger than 16 MiB or has more than 10000 runs; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not JSON, or cut short.
    #[error("the report {} is damaged", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field is not as `docs/bench-boot.schema.json` has it.
    #[error("the report {} is damaged: {field} is missing or not what it should be", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field's name.
        field: &'static str,
    },
    /// JSON of something else.
    #[error("{} is no report of husk bench boot", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Written by another version.
    #[error("the report {} has version {version}, this husk reads version {VERSION}: measure it again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
    },
    /// create, write or rename.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Nanoseconds against instructions.
    #[error("the runs before were timed by the {} clock, those after by the {} clock: they cannot be compared", before.label(), after.label())]
    Clocks {
        /// The baseline's.
        before: Clock,
        /// The new report's.
        after: Clock,
    },
    /// Two reports of different things.
    #[error("the two reports have no subject in common (before: {before}; after: {after})")]
    Subjects {
        /// The baseline's.
        before: String,
        /// The new report's.
        after: String,
    },
    /// Nothing to compare.
    #[error("{subject} has no run that succeeded")]
    NoRuns {
        /// Whose.
        subject: String,
    },
    /// Nothing that both have.
    #[error("{before} and {after} have no phase in common")]
    NoPhase {
        /// The first's name.
        before: String,
        /// The second's.
        after: String,
    },
}
