//! From rules in JSON to BPF. The build script compiles Husk's own with this, and at run time `--seccomp-filter` does.
//!
//! seccompiler compiles the conditions of a rule. It would put one call behind the other, and the kernel, which tries all numbers
//! of calls on a filter when it is installed, would walk that list hundreds of times: half a millisecond. So the calls become the
//! leaves of a binary tree here.

use crate::names;
use crate::shrink::shrink;
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule,
    sock_filter,
};
use serde::Deserialize;
use std::collections::BTreeMap;

/// A filter, as the kernel takes it.
pub type Program = Vec<sock_filter>;

/// The set that is part of every filter: what the handler of a violation needs.
const ALWAYS: &str = "violation";

/// AUDIT_ARCH_X86_64 of <linux/audit.h>.
const ARCH: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;

/// Instructions of classic BPF: BPF_LD | BPF_W | BPF_ABS and so on.
pub const LOAD: u16 = 0x20;
pub const RETURN: u16 = 0x06;
pub const JUMP: u16 = 0x05;
pub const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
/// What a conditional jump can skip.
const REACH: usize = u8::MAX as usize;
/// BPF_MAXINSNS: instructions of a filter.
const MOST: usize = 4096;

/// What is wrong with rules.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No JSON, or fields that are missing or unknown.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// There is no such set.
    #[error("there is no set of rules {0:?}")]
    NoSet(String),
    /// Sets that include each other.
    #[error("the set of rules {0:?} includes itself")]
    Cycle(String),
    /// No system call.
    #[error("in {0:?}: there is no system call {1:?}")]
    NoSyscall(String, String),
    /// Two rules that cannot both hold.
    #[error("in {0:?}: the rules of {1} name different errnos")]
    Errnos(String, &'static str),
    /// seccompiler's.
    #[error("in {0:?}: {1}: {2}")]
    Rule(String, &'static str, BackendError),
    /// Too many rules.
    #[error("{0:?} makes {1} instructions, and the kernel takes {MOST}")]
    TooLong(String, usize),
}

/// Rules under one name: a filter, or what filters include.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    #[serde(default, rename = "comment")]
    _comment: String,
    /// Other sets, whose rules are rules of this one.
    #[serde(default)]
    include: Vec<String>,
    #[serde(default = "trap", alias = "default_action")]
    mismatch_action: Action,
    #[serde(default = "allow", alias = "filter_action")]
    match_action: Action,
    filter: Vec<Rule>,
}

/// What the kernel does with a call.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    Allow,
    Errno(u32),
    KillThread,
    KillProcess,
    Log,
    Trace(u32),
    Trap,
}

fn trap() -> Action {
    Action::Trap
}

fn allow() -> Action {
    Action::Allow
}

impl Action {
    /// As a filter's answer.
    fn answer(self) -> u32 {
        u32::from(match self {
            Action::Allow => SeccompAction::Allow,
            Action::Errno(errno) => SeccompAction::Errno(errno),
            Action::KillThread => SeccompAction::KillThread,
            Action::KillProcess => SeccompAction::KillProcess,
            Action::Log => SeccompAction::Log,
            Action::Trace(number) => SeccompAction::Trace(number),
            Action::Trap => SeccompAction::Trap,
        })
    }
}

/// A call that is allowed, or refused without a violation.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    syscall: String,
    #[serde(default, rename = "comment")]
    _comment: String,
    /// Conditions, all of which must hold.
    #[serde(default)]
    args: Vec<Condition>,
    /// The call fails with this. Counts only where no rule allows the call.
    errno: Option<u32>,
}

/// A condition for an argument of a call.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Condition {
    #[serde(default, rename = "comment")]
    _comment: String,
    /// Which argument, from 0.
    index: u8,
    /// How much of it is compared.
    #[serde(rename = "type")]
    length: Length,
    op: Op,
    val: u64,
}

/// What the kernel itself reads of most arguments is 32 bits; only those must be compared then.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Length {
    Dword,
    Qword,
}

/// The argument is … than the value.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Op {
    Eq,
    Ge,
    Gt,
    Le,
    Lt,
    /// Only these bits of the argument count.
    MaskedEq(u64),
    Ne,
}

impl Condition {
    fn compile(&self) -> Result<SeccompCondition, BackendError> {
        let length = match self.length {
            Length::Dword => SeccompCmpArgLen::Dword,
            Length::Qword => SeccompCmpArgLen::Qword,
        };
        let op = match self.op {
            Op::Eq => SeccompCmpOp::Eq,
            Op::Ge => SeccompCmpOp::Ge,
            Op::Gt => SeccompCmpOp::Gt,
            Op::Le => SeccompCmpOp::Le,
            Op::Lt => SeccompCmpOp::Lt,
            Op::MaskedEq(mask) => SeccompCmpOp::MaskedEq(mask),
            Op::Ne => SeccompCmpOp::Ne,
        };
        SeccompCondition::new(self.index, length, op, self.val)
    }
}

/// What a filter says of one system call.
#[derive(Default)]
struct Call {
    always: bool,
    /// Rules of which one must hold.
    when: Vec<SeccompRule>,
    /// With the rules under which it is returned; none is always.
    errno: Option<(u32, Vec<SeccompRule>)>,
}

/// Several sets of rules.
pub struct Rules(BTreeMap<String, Set>);

impl Rules {
    /// Read them from JSON; `docs/seccomp.md` has its form.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Ok(Self(serde_json::from_slice(text.as_bytes())?))
    }

    /// The filter that is the set called `name`.
    pub fn compile(&self, name: &str) -> Result<Program, Error> {
        let set = self.set(name)?;
        let mut calls = BTreeMap::new();
        self.collect(name, &mut Vec::new(), &mut calls)?;
        if self.0.contains_key(ALWAYS) {
            self.collect(ALWAYS, &mut Vec::new(), &mut calls)?;
        }
        let mut tree = Tree::new(set.mismatch_action.answer());
        for (number, call) in calls {
            tree.add(number, set.leaf(call));
        }
        let program = tree.program();
        match program.len() {
            0..=MOST => Ok(program),
            length => Err(Error::TooLong(name.into(), length)),
        }
    }

    fn set(&self, name: &str) -> Result<&Set, Error> {
        self.0.get(name).ok_or_else(|| Error::NoSet(name.into()))
    }

    /// The rules of the set called `name` and of all that it includes. `within` are the sets that lead to it.
    fn collect<'a>(
        &'a self,
        name: &'a str,
        within: &mut Vec<&'a str>,
        calls: &mut BTreeMap<u32, Call>,
    ) -> Result<(), Error> {
        if within.contains(&name) {
            return Err(Error::Cycle(name.into()));
        }
        let set = self.set(name)?;
        for rule in &set.filter {
            let (number, syscall) = find(&rule.syscall)
                .ok_or_else(|| Error::NoSyscall(name.into(), rule.syscall.clone()))?;
            let call = calls.entry(number).or_default();
            let conditions = rule.args.iter().map(Condition::compile);
            let compiled = match rule.args.is_empty() {
                true => Ok(None),
                false => conditions
                    .collect::<Result<_, _>>()
                    .and_then(SeccompRule::new)
                    .map(Some),
            };
            let compiled = compiled.map_err(|e| Error::Rule(name.into(), syscall, e))?;
            match (rule.errno, compiled) {
                (None, None) => call.always = true,
                (None, Some(compiled)) => call.when.push(compiled),
                (Some(errno), compiled) => {
                    let (own, when) = call.errno.get_or_insert((errno, Vec::new()));
                    if *own != errno {
                        return Err(Error::Errnos(name.into(), syscall));
                    }
                    when.extend(compiled);
                }
            }
        }
        within.push(name);
        for other in &set.include {
            self.collect(other, within, calls)?;
        }
        within.pop();
        Ok(())
    }
}

/// A system call's number, and its name for as long as the process lives.
fn find(name: &str) -> Option<(u32, &'static str)> {
    let known = (0..).zip(names::all()).find(|(_, known)| **known == name);
    known
        .filter(|_| !name.is_empty())
        .map(|(number, known)| (number, *known))
}

impl Set {
    fn leaf(&self, call: Call) -> Leaf {
        let allowed = self.match_action.answer();
        let (then, when) = match call {
            Call { always: true, .. } => (allowed, Vec::new()),
            Call { when, .. } if !when.is_empty() => (allowed, when),
            Call { errno, .. } => {
                let (errno, when) = errno.unwrap_or_default();
                (Action::Errno(errno).answer(), when)
            }
        };
        if when.is_empty() {
            return Leaf::Return(then);
        }
        let mut program = Program::new();
        for rule in when {
            // Where it does not hold, it jumps over one instruction more.
            program.extend(Program::from(rule));
            program.push(instruction(RETURN, then));
        }
        program.push(instruction(RETURN, self.mismatch_action.answer()));
        Leaf::Program(shrink(program))
    }
}

/// What is done with a range of numbers of system calls.
#[derive(Clone, PartialEq, Eq)]
enum Leaf {
    /// The filter's answer.
    Return(u32),
    /// A program of its own, which ends with an answer on every path.
    Program(Program),
}

/// A search for the number of the system call.
struct Tree {
    default: u32,
    /// Ranges in order, each with its first number; the first begins at 0.
    ranges: Vec<(u32, Leaf)>,
}

impl Tree {
    fn new(default: u32) -> Self {
        Self {
            default,
            ranges: vec![(0, Leaf::Return(default))],
        }
    }

    /// `number` is larger than those that were added before.
    fn add(&mut self, number: u32, leaf: Leaf) {
        self.begin(number, leaf);
        self.begin(number + 1, Leaf::Return(self.default));
    }

    fn begin(&mut self, number: u32, leaf: Leaf) {
        self.ranges.pop_if(|(first, _)| *first == number);
        if self.ranges.last().is_none_or(|(_, last)| *last != leaf) {
            self.ranges.push((number, leaf));
        }
    }

    fn program(&self) -> Program {
        let mut program = vec![
            instruction(LOAD, ARCH_AT),
            jump_if(JUMP_IF_EQUAL, ARCH, 1, 0),
            instruction(RETURN, self.default),
            instruction(LOAD, NUMBER_AT),
        ];
        let mut jumps = Vec::new();
        search(&self.ranges, &mut program, &mut jumps);
        for (at, leaf) in jumps {
            let skipped = program.len() - at - 1;
            if let Some(jump) = program.get_mut(at) {
                jump.k = skipped as u32;
            }
            program.extend_from_slice(leaf);
        }
        program
    }
}

/// Append a search of `ranges`; `jumps` are the places that jump to programs to come.
fn search<'a>(
    ranges: &'a [(u32, Leaf)],
    program: &mut Program,
    jumps: &mut Vec<(usize, &'a Program)>,
) {
    let (below, from) = ranges.split_at(ranges.len() / 2);
    match (below, from) {
        ([], [(_, Leaf::Return(answer))]) => program.push(instruction(RETURN, *answer)),
        ([], [(_, Leaf::Program(leaf))]) => {
            jumps.push((program.len(), leaf));
            program.push(instruction(JUMP, 0));
        }
        (_, [(first, _), ..]) => {
            let skipped = length(below.len());
            match u8::try_from(skipped) {
                Ok(skipped) => program.push(jump_if(JUMP_IF_AT_LEAST, *first, skipped, 0)),
                Err(_) => {
                    program.push(jump_if(JUMP_IF_AT_LEAST, *first, 0, 1));
                    program.push(instruction(JUMP, skipped as u32));
                }
            }
            search(below, program, jumps);
            search(from, program, jumps);
        }
        (_, []) => {}
    }
}

/// Instructions of a search of so many ranges.
fn length(ranges: usize) -> usize {
    let below = ranges / 2;
    if below == 0 {
        return 1;
    }
    let skipped = length(below);
    1 + usize::from(skipped > REACH) + skipped + length(ranges - below)
}

fn instruction(code: u16, k: u32) -> sock_filter {
    jump_if(code, k, 0, 0)
}

fn jump_if(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
