//! Public clients of Firecracker's API, as PyPI has them, drive the binary as `firecracker`, on this machine's own /dev/kvm
//! with a payload kernel. Run by `cargo xtask test`, which installs them, as root: they make taps and firewall rules, in name
//! spaces of the test.
//!
//! What a client wants besides (Docker, the Internet, SSH) is stood in for; every request is its own.

mod common;

use common::payload::payload;
use common::{Vm, husk_binary, temp_dir, text};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// No client takes longer.
const LIMIT: Duration = Duration::from_secs(120);

/// Run `tests/clients/PROGRAM` with files for a VM and with `more`; it must say that it is done.
#[track_caller]
fn drive(program: &str, dir: &Path, more: &[&str]) {
    let python = common::guest::variable("HUSK_TEST_CLIENTS").join("bin/python");
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let file = |name: &str, length: usize| -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, vec![0; length]).unwrap();
        path
    };
    let (initrd, disk) = (file("initrd", 4096), file("disk", 1 << 20));
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--net", "sh", text(&own.join("world.sh"))])
        .args([husk_binary(), python, own.join(program)])
        .args([&payload("keyboard", ""), text(&initrd), text(&disk)])
        .args(more)
        .current_dir(dir)
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let ended = Vm::start(&mut command, LIMIT).finish();
    let console = ended.expect_status(0).console();
    assert!(console.ends_with(" is done\n"), "{}", ended.report());
}

#[test]
fn firecracker_python_drives_it() {
    let dir = temp_dir();
    drive("firecracker_python_vm.py", dir.path(), &[]);
}

#[test]
fn microheart_drives_it() {
    let (dir, home) = (temp_dir(), temp_dir());
    drive("microheart_vm.py", dir.path(), &[text(home.path())]);
}

#[test]
fn pyrecracker_drives_it() {
    let dir = temp_dir();
    let (log, socket) = (dir.path().join("log"), dir.path().join("api"));
    drive(
        "pyrecracker_vm.py",
        dir.path(),
        &[text(&log), text(&socket)],
    );
    assert!(!socket.exists(), "it removes the socket");
}
