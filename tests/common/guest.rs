//! Linux guests: a kernel, and an initramfs that runs a script.

use super::{Ended, Vm, husk, temp_dir, text};
use husk_loader::initramfs::Builder;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// No test waits longer than this for one Husk to end: on an emulated host a boot may take half a minute.
pub const LIMIT: Duration = Duration::from_secs(240);

/// A kernel under test.
pub struct Kernel {
    /// The file.
    pub image: PathBuf,
    /// The same in another form.
    pub bzimage: Option<PathBuf>,
    /// Its modules, when it has any.
    pub modules: Option<PathBuf>,
    /// In how much memory it boots, in any monitor.
    pub least_mib: u64,
    /// It reads the MP table (CONFIG_X86_MPPARSE); one that does not has one processor without ACPI.
    pub mp_table: bool,
}

impl Kernel {
    /// Debian's cloud kernel, as its package has it: a bzImage whose drivers are modules.
    pub fn debian() -> Self {
        Self {
            image: variable("HUSK_TEST_DEBIAN_KERNEL"),
            bzimage: None,
            modules: Some(variable("HUSK_TEST_MODULES")),
            // In 72 MiB it panics in QEMU as well: "System is deadlocked on memory".
            least_mib: 96,
            mp_table: false,
        }
    }

    /// The minimal kernel: a vmlinux with all that it needs.
    pub fn minimal() -> Self {
        let image = variable("HUSK_TEST_MINIMAL_KERNEL");
        let bzimage = ["bzImage", "arch/x86/boot/bzImage"]
            .iter()
            .map(|name| image.with_file_name(name))
            .find(|path| path.is_file());
        Self {
            bzimage: Some(
                bzimage.unwrap_or_else(|| panic!("no bzImage beside {}", image.display())),
            ),
            image,
            modules: None,
            least_mib: 64,
            mp_table: true,
        }
    }
}

/// The path in an environment variable that `cargo xtask test` sets.
pub fn variable(name: &str) -> PathBuf {
    let value = std::env::var_os(name).unwrap_or_else(|| {
        panic!("${name} is not set: run these tests by `cargo xtask test`, which gets the kernels and sets it")
    });
    let path = PathBuf::from(value);
    assert!(path.exists(), "${name}: there is no {}", path.display());
    path
}

/// A static busybox.
pub fn busybox() -> PathBuf {
    variable("HUSK_TEST_BUSYBOX")
}

/// A kernel with an initramfs.
pub struct Guest<'a> {
    kernel: &'a Kernel,
    /// What is in the initramfs.
    pub builder: Builder,
    /// Files of the test.
    pub dir: tempfile::TempDir,
    /// How long one Husk may take.
    pub limit: Duration,
}

impl<'a> Guest<'a> {
    /// One that runs `script` and powers off, or one with a shell.
    pub fn new(kernel: &'a Kernel, script: Option<&str>) -> Self {
        assert!(
            Path::new("/dev/kvm").exists(),
            "there is no /dev/kvm: run these tests by `cargo xtask test`"
        );
        let mut builder = Builder::new(busybox());
        builder.modules_dir.clone_from(&kernel.modules);
        builder.script = script.map(str::to_owned);
        Self {
            kernel,
            builder,
            dir: temp_dir(),
            limit: LIMIT,
        }
    }

    /// With one more file, which may be run.
    pub fn with_file(mut self, name: &str, content: &str) -> Self {
        let file = (name.to_owned(), content.as_bytes().to_vec(), 0o755);
        self.builder.files.push(file);
        self
    }

    /// Write the initramfs.
    pub fn initrd(&self) -> PathBuf {
        // A file of its own each time: a guest that runs may be running from the last one.
        let count = std::fs::read_dir(self.dir.path()).unwrap().count();
        let path = self.dir.path().join(format!("initrd{count}"));
        let archive = self.builder.build().unwrap_or_else(|e| panic!("{e}"));
        std::fs::write(&path, archive).unwrap();
        path
    }

    /// `husk run` with the initramfs and no kernel yet.
    pub fn command(&self) -> Command {
        let mut command = husk();
        command.args(["run", "--initrd", text(&self.initrd())]);
        command
    }

    /// `husk run` with kernel and initramfs.
    pub fn start(&self, arguments: &[&str]) -> Vm {
        let mut command = self.command();
        command
            .args(["--kernel", text(&self.kernel.image)])
            .args(arguments);
        Vm::start(&mut command, self.limit)
    }

    /// As [`Guest::start`], until it ends.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.start(arguments).finish()
    }
}

/// Husk with nothing but the names of what it would find by itself.
pub fn default_guest(kernel: &Kernel) -> Command {
    let mut command = husk();
    command
        .env("HUSK_KERNEL", &kernel.image)
        .env("HUSK_BUSYBOX", busybox());
    command
}

/// By busybox, which every test here has.
pub fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new(busybox())
        .arg("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}
