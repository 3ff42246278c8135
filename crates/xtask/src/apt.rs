//! Debian packages: installed when a tool must run from its place, else unpacked into the cache.

use crate::host::{self, TempDir};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes sure that each tool exists, from the package named beside it.
///
/// A tool is a program's name or, where it starts with '/', a file. What is missing is installed
/// when root; otherwise the error is the one line to run.
pub fn need(tools: &[(&str, &str)]) -> Result<()> {
    let lacking = missing(tools);
    if lacking.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = lacking.iter().map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    if host::find_tool("apt-get").is_none() {
        let names: Vec<&str> = lacking.iter().map(|(tool, _)| *tool).collect();
        bail!(
            "this needs {} (on Debian in: {}): install them and run it again",
            names.join(", "),
            packages.join(" ")
        );
    }
    let line = format!(
        "apt-get install -y --no-install-recommends {}",
        packages.join(" ")
    );
    if !host::is_root() {
        bail!("packages are missing; run this and try again:  sudo {line}");
    }
    host::step(&line, || {
        if !have_lists() {
            update()?;
        }
        if install(&packages).is_err() {
            // Lists that are too old name packages that the archive no longer has.
            update()?;
            install(&packages)?;
        }
        Ok(())
    })?;
    match missing(tools).first() {
        Some((tool, package)) => bail!("{package} was installed, but {tool} is still missing"),
        None => Ok(()),
    }
}

/// What apt knows of the version of a package that it would install.
pub struct Candidate {
    /// The package's version.
    pub version: String,
    /// Its `Depends:` field.
    pub depends: String,
}

/// Asks apt for the candidate of a package; when there is none and we are root, updates the lists.
pub fn candidate(package: &str) -> Result<Candidate> {
    require_apt()?;
    if let Some(found) = show(package) {
        return Ok(found);
    }
    if !host::is_root() {
        bail!("apt knows no package {package}; run this and try again:  sudo apt-get update");
    }
    host::step("apt-get update", update)?;
    show(package).with_context(|| {
        format!("apt knows no package {package}: a Debian archive must be among its sources")
    })
}

/// The kernel package (`linux-image-6.1.0-56-amd64`) that a meta package depends on.
pub fn kernel_package(meta: &str) -> Result<String> {
    let depends = candidate(meta)?.depends;
    first_kernel(&depends)
        .map(str::to_owned)
        .with_context(|| format!("{meta} depends on no kernel package: {depends}"))
}

/// Downloads a package and unpacks it below `dest`, without installing it.
///
/// `dest` must exist. The download is kept in a temporary folder beside it and removed.
pub fn unpack(package: &str, dest: &Path) -> Result<()> {
    require_apt()?;
    let parent = dest.parent().unwrap_or(dest);
    let download = TempDir::new(parent, "download")?;
    if download_into(package, download.path()).is_err() && host::is_root() {
        host::step("apt-get update", update)?;
    }
    let deb = match find_deb(download.path()) {
        Some(deb) => deb,
        None => {
            download_into(package, download.path()).with_context(|| {
                format!(
                    "cannot download {package}; if apt's lists are old, run:  sudo apt-get update"
                )
            })?;
            find_deb(download.path()).with_context(|| format!("apt-get downloaded no {package}"))?
        }
    };
    host::run_quiet(Command::new("dpkg-deb").arg("-x").arg(deb).arg(dest)).map(drop)
}

fn missing<'a>(tools: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let exists = |tool: &str| match tool.starts_with('/') {
        true => Path::new(tool).exists(),
        false => host::find_tool(tool).is_some(),
    };
    tools
        .iter()
        .copied()
        .filter(|(tool, _)| !exists(tool))
        .collect()
}

fn require_apt() -> Result<()> {
    if host::find_tool("apt-get").is_none() || host::find_tool("dpkg-deb").is_none() {
        bail!(
            "this fetches Debian packages with apt-get and dpkg-deb, which this machine lacks: run it on Debian or in a Debian container"
        );
    }
    Ok(())
}

fn have_lists() -> bool {
    fs::read_dir("/var/lib/apt/lists").is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
    })
}

fn update() -> Result<()> {
    host::run_quiet(apt_get().arg("update")).map(drop)
}

fn install(packages: &[&str]) -> Result<()> {
    let mut command = apt_get();
    command
        .args(["install", "-y", "-q", "--no-install-recommends"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive");
    host::run_quiet(&mut command).map(drop)
}

fn download_into(package: &str, dir: &Path) -> Result<()> {
    // apt's download user may not enter our folders; without this it warns of just that.
    let mut command = apt_get();
    command
        .args(["-o", "APT::Sandbox::User=root", "-q", "download", package])
        .current_dir(dir);
    host::run_quiet(&mut command).map(drop)
}

fn find_deb(dir: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    entries.find(|path| path.extension().is_some_and(|ext| ext == "deb"))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("LC_ALL", "C");
    command
}

fn show(package: &str) -> Option<Candidate> {
    let mut command = Command::new("apt-cache");
    command
        .args(["show", "--no-all-versions", package])
        .env("LC_ALL", "C");
    let text = host::run_quiet(&mut command).ok()?;
    let field = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    Some(Candidate {
        version: field("Version")?.trim().to_owned(),
        depends: field("Depends").unwrap_or_default().trim().to_owned(),
    })
}

fn first_kernel(depends: &str) -> Option<&str> {
    depends
        .split([',', '|'])
        .filter_map(|item| item.split_whitespace().next())
        .find(|name| {
            name.strip_prefix("linux-image-")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_among_a_meta_packages_dependencies() {
        assert_eq!(
            first_kernel("linux-image-6.1.0-56-amd64 (= 6.1.192-2)"),
            Some("linux-image-6.1.0-56-amd64")
        );
        assert_eq!(
            first_kernel("linux-base (>= 4), linux-image-6.12.9+deb13-cloud-amd64 (= 1) | x"),
            Some("linux-image-6.12.9+deb13-cloud-amd64")
        );
        assert_eq!(first_kernel("linux-image-amd64, kmod"), None);
    }

    #[test]
    fn only_what_does_not_exist_is_missing() {
        let tools = [
            ("sh", "dash"),
            ("/proc", "x"),
            ("no-such-tool-of-husk", "p"),
            ("/no/such/file", "q"),
        ];
        assert_eq!(
            missing(&tools),
            [("no-such-tool-of-husk", "p"), ("/no/such/file", "q")]
        );
    }
}
