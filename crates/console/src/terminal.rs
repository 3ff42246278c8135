//! The controlling terminal's mode.

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Standard input's mode as it was found, once it was read.
static FOUND: OnceLock<Termios> = OnceLock::new();
/// The terminal is in our raw mode.
static RAW: AtomicBool = AtomicBool::new(false);
/// Whether it may be made raw: one of the three below.
static PHASE: AtomicU8 = AtomicU8::new(ENDED);
/// A [`Terminal`] exists.
const OPEN: u8 = 0;
/// So it does, but the process is being stopped.
const STOPPED: u8 = 1;
/// There is none, or no longer.
const ENDED: u8 = 2;

/// Standard input as a terminal in raw mode, and its restoration.
///
/// There is one standard input, so this is a guard over process-wide state: have one at a time. In the
/// background (`husk run &`) the terminal is left alone until the process comes to the foreground.
pub struct Terminal(());

impl Terminal {
    /// Put the terminal on standard input into raw mode, if this process is in its foreground. `None` if
    /// standard input is no terminal.
    pub fn open() -> Option<Self> {
        if !isatty(stdin()) {
            return None;
        }
        PHASE.store(OPEN, Ordering::SeqCst);
        let terminal = Self(());
        terminal.claim();
        Some(terminal)
    }

    /// Whether standard input may be read: this process is in the terminal's foreground, and the terminal is
    /// raw now. Reading in the background would stop the process (SIGTTIN).
    pub fn claim(&self) -> bool {
        make_raw()
    }

    /// Whether the terminal is raw, so that a line on it ends in `\r\n`.
    pub fn is_raw() -> bool {
        RAW.load(Ordering::SeqCst)
    }

    /// Put the terminal back as it was found, for good: [`Terminal::claim`] fails from now on.
    ///
    /// Async-signal-safe, idempotent, and without effect if no [`Terminal`] was ever opened.
    pub fn emergency_restore() {
        PHASE.store(ENDED, Ordering::SeqCst);
        restore();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        Self::emergency_restore();
    }
}

/// Restore for the time that the process is stopped. Async-signal-safe.
pub(crate) fn suspend() {
    if PHASE
        .compare_exchange(OPEN, STOPPED, Ordering::SeqCst, Ordering::SeqCst)
        .is_ok()
    {
        restore();
    }
}

/// After [`suspend`]: raw again, if this process is in the foreground. Async-signal-safe, for the mode that
/// was found is known by then.
pub(crate) fn resume() {
    if PHASE
        .compare_exchange(STOPPED, OPEN, Ordering::SeqCst, Ordering::SeqCst)
        .is_ok()
        && FOUND.get().is_some()
    {
        make_raw();
    }
}

fn in_foreground() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp())
}

fn make_raw() -> bool {
    if PHASE.load(Ordering::SeqCst) != OPEN || !in_foreground() {
        return false;
    }
    if RAW.load(Ordering::SeqCst) {
        return true;
    }
    let found = match FOUND.get() {
        Some(found) => found,
        None => match tcgetattr(stdin()) {
            Ok(found) => FOUND.get_or_init(|| found),
            Err(_) => return false,
        },
    };
    let mut raw = found.clone();
    raw.make_raw();
    RAW.store(true, Ordering::SeqCst);
    let _ = tcsetattr(stdin(), OptionalActions::Now, &raw);
    // A restoration that came between the two lines above found nothing to undo.
    if PHASE.load(Ordering::SeqCst) != OPEN {
        RAW.store(true, Ordering::SeqCst);
        restore();
        return false;
    }
    true
}

/// Only atomics and system calls: this runs in signal handlers. In the background the terminal is the
/// shell's, which has set its own mode, and changing it would stop us (SIGTTOU).
fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && in_foreground()
        && let Some(found) = FOUND.get()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, found);
    }
}
