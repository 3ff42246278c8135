//! A shorter program that answers the same. seccompiler makes five instructions of a condition; most of them only jump, or load
//! what is loaded. What is shorter is sooner checked and compiled by the kernel, each time that a thread installs it.

use crate::compile::{JUMP, LOAD, Program, RETURN};
use seccompiler::sock_filter;

/// What a conditional jump can skip.
const REACH: usize = u8::MAX as usize;
/// BPF_JMP, the class of all jumps.
const JUMPS: u16 = 0x05;
/// The bits of a code that are its class.
const CLASS: u16 = 0x07;

/// Where an instruction leads to: one place, two, or none.
enum Next {
    One(usize),
    Two(usize, usize),
    None,
}

/// The same program in fewer instructions. Its jumps lead forward and stay inside, as the kernel demands.
pub fn shrink(mut program: Program) -> Program {
    loop {
        let before = program.len();
        forget_loads(&mut program);
        shorten_jumps(&mut program);
        program = without_unused(&program);
        if program.len() >= before {
            return program;
        }
    }
}

fn next(program: &[sock_filter], at: usize) -> Next {
    let Some(i) = program.get(at) else {
        return Next::None;
    };
    match i.code {
        RETURN => Next::None,
        JUMP => Next::One(at + 1 + i.k as usize),
        code if code & CLASS == JUMPS => {
            Next::Two(at + 1 + usize::from(i.jt), at + 1 + usize::from(i.jf))
        }
        _ => Next::One(at + 1),
    }
}

/// A load of what every path there has loaded becomes a jump to what follows.
fn forget_loads(program: &mut Program) {
    /// What is loaded where an instruction begins.
    #[derive(Clone, Copy, PartialEq)]
    enum Loaded {
        Unreached,
        From(u32),
        Anything,
    }
    let mut loaded = vec![Loaded::Unreached; program.len()];
    if let Some(first) = loaded.first_mut() {
        *first = Loaded::Anything;
    }
    for at in 0..program.len() {
        let (Some(&here), Some(i)) = (loaded.get(at), program.get_mut(at)) else {
            return;
        };
        let after = match (i.code, i.code & CLASS) {
            (LOAD, _) if here == Loaded::From(i.k) => {
                (i.code, i.k) = (JUMP, 0);
                here
            }
            (LOAD, _) => Loaded::From(i.k),
            (_, JUMPS) => here,
            _ => Loaded::Anything,
        };
        let mut reach = |to: usize| {
            if let Some(there) = loaded.get_mut(to) {
                *there = match *there {
                    Loaded::Unreached => after,
                    same if same == after => same,
                    _ => Loaded::Anything,
                };
            }
        };
        if here != Loaded::Unreached {
            match next(program, at) {
                Next::One(to) => reach(to),
                Next::Two(one, two) => [one, two].into_iter().for_each(reach),
                Next::None => {}
            }
        }
    }
}

/// Jumps to jumps lead to where those lead, and jumps to an answer to the last that is the same.
fn shorten_jumps(program: &mut Program) {
    for at in 0..program.len() {
        let short = |to: usize| {
            let mut to = to;
            while let (Some(JUMP), Next::One(on)) =
                (program.get(to).map(|i| i.code), next(program, to))
            {
                to = on;
            }
            let same = |i: &sock_filter| i.code == RETURN && program.get(to) == Some(i);
            let near = program.get(..=at + 1 + REACH).unwrap_or(program);
            near.iter().rposition(same).unwrap_or(to).max(to)
        };
        let skip = |to: usize| to.saturating_sub(at + 1);
        match next(program, at) {
            Next::Two(one, two) => {
                let [one, two] = [one, two].map(|to| u8::try_from(skip(short(to))));
                if let Some(i) = program.get_mut(at) {
                    i.jt = one.unwrap_or(i.jt);
                    i.jf = two.unwrap_or(i.jf);
                }
            }
            Next::One(to) => {
                let skipped = skip(short(to)) as u32;
                if let Some(i) = program.get_mut(at).filter(|i| i.code == JUMP) {
                    i.k = skipped;
                }
            }
            Next::None => {}
        }
    }
}

/// Without what no path reaches, and without jumps to what follows anyway.
fn without_unused(program: &[sock_filter]) -> Program {
    let mut used = vec![false; program.len()];
    let mut reach = vec![0];
    while let Some(at) = reach.pop() {
        let Some(here) = used.get_mut(at).filter(|used| !**used) else {
            continue;
        };
        *here = true;
        match next(program, at) {
            Next::One(to) => reach.push(to),
            Next::Two(one, two) => reach.extend([one, two]),
            Next::None => {}
        }
    }
    let kept =
        |at: usize, i: &sock_filter| used.get(at) == Some(&true) && !(i.code == JUMP && i.k == 0);
    // Where each instruction will be; one that goes, where the next that stays will be.
    let mut count = 0;
    let mut places = Vec::with_capacity(program.len() + 1);
    for (at, i) in program.iter().enumerate() {
        places.push(count);
        count += usize::from(kept(at, i));
    }
    let place = |at: usize| places.get(at).copied().unwrap_or(count);
    let all = program.iter().enumerate().filter(|(at, i)| kept(*at, i));
    all.map(|(at, i)| {
        let skip = |to: usize| place(to).saturating_sub(place(at) + 1);
        let mut i = i.clone();
        match next(program, at) {
            Next::Two(one, two) => (i.jt, i.jf) = (skip(one) as u8, skip(two) as u8),
            Next::One(to) if i.code == JUMP => i.k = skip(to) as u32,
            _ => {}
        }
        i
    })
    .collect()
}
