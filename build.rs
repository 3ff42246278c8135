//! How the binary is linked.
//!
//! Relocations in their packed form (DT_RELR): a static, position-independent executable relocates itself when it starts, and
//! this takes a sixtieth of the space and touches fewer pages. glibc's start-up code knows the form since 2.36.
//!
//! A release build has no tables for unwinding stacks, 0.45 MB: a panic aborts, and its backtrace would name nothing, because there
//! are no symbols either. Who debugs builds with `CARGO_PROFILE_RELEASE_DEBUG=true` and has them.

use std::path::Path;
use std::process::Command;

const NO_UNWINDING: &str = "resources/link/no-unwinding.ld";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu") && glibc() >= Some((2, 36)) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    println!("cargo::rerun-if-changed={NO_UNWINDING}");
    let is = |name: &str, value: &str| std::env::var(name).as_deref() == Ok(value);
    if is("PROFILE", "release") && is("DEBUG", "false") {
        let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        let script = Path::new(&root).join(NO_UNWINDING);
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
}

/// The version of glibc that is linked: the C compiler's, which is the linker's front end.
fn glibc() -> Option<(u32, u32)> {
    let output = Command::new("cc")
        .args([
            "-E",
            "-P",
            "-dM",
            "-include",
            "features.h",
            "-x",
            "c",
            "/dev/null",
        ])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let number = |name: &str| {
        let start = format!("#define {name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&start))?;
        value.trim().parse().ok()
    };
    Some((number("__GLIBC__")?, number("__GLIBC_MINOR__")?))
}
