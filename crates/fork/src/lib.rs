//! A process of this process: fork(2), for one that goes on in its own way and never comes back.
//!
//! **Architecture Invariant:** a leaf. What is unsafe about a fork is all here.

use rustix::process::Pid;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Signals that end a process, and for which this one may have handlers that tell threads of its own.
const ENDING: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// Start a process that does `child` and ends with its status; the number of the new process.
///
/// It has all memory of this one as it is now, and only the calling thread. Of its descriptors only the standard streams and `keep` are
/// open, so `child` may use nothing else that has one. SIGHUP, SIGINT, SIGQUIT and SIGTERM do to it what they do by themselves.
/// Nothing that this process has is dropped there.
///
/// A lock that another thread holds at this moment is never released in the new process: `child` must need none but libc's
/// (whose allocator is made for this) and those that the calling thread holds.
pub fn start(keep: &[RawFd], child: impl FnOnce() -> u8) -> io::Result<Pid> {
    // SAFETY: a fork breaks nothing that Rust relies on: the child's memory is a copy, and its one thread goes on at this point with
    // its own stack. It leaves only by `_exit`, so nothing is dropped twice, and no buffer is written twice.
    match unsafe { libc::fork() } {
        0 => {
            become_alone(keep);
            // A panic has been told by its hook.
            let status = catch_unwind(AssertUnwindSafe(child)).unwrap_or(101);
            // SAFETY: it does not return, and runs nothing of this process.
            unsafe { libc::_exit(status.into()) }
        }
        number => Pid::from_raw(number)
            .filter(|_| number > 0)
            .ok_or_else(io::Error::last_os_error),
    }
}

/// In the new process: nothing is shared with the old one but what was asked for.
fn become_alone(keep: &[RawFd]) {
    for signal in ENDING {
        // SAFETY: SIG_DFL is always valid. A signal that is ignored stays so.
        unsafe {
            if libc::signal(signal, libc::SIG_DFL) == libc::SIG_IGN {
                libc::signal(signal, libc::SIG_IGN);
            }
        }
    }
    let mut keep = keep.to_vec();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep {
        let (first, last) = (from, fd - 1);
        close(first, last);
        from = from.max(fd + 1);
    }
    close(from, RawFd::MAX);
}

fn close(first: RawFd, last: RawFd) {
    if let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last))
        && first <= last
    {
        // SAFETY: the objects that own these descriptors are never used nor dropped in this process, as `start` demands.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitOptions, waitpid};
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    fn status(pid: Pid) -> Option<i32> {
        let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
        status.exit_status()
    }

    #[test]
    fn a_child_has_what_it_is_given_and_nothing_else() {
        let (mut read, mut write) = io::pipe().unwrap();
        let (other, _held) = io::pipe().unwrap();
        let (own, others) = (write.as_raw_fd(), other.as_raw_fd());
        let is_open = |fd: RawFd| std::fs::metadata(format!("/proc/self/fd/{fd}")).is_ok();
        let pid = start(&[own], || {
            write.write_all(b"here").unwrap();
            u8::from(is_open(own)) + 2 * u8::from(is_open(others))
        });
        let pid = pid.unwrap();
        drop(write);
        let mut said = String::new();
        read.read_to_string(&mut said).unwrap();
        assert_eq!((said.as_str(), status(pid)), ("here", Some(1)));
        assert!(is_open(others), "in this process nothing is closed");
    }

    #[test]
    fn what_ends_a_process_ends_the_child() {
        let pid = start(&[], || {
            std::thread::sleep(std::time::Duration::from_secs(60));
            0
        });
        let pid = pid.unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.terminating_signal(), Some(libc::SIGTERM));
    }
}
