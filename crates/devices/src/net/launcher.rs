//! Starting programs for threads that may not: a seccomp filter would forbid it, and the program would inherit the filter.

use std::io;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

/// A command to start, and whom to tell.
type Job = (Command, Sender<io::Result<Child>>);

/// How programs are started once filters are in force; None: not at all. Unset before, when any thread may.
static LAUNCHER: OnceLock<Option<Sender<Job>>> = OnceLock::new();

/// Start a thread that starts passt for VMs that are built from now on, and does nothing else. Call it on a thread without a
/// filter, where a VM with a user network may be built after filters are in force. Once is enough.
///
/// The thread itself has no filter, because what it starts would inherit it.
pub fn start() -> io::Result<()> {
    if let Some(Some(_)) = LAUNCHER.get() {
        return Ok(());
    }
    let (sender, jobs) = channel::<Job>();
    let body = move || {
        for (mut command, done) in jobs {
            // Who does not listen any more has no use for it; it ends when its socket is closed.
            let _ = done.send(command.spawn());
        }
    };
    let thread = std::thread::Builder::new().name("launcher".into());
    thread.stack_size(128 << 10).spawn(body)?;
    // Another thread that was as quick has one of its own, and this one ends.
    let _ = LAUNCHER.set(Some(sender));
    Ok(())
}

/// From now on no program is started but by the launcher, should there be one. To be called before filters are in force, under
/// which an attempt would end the process.
pub fn refuse() {
    let _ = LAUNCHER.set(None);
}

/// Start `command` by the launcher, or here where nothing forbids it.
pub(super) fn spawn(mut command: Command) -> io::Result<Child> {
    let launcher = match LAUNCHER.get() {
        None => return command.spawn(),
        Some(Some(launcher)) => launcher,
        Some(None) => {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "seccomp filters are in force; start Husk with --user-networks (husk serve) or --no-seccomp",
            ));
        }
    };
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (done, child) = channel();
    launcher.send((command, done)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}
