//! The host's side of the guest's serial console: the terminal, standard input and standard output.
//!
//! Three parts, each usable alone: [`Terminal`] puts the terminal into raw mode and always restores it,
//! [`Output`] carries the guest's bytes to a file descriptor, [`Input`] carries bytes to the guest.
//!
//! **Architecture Invariant:** no byte is lost or reordered between a file descriptor and the UART, and no
//! vCPU makes a system call that can block on the host's terminal.
#![deny(unsafe_code)]

mod escape;
mod file;
mod input;
mod output;
mod signals;
mod terminal;

pub use file::FileOutput;
pub use input::Input;
pub use output::Output;
pub use signals::{
    install_exit_statuses, install_fatal_signal_handlers, install_panic_hook, is_ignored,
};
pub use terminal::Terminal;

/// What the user asked for by an escape sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleEvent {
    /// Ctrl-A x: end the VM at once.
    Leave,
    /// Ctrl-A p: press the guest's power button.
    PowerButton,
}

/// Why the console could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No thread.
    #[error(
        "cannot start the thread {name:?}: raise the limit on processes (ulimit -u, pids cgroup)"
    )]
    Thread {
        /// Its name.
        name: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// No event fd.
    #[error("cannot create an event fd for the console: raise the limit on open files (ulimit -n)")]
    EventFd(#[source] std::io::Error),
    /// Standard output could not be duplicated.
    #[error("cannot duplicate standard output: raise the limit on open files (ulimit -n)")]
    Duplicate(#[source] std::io::Error),
    /// A signal handler could not be set.
    #[error(
        "cannot set a handler for signal {signal}: a sandbox around husk must allow rt_sigaction"
    )]
    Signal {
        /// Its number.
        signal: i32,
        /// What the host said.
        source: std::io::Error,
    },
}
