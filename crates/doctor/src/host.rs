//! Reading the host: files below a root directory, and CPUID.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The most that is read of any file, in bytes.
const MAX_FILE: u64 = 1 << 16;
/// The longest piece of a file that is shown, in characters.
const MAX_SHOWN: usize = 80;

/// A host whose files are below `root`.
pub struct Host {
    root: PathBuf,
    /// What CPUID says.
    pub processor: Processor,
}

/// What a device node lets this process do.
#[derive(Debug)]
pub enum Access {
    /// It was opened for reading and writing.
    Open,
    /// There is no such node, or no driver behind it.
    Missing,
    /// The node's mode or access list forbids it.
    Denied,
    /// Something else than the node's mode forbids it: the device controller of a container's cgroup, mostly.
    Forbidden,
    /// It is a file of another type.
    NotADevice,
    /// Anything else.
    Failed(io::Error),
}

/// A capability of this process: its bit in `CapEff` (linux/capability.h).
#[derive(Clone, Copy)]
pub enum Capability {
    NetAdmin = 12,
    SysPtrace = 19,
    SysAdmin = 21,
}

impl Host {
    pub fn new(root: &Path, processor: Processor) -> Self {
        Self {
            root: root.into(),
            processor,
        }
    }

    /// Where the absolute `path` is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The start of a regular file.
    pub fn text(&self, path: &str) -> Option<String> {
        let path = self.path(path);
        // A FIFO would wait for a writer.
        if !fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        File::open(path)
            .ok()?
            .take(MAX_FILE)
            .read_to_end(&mut bytes)
            .ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The first line of a file, fit to be shown; none if it is empty.
    pub fn line(&self, path: &str) -> Option<String> {
        let line = shown(self.text(path)?.lines().next()?);
        (!line.is_empty()).then_some(line)
    }

    pub fn number(&self, path: &str) -> Option<u64> {
        self.line(path)?.parse().ok()
    }

    /// The value of the first line `key: value`.
    pub fn field(&self, path: &str, key: &str) -> Option<String> {
        self.text(path)?.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    }

    /// The bracketed choice of a file such as `always [madvise] never`.
    pub fn choice(&self, path: &str) -> Option<String> {
        let line = self.line(path)?;
        let (_, rest) = line.split_once('[')?;
        let (choice, _) = rest.split_once(']')?;
        (!choice.is_empty()).then(|| choice.to_owned())
    }

    /// Try to open a device node for reading and writing.
    pub fn device(&self, path: &str) -> Access {
        let path = self.path(path);
        match fs::metadata(&path) {
            Err(e) => return access_of(e),
            Ok(metadata) if !metadata.file_type().is_char_device() => return Access::NotADevice,
            Ok(_) => {}
        }
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(_) => Access::Open,
            Err(e) => access_of(e),
        }
    }

    /// The group that owns a file: its name, or its number if /etc/group does not name it.
    pub fn group_of(&self, path: &str) -> Option<String> {
        let gid = fs::metadata(self.path(path)).ok()?.gid().to_string();
        let groups = self.text("/etc/group").unwrap_or_default();
        let name = groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == gid).then(|| shown(name))
        });
        Some(name.unwrap_or(gid))
    }

    pub fn has_capability(&self, capability: Capability) -> bool {
        self.field("/proc/self/status", "CapEff")
            .and_then(|mask| u64::from_str_radix(&mask, 16).ok())
            .is_some_and(|mask| mask >> (capability as u32) & 1 == 1)
    }

    /// This process is under a seccomp filter: the kernel may refuse what its switches allow.
    pub fn is_filtered(&self) -> bool {
        self.field("/proc/self/status", "Seccomp").as_deref() == Some("2")
    }

    /// Major and minor version of the kernel.
    pub fn kernel_version(&self) -> Option<(u32, u32)> {
        let release = self.line("/proc/sys/kernel/osrelease")?;
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

fn access_of(error: io::Error) -> Access {
    // errno(3) numbers of Linux: ENXIO and ENODEV have no io::ErrorKind, and EPERM and EACCES share one.
    const EPERM: i32 = 1;
    const ENXIO: i32 = 6;
    const ENODEV: i32 = 19;
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::NotFound, _) | (_, Some(ENXIO | ENODEV)) => Access::Missing,
        (_, Some(EPERM)) => Access::Forbidden,
        (io::ErrorKind::PermissionDenied, _) => Access::Denied,
        _ => Access::Failed(error),
    }
}

/// `text` on one line, without control characters, and not too long.
pub fn shown(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_SHOWN)
        .collect()
}

/// An error and what caused it, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// What CPUID says of virtualization.
#[derive(Clone, Debug, Default)]
pub struct Processor {
    /// Intel VMX: leaf 1, ECX bit 5.
    pub vmx: bool,
    /// AMD SVM: leaf 0x8000_0001, ECX bit 2.
    pub svm: bool,
    /// The hypervisor that this host runs on, if it is a VM: leaf 1, ECX bit 31, and leaf 0x4000_0000.
    pub hypervisor: Option<String>,
}

impl Processor {
    pub fn detect() -> Self {
        use std::arch::x86_64::__cpuid;
        let features = __cpuid(1).ecx;
        let extended = match __cpuid(0x8000_0000).eax {
            0x8000_0001.. => __cpuid(0x8000_0001).ecx,
            _ => 0,
        };
        let signature = __cpuid(0x4000_0000);
        let signature = [signature.ebx, signature.ecx, signature.edx];
        Self {
            vmx: features >> 5 & 1 == 1,
            svm: extended >> 2 & 1 == 1,
            hypervisor: (features >> 31 == 1).then(|| hypervisor(&signature)),
        }
    }

    /// The processor is QEMU's software emulation of one.
    pub fn is_emulated(&self) -> bool {
        self.hypervisor.as_deref() == Some(TCG)
    }
}

const TCG: &str = "QEMU's software emulation";

fn hypervisor(signature: &[u32; 3]) -> String {
    let bytes = signature
        .iter()
        .flat_map(|register| register.to_le_bytes())
        .collect::<Vec<_>>();
    match bytes.as_slice() {
        b"KVMKVMKVM\0\0\0" => "KVM".into(),
        b"TCGTCGTCGTCG" => TCG.into(),
        b"Microsoft Hv" => "Hyper-V".into(),
        b"VMwareVMware" => "VMware".into(),
        b"XenVMMXenVMM" => "Xen".into(),
        b"VBoxVBoxVBox" => "VirtualBox".into(),
        b"bhyve bhyve " => "bhyve".into(),
        _ => match shown(&String::from_utf8_lossy(&bytes)) {
            name if name.is_empty() => "a hypervisor without a name".into(),
            name => name,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHost;

    #[test]
    fn files_are_read_below_the_root_and_shown_on_one_line() {
        let fake = FakeHost::new();
        fake.write("/a/b", "  one\ttwo\u{7}  \nthree\n");
        fake.write("/empty", "\n");
        let host = fake.host();
        assert_eq!(host.line("/a/b").as_deref(), Some("one two"));
        assert_eq!(host.line("/empty"), None);
        assert_eq!(host.line("/none"), None);
        assert_eq!(host.text("/a"), None);
    }

    #[test]
    fn an_endless_file_is_read_in_part() {
        let fake = FakeHost::new();
        fake.write("/long", &"x".repeat(1 << 20));
        assert_eq!(fake.host().text("/long").unwrap().len(), 1 << 16);
        assert_eq!(fake.host().line("/long").unwrap().len(), MAX_SHOWN);
    }

    #[test]
    fn devices_are_told_from_files_and_from_nothing() {
        let fake = FakeHost::new();
        fake.write("/dev/file", "");
        fake.link("/dev/null", "/dev/good");
        let host = fake.host();
        assert!(matches!(host.device("/dev/file"), Access::NotADevice));
        assert!(matches!(host.device("/dev/none"), Access::Missing));
        assert!(matches!(host.device("/dev/good"), Access::Open));
    }

    #[test]
    fn errors_say_whose_refusal_it_is() {
        let access = |errno| access_of(io::Error::from_raw_os_error(errno));
        assert!(matches!(access(1), Access::Forbidden));
        assert!(matches!(access(13), Access::Denied));
        assert!(matches!(access(2), Access::Missing));
        assert!(matches!(access(19), Access::Missing));
        assert!(matches!(access(5), Access::Failed(_)));
    }

    #[test]
    fn capabilities_are_bits_of_cap_eff() {
        let fake = FakeHost::new();
        fake.write("/proc/self/status", "Name:\tx\nCapEff:\t0000000000001000\n");
        assert!(fake.host().has_capability(Capability::NetAdmin));
        assert!(!fake.host().has_capability(Capability::SysAdmin));
    }

    #[test]
    fn kernel_versions_are_two_numbers() {
        let fake = FakeHost::new();
        fake.write("/proc/sys/kernel/osrelease", "6.12-rc3\n");
        assert_eq!(fake.host().kernel_version(), Some((6, 12)));
        fake.write("/proc/sys/kernel/osrelease", "new\n");
        assert_eq!(fake.host().kernel_version(), None);
    }

    #[test]
    fn hypervisors_have_names() {
        let name = |bytes: &[u8; 12]| {
            let word = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().unwrap());
            hypervisor(&[word(0), word(4), word(8)])
        };
        assert_eq!(name(b"KVMKVMKVM\0\0\0"), "KVM");
        assert_eq!(name(b"TCGTCGTCGTCG"), TCG);
        assert_eq!(
            name(b"\0\0\0\0\0\0\0\0\0\0\0\0"),
            "a hypervisor without a name"
        );
        assert_eq!(name(b"MyOwnHyper\0\0"), "MyOwnHyper");
    }
}
