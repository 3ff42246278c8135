//! What Husk counts, and how it tells of it: lines of JSON in Firecracker's shape, and Prometheus text.
//!
//! [`METRICS`] holds everything. What a process has one of (the API, say) is a structure in it; what there may be several of
//! (disks, interfaces, vCPUs) is a [`Family`], from which each device takes a structure of its own by name. All are plain
//! atomics: counting is one relaxed addition, takes no lock and allocates nothing.
//!
//! Each counter is declared once, in `sections`, with its help text. Both formats are made from these declarations.
//!
//! **Architecture Invariant:** a leaf. Nothing here knows what is counted, and nothing here waits: what a file or a FIFO does
//! not take at once is counted as missed, and the VM goes on.
#![forbid(unsafe_code)]

mod family;
mod json;
mod last;
mod prometheus;
mod requests;
mod section;
mod sections;
mod sink;
mod snapshot;
mod start;
mod value;

pub use family::Family;
pub use prometheus::{CONTENT_TYPE, prometheus};
pub use requests::{count_deprecated_request, count_failed_request, count_request};
pub use section::{Metric, Section};
pub use sections::*;
pub use sink::{
    Error, PERIOD, configure, flush, flush_after_panic, flush_from_handler, flush_if_due, forget,
    next_flush,
};
pub use start::start_times;
pub use value::{Counter, Gauge, Latency, Micros};
