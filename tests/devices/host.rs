//! What tests need of the host: files, file systems, devices, networks.

use crate::common::guest::variable;
use crate::common::{temp_dir, text};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

#[track_caller]
pub fn command(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    // As an ordinary user's path has it, mkfs and ip are not found.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let output = command.args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A file of zeroes that takes no room.
pub fn make_image(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Blocks of 512 bytes that a file takes.
pub fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

pub fn resident_mib(pid: rustix::process::Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() / 1024
}

/// A tap device with an address; it is removed at the end.
pub struct Tap {
    pub name: String,
    pub host: String,
    pub guest: String,
}

/// Tests may run side by side.
static TAPS: AtomicU32 = AtomicU32::new(0);

impl Tap {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// With more words for `ip tuntap add`.
    pub fn with(more: &[&str]) -> Self {
        let id = std::process::id();
        let count = TAPS.fetch_add(1, Ordering::Relaxed);
        let net = format!("10.{}.{}", id & 0x7f | 0x80, count & 0xff);
        let tap = Self {
            name: format!("husk{id}_{count}"),
            host: format!("{net}.1"),
            guest: format!("{net}.2"),
        };
        let add = ["tuntap", "add", &tap.name, "mode", "tap"];
        command("ip", &[&add, more].concat());
        let address = format!("{}/24", tap.host);
        command("ip", &["addr", "add", &address, "dev", &tap.name]);
        command("ip", &["link", "set", &tap.name, "up"]);
        tap
    }

    /// What the host counts: bytes that went to the guest, or came from it.
    pub fn bytes(&self, to_guest: bool) -> u64 {
        // The host transmits what the guest receives.
        let name = if to_guest { "tx_bytes" } else { "rx_bytes" };
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A test may have removed it.
        let _ = Command::new("ip")
            .args(["link", "del", &self.name])
            .output();
    }
}

/// An interface with the default route, where the host has none.
pub struct Uplink {
    own: bool,
    pub address: String,
    pub gateway: String,
}

impl Uplink {
    pub fn new() -> Self {
        let route = command("ip", &["-4", "route", "show", "default"]);
        if let Some(gateway) = route.split_whitespace().nth(2) {
            let words: Vec<&str> = route.split_whitespace().collect();
            let device = words[4];
            let addresses = command("ip", &["-4", "-o", "addr", "show", "dev", device]);
            let address = addresses.split_whitespace().nth(3).unwrap();
            return Self {
                own: false,
                address: address.split('/').next().unwrap().to_owned(),
                gateway: gateway.to_owned(),
            };
        }
        command(
            "ip",
            &[
                "link", "add", "huskup", "type", "veth", "peer", "name", "huskup1",
            ],
        );
        let own = Self {
            own: true,
            address: "192.0.2.1".into(),
            gateway: "192.0.2.254".into(),
        };
        command("ip", &["addr", "add", "192.0.2.1/24", "dev", "huskup"]);
        for device in ["huskup", "huskup1"] {
            command("ip", &["link", "set", device, "up"]);
        }
        command("ip", &["route", "add", "default", "via", "192.0.2.254"]);
        own
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        if self.own {
            let _ = Command::new("ip").args(["link", "del", "huskup"]).status();
        }
    }
}

/// A file system of a size of its own, in a folder of its own.
pub struct Mount(tempfile::TempDir);

impl Mount {
    /// In memory, with room for so many bytes.
    pub fn tmpfs(bytes: u64) -> Self {
        let dir = temp_dir();
        let size = format!("size={bytes}");
        command(
            "mount",
            &["-t", "tmpfs", "-o", &size, "none", text(dir.path())],
        );
        Self(dir)
    }

    /// One that has O_DIRECT, which not every place for temporary files does.
    pub fn ext4(bytes: u64) -> Self {
        let images = temp_dir();
        let (dir, image) = (temp_dir(), images.path().join("image"));
        make_image(&image, bytes);
        command("mkfs.ext4", &["-q", "-F", text(&image)]);
        // The loop device keeps the image, and goes with the mount.
        command("mount", &["-o", "loop", text(&image), text(dir.path())]);
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// A block device on a file.
pub struct Loop(pub PathBuf);

impl Loop {
    /// With sectors of so many bytes.
    pub fn new(file: &Path, sector: u32) -> Self {
        let sector = sector.to_string();
        let words = ["--find", "--show", "--sector-size", &sector, text(file)];
        Self(command("losetup", &words).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A block device that can be taken away while it is in use.
pub struct Removable {
    name: String,
    _below: Loop,
}

impl Removable {
    /// With the contents of `file`, which has so many bytes.
    pub fn new(name: &str, file: &Path, bytes: u64) -> Self {
        let below = Loop::new(file, 512);
        let own = Self {
            name: format!("husk{}_{name}", std::process::id()),
            _below: below,
        };
        let table = format!("0 {} linear {} 0", bytes / 512, text(&own._below.0));
        own.dmsetup(&["create", &own.name, "--table", &table]);
        own
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(&self.name)
    }

    /// From now on all of its sectors fail.
    pub fn fail(&self) {
        self.dmsetup(&["wipe_table", &self.name]);
    }

    #[track_caller]
    fn dmsetup(&self, words: &[&str]) {
        // No udev need run here.
        let all = [&["DM_DISABLE_UDEV=1", "dmsetup"], words].concat();
        command("env", &all);
    }
}

impl Drop for Removable {
    fn drop(&mut self) {
        let _ = Command::new("env")
            .args([
                "DM_DISABLE_UDEV=1",
                "dmsetup",
                "remove",
                "--force",
                &self.name,
            ])
            .output();
    }
}

/// The tool of tests/guest, on this side.
#[track_caller]
pub fn tool(arguments: &[&str]) -> String {
    command(text(&variable("HUSK_TEST_TOOL")), arguments)
}

/// A program of the host with all that it needs to start, for a guest's initramfs.
pub fn program(path: &str) -> Vec<(String, Vec<u8>, u32)> {
    let libraries = command("ldd", &[path]);
    // `libc.so.6 => /lib/…/libc.so.6 (0x…)`, or the loader alone: `/lib64/ld-linux-x86-64.so.2 (0x…)`.
    let files = libraries
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let file = |path: &str| (path.to_owned(), std::fs::read(path).unwrap(), 0o755);
    files.chain([path]).map(file).collect()
}
