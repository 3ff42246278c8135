use super::*;
use serde_json::Value;
use std::collections::BTreeSet;

const OWN: &str = include_str!("../../../resources/seccomp/x86_64.json");

const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const X86_64: u32 = 0xc000_003e;

/// What the kernel's BPF machine would answer to a call, and after how many instructions it looked at an argument or was
/// done.
fn answer(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
    let mut data = [0; 64];
    data[0..4].copy_from_slice(&number.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (place, argument) in data[16..].chunks_mut(8).zip(arguments) {
        place.copy_from_slice(&argument.to_le_bytes());
    }
    let (mut at, mut a) = (0, 0_u32);
    let mut searched = None;
    for steps in 1.. {
        let i = &program[at];
        let taken = match i.code {
            0x20 => {
                let k = i.k as usize;
                if k >= 16 {
                    searched.get_or_insert(steps);
                }
                a = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
                true
            }
            0x54 => {
                a &= i.k;
                true
            }
            0x05 => {
                at += i.k as usize;
                true
            }
            0x06 => return (i.k, searched.unwrap_or(steps)),
            0x15 => a == i.k,
            0x25 => a > i.k,
            0x35 => a >= i.k,
            other => panic!("an instruction that seccompiler does not make: {other:#x}"),
        };
        if matches!(i.code, 0x15 | 0x25 | 0x35) {
            at += usize::from(if taken { i.jt } else { i.jf });
        }
        at += 1;
    }
    unreachable!()
}

fn number(name: &str) -> u32 {
    names::all().iter().position(|n| *n == name).unwrap() as u32
}

fn built_in(kind: Kind) -> &'static [sock_filter] {
    BUILT_IN.0[kind as usize]
}

/// The arguments that satisfy a rule's conditions.
fn arguments(rule: &Value) -> [u64; 6] {
    let mut all = [0; 6];
    for condition in rule["args"].as_array().into_iter().flatten() {
        let index = condition["index"].as_u64().unwrap() as usize;
        all[index] = condition["val"].as_u64().unwrap();
    }
    all
}

/// The rules of a set, with those of the sets that it includes.
fn rules(all: &Value, set: &str) -> Vec<Value> {
    let mut rules = all[set]["filter"].as_array().unwrap().clone();
    for other in all[set]["include"].as_array().into_iter().flatten() {
        rules.extend(self::rules(all, other.as_str().unwrap()));
    }
    rules
}

#[test]
fn a_filter_allows_what_its_rules_say_and_nothing_else() {
    let all: Value = serde_json::from_str(OWN).unwrap();
    for kind in Kind::ALL {
        let program = built_in(kind);
        let mut rules = rules(&all, kind.name());
        rules.extend(self::rules(&all, "violation"));
        let mut named = BTreeSet::new();
        let mut allowed = BTreeSet::new();
        for rule in rules.iter().filter(|rule| rule["errno"].is_null()) {
            let number = number(rule["syscall"].as_str().unwrap());
            let (what, _) = answer(program, X86_64, number, arguments(rule));
            assert_eq!(what, ALLOW, "{kind:?}: {rule}");
            named.insert(number);
            allowed.insert(number);
        }
        for rule in rules.iter().filter(|rule| !rule["errno"].is_null()) {
            let number = number(rule["syscall"].as_str().unwrap());
            let (what, _) = answer(program, X86_64, number, arguments(rule));
            let errno = rule["errno"].as_u64().unwrap() as u32;
            let wanted = match allowed.contains(&number) {
                true => what == ALLOW || what == TRAP,
                false => what == ERRNO | errno,
            };
            assert!(wanted, "{kind:?}: {rule}: {what:#x}");
            named.insert(number);
        }
        for number in (0..1000).filter(|number| !named.contains(number)) {
            let (what, _) = answer(program, X86_64, number, [0; 6]);
            assert_eq!(what, TRAP, "{kind:?}: {number}");
        }
    }
}

#[test]
fn arguments_that_no_rule_has_are_refused() {
    for kind in Kind::ALL {
        let what = |name: &str, arguments: [u64; 6]| {
            answer(built_in(kind), X86_64, number(name), arguments).0
        };
        let (read, write, execute) = (1, 2, 4);
        assert_eq!(what("mmap", [0, 4096, read | write, 0, 0, 0]), ALLOW);
        assert_eq!(what("mmap", [0, 4096, read | execute, 0, 0, 0]), TRAP);
        assert_eq!(what("mprotect", [0, 4096, execute, 0, 0, 0]), TRAP);
        // A signal to another process: the rule's number is replaced by this process's.
        let own = u64::from(OWN_PROCESS);
        assert_eq!(what("tgkill", [own, 5, 6, 0, 0, 0]), ALLOW);
        assert_eq!(what("tgkill", [1, 1, 6, 0, 0, 0]), TRAP);
        // The terminal's keyboard (TIOCSTI) is not to be typed on.
        assert_eq!(what("ioctl", [0, 0x5412, 0, 0, 0, 0]), TRAP);
        // A process, rather than a thread.
        assert_ne!(what("clone", [17, 0, 0, 0, 0, 0]), ALLOW);
        // Packets of every process on the host.
        assert_eq!(what("socket", [17, 3, 0, 0, 0, 0]), TRAP);
    }
}

#[test]
fn calls_of_other_architectures_are_refused() {
    for kind in Kind::ALL {
        let getpid = number("getpid");
        assert_eq!(answer(built_in(kind), X86_64, getpid, [0; 6]).0, ALLOW);
        let i386 = 0x4000_0003;
        assert_eq!(answer(built_in(kind), i386, getpid, [0; 6]).0, TRAP);
        let x32 = 0x4000_0000 | getpid;
        assert_eq!(answer(built_in(kind), X86_64, x32, [0; 6]).0, TRAP);
    }
}

#[test]
fn the_kernel_finds_each_call_in_a_few_steps() {
    for kind in Kind::ALL {
        for number in 0..500 {
            let (_, steps) = answer(built_in(kind), X86_64, number, [0; 6]);
            assert!(steps <= 20, "{kind:?}: {number} takes {steps}");
        }
    }
}

#[test]
fn what_a_builder_starts_may_do_all_that_it_has_to() {
    let all: Value = serde_json::from_str(OWN).unwrap();
    for kind in [
        Kind::Main,
        Kind::Vcpu,
        Kind::Io,
        Kind::Console,
        Kind::Doorbells,
    ] {
        for rule in rules(&all, kind.name()) {
            if rule["errno"].is_null() {
                let number = number(rule["syscall"].as_str().unwrap());
                let (what, _) = answer(built_in(Kind::Builder), X86_64, number, arguments(&rule));
                assert_eq!(what, ALLOW, "{kind:?}: {rule}");
            }
        }
    }
}

#[test]
fn every_rule_says_why_it_is_there() {
    let all: Value = serde_json::from_str(OWN).unwrap();
    for (name, set) in all.as_object().unwrap() {
        assert!(set["comment"].is_string(), "{name}");
        for rule in set["filter"].as_array().unwrap() {
            assert!(rule["comment"].is_string(), "{name}: {rule}");
            for condition in rule["args"].as_array().into_iter().flatten() {
                assert!(condition["comment"].is_string(), "{name}: {rule}");
            }
        }
    }
}

fn compile(text: &str) -> Result<Program, String> {
    let rules = Rules::parse(text).map_err(|e| e.to_string())?;
    rules.compile("main").map_err(|e| e.to_string())
}

#[test]
fn wrong_rules_are_refused_by_name() {
    for (text, said) in [
        ("", "EOF"),
        ("[]", "invalid type"),
        (
            r#"{"main": {"filter": [], "more": 1}}"#,
            "unknown field `more`",
        ),
        (r#"{"api": {"filter": []}}"#, "no set of rules \"main\""),
        (
            r#"{"main": {"filter": [{"syscall": "opne"}]}}"#,
            "no system call \"opne\"",
        ),
        (
            r#"{"main": {"include": ["it"], "filter": []}}"#,
            "no set of rules \"it\"",
        ),
        (
            r#"{"main": {"include": ["it"], "filter": []}, "it": {"include": ["main"], "filter": []}}"#,
            "\"main\" includes itself",
        ),
        (
            r#"{"main": {"filter": [{"syscall": "open", "args": [{"index": 9, "type": "dword", "op": "eq", "val": 1}]}]}}"#,
            "\"main\": open: ",
        ),
        (
            r#"{"main": {"filter": [{"syscall": "open", "errno": 1}, {"syscall": "open", "errno": 2}]}}"#,
            "the rules of open name different errnos",
        ),
        (
            r#"{"main": {"mismatch_action": "shrug", "filter": []}}"#,
            "shrug",
        ),
    ] {
        let error = compile(text).unwrap_err();
        assert!(error.contains(said), "{text}: {error}");
    }
}

#[test]
fn files_may_choose_other_actions_and_use_firecrackers_names_for_them() {
    let text = r#"{"main": {"default_action": "kill_process", "filter_action": "log", "filter": [
        {"syscall": "read"},
        {"syscall": "open", "args": [{"index": 1, "type": "dword", "op": {"masked_eq": 3}, "val": 0}]}
    ]}}"#;
    let program = compile(text).unwrap();
    let what = |name, arguments| answer(&program, X86_64, number(name), arguments).0;
    let (log, kill) = (0x7ffc_0000, 0x8000_0000);
    assert_eq!(what("read", [0; 6]), log);
    assert_eq!(what("write", [0; 6]), kill);
    assert_eq!(what("open", [0, 4, 0, 0, 0, 0]), log);
    assert_eq!(what("open", [0, 1, 0, 0, 0, 0]), kill);
}

#[test]
fn a_filter_of_every_call_is_found_whole() {
    let mut all = Vec::new();
    for number in (0..460).step_by(2) {
        let Some(call) = names::all().get(number).filter(|name| !name.is_empty()) else {
            continue;
        };
        all.push(format!(r#"{{"syscall": "{call}"}}"#));
    }
    let text = format!(r#"{{"main": {{"filter": [{}]}}}}"#, all.join(","));
    let program = compile(&text).unwrap();
    for number in 0..600_u32 {
        let there = number < 460 && number % 2 == 0 && !names::all()[number as usize].is_empty();
        let wanted = if there { ALLOW } else { TRAP };
        assert_eq!(
            answer(&program, X86_64, number, [0; 6]).0,
            wanted,
            "{number}"
        );
    }
}

#[test]
fn a_file_must_have_a_filter_for_every_kind_and_be_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("filter.json");
    std::fs::write(&path, OWN).unwrap();
    assert!(Filters::from_file(&path).unwrap().are_any());
    let all: Value = serde_json::from_str(OWN).unwrap();
    for kind in Kind::ALL {
        let mut less = all.clone();
        less.as_object_mut().unwrap().remove(kind.name());
        std::fs::write(&path, less.to_string()).unwrap();
        let error = Filters::from_file(&path).map(drop).unwrap_err();
        assert!(matches!(error, Error::Rules(..)), "{error}");
    }
    std::fs::write(&path, [3, 0, 0xff, 0xfe]).unwrap();
    let error = Filters::from_file(&path).map(drop).unwrap_err();
    assert!(matches!(error, Error::Binary(_)), "{error}");
    let error = Filters::from_file(dir.path()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Read(..)), "{error}");
    let endless = Filters::from_file(Path::new("/dev/zero")).map(drop);
    assert!(matches!(endless.unwrap_err(), Error::Read(..)));
}
