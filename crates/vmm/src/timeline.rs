//! When each phase of a boot was reached, and what it had cost by then.

use crate::vcpu::ExitCounts;
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
    /// A byte that the guest writes to the mark port: 0 by an init that is started, 1 by one that is done; others are the guest's.
    Mark(u8),
    /// The guest has ended.
    GuestEnded,
}

/// Phases and when they were reached. Shared by all threads.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    reached: Mutex<Vec<Reached>>,
    /// Exits so far, by reason, when they are counted.
    exits: Option<Mutex<ExitCounts>>,
    /// What each phase cost is noted with it.
    costs: bool,
}

/// A phase that was reached.
#[derive(Clone, Debug)]
pub struct Reached {
    /// Which.
    pub phase: Phase,
    /// When, since the process began.
    pub at: Duration,
    /// What it had cost by then, if that was asked for.
    pub cost: Option<Cost>,
}

/// What a boot has cost up to some moment.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    /// Exits from the guest to the monitor, by reason and address.
    pub exits: ExitCounts,
    /// Pages of this process that are resident, most of them the guest's. 0: the host does not say.
    pub resident_pages: u64,
    /// Bytes that system calls of this process have read. Files that are mapped and disks read through io_uring are not among them.
    pub bytes_read: u64,
}

/// What is counted beside the time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counting {
    /// Exits by reason.
    pub exits: bool,
    /// What each phase cost. The threads of the VM look into /proc then, which their seccomp filters do not let them.
    pub costs: bool,
}

/// Marks that one boot may leave; a guest that writes more is not listened to.
const MAX_MARKS: usize = 64;

impl Timeline {
    /// Phases count from `start`.
    pub fn new(start: Instant) -> Self {
        Self::counting(start, Counting::default())
    }

    /// The same, with costs.
    pub fn counting(start: Instant, counting: Counting) -> Self {
        Self {
            start,
            reached: Mutex::new(Vec::with_capacity(16)),
            exits: (counting.exits || counting.costs).then(Mutex::default),
            costs: counting.costs,
        }
    }

    /// Where exits are counted, if they are.
    pub fn exits(&self) -> Option<&Mutex<ExitCounts>> {
        self.exits.as_ref()
    }

    /// When the process began, by its own account.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// `phase` is reached now.
    pub fn reach(&self, phase: Phase) {
        let now = self.start.elapsed();
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if reached.len() < MAX_MARKS || phase == Phase::GuestEnded {
            let cost = self.costs.then(|| self.cost());
            reached.push(Reached {
                phase,
                at: now,
                cost,
            });
        }
    }

    fn cost(&self) -> Cost {
        let exits = self.exits.as_ref().map(|counts| {
            counts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone()
        });
        let number = |path: &str, find: fn(&str) -> Option<&str>| {
            let text = std::fs::read_to_string(path).ok()?;
            find(&text)?.parse().ok()
        };
        Cost {
            exits: exits.unwrap_or_default(),
            resident_pages: number("/proc/self/statm", |text| text.split(' ').nth(1))
                .unwrap_or_default(),
            bytes_read: number("/proc/self/io", |text| {
                text.lines().find_map(|line| line.strip_prefix("rchar: "))
            })
            .unwrap_or_default(),
        }
    }

    /// What was reached, in the order of time.
    pub fn reached(&self) -> Vec<Reached> {
        let mut reached = self
            .reached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        reached.sort_by_key(|reached| reached.at);
        reached
    }
}

impl Phase {
    /// Its name for programs.
    pub fn key(self) -> &'static str {
        match self {
            Phase::Asked => "asked",
            Phase::VmCreated => "vm_created",
            Phase::VcpusReady => "vcpus_ready",
            Phase::MemoryReady => "memory_ready",
            Phase::KernelLoaded => "kernel_loaded",
            Phase::GuestEntered => "guest_entered",
            Phase::FirstExit => "first_exit",
            Phase::FirstConsoleByte => "first_console_byte",
            Phase::Mark(_) => "mark",
            Phase::GuestEnded => "guest_ended",
        }
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
            Phase::Mark(0) => "kernel hands over to init (its mark)",
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
        assert!(reached[0].at <= reached[1].at);
        assert_eq!(reached[1].phase.to_string(), "guest's mark 7");
        assert!(reached[1].cost.is_none());
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
        assert_eq!(reached.last().map(|r| r.phase), Some(Phase::GuestEnded));
    }

    #[test]
    fn costs_are_those_up_to_the_phase() {
        let counting = Counting {
            costs: true,
            ..Counting::default()
        };
        let timeline = Timeline::counting(Instant::now(), counting);
        timeline.reach(Phase::VmCreated);
        let exits = timeline.exits().unwrap();
        exits.lock().unwrap().insert(("out to port", 0x3f8), 3);
        timeline.reach(Phase::Mark(1));
        let costs = timeline.reached();
        let costs: Vec<&Cost> = costs.iter().filter_map(|r| r.cost.as_ref()).collect();
        assert!(costs[0].exits.is_empty());
        assert_eq!(costs[1].exits[&("out to port", 0x3f8)], 3);
        assert!(costs[1].resident_pages > 0);
        // /proc/self/statm was read between them.
        assert!(costs[1].bytes_read > costs[0].bytes_read);
    }
}
