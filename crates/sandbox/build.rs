//! Compiles the filters of `resources/seccomp` into constants, so that nothing is parsed when Husk starts.

#[path = "src/compile.rs"]
mod compile;
#[path = "src/kind.rs"]
mod kind;
#[path = "src/shrink.rs"]
mod shrink;

mod names {
    use std::sync::LazyLock;
    use syscalls::Sysno;

    /// Names of system calls by number; empty where there is none.
    static ALL: LazyLock<Vec<&str>> = LazyLock::new(|| {
        let count = Sysno::last().id().unsigned_abs() as usize + 1;
        let name = |number| Sysno::new(number).map_or("", |call| call.name());
        (0..count).map(name).collect()
    });

    pub fn all() -> &'static [&'static str] {
        &ALL
    }
}

use compile::{Program, Rules};
use kind::Kind;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;

const SOURCE: &str = "../../resources/seccomp/x86_64.json";

fn main() -> Result<(), Box<dyn Error>> {
    for path in [SOURCE, "src/compile.rs", "src/kind.rs", "src/shrink.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let text = std::fs::read_to_string(SOURCE).map_err(|e| format!("{SOURCE}: {e}"))?;
    let rules = Rules::parse(&text).map_err(|e| format!("{SOURCE}: {e}"))?;
    let mut all = String::from("static BUILT_IN: Programs<&[sock_filter]> = Programs([\n");
    for kind in Kind::ALL {
        let program = rules
            .compile(kind.name())
            .map_err(|e| format!("{SOURCE}: {e}"))?;
        write(&mut all, &program)?;
    }
    all += "]);\n";
    writeln!(
        all,
        "pub(crate) mod names {{ pub(crate) fn all() -> &'static [&'static str] {{ &{:?} }} }}",
        names::all()
    )?;
    let target = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    std::fs::write(Path::new(&target).join("filters.rs"), all)?;
    Ok(())
}

fn write(all: &mut String, program: &Program) -> std::fmt::Result {
    *all += "&[";
    for i in program {
        let (code, jt, jf, k) = (i.code, i.jt, i.jf, i.k);
        write!(
            all,
            "sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},"
        )?;
    }
    *all += "],\n";
    Ok(())
}
