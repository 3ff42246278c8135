//! How a VM comes to its end: what the guest and the vCPUs report, and what the main thread learns of it.

use crate::host::Watch;
use crate::timeline::{Phase, Timeline};
use husk_config::Event;
use husk_devices::{GuestEvent, GuestEvents};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// All of the guest's processors halted with interrupts off.
    Halted,
    /// The guest's kernel panicked.
    Panic,
    /// A processor of the guest shut down: a fault while it delivered a double fault.
    TripleFault,
    /// KVM could not go on with the guest.
    Kvm(String),
    /// Who was to fill memory is gone, or does not answer.
    Memory(String),
    /// The monitor was told to end the VM.
    Stopped,
}

impl Outcome {
    /// The exit status of `husk run`. Documented in the README; scripts rely on it.
    pub fn exit_status(&self) -> u8 {
        match self {
            Outcome::PowerOff | Outcome::Reset | Outcome::Halted | Outcome::Stopped => 0,
            Outcome::Panic => 3,
            Outcome::TripleFault => 4,
            Outcome::Kvm(_) => 5,
            Outcome::Memory(_) => 6,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::PowerOff => f.write_str("the guest powered off"),
            Outcome::Reset => f.write_str("the guest rebooted"),
            Outcome::Halted => f.write_str("the guest halted"),
            Outcome::Panic => f.write_str("the guest's kernel panicked"),
            Outcome::TripleFault => f.write_str("the guest stopped with a triple fault"),
            Outcome::Kvm(why) => write!(f, "KVM could not run the guest on: {why}"),
            Outcome::Memory(why) => write!(f, "the guest's memory is lost: {why}"),
            Outcome::Stopped => f.write_str("the VM was stopped"),
        }
    }
}

/// Tells the main thread that there is something to look at: the end, or a panic. Called on a vCPU thread; must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// The mark of an init that says that it has been started, before it does anything.
const MARK_HANDED_OVER: u8 = 0;

/// One VM's end, as all of its threads see it. The first report counts.
pub struct Lifecycle {
    ended: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
    panicked: AtomicBool,
    wake: Wake,
    timeline: Arc<Timeline>,
    watch: Watch,
    /// The VM ends at its guest's mark.
    ends_at_mark: bool,
}

impl Lifecycle {
    /// `wake` is called on every report that concerns the main thread.
    pub fn new(wake: Wake, timeline: Arc<Timeline>, watch: Watch) -> Self {
        Self {
            ended: AtomicBool::new(false),
            outcome: Mutex::new(None),
            panicked: AtomicBool::new(false),
            wake,
            timeline,
            watch,
            ends_at_mark: false,
        }
    }

    /// The same, for a VM that ends as soon as its guest has set a boot mark, if `ends`.
    pub fn ending_at_mark(mut self, ends: bool) -> Self {
        self.ends_at_mark = ends;
        self
    }

    /// The VM ends with `outcome`, unless it has ended before.
    pub fn end(&self, outcome: Outcome) {
        let mut first = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(outcome);
            self.timeline.reach(Phase::GuestEnded);
            self.ended.store(true, Ordering::Release);
            (self.wake)();
        }
    }

    /// vCPUs leave the guest for good when this is true.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// How the VM ended; None while it runs.
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The guest has said through pvpanic that its kernel panicked.
    pub fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }
}

impl GuestEvents for Lifecycle {
    fn event(&self, event: GuestEvent) {
        match event {
            GuestEvent::PowerOff => self.end(Outcome::PowerOff),
            GuestEvent::Reset => self.end(Outcome::Reset),
            GuestEvent::Panicked => {
                // The kernel still prints, and restarts if it was told to: the VM ends then, or a while later.
                if !self.panicked.swap(true, Ordering::AcqRel) {
                    (self.watch)(Event::Panicked);
                }
                (self.wake)();
            }
            GuestEvent::CrashLoaded => {
                log::warn!("the guest's kernel panicked and starts its crash kernel")
            }
            GuestEvent::Mark(value) => {
                self.timeline.reach(Phase::Mark(value));
                if self.ends_at_mark && value != MARK_HANDED_OVER {
                    self.end(Outcome::Stopped);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::time::Instant;

    fn lifecycle() -> (Lifecycle, Arc<AtomicU32>) {
        let wakes = Arc::new(AtomicU32::new(0));
        let wake = {
            let wakes = Arc::clone(&wakes);
            move || {
                wakes.fetch_add(1, Ordering::SeqCst);
            }
        };
        (
            Lifecycle::new(
                Arc::new(wake),
                Arc::new(Timeline::new(Instant::now())),
                Arc::new(|_| ()),
            ),
            wakes,
        )
    }

    #[test]
    fn the_first_end_counts() {
        let (lifecycle, wakes) = lifecycle();
        assert_eq!(lifecycle.outcome(), None);
        lifecycle.event(GuestEvent::PowerOff);
        lifecycle.end(Outcome::TripleFault);
        assert!(lifecycle.has_ended());
        assert_eq!(lifecycle.outcome(), Some(Outcome::PowerOff));
        assert_eq!(wakes.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_panic_is_told_but_is_no_end() {
        let (lifecycle, wakes) = lifecycle();
        lifecycle.event(GuestEvent::Panicked);
        assert!(lifecycle.has_panicked());
        assert!(!lifecycle.has_ended());
        assert_eq!(wakes.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_mark_ends_only_who_is_to_end_there_and_only_when_init_is_done() {
        let (stays, _) = lifecycle();
        stays.event(GuestEvent::Mark(1));
        assert!(!stays.has_ended());
        let (lifecycle, _) = lifecycle();
        let ends = lifecycle.ending_at_mark(true);
        ends.event(GuestEvent::Mark(MARK_HANDED_OVER));
        assert!(!ends.has_ended());
        ends.event(GuestEvent::Mark(1));
        assert_eq!(ends.outcome(), Some(Outcome::Stopped));
    }
}
