//! Public clients of Firecracker's API for tests/clients.rs: packages of PyPI in a virtual environment in the cache.

use crate::apt;
use crate::host::{self, TempDir};
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

const REQUIREMENTS: &str = "tests/clients/requirements.txt";

/// Debian's own: `nftables`, which a client uses, is a module of it and not on PyPI.
const PYTHON: &str = "/usr/bin/python3";

const TOOLS: &[(&str, &str)] = &[
    (PYTHON, "python3"),
    ("/usr/share/python-wheels", "python3-venv"),
    (
        "/usr/lib/python3/dist-packages/nftables",
        "python3-nftables",
    ),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
];

/// The folder of the virtual environment, made when there is none for these packages and this Python.
pub fn ensure() -> Result<PathBuf> {
    apt::need(TOOLS)?;
    let requirements = host::workspace_root()?.join(REQUIREMENTS);
    let wanted = fs::read(&requirements)
        .with_context(|| format!("cannot read {}", requirements.display()))?;
    let version = host::run_quiet(Command::new(PYTHON).arg("--version"))?;
    let root = host::cache_dir()?.join("clients");
    fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
    let place = root.join(host::key(&[&wanted, version.as_bytes()]));
    if place.is_dir() {
        return Ok(place);
    }
    host::step(
        "installing clients of Firecracker's API from PyPI (once)",
        || {
            let temp = TempDir::new(&root, "make")?;
            let made = temp.path().join("venv");
            host::run_quiet(Command::new(PYTHON).args(["-m", "venv"]).arg(&made))?;
            let mut pip = Command::new(made.join("bin/python"));
            // See the requirements for the versions of Python.
            pip.args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--ignore-requires-python",
            ])
            .arg("--requirement")
            .arg(&requirements);
            host::run_quiet(&mut pip)?;
            // What is started by bin/python finds its packages wherever that is.
            host::rename_into_place(&made, &place)
        },
    )?;
    Ok(place)
}
