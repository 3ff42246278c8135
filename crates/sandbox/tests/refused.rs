//! Filters in the kernel: this program starts itself again as a process with one thread of a kind, which makes one call.

use husk_sandbox::{EXIT_STATUS, Filters, Kind, catch_violations};
use std::process::{Command, ExitCode, Output};

/// What a thread can be asked to do.
type Act = (&'static str, fn() -> i64);

/// Calls that no thread may make, with the name that the line has for it.
const NEVER: &[Act] = &[
    ("execve", || raw(libc::SYS_execve, [0; 4])),
    ("execveat", || raw(libc::SYS_execveat, [0; 4])),
    ("fork", || raw(libc::SYS_fork, [0; 4])),
    ("vfork", || raw(libc::SYS_vfork, [0; 4])),
    ("clone", || {
        raw(libc::SYS_clone, [libc::SIGCHLD as i64, 0, 0, 0])
    }),
    ("ptrace", || raw(libc::SYS_ptrace, [0; 4])),
    ("process_vm_writev", || {
        raw(libc::SYS_process_vm_writev, [1, 0, 0, 0])
    }),
    ("kill", || raw(libc::SYS_kill, [1, 0, 0, 0])),
    ("tgkill", || raw(libc::SYS_tgkill, [1, 1, 6, 0])),
    ("mount", || raw(libc::SYS_mount, [0; 4])),
    ("unshare", || raw(libc::SYS_unshare, [0; 4])),
    ("setns", || raw(libc::SYS_setns, [0; 4])),
    ("bpf", || raw(libc::SYS_bpf, [0; 4])),
    ("keyctl", || raw(libc::SYS_keyctl, [0; 4])),
    // One that another process cannot poll.
    ("userfaultfd", || raw(libc::SYS_userfaultfd, [0; 4])),
    ("perf_event_open", || raw(libc::SYS_perf_event_open, [0; 4])),
    ("init_module", || raw(libc::SYS_init_module, [0; 4])),
    ("setuid", || raw(libc::SYS_setuid, [0; 4])),
    ("personality", || raw(libc::SYS_personality, [-1, 0, 0, 0])),
    ("mmap", || {
        raw(libc::SYS_mmap, [0, 4096, i64::from(libc::PROT_EXEC), 0x22])
    }),
    ("mprotect", || raw(libc::SYS_mprotect, [0, 4096, 5, 0])),
    ("memfd_secret", || raw(libc::SYS_memfd_secret, [0; 4])),
    ("prctl", || {
        raw(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0])
    }),
    ("ioctl", || ioctl(0x5412)), // TIOCSTI
    ("socket", || socket(libc::AF_PACKET)),
    ("mknod", || raw(libc::SYS_mknod, [0; 4])),
];

const OPEN: Act = ("openat", || open(libc::O_RDWR));
const OPEN_OLD: Act = ("open", || {
    raw(libc::SYS_open, [c"/dev/null".as_ptr() as i64, 0, 0, 0])
});
const CREATE: Act = ("open", || {
    let flags = i64::from(libc::O_CREAT | libc::O_RDWR);
    raw(libc::SYS_open, [c"/dev/null".as_ptr() as i64, flags, 0, 0])
});
const INTERNET: Act = ("socket", || socket(libc::AF_INET));
const UNIX: Act = ("socket", || socket(libc::AF_UNIX));
const KVM_RUN: Act = ("ioctl", || ioctl(0xae80));
const KVM_CREATE_VM: Act = ("ioctl", || ioctl(0xae01));
const KVM_IOEVENTFD: Act = ("ioctl", || ioctl(0x4040_ae79));
const TUNSETIFF: Act = ("ioctl", || ioctl(0x4004_54ca));
const CONNECT: Act = ("connect", || raw(libc::SYS_connect, [-1, 0, 0, 0]));
const RING: Act = ("io_uring_setup", || raw(libc::SYS_io_uring_setup, [0; 4]));
const ENTER: Act = ("io_uring_enter", || {
    raw(libc::SYS_io_uring_enter, [-1, 0, 0, 0])
});
const UNLINK: Act = ("unlink", || {
    raw(libc::SYS_unlink, [c"/nonexistent".as_ptr() as i64, 0, 0, 0])
});
const USERFAULTFD: Act = ("userfaultfd", || {
    let flags = i64::from(libc::O_CLOEXEC | libc::O_NONBLOCK);
    raw(libc::SYS_userfaultfd, [flags, 0, 0, 0])
});
const KICK: Act = ("tgkill", || {
    raw(
        libc::SYS_tgkill,
        [
            std::process::id().into(),
            0x3fff_ffff,
            libc::SIGRTMIN().into(),
            0,
        ],
    )
});
/// By itself: libc starts threads with all signals blocked, and then a violation is a plain SIGSYS.
const START_A_THREAD: Act = ("clone3", || raw(libc::SYS_clone3, [0; 4]));
const RUN_A_THREAD: Act = ("clone", || {
    let thread = std::thread::Builder::new().name("child".into());
    let made = thread.spawn(|| vec![0_u8; 1 << 20].len()).map(|t| t.join());
    i64::from(matches!(made, Ok(Ok(_)))) - 1
});

/// What each kind must not, and what it must be able to do. Where the call fails, it was not the filter's doing.
fn cases() -> Vec<(Kind, Vec<Act>, Vec<Act>)> {
    vec![
        (
            Kind::Vcpu,
            vec![
                OPEN,
                USERFAULTFD,
                OPEN_OLD,
                INTERNET,
                UNIX,
                KVM_CREATE_VM,
                KVM_IOEVENTFD,
                TUNSETIFF,
                CONNECT,
                RING,
                ENTER,
                UNLINK,
            ],
            vec![KVM_RUN, RUN_A_THREAD],
        ),
        (
            Kind::Io,
            vec![
                OPEN,
                USERFAULTFD,
                CREATE,
                INTERNET,
                KVM_RUN,
                KVM_CREATE_VM,
                TUNSETIFF,
                RING,
                UNLINK,
                START_A_THREAD,
            ],
            vec![OPEN_OLD, UNIX, CONNECT, ENTER],
        ),
        (
            Kind::Api,
            vec![
                OPEN,
                USERFAULTFD,
                OPEN_OLD,
                INTERNET,
                UNIX,
                KVM_RUN,
                KVM_CREATE_VM,
                CONNECT,
                RING,
                ENTER,
                UNLINK,
                START_A_THREAD,
            ],
            vec![],
        ),
        (
            Kind::Console,
            vec![
                OPEN,
                USERFAULTFD,
                OPEN_OLD,
                INTERNET,
                UNIX,
                KVM_RUN,
                KVM_CREATE_VM,
                CONNECT,
                RING,
                UNLINK,
                START_A_THREAD,
            ],
            vec![],
        ),
        (
            Kind::Doorbells,
            vec![
                OPEN,
                USERFAULTFD,
                OPEN_OLD,
                INTERNET,
                UNIX,
                KVM_RUN,
                KVM_CREATE_VM,
                CONNECT,
                RING,
                UNLINK,
                START_A_THREAD,
            ],
            vec![KVM_IOEVENTFD],
        ),
        (
            Kind::Main,
            vec![
                OPEN,
                USERFAULTFD,
                CREATE,
                INTERNET,
                UNIX,
                KVM_RUN,
                KVM_CREATE_VM,
                TUNSETIFF,
                CONNECT,
                RING,
            ],
            vec![OPEN_OLD, UNLINK, KICK, RUN_A_THREAD, KVM_IOEVENTFD],
        ),
        (
            Kind::Builder,
            vec![],
            vec![
                OPEN,
                OPEN_OLD,
                INTERNET,
                UNIX,
                KVM_RUN,
                KVM_CREATE_VM,
                TUNSETIFF,
                CONNECT,
                RING,
                UNLINK,
                KICK,
                USERFAULTFD,
                RUN_A_THREAD,
            ],
        ),
    ]
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, list, kind, act] = arguments.as_slice()
        && role == "act"
    {
        return child(list, kind, act);
    }
    for (kind, refused, allowed) in cases() {
        for (index, (syscall, _)) in NEVER.iter().enumerate() {
            assert_refused(kind, syscall, &start("never", kind, index));
        }
        for (index, (syscall, _)) in refused.iter().enumerate() {
            assert_refused(kind, syscall, &start("refused", kind, index));
        }
        for (index, (syscall, _)) in allowed.iter().enumerate() {
            let output = start("allowed", kind, index);
            assert_eq!(
                output.status.code(),
                Some(0),
                "{kind:?} {syscall}: {}",
                said(&output)
            );
        }
        println!(
            "{}: {} refused, {} allowed",
            kind.name(),
            NEVER.len() + refused.len(),
            allowed.len()
        );
    }
    what_libraries_open_by_themselves_is_refused_quietly();
    a_signal_from_another_process_is_no_violation();
    without_filters_nothing_is_refused();
    ExitCode::SUCCESS
}

fn start(list: &str, kind: Kind, act: usize) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["act", list, kind.name(), &act.to_string()]);
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_refused(kind: Kind, syscall: &str, output: &Output) {
    let line = said(output);
    assert_eq!(
        output.status.code(),
        Some(EXIT_STATUS),
        "{kind:?} {syscall}: {line}"
    );
    let wanted = format!("husk: seccomp: the thread worker7 may not call {syscall} (system call ");
    assert!(line.starts_with(&wanted), "{kind:?} {syscall}: {line}");
    assert!(
        line.contains(&format!("; filter {})", kind.name())),
        "{line}"
    );
    assert_eq!(line.lines().count(), 1, "{line}");
    // What was to be done before the line.
    assert_eq!(output.stdout, b"restored, told", "{kind:?} {syscall}");
}

/// Runs in a process of its own.
fn child(list: &str, kind: &str, act: &str) -> ExitCode {
    let index: usize = act.parse().unwrap();
    let kind = Kind::ALL.into_iter().find(|k| k.name() == kind).unwrap();
    let (_, refused, allowed) = cases().into_iter().find(|(k, ..)| *k == kind).unwrap();
    let act = match list {
        "never" => NEVER[index],
        "refused" => refused[index],
        "allowed" => allowed[index],
        "quiet" => (
            "openat",
            (|| open(libc::O_RDONLY | libc::O_CLOEXEC)) as fn() -> i64,
        ),
        "signal" => ("kill", (|| raw(libc::SYS_pause, [0; 4])) as fn() -> i64),
        _ => KVM_CREATE_VM,
    };
    let restore = || {
        let _ = raw(libc::SYS_write, [1, c"restored".as_ptr() as i64, 8, 0]);
    };
    let last = || {
        let _ = raw(libc::SYS_write, [1, c", told".as_ptr() as i64, 6, 0]);
    };
    catch_violations(restore, last).unwrap();
    let filters = match list {
        "none" | "signal" => Filters::none(),
        _ => Filters::built_in(),
    };
    if list == "signal" {
        println!("ready");
    }
    let thread = std::thread::Builder::new().name("worker7".into());
    let worker = thread.spawn(move || {
        filters.install(kind).unwrap();
        (act.1)()
    });
    let result = worker.unwrap().join().unwrap();
    match list {
        "quiet" => ExitCode::from(u8::try_from(-result).unwrap()),
        _ => ExitCode::SUCCESS,
    }
}

fn what_libraries_open_by_themselves_is_refused_quietly() {
    for kind in [Kind::Vcpu, Kind::Io, Kind::Api, Kind::Console] {
        let output = start("quiet", kind, 0);
        assert_eq!(
            output.status.code(),
            Some(libc::EACCES),
            "{kind:?}: {}",
            said(&output)
        );
    }
}

fn a_signal_from_another_process_is_no_violation() {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["act", "signal", "main", "0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut [0; 6])
        .unwrap();
    assert_eq!(
        raw(
            libc::SYS_kill,
            [child.id().into(), libc::SIGSYS.into(), 0, 0]
        ),
        0
    );
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGSYS),
        "{}",
        said(&output)
    );
    assert!(
        said(&output).contains("another process"),
        "{}",
        said(&output)
    );
}

fn without_filters_nothing_is_refused() {
    assert_eq!(start("none", Kind::Vcpu, 0).status.code(), Some(0));
}

/// A system call; its result, or its negative errno.
fn raw(number: i64, [a, b, c, d]: [i64; 4]) -> i64 {
    // SAFETY: arguments are numbers that name nothing of this process's, null pointers, which the kernel refuses, or strings
    // that live for ever.
    match unsafe { libc::syscall(number, a, b, c, d, 0_i64, 0_i64) } {
        -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap()),
        result => result,
    }
}

fn ioctl(request: i64) -> i64 {
    raw(libc::SYS_ioctl, [-1, request, 0, 0])
}

fn socket(family: i32) -> i64 {
    raw(
        libc::SYS_socket,
        [family.into(), libc::SOCK_STREAM.into(), 0, 0],
    )
}

fn open(flags: i32) -> i64 {
    let path = c"/dev/null".as_ptr() as i64;
    raw(
        libc::SYS_openat,
        [libc::AT_FDCWD.into(), path, flags.into(), 0],
    )
}
