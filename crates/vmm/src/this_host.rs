//! Which host this is, for snapshots that go on where they were made.

use rustix::fs::{Mode, OFlags, open, stat};
use rustix::io::read;
use std::fmt::Write;

/// A random number of each boot of a kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// KVM's device and its modules. Their inodes are others once a module has been loaded anew, maybe with other parameters.
const KVM: [&str; 4] = [
    "/dev/kvm",
    "/sys/module/kvm",
    "/sys/module/kvm_intel",
    "/sys/module/kvm_amd",
];

/// Names this boot of this host's kernel, and its KVM. Where the name is the same, so are the processor and all that KVM gives of it to
/// guests, and neither must be asked: on a host that is itself a VM that takes longer than all else that a VM needs. None where the
/// host does not tell.
pub fn this_host() -> Option<String> {
    let boot_id = open(BOOT_ID, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0; 36];
    let length = read(boot_id, &mut text).ok()?;
    let mut name = std::str::from_utf8(text.get(..length)?).ok()?.to_owned();
    for path in KVM {
        let inode = stat(path).map_or(0, |about| about.st_ino);
        write!(name, " {inode}").ok()?;
    }
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_stays_itself() {
        let name = this_host().unwrap();
        assert_eq!(this_host(), Some(name.clone()));
        let boot_id = std::fs::read_to_string(BOOT_ID).unwrap();
        assert!(name.starts_with(boot_id.trim_end()), "{name}");
        assert_eq!(name.split(' ').count(), 1 + KVM.len());
        let kvm = stat("/dev/kvm").unwrap().st_ino.to_string();
        assert_eq!(name.split(' ').nth(1), Some(kvm.as_str()));
    }
}
