//! Filters in force, and what happens to a thread that makes a call it may not.
#![allow(unsafe_code)] // prctl, seccomp and a signal handler that reads registers: no safe crate has them

use crate::{Kind, names};
use libc::{c_int, c_void};
use seccompiler::sock_filter;
use std::cell::Cell;
use std::fmt::Write;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Exit status of a process that has made a system call which its filter does not allow. Firecracker's.
pub const EXIT_STATUS: i32 = 148;

/// `si_code` of a SIGSYS that a filter has caused: SYS_SECCOMP of <asm-generic/siginfo.h>.
const SYS_SECCOMP: c_int = 1;

/// `si_arch`: AUDIT_ARCH_X86_64 of <linux/audit.h>.
const ARCH: u32 = 0xc000_003e;

thread_local! {
    /// The filter that this thread has installed last. Constant and without a destructor: a signal handler may read it.
    static KIND: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// The `fn()` that is called before the line is written; 0 is none.
static RESTORE: AtomicUsize = AtomicUsize::new(0);

/// The `fn()` that is called after it; 0 is none.
static LAST: AtomicUsize = AtomicUsize::new(0);

/// `siginfo_t` of a SIGSYS (sigaction(2)).
#[repr(C)]
struct SigSys {
    signo: c_int,
    errno: c_int,
    code: c_int,
    address: *mut c_void,
    syscall: c_int,
    arch: u32,
}

/// `struct sock_fprog` of <linux/filter.h>.
#[repr(C)]
struct Fprog {
    len: u16,
    filter: *const sock_filter,
}

/// Make a violation end the process with [`EXIT_STATUS`] and a line on stderr; `restore` is called before that line and `last`
/// after it. Both must be async-signal-safe, and make no calls but those that every filter allows. `restore` is also called
/// before a SIGSYS that another process sent kills this one.
///
/// Call it before the first filter is installed.
pub fn catch_violations(restore: fn(), last: fn()) -> io::Result<()> {
    RESTORE.store(restore as usize, Ordering::Release);
    LAST.store(last as usize, Ordering::Release);
    set_action(
        on_sigsys as *const () as usize,
        libc::SA_SIGINFO | libc::SA_ONSTACK,
    )
}

pub(crate) fn remember(kind: Kind) {
    KIND.set(Some(kind));
}

/// Put `program` in force for this thread.
pub(crate) fn install(program: &[sock_filter]) -> io::Result<()> {
    let program = Fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr(),
    };
    // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers only, and all five of them.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mode = libc::c_ulong::from(libc::SECCOMP_SET_MODE_FILTER);
    // SAFETY: the kernel reads `len` instructions at `filter`, a slice that is borrowed for the call, and keeps a copy.
    match unsafe { libc::syscall(libc::SYS_seccomp, mode, 0_u64, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_action(handler: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction (default action, empty mask, no flags).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is valid, and its handler is SIG_DFL or, with SA_SIGINFO, `on_sigsys`, which takes the three arguments of
    // such a handler and calls async-signal-safe functions only.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Call what [`catch_violations`] was given for the time before the line.
pub(crate) fn restore() {
    call(&RESTORE);
}

fn call(stored: &AtomicUsize) {
    let stored = stored.load(Ordering::Acquire);
    if stored != 0 {
        // SAFETY: nothing but a `fn()` or 0 is stored in the two statics that come here.
        let stored = unsafe { std::mem::transmute::<usize, fn()>(stored) };
        stored();
    }
}

extern "C" fn on_sigsys(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    restore();
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t, whose part for SIGSYS this is; it is larger, and aligned.
    let info = unsafe { &*info.cast::<SigSys>() };
    if info.code != SYS_SECCOMP {
        say("husk: SIGSYS: ended by another process\n");
        let _ = set_action(libc::SIG_DFL, 0);
        // SAFETY: raise is async-signal-safe. The signal is blocked while this runs, and kills when it returns.
        unsafe { libc::raise(libc::SIGSYS) };
        return;
    }
    // SAFETY: with SA_SIGINFO the third argument is the interrupted thread's ucontext_t.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut line = Line::default();
    // A line that is too long is cut.
    let _ = describe(&mut line, info, registers);
    say(line.text());
    call(&LAST);
    // SAFETY: _exit is async-signal-safe, and does not return.
    unsafe { libc::_exit(EXIT_STATUS) }
}

fn describe(line: &mut Line, info: &SigSys, registers: &[libc::greg_t]) -> std::fmt::Result {
    let mut name = [0; 16];
    // SAFETY: both take no argument, and never fail.
    let is_main = unsafe { libc::getpid() == libc::gettid() };
    match is_main {
        true => name[..4].copy_from_slice(b"main"),
        // SAFETY: PR_GET_NAME writes at most 16 bytes, with a NUL at their end.
        false => drop(unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) }),
    }
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name).unwrap_or("?");
    let number = info.syscall;
    let known = usize::try_from(number)
        .ok()
        .and_then(|number| names::all().get(number));
    let syscall = match known.filter(|known| info.arch == ARCH && !known.is_empty()) {
        Some(known) => known,
        None => "what is no call of this architecture",
    };
    write!(
        line,
        "husk: seccomp: the thread {name} may not call {syscall} ("
    )?;
    write!(line, "system call {number}, arguments")?;
    for register in [
        libc::REG_RDI,
        libc::REG_RSI,
        libc::REG_RDX,
        libc::REG_R10,
        libc::REG_R8,
        libc::REG_R9,
    ] {
        let value = registers.get(register as usize).copied().unwrap_or(0);
        write!(line, " {value:#x}")?;
    }
    let kind = KIND.get().map_or("of its parent", Kind::name);
    writeln!(line, "; filter {kind}); see docs/seccomp.md")
}

/// A line that is put together without an allocator.
struct Line {
    bytes: [u8; 320],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 320],
            length: 0,
        }
    }
}

impl Line {
    fn text(&self) -> &str {
        let text = self.bytes.get(..self.length).unwrap_or_default();
        std::str::from_utf8(text).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let place = room.get_mut(..text.len()).ok_or(std::fmt::Error)?;
        place.copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}

/// Write to stderr, whatever lock is held. With stderr closed there is nobody to tell.
pub(crate) fn say(text: &str) {
    // SAFETY: the pointer and length are the text's; write is async-signal-safe.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}
