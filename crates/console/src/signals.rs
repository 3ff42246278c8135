//! Ends that no one planned: panics and signals. The terminal is restored before the process dies.
#![allow(unsafe_code)] // signal handlers: no safe crate sets one for SIGSEGV

use crate::{Error, Terminal, terminal};
use husk_metrics::METRICS;
use libc::c_int;
use rustix::io::write;
use rustix::stdio::stderr;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU8, Ordering};

/// Signals whose default action kills, and the line that says so. SIGINT, SIGTERM, SIGHUP and SIGQUIT are the monitor's
/// to handle, and must not be here: a handler that calls the one before it would call itself for ever. SIGSYS is the seccomp
/// filters'.
const FATAL: [(c_int, &str); 9] = [
    (
        libc::SIGSEGV,
        "husk: internal error: SIGSEGV (bad memory access); please report it\n",
    ),
    (
        libc::SIGBUS,
        "husk: SIGBUS: a kernel or initrd file that was mapped has shrunk, or the host is out of memory\n",
    ),
    (
        libc::SIGABRT,
        "husk: internal error: SIGABRT (aborted); please report it\n",
    ),
    (
        libc::SIGILL,
        "husk: internal error: SIGILL (illegal instruction); please report it\n",
    ),
    (
        libc::SIGFPE,
        "husk: internal error: SIGFPE (arithmetic fault); please report it\n",
    ),
    (
        libc::SIGXCPU,
        "husk: SIGXCPU: the limit on CPU time is reached (ulimit -t)\n",
    ),
    (
        libc::SIGXFSZ,
        "husk: SIGXFSZ: a file would be larger than the limit allows (ulimit -f)\n",
    ),
    (libc::SIGALRM, ""),
    (libc::SIGTRAP, ""),
];

/// Make a panic restore the terminal, print one line and end the process with status 1. With
/// `RUST_BACKTRACE` set a backtrace follows.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        Terminal::emergency_restore();
        let message = info
            .payload_as_str()
            .unwrap_or("(no message)")
            .replace('\n', " ");
        let place = info
            .location()
            .map(|at| format!(" ({}:{})", at.file(), at.line()));
        let backtrace = Backtrace::capture();
        let trace = match backtrace.status() {
            BacktraceStatus::Captured => format!("{backtrace}"),
            _ => String::new(),
        };
        let text = format!(
            "husk: internal error: {message}{}; please report it\n{trace}",
            place.unwrap_or_default()
        );
        // Not eprintln!: the panic may have come with stderr's lock held.
        let _ = write(stderr(), text.as_bytes());
        std::process::exit(1);
    }));
}

/// Make signals that kill (and are at their default) restore the terminal first, and say in one line what
/// happened; then the default action follows. They are counted, and a last line of metrics is written. SIGTSTP restores, stops,
/// and makes the terminal raw again when the process goes on. SIGPIPE is counted and has no other effect.
///
/// Call it before other threads start, and install handlers of one's own after it.
pub fn install_fatal_signal_handlers() -> Result<(), Error> {
    for (signal, _) in FATAL {
        // Rust's runtime has handlers for these two (stack overflow); what is ignored (nohup) stays ignored.
        let replace = matches!(signal, libc::SIGSEGV | libc::SIGBUS);
        if replace || disposition(signal)? == libc::SIG_DFL {
            set(
                signal,
                on_fatal as *const () as usize,
                libc::SA_RESETHAND | libc::SA_ONSTACK,
            )?;
        }
    }
    // Rust's runtime ignores it: who writes is told by an error.
    set(
        libc::SIGPIPE,
        on_pipe as *const () as usize,
        libc::SA_RESTART | libc::SA_ONSTACK,
    )?;
    if disposition(libc::SIGTSTP)? == libc::SIG_DFL {
        set(
            libc::SIGTSTP,
            on_stop as *const () as usize,
            libc::SA_RESTART | libc::SA_ONSTACK,
        )?;
    }
    Ok(())
}

/// Make `signals` restore the terminal and end the process with the status beside them, at once and without a word; those
/// without a status restore it and then do what they do by default. After [`install_fatal_signal_handlers`], which has others
/// in mind for some of them.
pub fn install_exit_statuses(signals: &[(c_int, Option<u8>)]) -> Result<(), Error> {
    for &(signal, status) in signals {
        if is_ignored(signal) {
            continue;
        }
        let handler = match (status, usize::try_from(signal)) {
            (Some(status), Ok(at)) => {
                if let Some(own) = EXIT_STATUS.get(at) {
                    own.store(status, Ordering::Relaxed);
                }
                on_exit as *const () as usize
            }
            _ => on_fatal as *const () as usize,
        };
        set(signal, handler, libc::SA_RESETHAND | libc::SA_ONSTACK)?;
    }
    Ok(())
}

/// By signal: the status that [`on_exit`] ends with.
static EXIT_STATUS: [AtomicU8; 65] = [const { AtomicU8::new(0) }; 65];

extern "C" fn on_exit(signal: c_int) {
    Terminal::emergency_restore();
    let status = usize::try_from(signal)
        .ok()
        .and_then(|at| EXIT_STATUS.get(at));
    let status = status.map_or(1, |status| status.load(Ordering::Relaxed));
    tell(signal);
    // SAFETY: _exit is async-signal-safe and takes any status.
    unsafe { libc::_exit(status.into()) };
}

/// Whether `signal` was set to be ignored, by nohup for example, and should stay so.
pub fn is_ignored(signal: c_int) -> bool {
    disposition(signal).is_ok_and(|disposition| disposition == libc::SIG_IGN)
}

fn disposition(signal: c_int) -> Result<usize, Error> {
    let mut current = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only reads; `current` is valid for one sigaction, and all-zero is a value of it.
    let (result, current) = unsafe {
        let result = libc::sigaction(signal, std::ptr::null(), current.as_mut_ptr());
        (result, current.assume_init())
    };
    check(signal, result)?;
    Ok(current.sa_sigaction)
}

fn set(signal: c_int, handler: usize, flags: c_int) -> Result<(), Error> {
    // SAFETY: all-zero is a valid sigaction (default action, empty mask, no flags).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is valid; without SA_SIGINFO its handler takes one c_int, as `on_fatal`, `on_exit`, `on_pipe` and
    // `on_stop` do, and all call async-signal-safe functions only.
    let result = unsafe { libc::sigaction(signal, &action, null_mut()) };
    check(signal, result)
}

fn check(signal: c_int, result: c_int) -> Result<(), Error> {
    match result {
        0 => Ok(()),
        _ => Err(Error::Signal {
            signal,
            source: std::io::Error::last_os_error(),
        }),
    }
}

/// SA_RESETHAND has put the default action back, and the signal is blocked while this runs: raised again, it
/// kills when this returns.
extern "C" fn on_fatal(signal: c_int) {
    Terminal::emergency_restore();
    let line = FATAL.iter().find(|(fatal, _)| *fatal == signal);
    if let Some((_, line)) = line
        && !line.is_empty()
    {
        let _ = write(stderr(), line.as_bytes());
    }
    tell(signal);
    // SAFETY: raise is async-signal-safe and takes any signal number.
    unsafe { libc::raise(signal) };
}

/// Count a signal that ends the process, and write the last line of metrics. Async-signal-safe, and after all else that the
/// user is to see.
fn tell(signal: c_int) {
    let signals = &METRICS.signals;
    let own = match signal {
        libc::SIGBUS => Some(&signals.sigbus),
        libc::SIGSEGV => Some(&signals.sigsegv),
        libc::SIGXFSZ => Some(&signals.sigxfsz),
        libc::SIGXCPU => Some(&signals.sigxcpu),
        libc::SIGHUP => Some(&signals.sighup),
        libc::SIGILL => Some(&signals.sigill),
        _ => None,
    };
    if let Some(own) = own {
        own.set(1);
    }
    husk_metrics::flush_from_handler();
}

extern "C" fn on_pipe(_: c_int) {
    METRICS.signals.sigpipe.inc();
}

/// Stop as SIGTSTP by default does, between a restored terminal and a raw one.
extern "C" fn on_stop(signal: c_int) {
    terminal::suspend();
    // SAFETY: sigaction, sigemptyset, sigaddset, raise and pthread_sigmask are async-signal-safe, and every
    // pointer is to a local that is valid for the call; all-zero is a valid sigaction (the default action) and
    // a valid sigset_t.
    unsafe {
        let errno = *libc::__errno_location();
        let default: libc::sigaction = std::mem::zeroed();
        let mut ours: libc::sigaction = std::mem::zeroed();
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaction(signal, &default, &mut ours);
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::raise(signal);
        // The process stops here, and SIGCONT lets it go on.
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, null_mut());
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut());
        libc::sigaction(signal, &ours, null_mut());
        *libc::__errno_location() = errno;
    }
    terminal::resume();
}
