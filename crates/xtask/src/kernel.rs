//! The minimal guest kernel: Debian's kernel source with the fragment in resources/guest-kernel.

use crate::apt;
use crate::host::{self, TempDir};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

const PACKAGE: &str = "linux-source-6.12";
const FRAGMENT: &str = "resources/guest-kernel/minimal.config";

/// What a build needs, and the packages of Debian that have it.
const TOOLS: &[(&str, &str)] = &[
    ("make", "make"),
    ("gcc", "gcc"),
    ("/usr/include/stdio.h", "libc6-dev"),
    ("ld", "binutils"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("xz", "xz-utils"),
    ("lz4", "lz4"),
    ("tar", "tar"),
    ("/usr/include/libelf.h", "libelf-dev"),
];

/// `cargo xtask kernel`: builds the kernel unless it is cached, and prints where it is.
pub fn run() -> Result<ExitCode> {
    println!("{}", ensure()?.display());
    Ok(ExitCode::SUCCESS)
}

/// The path of the minimal kernel's vmlinux (its bzImage is beside it), built when it is not cached.
pub fn ensure() -> Result<PathBuf> {
    let fragment_path = host::workspace_root()?.join(FRAGMENT);
    let fragment = fs::read_to_string(&fragment_path)
        .with_context(|| format!("cannot read {}", fragment_path.display()))?;
    let version = apt::candidate(PACKAGE)?.version;
    let kernels = host::cache_dir()?.join("kernels");
    fs::create_dir_all(&kernels).with_context(|| format!("cannot create {}", kernels.display()))?;
    let key = host::key(&[fragment.as_bytes(), version.as_bytes()]);
    let place = kernels.join(format!("minimal-{key}"));
    let vmlinux = place.join("vmlinux");
    if vmlinux.is_file() {
        return Ok(vmlinux);
    }
    apt::need(TOOLS)?;
    let work = TempDir::new(&kernels, "build")?;
    let tree = host::step(&format!("fetching {PACKAGE} {version} (150 MB)"), || {
        source(work.path())
    })?;
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    host::step("configuring the minimal kernel", || {
        configure(&tree, &fragment_path, &fragment)
    })?;
    host::step(
        &format!("building the minimal kernel with {jobs} jobs (about 6 minutes on two cores)"),
        || build(&tree, jobs),
    )?;
    let result = work.path().join("result");
    fs::create_dir(&result).with_context(|| format!("cannot create {}", result.display()))?;
    for (from, to) in [
        ("vmlinux", "vmlinux"),
        ("arch/x86/boot/bzImage", "bzImage"),
        (".config", "config"),
    ] {
        fs::copy(tree.join(from), result.join(to))
            .with_context(|| format!("cannot keep {from} in {}", kernels.display()))?;
    }
    host::rename_into_place(&result, &place)?;
    Ok(vmlinux)
}

/// Downloads and unpacks the source below `work`; the path of the source tree.
fn source(work: &Path) -> Result<PathBuf> {
    let package = work.join("package");
    let tree = work.join("tree");
    for dir in [&package, &tree] {
        fs::create_dir(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    apt::unpack(PACKAGE, &package)?;
    let archive = package.join(format!("usr/src/{PACKAGE}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(&archive).arg("-C").arg(&tree);
    host::run_quiet(tar.arg("--strip-components=1").env("XZ_DEFAULTS", "-T0"))?;
    let _ = fs::remove_dir_all(&package);
    Ok(tree)
}

fn configure(tree: &Path, fragment_path: &Path, fragment: &str) -> Result<()> {
    host::run_quiet(make(tree).arg("tinyconfig"))?;
    let mut merge = Command::new("sh");
    merge.args(["scripts/kconfig/merge_config.sh", "-m", ".config"]);
    host::run_quiet(merge.arg(fragment_path).current_dir(tree))?;
    host::run_quiet(make(tree).arg("olddefconfig"))?;
    let config = fs::read_to_string(tree.join(".config")).context("cannot read .config")?;
    let lost = lost_options(fragment, &config);
    if !lost.is_empty() {
        bail!(
            "{}: these options did not survive `make olddefconfig`; add what they depend on: {}",
            fragment_path.display(),
            lost.join(" ")
        );
    }
    Ok(())
}

/// Builds vmlinux and bzImage, with a line of progress for every 200 files.
fn build(tree: &Path, jobs: usize) -> Result<()> {
    let log = tree.join("build.log");
    let errors = fs::File::create(&log).context("cannot write the build's log")?;
    let start = Instant::now();
    let mut child = make(tree)
        .args([&format!("-j{jobs}"), "vmlinux", "bzImage"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("cannot start make")?;
    let mut tail = Vec::new();
    if let Some(output) = child.stdout.take() {
        for (count, line) in BufReader::new(output).lines().enumerate() {
            let line = line.context("cannot read make's output")?;
            if count > 0 && count % 200 == 0 {
                let seconds = start.elapsed().as_secs();
                eprintln!("    {count} files, {seconds} s: {}", line.trim());
            }
            tail.push(line);
            if tail.len() > 2000 {
                tail.drain(..1000);
            }
        }
    }
    if !child.wait().context("cannot wait for make")?.success() {
        let errors = fs::read_to_string(&log).unwrap_or_default();
        bail!(
            "the kernel's build failed:\n{}\n{}",
            host::last_lines(&tail.join("\n"), 5),
            host::last_lines(&errors, 15)
        );
    }
    Ok(())
}

fn make(tree: &Path) -> Command {
    let mut command = Command::new("make");
    command.current_dir(tree).env("LC_ALL", "C");
    // The same input gives the same kernel, whoever builds it and whenever.
    command
        .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
        .env("KBUILD_BUILD_USER", "husk")
        .env("KBUILD_BUILD_HOST", "husk");
    // Options meant for an outer make (a recursive -j, V=1) are none of this build's.
    command.env_remove("MAKEFLAGS").env_remove("MFLAGS");
    command.arg("ARCH=x86_64");
    command
}

/// The lines of the fragment that the final configuration does not have.
fn lost_options(fragment: &str, config: &str) -> Vec<String> {
    let kept: std::collections::HashSet<&str> = config.lines().map(str::trim).collect();
    let wanted = fragment.lines().map(str::trim).filter(|line| {
        line.starts_with("CONFIG_")
            || (line.starts_with("# CONFIG_") && line.ends_with("is not set"))
    });
    wanted
        .filter(|line| {
            // An option that is off may also be absent, where what it depends on is off.
            let off = line
                .strip_prefix("# ")
                .and_then(|rest| rest.strip_suffix(" is not set"))
                .or_else(|| line.strip_suffix("=n"));
            match off {
                Some(name) => {
                    let set = format!("{name}=");
                    config.lines().any(|line| line.starts_with(&set))
                }
                None => !kept.contains(line),
            }
        })
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::lost_options;

    #[test]
    fn an_option_that_was_dropped_or_changed_is_named() {
        let config = "CONFIG_A=y\nCONFIG_N=8\n# CONFIG_OFF is not set\nCONFIG_ON=y\n";
        let fragment = "# a comment\nCONFIG_A=y\nCONFIG_GONE=y\nCONFIG_N=64\n# CONFIG_OFF is not set\n\
                        # CONFIG_ON is not set\nCONFIG_ABSENT=n\n";
        assert_eq!(
            lost_options(fragment, config),
            ["CONFIG_GONE=y", "CONFIG_N=64", "# CONFIG_ON is not set"]
        );
    }
}
