//! What `husk doctor` says: what this host can do for Husk, and what to do about what it cannot.
//!
//! **Architecture Invariant:** it only looks. It changes nothing on the host, starts no program, and takes less than
//! half a second on a host that works, three at worst. A missing or strange file is a finding, never an error.
#![deny(unsafe_code)]

mod features;
mod guest;
mod host;
mod kvm;
mod network;
// Memory is handed to a VM here, which only the caller can answer for.
#[allow(unsafe_code)]
mod probe;
mod resources;

#[cfg(test)]
mod testing;

use host::{Host, Processor};
use serde_json::json;
use std::fmt;
use std::path::{Path, PathBuf};

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As it should be, or not needed.
    Ok,
    /// Husk runs; something is slower, missing or not permitted.
    Warn,
    /// Husk cannot run Linux because of this.
    Fail,
}

impl Status {
    /// `ok`, `warn` or `FAIL`, as it is printed.
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at: one word, the same in every version.
    pub name: &'static str,
    /// How good it is.
    pub status: Status,
    /// What is: one line for a person.
    pub text: String,
    /// What to do about it: one line.
    pub advice: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Ok,
            text: text.into(),
            advice: None,
        }
    }

    fn warn(name: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            advice: Some(advice.into()),
            ..Self::ok(name, text)
        }
    }

    fn fail(name: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(name, text, advice)
        }
    }
}

/// What `husk run` would boot if nothing were named. Only its user knows where to look, so it is handed in.
#[derive(Clone, Debug)]
pub struct DefaultGuest {
    /// The kernel, or one line that says why there is none and what to do.
    pub kernel: Result<PathBuf, String>,
    /// The busybox of the default initramfs.
    pub busybox: Option<PathBuf>,
}

/// All that was found. `{}` prints one line a finding.
#[derive(Clone, Debug)]
pub struct Report {
    /// In the order in which they are read: what everything hangs on comes first.
    pub findings: Vec<Finding>,
    /// `husk run` can boot an ordinary Linux kernel here.
    pub can_run_linux: bool,
}

impl Report {
    /// One JSON object: `husk` (the version that is handed in), `can_run_linux`, and `findings`, an array of objects
    /// with `name`, `status` (`ok`, `warn`, `fail`), `text` and `advice` (a string or null).
    pub fn to_json(&self, version: &str) -> String {
        let findings: Vec<_> = self
            .findings
            .iter()
            .map(|finding| {
                json!({
                    "name": finding.name,
                    "status": finding.status.label().to_lowercase(),
                    "text": finding.text,
                    "advice": finding.advice,
                })
            })
            .collect();
        let report = json!({
            "husk": version,
            "can_run_linux": self.can_run_linux,
            "findings": findings,
        });
        format!("{report:#}")
    }
}

impl fmt::Display for Report {
    /// One line a finding, with a newline after each: status, name, what is, and after an arrow what to do.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.findings.iter().map(|finding| finding.name.len());
        let width = names.max().unwrap_or(0);
        for finding in &self.findings {
            let label = finding.status.label();
            write!(f, "{label:4}  {:width$}  {}", finding.name, finding.text)?;
            match &finding.advice {
                Some(advice) => writeln!(f, " → {advice}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// Look at this host: its files, its processor, and what a tiny VM does on its KVM.
pub fn examine(guest: &DefaultGuest) -> Report {
    let host = Host::new(Path::new("/"), Processor::detect());
    report(&host, &probe::run(), guest)
}

fn report(host: &Host, probed: &probe::Outcome, guest: &DefaultGuest) -> Report {
    let (mut findings, can_run_linux) = kvm::examine(host, probed);
    findings.extend(resources::examine(host));
    findings.extend(network::examine(host));
    findings.extend(features::examine(host));
    findings.extend(guest::examine(guest));
    Report {
        findings,
        can_run_linux,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> Report {
        Report {
            findings: vec![
                Finding::ok("kvm", "there"),
                Finding::fail("linux", "it \"cannot\" be run", "use another host"),
            ],
            can_run_linux: false,
        }
    }

    #[test]
    fn a_finding_is_a_line_and_the_columns_are_aligned() {
        assert_eq!(
            two().to_string(),
            "ok    kvm    there\nFAIL  linux  it \"cannot\" be run → use another host\n"
        );
    }

    #[test]
    fn json_holds_what_the_lines_hold() {
        let value: serde_json::Value = serde_json::from_str(&two().to_json("1.2.3")).unwrap();
        assert_eq!(value["husk"], "1.2.3");
        assert_eq!(value["can_run_linux"], false);
        assert_eq!(value["findings"][0]["status"], "ok");
        assert_eq!(value["findings"][0]["advice"], serde_json::Value::Null);
        assert_eq!(value["findings"][1]["status"], "fail");
        assert_eq!(value["findings"][1]["text"], "it \"cannot\" be run");
        assert_eq!(value["findings"][1]["advice"], "use another host");
    }

    /// Whatever the machine on which this test runs can do.
    #[test]
    fn the_real_host_is_examined_to_the_end() {
        let report = examine(&DefaultGuest {
            kernel: Err("none".into()),
            busybox: None,
        });
        assert!((12..=20).contains(&report.findings.len()), "{report}");
        assert_eq!(report.to_string().lines().count(), report.findings.len());
    }

    #[test]
    fn a_host_with_no_files_at_all_gets_a_full_report() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::new(root.path(), Processor::default());
        let guest = DefaultGuest {
            kernel: Err("none".into()),
            busybox: None,
        };
        let report = report(&host, &probe::Outcome::nothing("no KVM"), &guest);
        assert!(!report.can_run_linux);
        assert!(report.findings.len() >= 12, "{report}");
        let mut names: Vec<_> = report.findings.iter().map(|finding| finding.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), report.findings.len(), "{report}");
    }

    #[test]
    fn files_full_of_rubbish_get_a_report_of_clean_lines() {
        for rubbish in [
            "",
            "\n\n",
            "-1",
            "99999999999999999999999999",
            "[",
            "]",
            "\u{1b}[31m",
            ": : :",
        ] {
            let host = testing::FakeHost::new();
            for path in [
                "/proc/sys/kernel/osrelease",
                "/proc/cpuinfo",
                "/proc/meminfo",
                "/proc/self/status",
                "/proc/sys/vm/overcommit_memory",
                "/proc/sys/vm/unprivileged_userfaultfd",
                "/proc/sys/kernel/io_uring_disabled",
                "/proc/sys/kernel/seccomp/actions_avail",
                "/etc/group",
                "/sys/kernel/mm/transparent_hugepage/enabled",
                "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
                "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
                "/sys/kernel/mm/ksm/run",
                "/sys/kernel/security/lsm",
                "/sys/devices/system/clocksource/clocksource0/current_clocksource",
                "/dev/kvm",
                "/dev/net/tun",
            ] {
                host.write(path, rubbish);
            }
            let guest = DefaultGuest {
                kernel: Ok(host.path("/dev")),
                busybox: Some(host.path("/dev/kvm")),
            };
            let report = report(&host.host(), &probe::Outcome::nothing("no KVM"), &guest);
            let text = report.to_string();
            assert_eq!(text.lines().count(), report.findings.len(), "{text}");
            assert!(!text.contains('\u{1b}'), "{text}");
        }
    }
}
