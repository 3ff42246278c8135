//! Assembles the program that sets boot marks in guests. `cc` is there: it links Husk.

use std::path::Path;
use std::process::Command;

const SOURCE: &str = "src/initramfs/mark.S";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SOURCE}");
    let folder = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let mut cc = Command::new("cc");
    cc.args(["-nostdlib", "-static", "-no-pie", "-s"])
        // Headers and code in one segment, without padding between them.
        .args(["-Wl,-z,noseparate-code", "-Wl,--build-id=none", "-o"])
        .arg(Path::new(&folder).join("mark"))
        .arg(SOURCE);
    let status = cc
        .status()
        .expect("cc, the linker that Rust calls, can be started");
    assert!(status.success(), "cc cannot assemble {SOURCE}");
}
