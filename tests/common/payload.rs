//! Kernels of a few instructions.

use super::text;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// The path of the payload kernel `tests/payloads/NAME.S`, assembled with the macro `define` (if any) defined.
pub fn payload(name: &str, define: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/payloads");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("payloads");
    std::fs::create_dir_all(&target).unwrap();
    let kernel = target.join(format!("{name}{define}"));
    // Tests run at the same time: the file comes into being whole.
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let fresh = target.join(format!("{name}{define}.{}.{next}", std::process::id()));
    let mut cc = Command::new("cc");
    cc.args(["-nostdlib", "-static", "-no-pie"])
        .args([
            "-Wl,-Ttext=0x1000000",
            "-Wl,--build-id=none",
            "-Wl,-z,noexecstack",
        ])
        .args((!define.is_empty()).then(|| format!("-D{define}")))
        .arg("-o")
        .args([&fresh, &source.join(format!("{name}.S"))]);
    let output = cc.output().unwrap_or_else(|e| {
        panic!("these tests need a C compiler named cc (apt-get install gcc): {e}")
    });
    assert!(
        output.status.success(),
        "{cc:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::rename(&fresh, &kernel).unwrap();
    text(&kernel).to_owned()
}
