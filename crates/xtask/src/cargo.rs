//! Building with cargo, and finding what it built.

use crate::host;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A test program that cargo built.
#[derive(Debug, Clone, PartialEq)]
pub struct TestProgram {
    /// The package that it tests.
    pub package: String,
    /// The target's name: the file's in `tests/`, else the crate's.
    pub target: String,
    /// Whether it is a file of `tests/` rather than the unit tests of a crate.
    pub integration: bool,
    /// The program.
    pub executable: PathBuf,
    /// The package's folder, where cargo runs it.
    pub folder: PathBuf,
}

/// Builds the release binary and returns its path.
pub fn release_binary() -> Result<PathBuf> {
    let messages = build(&["build", "--release", "--package", "husk", "--bin", "husk"])?;
    let built = messages.iter().find_map(|message| {
        let ours = message.pointer("/target/name")? == "husk";
        let executable = message.get("executable")?.as_str()?;
        ours.then(|| PathBuf::from(executable))
    });
    built.context("cargo built no binary husk: is src/main.rs there?")
}

/// Builds every test of the workspace and returns the programs.
pub fn test_programs() -> Result<Vec<TestProgram>> {
    let messages = build(&["test", "--workspace", "--no-run"])?;
    Ok(messages.iter().filter_map(test_program).collect())
}

/// `cargo`, as this program was started by it, in the workspace's root.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(host::workspace_root()?);
    // What cargo told us of our own package is not true of the packages that are built here.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
        }) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

fn build(args: &[&str]) -> Result<Vec<Value>> {
    let mut command = cargo()?;
    command
        .args(args)
        .arg("--message-format=json-render-diagnostics");
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo {} failed ({})", args.join(" "), output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

fn test_program(message: &Value) -> Option<TestProgram> {
    let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
    if text("/reason")? != "compiler-artifact" || !message.pointer("/profile/test")?.as_bool()? {
        return None;
    }
    let folder = PathBuf::from(text("/manifest_path")?)
        .parent()?
        .to_path_buf();
    let kinds = message.pointer("/target/kind")?.as_array()?;
    Some(TestProgram {
        package: package_name(text("/package_id")?).to_owned(),
        target: text("/target/name")?.to_owned(),
        integration: kinds.iter().any(|kind| kind == "test"),
        executable: PathBuf::from(text("/executable")?),
        folder,
    })
}

/// The name in a package id: `path+file:///src/husk#0.1.0`, `…/crates/bus#husk-bus@0.1.0`.
fn package_name(id: &str) -> &str {
    let (path, fragment) = id.rsplit_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _)) => name,
        None => path.rsplit('/').next().unwrap_or(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_programs_message_is_understood() {
        let message = serde_json::json!({
            "reason": "compiler-artifact",
            "package_id": "path+file:///src/crates/bus#husk-bus@0.1.0",
            "manifest_path": "/src/crates/bus/Cargo.toml",
            "target": {"kind": ["test"], "name": "kit"},
            "profile": {"test": true},
            "executable": "/t/kit-1234",
        });
        let program = test_program(&message).unwrap();
        assert_eq!(
            (program.package.as_str(), program.target.as_str()),
            ("husk-bus", "kit")
        );
        assert!(program.integration);
        assert_eq!(program.folder, PathBuf::from("/src/crates/bus"));
    }

    #[test]
    fn what_is_no_test_program_is_left_out() {
        let library = serde_json::json!({
            "reason": "compiler-artifact", "package_id": "x", "manifest_path": "/a/Cargo.toml",
            "target": {"kind": ["lib"], "name": "x"}, "profile": {"test": false}, "executable": null,
        });
        assert_eq!(test_program(&library), None);
        assert_eq!(
            test_program(&serde_json::json!({"reason": "build-finished"})),
            None
        );
    }

    #[test]
    fn package_names_come_with_and_without_a_name_in_the_fragment() {
        assert_eq!(package_name("path+file:///src/husk#0.1.0"), "husk");
        assert_eq!(
            package_name("path+file:///src/crates/bus#husk-bus@0.1.0"),
            "husk-bus"
        );
    }
}
