//! Metrics, as far as they are a matter of the process: where they go, and what happens when they cannot.

use crate::Failure;
use husk_config::Metrics as Settings;
use husk_metrics::{Error, METRICS};
use std::time::Instant;

/// From now on lines can be written, when they are asked for and when they are due.
pub fn configure(settings: &Settings) -> Result<(), Failure> {
    let failed = |e: Error| Failure::usage(husk_vmm::chain(&e));
    husk_metrics::configure(&settings.metrics_path).map_err(failed)
}

/// This process was forked: what it counts is not the other's, and goes nowhere.
pub fn forget() {
    husk_metrics::forget();
}

/// Write a line, if a file was configured: the VM's last.
pub fn flush() {
    said(husk_metrics::flush());
}

/// Write a line because somebody asks for it; why not, if not.
pub fn flush_now() -> Result<(), String> {
    // Where nothing was configured there is nothing to write, which is no error.
    husk_metrics::flush()
        .map(drop)
        .map_err(|e| husk_vmm::chain(&e))
}

/// Write a line if it is time.
pub fn flush_if_due(now: Instant) {
    said(husk_metrics::flush_if_due(now));
}

/// A panic is counted, and what was counted until then is written.
pub fn install_panic_hook() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        METRICS.vmm.panic_count.set(1);
        husk_metrics::flush_after_panic();
        before(panic);
    }));
}

/// A thread has made a system call that its filter refuses, and the process ends. Called in the signal's handler.
pub fn count_violation() {
    METRICS.seccomp.num_faults.set(1);
    husk_metrics::flush_from_handler();
}

/// Metrics that cannot be written are no reason to end a VM.
fn said(result: Result<bool, Error>) {
    if let Err(e) = result {
        log::warn!("{}", husk_vmm::chain(&e));
    }
}
