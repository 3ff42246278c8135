//! The initramfs of Husk's default guest: a static busybox, the few kernel modules that the power
//! button needs, and an `/init` that runs a script or gives a shell.

mod cpio;
mod modules;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

pub use cpio::Archive;

use crate::cache::{Identity, Key, StoreFault};
use crate::kernel::{Image, open_regular};
use crate::{Cache, Error, elf};

/// What goes into the initramfs.
#[derive(Debug, Clone)]
pub struct Builder {
    /// A statically linked busybox, installed as `/bin/busybox`.
    pub busybox: PathBuf,
    /// The release of the guest's kernel; with no `modules_dir`, its modules are looked for in
    /// `/lib/modules/RELEASE`.
    pub kernel_release: Option<String>,
    /// The directory with `modules.dep`, or at least `modules.order`: a package need only be unpacked.
    pub modules_dir: Option<PathBuf>,
    /// A script for the guest's `/bin/sh`, run in place of the interactive shell. The guest powers
    /// off after it.
    pub script: Option<String>,
    /// More files: path in the guest, contents, permission bits. They replace what is there.
    pub files: Vec<(String, Vec<u8>, u32)>,
    /// Modules to load before anything runs, by name. What they depend on is loaded before them;
    /// what is built in or does not exist is left out.
    pub modules: Vec<String>,
}

impl Builder {
    /// With the default modules, which make the ACPI power button work and report panics.
    pub fn new(busybox: PathBuf) -> Self {
        Self {
            busybox,
            kernel_release: None,
            modules_dir: None,
            script: None,
            files: Vec::new(),
            modules: DEFAULT_MODULES.map(str::to_owned).to_vec(),
        }
    }

    /// The archive (cpio, newc format), not compressed. Equal inputs give equal bytes.
    ///
    /// # Errors
    /// If busybox cannot be read or is not a static x86-64 program, or if a name in `files` cannot
    /// be one in an archive. Modules that cannot be read are left out, with a warning.
    pub fn build(&self) -> Result<Vec<u8>, Error> {
        let busybox = self.read_busybox()?;
        let mut archive = Archive::new();
        for directory in DIRECTORIES {
            archive.directory(directory, 0o755)?;
        }
        // The kernel opens it as the standard streams of /init, before devtmpfs is there.
        archive.character_device("dev/console", 0o600, 5, 1)?;
        archive.file("bin/busybox", 0o755, &busybox)?;
        archive.symlink("bin/sh", "busybox")?;
        archive.file("etc/acpi/PWRF/00000080", 0o755, POWER_BUTTON.as_bytes())?;
        let mut names = Vec::new();
        for (module, data) in modules::load(self.module_directory().as_deref(), &self.modules) {
            let name = format!("lib/modules/husk/{module}.ko");
            archive.file(&name, 0o644, &data)?;
            names.push(module);
        }
        archive.file("etc/modules", 0o644, lines(&names).as_bytes())?;
        archive.file("etc/husk/console", 0o755, CONSOLE.as_bytes())?;
        archive.file("etc/husk/mark", 0o755, MARK)?;
        archive.file("init", 0o755, INIT.as_bytes())?;
        if let Some(script) = &self.script {
            archive.file("script", 0o755, script.as_bytes())?;
        }
        for (name, data, mode) in &self.files {
            archive.file(name.trim_start_matches('/'), *mode, data)?;
        }
        archive.finish()
    }

    /// As [`Self::build`], kept in `cache` for as long as busybox, the list of modules and all of
    /// `self` stay the same. The file is open for reading at no particular position.
    ///
    /// # Errors
    /// As [`Self::build`], and if there is no room for the archive even in memory.
    pub fn open(&self, cache: &Cache) -> Result<File, Error> {
        let (_, metadata) = open_regular(&self.busybox)?;
        let mut parts = vec![
            Identity::of(&metadata).name().into_bytes(),
            MARK.into(),
            INIT.into(),
            CONSOLE.into(),
            POWER_BUTTON.into(),
        ];
        for name in ["modules.dep", "modules.order"] {
            let path = self
                .module_directory()
                .map(|directory| directory.join(name));
            let metadata = path.and_then(|path| path.metadata().ok());
            parts.push(
                metadata
                    .map(|m| Identity::of(&m).name().into_bytes())
                    .unwrap_or_default(),
            );
        }
        // Debug forms quote: no two different lists have the same one.
        parts.push(
            format!(
                "{:?}{:?}{:?}",
                self.modules,
                self.module_directory(),
                self.script
            )
            .into(),
        );
        for (name, data, mode) in &self.files {
            parts.push(format!("{name:?} {mode:o}").into_bytes());
            parts.push(data.clone());
        }
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        let key = Key::new("initramfs", &parts);
        if let Some(file) = cache.find(&key.name()) {
            return Ok(file);
        }
        let archive = self.build()?;
        cache.store(&key, Path::new("the initramfs"), &|mut sink: &File| {
            sink.write_all(&archive).map_err(StoreFault::Sink)?;
            Ok(archive.len() as u64)
        })
    }

    fn module_directory(&self) -> Option<PathBuf> {
        self.modules_dir.clone().or_else(|| {
            let release = self.kernel_release.as_deref()?;
            let plain = !release.contains('/') && !release.starts_with('.');
            plain.then(|| Path::new("/lib/modules").join(release))
        })
    }

    fn read_busybox(&self) -> Result<Vec<u8>, Error> {
        let path = self.busybox.as_path();
        let (file, metadata) = open_regular(path)?;
        let image = Image::read(&file, path, &metadata)?;
        if !image.head.starts_with(elf::MAGIC) {
            return Err(Error::NotProgram { path: path.into() });
        }
        match elf::has_interpreter(&image) {
            Ok(false) => {}
            Ok(true) => return Err(Error::Dynamic { path: path.into() }),
            Err(Error::Truncated {
                path,
                what,
                end,
                length,
            }) => {
                return Err(Error::Truncated {
                    path,
                    what,
                    end,
                    length,
                });
            }
            Err(_) => return Err(Error::NotProgram { path: path.into() }),
        }
        let mut data = Vec::new();
        (&file)
            .take(MAX_FILE)
            .read_to_end(&mut data)
            .map_err(|source| Error::Read {
                path: path.into(),
                source,
            })?;
        Ok(data)
    }
}

/// The most that is read of busybox or of a module, packed or not. Debian's busybox has 2 MB.
const MAX_FILE: u64 = 64 << 20;

/// Debian's cloud kernel has these as modules: without them the power button does nothing.
const DEFAULT_MODULES: [&str; 3] = ["button", "evdev", "pvpanic-mmio"];

const DIRECTORIES: [&str; 17] = [
    "bin",
    "dev",
    "etc",
    "etc/acpi",
    "etc/acpi/PWRF",
    "lib",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
    "var/log",
];

/// Sets boot marks: `mark.S`.
const MARK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/mark"));

/// An initramfs (cpio) whose init does nothing but to mark that it runs and to power off.
///
/// # Errors
/// None today, as of [`Archive::finish`].
pub fn marking() -> Result<Vec<u8>, Error> {
    let mut archive = Archive::new();
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.character_device("dev/port", 0o600, 1, 4)?;
    archive.file("init", 0o755, MARK)?;
    archive.finish()
}

const INIT: &str = include_str!("init.sh");
const CONSOLE: &str = include_str!("console.sh");

/// What busybox's acpid runs when the power button is pressed.
const POWER_BUTTON: &str = "#!/bin/sh\nsync\npoweroff -f\n";

fn lines(names: &[String]) -> String {
    names.iter().map(|name| format!("{name}\n")).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
