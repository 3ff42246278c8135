//! This machine: where the workspace and the cache are, which tools exist, and running them.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The folder of the workspace's Cargo.toml.
///
/// `CARGO_MANIFEST_DIR` is read when `cargo run` set it, so that a checkout that was moved works;
/// otherwise it is the place where this program was built.
pub fn workspace_root() -> Result<PathBuf> {
    let is_root = |dir: &Path| dir.join("crates/xtask/Cargo.toml").is_file();
    let candidates = [
        std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from),
        Some(PathBuf::from(env!("CARGO_MANIFEST_DIR"))),
        std::env::current_dir().ok(),
    ];
    for start in candidates.into_iter().flatten() {
        if let Some(root) = start.ancestors().find(|dir| is_root(dir)) {
            return Ok(root.to_path_buf());
        }
    }
    bail!("the workspace of Husk is not above the current folder: run cargo xtask inside it")
}

/// Husk's cache folder ($HUSK_CACHE, $XDG_CACHE_HOME/husk, ~/.cache/husk), created with mode 0700.
pub fn cache_dir() -> Result<PathBuf> {
    let dir = husk_loader::Cache::default_dir()
        .context("no cache folder: set HUSK_CACHE or HOME to a folder that can be written")?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("cannot create the cache folder {}", dir.display()))?;
    Ok(dir)
}

/// Whether this process is root, and so may install packages.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

/// The path of a program, looked for in PATH and in the folders that hold administration tools.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| {
            fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

/// Runs a command with its output kept; when it fails, the error ends with the output's last lines.
pub fn run_quiet(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        bail!(
            "{} failed ({})\n{}",
            show(command),
            output.status,
            last_lines(&text, 15)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last `count` lines of a text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let start = lines.len().saturating_sub(count);
    lines.get(start..).unwrap_or_default().join("\n")
}

/// A word quoted for a POSIX shell.
pub fn shell_quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Does one step of a longer task: says what it is on stderr, and how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {what}");
    let start = Instant::now();
    let value = work()?;
    let took = start.elapsed();
    if took > Duration::from_millis(50) {
        eprintln!("    done in {:.1} s", took.as_secs_f64());
    }
    Ok(value)
}

/// A folder of this process that is removed when dropped.
///
/// Those that a killed process left in the same place are removed when the next one is made.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes a new folder `PREFIX-PID-N` in `parent` that only its owner may enter.
    pub fn new(parent: &Path, prefix: &str) -> Result<Self> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        remove_stale(parent, prefix);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = parent.join(format!("{prefix}-{}-{count}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot create the folder {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes a file beside its place and renames it, so that no reader ever sees half of it.
pub fn write_atomically(path: &Path, data: &[u8]) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".tmp-{}", std::process::id()));
    let beside = PathBuf::from(beside);
    fs::File::create(&beside)
        .and_then(|mut file| file.write_all(data))
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Renames a finished folder to its place. When another process was first, its result is kept.
pub fn rename_into_place(from: &Path, to: &Path) -> Result<()> {
    match fs::rename(from, to) {
        Err(_) if to.is_dir() => Ok(()),
        result => result.with_context(|| format!("cannot create {}", to.display())),
    }
}

/// A stable 64-bit hash (FNV-1a) as 16 hexadecimal digits: the key of what is built from `parts`.
pub fn key(parts: &[&[u8]]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        // A separator that no text holds: ("ab", "c") and ("a", "bc") are different keys.
        for byte in part.iter().copied().chain([0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

fn remove_stale(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(prefix)?.strip_prefix('-'))
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        let own = entry.metadata().is_ok_and(|meta| {
            meta.is_dir() && fs::metadata("/proc/self").is_ok_and(|me| me.uid() == meta.uid())
        });
        if let Some(pid) = pid
            && own
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<String> = words
        .map(OsStr::to_string_lossy)
        .map(|word| shell_quote(&word))
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_gives_the_shell_the_same_words_back() {
        for word in [
            "",
            "plain",
            "a b",
            "it's",
            "$HOME `id` \"x\" \\",
            "new\nline",
            "*",
        ] {
            let echoed = run_quiet(
                Command::new("sh").args(["-c", &format!("printf %s {}", shell_quote(word))]),
            );
            assert_eq!(echoed.unwrap(), word);
        }
    }

    #[test]
    fn keys_depend_on_where_the_parts_end() {
        assert_eq!(key(&[b"ab", b"c"]), key(&[b"ab", b"c"]));
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
    }

    #[test]
    fn a_folder_of_a_dead_process_is_removed_and_one_of_a_living_is_kept() {
        let parent = TempDir::new(&std::env::temp_dir(), "husk-xtask-test").unwrap();
        // No process has this number: the kernel's limit is 2^22.
        let dead = parent.path().join("x-4194999-0");
        let alive = parent.path().join(format!("x-{}-77", std::process::id()));
        fs::create_dir(&dead).unwrap();
        fs::create_dir(&alive).unwrap();
        let made = TempDir::new(parent.path(), "x").unwrap();
        assert!(!dead.exists() && alive.exists() && made.path().exists());
    }

    #[test]
    fn a_failed_command_is_named_with_its_last_words() {
        let error = run_quiet(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("sh -c") && text.contains("why"), "{text}");
    }
}
