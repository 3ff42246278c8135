//! What the guests are made of: Debian's kernels and busybox, fetched and not installed.

use crate::apt;
use crate::host;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Seek;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's kernel, unpacked from its package.
pub struct DebianKernel {
    /// Its bzImage.
    pub vmlinuz: PathBuf,
    /// `lib/modules/RELEASE` below it, with modules.dep.
    pub modules: PathBuf,
}

/// Unpacks the kernel that a meta package depends on into the folder `package` below `temp`.
pub fn fetch_kernel(meta: &str, temp: &Path) -> Result<DebianKernel> {
    let package = apt::kernel_package(meta)?;
    let root = temp.join("package");
    fs::create_dir(&root).with_context(|| format!("cannot create {}", root.display()))?;
    apt::unpack(&package, &root)?;
    let release = package.trim_start_matches("linux-image-");
    let modules = root.join("lib/modules").join(release);
    if !modules.is_dir() {
        // Newer releases of Debian have it in /usr/lib; here both names are the same folder.
        let merged = root.join("usr/lib");
        if !merged.join("modules").join(release).is_dir() {
            bail!("{package} has no lib/modules/{release}");
        }
        std::os::unix::fs::symlink("usr/lib", root.join("lib"))
            .with_context(|| format!("cannot link {}", root.join("lib").display()))?;
    } else if !root.join("usr/lib").exists() {
        fs::create_dir_all(root.join("usr"))
            .and_then(|()| std::os::unix::fs::symlink("../lib", root.join("usr/lib")))
            .with_context(|| format!("cannot link {}", root.join("usr/lib").display()))?;
    }
    let depmod = host::find_tool("depmod").context("depmod is missing: install kmod")?;
    host::run_quiet(Command::new(depmod).arg("-b").arg(&root).arg(release))?;
    let vmlinuz = root.join(format!("boot/vmlinuz-{release}"));
    if !vmlinuz.is_file() {
        bail!("{package} has no boot/vmlinuz-{release}");
    }
    Ok(DebianKernel { vmlinuz, modules })
}

/// Unpacks Debian's static busybox below `temp`; its path.
pub fn fetch_busybox(temp: &Path) -> Result<PathBuf> {
    let root = temp.join("busybox-package");
    fs::create_dir(&root).with_context(|| format!("cannot create {}", root.display()))?;
    apt::unpack("busybox-static", &root)?;
    ["bin/busybox", "usr/bin/busybox"]
        .iter()
        .map(|name| root.join(name))
        .find(|path| path.is_file())
        .context("the package busybox-static has no bin/busybox")
}

/// Unpacks a bzImage into an ELF file.
pub fn unpack_kernel(vmlinuz: &Path, vmlinux: &Path) -> Result<()> {
    let mut kernel = husk_loader::Kernel::open(vmlinuz, &husk_loader::Cache::disabled())?;
    let create = fs::File::create(vmlinux);
    create
        .and_then(|mut to| {
            kernel.file.rewind()?;
            std::io::copy(&mut kernel.file, &mut to)
        })
        .with_context(|| format!("cannot write {}", vmlinux.display()))?;
    Ok(())
}
