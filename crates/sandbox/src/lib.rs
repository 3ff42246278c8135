//! What a thread of Husk's may ask of the host's kernel.
//!
//! Each kind of thread installs a filter of system calls ([`Filters::install`]) before it touches anything that a guest or a
//! client sent. The filters are made from `resources/seccomp` when Husk is built. A call that is not allowed ends the process
//! with [`EXIT_STATUS`] and a line that names the call and the thread ([`catch_violations`]).
//!
//! **Architecture Invariant:** a leaf. Nothing is parsed when Husk starts, and a filter is never taken off or widened.
#![deny(unsafe_code)]

mod compile;
mod kind;
mod shrink;
mod violation;

pub use compile::Error as RulesError;
pub use kind::Kind;
pub use violation::{EXIT_STATUS, catch_violations};

use compile::{Program, Rules};
use seccompiler::sock_filter;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A filter for each kind, in the order of [`Kind::ALL`].
struct Programs<P>([P; Kind::ALL.len()]);

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// Stands in a rule for the number of the process, which is not known before it runs. No process has it.
const OWN_PROCESS: u32 = i32::MAX as u32;
/// The most that a file of rules may be long, in bytes.
const LONGEST: u64 = 1 << 20;

/// Why there are no filters, or why one is not in force.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the seccomp filter {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// The file is no JSON, but a program that seccompiler-bin has made.
    #[error(
        "the seccomp filter {} is no text; give the JSON file itself, Husk compiles it (docs/seccomp.md)", .0.display()
    )]
    Binary(PathBuf),
    /// The file's rules are wrong.
    #[error("the seccomp filter {} is wrong (docs/seccomp.md)", .0.display())]
    Rules(PathBuf, #[source] RulesError),
    /// The kernel refused.
    #[error(
        "the host's kernel refuses the seccomp filter of the thread kind {0}; it needs CONFIG_SECCOMP_FILTER (Husk runs without \
         filters with --no-seccomp)"
    )]
    Install(&'static str, #[source] io::Error),
}

impl Error {
    /// The host is in the way, not a file.
    pub fn is_host_trouble(&self) -> bool {
        matches!(self, Error::Install(..))
    }
}

/// The filters of all kinds of threads. Clones are cheap.
#[derive(Clone)]
pub struct Filters(Source);

#[derive(Clone)]
enum Source {
    Nowhere,
    BuiltIn,
    File(Arc<Programs<Program>>),
}

impl Filters {
    /// Husk's own.
    pub fn built_in() -> Self {
        Self(Source::BuiltIn)
    }

    /// None: every thread may do what the process may.
    pub fn none() -> Self {
        Self(Source::Nowhere)
    }

    /// Those of a JSON file with a filter for every kind (docs/seccomp.md).
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = read(path).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => Error::Binary(path.into()),
            _ => Error::Read(path.into(), e),
        })?;
        let programs = from_text(&text).map_err(|e| Error::Rules(path.into(), e))?;
        Ok(Self(Source::File(Arc::new(programs))))
    }

    /// Whether these are any.
    pub fn are_any(&self) -> bool {
        !matches!(self.0, Source::Nowhere)
    }

    /// From now on the calling thread, and every thread and process that it starts, makes only calls that `kind` allows, and
    /// gains no privileges by executing a file. What was installed before stays in force: the strictest counts.
    pub fn install(&self, kind: Kind) -> Result<(), Error> {
        let at = kind as usize;
        let program = match &self.0 {
            Source::Nowhere => return Ok(()),
            Source::BuiltIn => BUILT_IN.0.get(at).copied(),
            Source::File(programs) => programs.0.get(at).map(Vec::as_slice),
        };
        violation::remember(kind);
        let program = for_this_process(program.unwrap_or_default());
        violation::install(&program).map_err(|e| Error::Install(kind.name(), e))
    }

    /// [`Filters::install`] for a thread that has nobody to report to. Where it fails, the process ends with a line and
    /// status 1: a thread that is not confined must not go on.
    pub fn confine(&self, kind: Kind) {
        let Err(error) = self.install(kind) else {
            return;
        };
        let why = std::error::Error::source(&error).map(|why| format!(": {why}"));
        violation::restore();
        violation::say(&format!("husk: {error}{}\n", why.unwrap_or_default()));
        std::process::exit(1);
    }
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let file = std::fs::File::open(path)?;
    file.take(LONGEST + 1).read_to_string(&mut text)?;
    match text.len() as u64 {
        0..=LONGEST => Ok(text),
        _ => Err(io::ErrorKind::FileTooLarge.into()),
    }
}

fn from_text(text: &str) -> Result<Programs<Program>, RulesError> {
    let rules = Rules::parse(text)?;
    let mut programs = [const { Program::new() }; Kind::ALL.len()];
    for (program, kind) in programs.iter_mut().zip(Kind::ALL) {
        *program = rules.compile(kind.name())?;
    }
    Ok(Programs(programs))
}

/// The filter with this process's number where it is meant.
fn for_this_process(program: &[sock_filter]) -> Program {
    let own = std::process::id();
    let mut program = program.to_vec();
    for instruction in &mut program {
        if instruction.code == compile::JUMP_IF_EQUAL && instruction.k == OWN_PROCESS {
            instruction.k = own;
        }
    }
    program
}

#[cfg(test)]
mod tests;
