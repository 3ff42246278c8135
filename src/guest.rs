//! The default guest: which kernel, and a small initramfs with a shell, when the user names none.

use husk_config::VmConfig;
use husk_loader::Cache;
use husk_loader::initramfs::Builder;
use std::cmp::Ordering;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The kernel to boot when none is named: `$HUSK_KERNEL`, the demo's, the newest readable one in /boot.
pub fn default_kernel() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("HUSK_KERNEL").filter(|value| !value.is_empty()) {
        return Ok(path.into());
    }
    let demo = Cache::default_dir().map(|cache| cache.join("demo/vmlinuz"));
    if let Some(demo) = demo.filter(|path| path.is_file()) {
        return Ok(demo);
    }
    newest_in(Path::new("/boot")).ok_or_else(|| {
        "no kernel found: give one with --kernel PATH or $HUSK_KERNEL, run `cargo xtask demo` once, or make one in /boot readable"
            .into()
    })
}

/// The initramfs of the default guest, fit for the kernel and the devices of `config`. The file must stay open while its path
/// is used.
pub fn default_initrd(config: &VmConfig, cache: &Cache) -> Result<(File, PathBuf), String> {
    let kernel = config.boot_source.kernel_image_path.as_path();
    let busybox = busybox().ok_or(
        "no static busybox found for the default guest: `sudo apt-get install busybox-static` (or name one with $HUSK_BUSYBOX), or give --initrd PATH",
    )?;
    let release = husk_loader::kernel_release(kernel);
    let mut builder = Builder::new(busybox.clone());
    builder.modules_dir = release
        .as_deref()
        .and_then(|release| modules_of(kernel, release));
    builder.kernel_release = release;
    builder
        .modules
        .extend(drivers(config).into_iter().map(str::to_owned));
    let file = builder.open(cache).map_err(|e| husk_vmm::chain(&e))?;
    Ok((file, busybox))
}

/// What a kernel has as modules that it needs for its devices, and to mount disks.
fn drivers(config: &VmConfig) -> Vec<&'static str> {
    let mut modules = Vec::new();
    for (there, own) in [
        (
            !config.drives.is_empty(),
            &["virtio_blk", "crc32c_generic", "ext4", "erofs"][..],
        ),
        (
            !config.network_interfaces.is_empty(),
            &["virtio_net", "af_packet"],
        ),
        (config.vsock.is_some(), &["vmw_vsock_virtio_transport"]),
        (config.entropy.is_some(), &["virtio_rng"]),
        (config.balloon.is_some(), &["virtio_balloon"]),
    ] {
        if there {
            modules.extend(own);
        }
    }
    if !modules.is_empty() {
        modules.push(if config.pci {
            "virtio_pci"
        } else {
            "virtio_mmio"
        });
    }
    modules
}

/// The busybox of the default guest: `$HUSK_BUSYBOX`, the demo's, the first in `$PATH`.
pub fn busybox() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("HUSK_BUSYBOX").filter(|value| !value.is_empty()) {
        return Some(path.into());
    }
    let demo = Cache::default_dir().map(|cache| cache.join("demo/busybox"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|directory| directory.join("busybox"));
    demo.into_iter().chain(in_path).find(|path| path.is_file())
}

/// Modules beside the kernel (as the demo keeps them), else the host's.
fn modules_of(kernel: &Path, release: &str) -> Option<PathBuf> {
    let beside = kernel
        .parent()
        .map(|directory| directory.join("lib/modules").join(release));
    let host = Path::new("/lib/modules").join(release);
    beside.into_iter().chain([host]).find(|path| path.is_dir())
}

fn newest_in(directory: &Path) -> Option<PathBuf> {
    let mut kernels: Vec<PathBuf> = std::fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("vmlinuz-")) && File::open(path).is_ok()
        })
        .collect();
    kernels.sort_by(|a, b| compare_versions(&a.to_string_lossy(), &b.to_string_lossy()));
    kernels.pop()
}

/// Numbers in names compare as numbers: 6.12 is newer than 6.9.
fn compare_versions(a: &str, b: &str) -> Ordering {
    fn parts(text: &str) -> Vec<(u64, &str)> {
        text.split_inclusive(|c: char| !c.is_ascii_digit())
            .map(|part| {
                let digits = part.trim_end_matches(|c: char| !c.is_ascii_digit());
                (digits.parse().unwrap_or(0), part)
            })
            .collect()
    }
    parts(a).cmp(&parts(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_sort_last() {
        let mut names = vec![
            "vmlinuz-6.12.3-amd64",
            "vmlinuz-6.9.0-amd64",
            "vmlinuz-5.10.0-30-amd64",
            "vmlinuz-5.10.0-8-amd64",
        ];
        names.sort_by(|a, b| compare_versions(a, b));
        assert_eq!(
            names,
            [
                "vmlinuz-5.10.0-8-amd64",
                "vmlinuz-5.10.0-30-amd64",
                "vmlinuz-6.9.0-amd64",
                "vmlinuz-6.12.3-amd64"
            ]
        );
    }

    #[test]
    fn an_empty_directory_has_no_kernel() {
        let empty = std::env::temp_dir().join(format!("husk-empty-{}", std::process::id()));
        std::fs::create_dir(&empty).unwrap();
        assert_eq!(newest_in(&empty), None);
        std::fs::write(empty.join("vmlinuz-6.1.0"), "").unwrap();
        assert_eq!(newest_in(&empty), Some(empty.join("vmlinuz-6.1.0")));
        std::fs::remove_dir_all(&empty).unwrap();
    }
}
