//! `cargo xtask bench-boot`: `husk bench boot` on the testbed with instructions counted, for machines without virtualisation.

use crate::cargo;
use crate::host::{self, TempDir, shell_quote};
use crate::testbed::Testbed;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// `cargo xtask bench-boot`.
///
/// All options are those of `husk bench boot`, and so is the exit status. Files that they name are copied into the emulated
/// host's memory first, reports come back from there.
#[derive(clap::Args)]
pub struct Args {
    /// Options of `husk bench boot`
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required = true,
        value_name = "OPTIONS"
    )]
    options: Vec<String>,
}

/// What is written on the emulated host, and where it belongs.
const REPORTS: [(&str, &str); 2] = [("--json", "report.json"), ("--html", "report.html")];

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// Measures; the exit status is that of `husk bench boot`.
pub fn run(args: &Args) -> Result<ExitCode> {
    let husk = host::step("building husk (release)", cargo::release_binary)?;
    let temp = TempDir::new(&std::env::temp_dir(), "husk-bench-boot")?;
    let out = temp.path().join("out");
    fs::create_dir(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let (options, reports) = with_reports_in_out(&args.options)?;
    let files: Vec<PathBuf> = options.iter().filter_map(|word| file_in(word)).collect();
    let near = files.iter().map(PathBuf::as_path).chain([husk.as_path()]);
    let mut script = bring_near(near);
    script += &format!(
        "exec {} bench boot",
        shell_quote(&husk.display().to_string())
    );
    for word in &options {
        script += &format!(" {}", shell_quote(word));
    }
    let status = on_testbed(&script, &out, LIMIT, |text| {
        let _ = std::io::stdout().lock().write_all(text);
    })?;
    for (name, place) in reports {
        let made = out.join(name);
        // Where nothing was measured there is none, and what was there stays.
        if made.is_file() {
            fs::copy(&made, &place).with_context(|| format!("cannot write {}", place.display()))?;
        }
    }
    Ok(ExitCode::from(status))
}

/// Runs a script for `sh` on the emulated host, which sees the folder `out` as /out; the exit status. `output` is called with what it
/// writes.
pub fn on_testbed(
    script: &str,
    out: &Path,
    limit: Duration,
    output: impl FnMut(&[u8]),
) -> Result<u8> {
    let testbed = Testbed {
        cpus: 1,
        icount: true,
        limit: Some(limit),
        out: Some(out.to_owned()),
        ..Testbed::default()
    };
    let command = ["sh".to_owned(), "-c".to_owned(), script.to_owned()];
    let finish = testbed.run(&command, &[], output)?;
    Ok(finish.exit_status())
}

/// A script that has the emulated host copy `files` into its memory. Otherwise each opening of one asks this machine for it; the
/// emulated host's only processor is idle meanwhile, and its clock leaps to the next timer.
pub fn bring_near<'a>(files: impl Iterator<Item = &'a Path>) -> String {
    let mut script = String::new();
    for file in files {
        // Opening for writing is what makes an overlay copy.
        script += &format!(": >>{}\n", shell_quote(&file.display().to_string()));
    }
    // What has just been written is hashed at each start; this sleep is virtual.
    script + "sleep 10\n"
}

/// Reports by their names in /out, and where each belongs.
type Reports = Vec<(&'static str, PathBuf)>;

/// The options, with reports that are written to /out.
fn with_reports_in_out(words: &[String]) -> Result<(Vec<String>, Reports)> {
    let (mut options, mut reports) = (Vec::new(), Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let (option, value) = match word.split_once('=') {
            Some((option, value)) => (option, Some(value)),
            None => (word.as_str(), None),
        };
        let Some((_, name)) = REPORTS.iter().find(|(report, _)| *report == option) else {
            options.push(word.clone());
            continue;
        };
        let Some(place) = value.or_else(|| words.next().map(String::as_str)) else {
            bail!("{option} needs a path");
        };
        options.push(format!("{option}=/out/{name}"));
        reports.push((*name, PathBuf::from(place)));
    }
    Ok((options, reports))
}

/// The file that a word of the options names: PATH, --option=PATH or PATH,more.
fn file_in(word: &str) -> Option<PathBuf> {
    let value = match word.strip_prefix("--") {
        Some(option) => option.split_once('=')?.1,
        None => word,
    };
    let first = value.split(',').next().unwrap_or(value);
    [value, first]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_go_out_and_everything_else_stays() {
        let words = [
            "--kernel",
            "k",
            "--json",
            "a/b.json",
            "--html=c",
            "--cmdline=a=b",
        ];
        let words = words.map(str::to_owned);
        let (options, reports) = with_reports_in_out(&words).unwrap();
        assert_eq!(
            options.join(" "),
            "--kernel k --json=/out/report.json --html=/out/report.html --cmdline=a=b"
        );
        let places: Vec<_> = reports
            .iter()
            .map(|(_, place)| place.display().to_string())
            .collect();
        assert_eq!(places, ["a/b.json", "c"]);
        assert!(with_reports_in_out(&["--json".to_owned()]).is_err());
    }

    #[test]
    fn files_are_found_in_options() {
        let temp = TempDir::new(&std::env::temp_dir(), "husk-file-in").unwrap();
        let file = temp.path().join("disk");
        fs::write(&file, "").unwrap();
        let path = file.display().to_string();
        for word in [
            path.clone(),
            format!("{path},ro,root"),
            format!("--disk={path},ro"),
        ] {
            assert_eq!(file_in(&word), Some(file.clone()), "{word}");
        }
        for word in ["--quiet", "quiet", "--cmdline=x", "/", ""] {
            assert_eq!(file_in(word), None, "{word}");
        }
    }
}
