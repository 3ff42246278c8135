//! The arithmetic and the paper of `husk bench boot`: its report as a file, statistics, comparison, text and HTML.
//!
//! A [`Report`] is what was measured: for each [`Subject`] the times at which each run reached its [`Phase`]s. All else is
//! derived from it: [`stats`] says how sure a median is, [`compare`] whether two differ, and [`text`] and [`html`] show it.
//!
//! **Architecture Invariant:** a leaf. It starts no VM and no process and looks at no clock but for a report's date. The same
//! report always yields the same text: the bootstrap is seeded.
//!
//! **Hostile input:** names, console lines and whole files come from guests and strangers. What is parsed is bounded, and what
//! is shown is escaped for the place where it is shown.
#![forbid(unsafe_code)]

// What tests share names this crate as a program does.
#[cfg(test)]
extern crate self as husk_bench;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod sample;

pub mod compare;
mod error;
mod file;
pub mod html;
pub mod initcalls;
mod model;
mod show;
pub mod stats;
mod tables;
pub mod text;

pub use show::plain;

pub use error::Error;
pub use file::write_whole;
pub use model::{
    Clock, Counts, Failed, HostInfo, Initcall, Phase, PhaseCounts, Report, Run, SCHEMA, Subject,
    VERSION,
};
