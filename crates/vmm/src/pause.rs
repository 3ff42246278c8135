//! Keeping all vCPUs out of the guest for a while.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whether vCPUs are to stay out of the guest, and how many do. Shared by the vCPU threads and the main thread.
#[derive(Default)]
pub struct Pause {
    /// Read at every exit, so not behind the lock; changed only with it held.
    wanted: AtomicBool,
    parked: Mutex<Parked>,
    changed: Condvar,
}

/// The vCPUs that are parked.
#[derive(Default)]
struct Parked {
    count: u32,
    /// Counts what they were asked.
    questions: u64,
}

/// How soon a vCPU is kicked again: the signal before may have come just before it entered the guest.
const KICK_AGAIN: Duration = Duration::from_micros(200);

impl Pause {
    /// A vCPU has to call [`Pause::park`] before it enters the guest.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Stay here until the guest is to go on, or the VM `has_ended`. Called on a vCPU's thread, out of the guest; `answer` is called
    /// there for each [`Pause::ask`] meanwhile.
    pub fn park(&self, has_ended: impl Fn() -> bool, mut answer: impl FnMut()) {
        let mut parked = self.lock();
        parked.count += 1;
        let mut answered = parked.questions;
        self.changed.notify_all();
        while self.is_wanted() && !has_ended() {
            if parked.questions != answered {
                answered = parked.questions;
                drop(parked);
                answer();
                parked = self.lock();
                continue;
            }
            parked = self
                .changed
                .wait(parked)
                .unwrap_or_else(PoisonError::into_inner);
        }
        parked.count -= 1;
    }

    /// Have each of `count` vCPUs answer. One that is about to park, as after [`Pause::begin_stopped`], has `limit` to do so.
    pub fn ask(&self, count: u32, limit: Duration) {
        let late = |parked: &mut Parked| parked.count < count;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, late);
        let (mut parked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        parked.questions += 1;
        self.changed.notify_all();
    }

    /// vCPUs that come to run park at once, as after [`Pause::stop_all`].
    pub fn begin_stopped(&self) {
        let _parked = self.lock();
        self.wanted.store(true, Ordering::Release);
    }

    /// Have all `count` vCPUs park; `kick` makes those in the guest leave it. True when they have, false when `has_ended` or
    /// `limit` came before: then nothing is wanted any more.
    pub fn stop_all(
        &self,
        count: u32,
        limit: Duration,
        kick: impl Fn(),
        has_ended: impl Fn() -> bool,
    ) -> bool {
        let until = Instant::now() + limit;
        let mut parked = self.lock();
        self.wanted.store(true, Ordering::Release);
        while parked.count < count {
            if has_ended() || Instant::now() >= until {
                self.wanted.store(false, Ordering::Release);
                self.changed.notify_all();
                return false;
            }
            drop(parked);
            kick();
            let waited = self.changed.wait_timeout(self.lock(), KICK_AGAIN);
            (parked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Let them go on.
    pub fn go_on(&self) {
        let _parked = self.lock();
        self.wanted.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// Have those that are parked look whether the VM has ended.
    pub fn look_again(&self) {
        let _parked = self.lock();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    const LIMIT: Duration = Duration::from_secs(20);

    /// What stands for vCPUs here: threads that count.
    #[derive(Default)]
    struct Vm {
        pause: Pause,
        ended: AtomicBool,
        count: AtomicU64,
    }

    impl Vm {
        fn run(&self) {
            while !self.has_ended() {
                if self.pause.is_wanted() {
                    self.pause.park(|| self.has_ended(), || ());
                    continue;
                }
                self.count.fetch_add(1, Ordering::Relaxed);
                thread::yield_now();
            }
        }

        fn has_ended(&self) -> bool {
            self.ended.load(Ordering::Acquire)
        }

        fn count(&self) -> u64 {
            self.count.load(Ordering::Acquire)
        }

        fn stop_all(&self, limit: Duration) -> bool {
            self.pause.stop_all(3, limit, || (), || self.has_ended())
        }
    }

    #[test]
    fn nobody_runs_between_stop_and_go() {
        let vm = Vm::default();
        thread::scope(|scope| {
            (0..3).for_each(|_| drop(scope.spawn(|| vm.run())));
            for _ in 0..100 {
                assert!(vm.stop_all(LIMIT));
                let before = vm.count();
                thread::sleep(Duration::from_micros(300));
                assert_eq!(vm.count(), before);
                vm.pause.go_on();
                let until = Instant::now() + LIMIT;
                while vm.count() == before {
                    assert!(Instant::now() < until, "nobody goes on");
                    thread::yield_now();
                }
            }
            assert!(vm.stop_all(LIMIT));
            // The end reaches those that are parked.
            vm.ended.store(true, Ordering::Release);
            vm.pause.look_again();
        });
    }

    #[test]
    fn one_that_does_not_come_is_given_up_and_the_others_go_on() {
        let vm = Vm::default();
        thread::scope(|scope| {
            (0..2).for_each(|_| drop(scope.spawn(|| vm.run())));
            assert!(!vm.stop_all(Duration::from_millis(20)));
            let before = vm.count();
            let until = Instant::now() + LIMIT;
            while vm.count() == before {
                assert!(Instant::now() < until, "nobody goes on");
                thread::yield_now();
            }
            vm.ended.store(true, Ordering::Release);
        });
        assert!(!vm.stop_all(LIMIT), "it has ended");
    }
}
