//! Waiting without sleep.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// Receive what is about to come, for a `moment` and without sleep: a processor that has fallen idle takes as long to wake as
/// the thread that is waited for takes for its work, where the processor is itself virtual.
pub fn spin_for<T>(receiver: &Receiver<T>, moment: Duration) -> Result<T, RecvTimeoutError> {
    let asked = Instant::now();
    loop {
        match receiver.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            Err(TryRecvError::Empty) if asked.elapsed() > moment => {
                return Err(RecvTimeoutError::Timeout);
            }
            // Where there is but one processor, the other thread has it.
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
}

/// How long a guest that was just started has the processor to itself: until it has been entered, and has come out for the first
/// time.
const HEAD_START: Duration = Duration::from_micros(250);

/// Give way to a guest that was just started. A vCPU's thread is woken where the one that woke it runs, and hosts that have their
/// virtual processors packed leave it there: what else is to be done would come before the guest's first instruction.
pub fn give_way() {
    std::thread::sleep(HEAD_START);
}
