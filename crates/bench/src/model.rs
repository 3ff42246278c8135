use serde::Serialize;
use std::collections::BTreeMap;
use std::time::SystemTime;

/// What `schema` says in a report's file.
pub const SCHEMA: &str = "husk.bench.boot";
/// The version of the file that is written, and the newest that is read.
///
/// Fields may be added without a new one: a reader ignores what it does not know. A new phase, or a field that changes its
/// meaning, is a new version.
pub const VERSION: u32 = 1;

/// What `--json` writes and `--baseline` reads, described by `docs/bench-boot.schema.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Always [`SCHEMA`]; checked when a file is read.
    pub schema: String,
    /// Always [`VERSION`]; checked when a file is read.
    pub version: u32,
    /// When the measurement began, in RFC 3339.
    pub created: String,
    /// What the times are times of.
    pub clock: Clock,
    /// Where it was measured.
    pub host: HostInfo,
    /// What was measured. Each has a name of its own.
    pub subjects: Vec<Subject>,
    /// The user ended it early: there are fewer runs than were asked for.
    pub interrupted: bool,
}

/// What the times are times of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Clock {
    /// The host's.
    Real,
    /// Instructions that an emulated host executed; one is a nanosecond. Nearly deterministic.
    Virtual,
}

/// The host of a measurement.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct HostInfo {
    /// The processor's model.
    pub cpu: String,
    /// The kernel's release.
    pub kernel: String,
    /// The version of Husk that measured.
    pub husk: String,
    /// Processors online.
    pub cpus: u32,
}

/// One command that was run again and again.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Subject {
    /// By this it is found in a baseline.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// The measured runs in their order, without those that warmed up.
    pub runs: Vec<Run>,
    /// From a run of its own, so that counting disturbs no time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counts: Option<Counts>,
    /// From a run of its own, the slowest first; empty where the kernel told of none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub initcalls: Vec<Initcall>,
}

/// One measured run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Run {
    /// Nanoseconds from spawn to each phase that was seen.
    pub phases: BTreeMap<Phase, u64>,
    /// Why it does not count. It keeps the phases that it reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
}

/// Why a run failed.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Failed {
    /// In a few words.
    pub reason: String,
    /// The last lines of its console.
    pub console: Vec<String>,
}

/// Points of a start that a run can be seen to pass, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The monitor's `main`.
    Exec,
    /// KVM's VM stands, with memory and vCPUs.
    VmReady,
    /// Kernel and initramfs are in guest memory.
    KernelLoaded,
    /// The first KVM_RUN.
    VcpuEntered,
    /// It returned for the first time.
    FirstExit,
    /// The guest wrote to its console.
    FirstConsoleByte,
    /// The kernel hands over to user space.
    HandsOver,
    /// The console had the text that counts as booted.
    Mark,
    /// The monitor's process ended.
    Exit,
}

impl Phase {
    /// All, in their order.
    pub const ALL: [Self; 9] = [
        Self::Exec,
        Self::VmReady,
        Self::KernelLoaded,
        Self::VcpuEntered,
        Self::FirstExit,
        Self::FirstConsoleByte,
        Self::HandsOver,
        Self::Mark,
        Self::Exit,
    ];

    /// As in the file.
    pub fn key(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::VmReady => "vm_ready",
            Self::KernelLoaded => "kernel_loaded",
            Self::VcpuEntered => "vcpu_entered",
            Self::FirstExit => "first_exit",
            Self::FirstConsoleByte => "first_console_byte",
            Self::HandsOver => "hands_over",
            Self::Mark => "mark",
            Self::Exit => "exit",
        }
    }

    /// As a person reads it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::VmReady => "VM ready",
            Self::KernelLoaded => "kernel loaded",
            Self::VcpuEntered => "vCPU entered",
            Self::FirstExit => "first exit",
            Self::FirstConsoleByte => "first console byte",
            Self::HandsOver => "hands over",
            Self::Mark => "mark",
            Self::Exit => "exit",
        }
    }
}

/// What one start costs beside time.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counts {
    /// In the order of the phases.
    pub by_phase: Vec<PhaseCounts>,
}

/// What happened from the phase before to this one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseCounts {
    /// The phase that ends here.
    pub phase: Phase,
    /// VM exits by their reason.
    pub exits: BTreeMap<String, u64>,
    /// Pages of guest memory touched for the first time.
    pub pages_touched: u64,
    /// Bytes read from files and disks.
    pub bytes_read: u64,
}

/// What a kernel told of one of its initialisation functions under `initcall_debug`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Initcall {
    /// The function, with its module in brackets where it has one.
    pub name: String,
    /// Microseconds.
    pub us: u64,
    /// What it returned; negative is an error.
    pub returned: i64,
}

impl Report {
    /// A report of nothing yet, dated now.
    pub fn new(clock: Clock, host: HostInfo) -> Self {
        Self {
            schema: SCHEMA.into(),
            version: VERSION,
            created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            clock,
            host,
            subjects: Vec::new(),
            interrupted: false,
        }
    }
}

impl Subject {
    /// The runs that count.
    pub fn good(&self) -> impl Iterator<Item = &Run> + Clone {
        self.runs.iter().filter(|run| run.failed.is_none())
    }

    /// How many runs failed.
    pub fn failed(&self) -> usize {
        self.runs.len() - self.good().count()
    }

    /// The phases that every good run reached; none without a good run.
    pub fn phases(&self) -> Vec<Phase> {
        let in_all = |phase: &Phase| self.good().all(|run| run.phases.contains_key(phase));
        match self.good().next() {
            Some(_) => Phase::ALL.into_iter().filter(in_all).collect(),
            None => Vec::new(),
        }
    }

    /// The phase at which a start counts as done; see [`headline`].
    pub fn headline(&self) -> Option<Phase> {
        headline(&self.phases())
    }
}

/// Of the phases that all good runs have, the one whose time is the figure to look at: the mark; without one, the exit; without
/// either, the last there is.
pub(crate) fn headline(common: &[Phase]) -> Option<Phase> {
    let has = |phase: &Phase| common.contains(phase);
    let named = [Phase::Mark, Phase::Exit].into_iter().find(has);
    named.or_else(|| common.last().copied())
}

impl Run {
    /// The phase whose time is the figure to look at, and the time. None of a run that reached none.
    pub fn figure(&self) -> Option<(Phase, u64)> {
        let phase = headline(&self.phases.keys().copied().collect::<Vec<_>>())?;
        Some((phase, self.phases.get(&phase).copied()?))
    }

    /// Nanoseconds that each of `phases` took: from the one before in `phases`, the first from spawn. All are phases of this run.
    ///
    /// A foreign monitor may pass two in another order; the later in order then took no time, and the sum stays right.
    pub(crate) fn steps(&self, phases: &[Phase]) -> Vec<u64> {
        let mut last = 0;
        let step = |phase| {
            let at = self.phases.get(phase).copied().unwrap_or(last).max(last);
            at - std::mem::replace(&mut last, at)
        };
        phases.iter().map(step).collect()
    }
}

/// When each of `runs` reached `phase`; of those that did not, nothing.
pub(crate) fn times(runs: &mut dyn Iterator<Item = &Run>, phase: Phase) -> Vec<u64> {
    let mut times = Vec::new();
    runs.for_each(|run| times.extend(run.phases.get(&phase)));
    times
}
