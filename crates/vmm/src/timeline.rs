//! When each phase of a boot was reached.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A phase of a boot, in the order in which phases usually come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The VM was asked for.
    Asked,
    /// KVM has created the VM.
    VmCreated,
    /// Interrupt controllers, vCPUs and their CPUID are set up.
    VcpusReady,
    /// Guest memory is registered with KVM.
    MemoryReady,
    /// Kernel, initrd and tables are in guest memory.
    KernelLoaded,
    /// The boot vCPU enters the guest.
    GuestEntered,
    /// The guest's first exit to the monitor.
    FirstExit,
    /// The first byte that the guest writes to its console.
    FirstConsoleByte,
    /// A byte that the guest writes to the mark port; 1 by init when it starts.
    Mark(u8),
    /// The guest has ended.
    GuestEnded,
}

/// Phases and when they were reached. Shared by all threads.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    reached: Mutex<Vec<(Phase, Duration)>>,
}

/// Marks that one boot may leave; a guest that writes more is not listened to.
const MAX_MARKS: usize = 64;

impl Timeline {
    /// Phases count from `start`.
    pub fn new(start: Instant) -> Self {
        Self {
            start,
            reached: Mutex::new(Vec::with_capacity(16)),
        }
    }

    /// `phase` is reached now.
    pub fn reach(&self, phase: Phase) {
        let now = self.start.elapsed();
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if reached.len() < MAX_MARKS || phase == Phase::GuestEnded {
            reached.push((phase, now));
        }
    }

    /// What was reached, in the order of time.
    pub fn reached(&self) -> Vec<(Phase, Duration)> {
        let mut reached = self
            .reached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        reached.sort_by_key(|&(_, at)| at);
        reached
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Asked => "boot asked for",
            Phase::VmCreated => "KVM VM created",
            Phase::VcpusReady => "vCPUs ready",
            Phase::MemoryReady => "memory registered",
            Phase::KernelLoaded => "kernel loaded",
            Phase::GuestEntered => "guest entered",
            Phase::FirstExit => "first guest exit",
            Phase::FirstConsoleByte => "first console byte",
            Phase::Mark(1) => "init runs (its mark)",
            Phase::Mark(value) => return write!(f, "guest's mark {value}"),
            Phase::GuestEnded => "guest ended",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_come_back_in_the_order_of_time() {
        let timeline = Timeline::new(Instant::now());
        timeline.reach(Phase::VmCreated);
        timeline.reach(Phase::Mark(7));
        let reached = timeline.reached();
        assert_eq!(reached.len(), 2);
        assert!(reached[0].1 <= reached[1].1);
        assert_eq!(reached[1].0.to_string(), "guest's mark 7");
    }

    #[test]
    fn a_guest_cannot_fill_memory_with_marks() {
        let timeline = Timeline::new(Instant::now());
        for _ in 0..10_000 {
            timeline.reach(Phase::Mark(1));
        }
        timeline.reach(Phase::GuestEnded);
        let reached = timeline.reached();
        assert_eq!(reached.len(), MAX_MARKS + 1);
        assert_eq!(reached.last().map(|r| r.0), Some(Phase::GuestEnded));
    }
}
