//! Asking KVM itself: its capabilities, and how fast a tiny VM executes instructions.

use crate::host::chain;
use husk_arch::boot::{self, BootInfo};
use husk_kvm::{Exit, Kvm};
use kvm_ioctls::Cap;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How long the guest is measured.
const MEASURE: Duration = Duration::from_millis(200);
/// How long a stretch must be that its start and end do not count.
const STRETCH: Duration = Duration::from_millis(10);
/// When a VM that says nothing is given up.
const GIVE_UP: Duration = Duration::from_secs(2);

/// Guest memory in bytes: [`boot`]'s tables, and the loop above them.
const MEMORY: u64 = 2 << 20;
/// Where the loop is.
const ENTRY: u64 = 0x10_0000;
/// A port at which the guest asks how often to go round.
const PORT: u16 = 0x80;
/// 64-bit code: `again: in eax, 0x80; mov ecx, eax; round: dec ecx; jnz round; jmp again`.
const LOOP: [u8; 10] = [0xe5, 0x80, 0x89, 0xc1, 0xff, 0xc9, 0x75, 0xfc, 0xeb, 0xf6];
/// Instructions of one round.
const ROUND: u64 = 2;
/// Rounds of the first stretch: a few hundredths of a second where KVM emulates each instruction.
const FIRST_ROUNDS: u32 = 10_000;

/// What KVM said and did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its own description, or why it could not be asked: one line.
    pub system: Result<System, String>,
    /// Instructions that a guest executed per second, or why none ran: one line.
    pub speed: Result<u64, String>,
}

/// What KVM says of itself.
#[derive(Clone, Debug)]
pub struct System {
    /// Most vCPUs of a VM.
    pub max_vcpus: usize,
    /// What Husk needs and KVM has not: names of KVM_CAP_….
    pub missing: Vec<&'static str>,
    /// What Husk can do without and KVM has not.
    pub missing_optional: Vec<&'static str>,
}

impl Outcome {
    /// KVM could not be asked.
    pub fn nothing(reason: &str) -> Self {
        Self {
            system: Err(reason.into()),
            speed: Err(reason.into()),
        }
    }
}

/// Ask this host's KVM.
pub fn run() -> Outcome {
    match Kvm::open() {
        Err(e) => Outcome::nothing(&chain(&e)),
        Ok(kvm) => Outcome {
            system: system(),
            speed: speed_within(GIVE_UP, kvm),
        },
    }
}

fn system() -> Result<System, String> {
    let kvm = kvm_ioctls::Kvm::new().map_err(|e| format!("cannot open /dev/kvm: {e}"))?;
    let missing = |capabilities: &[(Cap, &'static str)]| {
        let missing = capabilities
            .iter()
            .filter(|(capability, _)| !kvm.check_extension(*capability));
        missing.map(|&(_, name)| name).collect()
    };
    Ok(System {
        max_vcpus: kvm.get_max_vcpus(),
        missing: missing(&[
            (Cap::Irqchip, "IRQCHIP"),
            (Cap::Pit2, "PIT2"),
            (Cap::Irqfd, "IRQFD"),
            (Cap::Ioeventfd, "IOEVENTFD"),
            (Cap::UserMemory, "USER_MEMORY"),
            (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
            (Cap::SetTssAddr, "SET_TSS_ADDR"),
            (Cap::ExtCpuid, "EXT_CPUID"),
        ]),
        missing_optional: missing(&[(Cap::TscDeadlineTimer, "TSC_DEADLINE_TIMER")]),
    })
}

/// A VM that never comes back keeps its thread, not this one; the thread ends with the process.
fn speed_within(limit: Duration, kvm: Kvm) -> Result<u64, String> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("doctor-probe".into())
        .spawn(move || {
            // Nobody waits any more if the limit has passed.
            let _ = sender.send(speed(&kvm).map_err(|e| chain(&e)));
        })
        .map_err(|e| format!("cannot start a thread: {e}"))?;
    receiver
        .recv_timeout(limit)
        .unwrap_or_else(|_| Err(format!("the guest did not answer within {limit:?}")))
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Kvm(#[from] husk_kvm::Error),
    #[error("cannot get {MEMORY:#x} bytes for a guest")]
    Memory,
    #[error("the guest left its loop: {0}")]
    Exit(String),
}

/// Let a guest run [`LOOP`] as the kernel would run: 64-bit code, paging, privilege level 0.
fn speed(kvm: &Kvm) -> Result<u64, Error> {
    // Before the VM, so that it is dropped after it.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY as usize)])
        .map_err(|_| Error::Memory)?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|_| Error::Memory)?;
    let vm = kvm.create_vm()?;
    // SAFETY: `memory` maps MEMORY bytes at `host`, is this guest's alone, and is declared before `vm` and `vcpu`, so it
    // is unmapped after both are dropped. Nothing here keeps a reference into it.
    unsafe { vm.set_memory_slot(0, 0, MEMORY, host as u64, false) }?;

    let info = BootInfo {
        memory_size: MEMORY,
        cmdline: "",
        initrd: None,
        setup_header: None,
        kernel_end: MEMORY,
        random_seed: [0; 32],
    };
    let start = boot::linux(&info, ENTRY);
    let contents = start
        .writes
        .iter()
        .map(|(at, bytes)| (*at, bytes.as_slice()));
    for (address, bytes) in contents.chain([(ENTRY, LOOP.as_slice())]) {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| Error::Memory)?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&kvm.supported_cpuid()?)?;
    let mut sregs = vcpu.sregs()?;
    start.apply(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&start.regs)?;

    let mut watch = StopWatch::new();
    loop {
        match vcpu.run()? {
            Exit::PortIn {
                port: PORT, data, ..
            } => match watch.asked(Instant::now()) {
                Some(rounds) => data
                    .iter_mut()
                    .zip(rounds.to_le_bytes())
                    .for_each(|(to, from)| *to = from),
                None => return Ok(watch.best),
            },
            Exit::Interrupted => {}
            other => return Err(Error::Exit(format!("{other:?}"))),
        }
    }
}

/// Times the guest's stretches of rounds, longer ones until one is long enough.
struct StopWatch {
    /// When the guest asked first, and when it asked last.
    times: Option<(Instant, Instant)>,
    /// What it was told last.
    rounds: u32,
    /// Instructions per second in the best stretch: what else the host does makes a stretch slower, never faster.
    best: u64,
}

impl StopWatch {
    fn new() -> Self {
        Self {
            times: None,
            rounds: FIRST_ROUNDS,
            best: 0,
        }
    }

    /// The guest has gone its rounds: the number of the next ones, or none if it has been measured long enough.
    fn asked(&mut self, now: Instant) -> Option<u32> {
        let Some((first, last)) = self.times else {
            self.times = Some((now, now));
            return Some(self.rounds);
        };
        let took = now.duration_since(last);
        self.best = self
            .best
            .max(per_second(u64::from(self.rounds) * ROUND, took));
        if took < STRETCH {
            self.rounds = self.rounds.saturating_mul(2);
        }
        self.times = Some((first, now));
        (now.duration_since(first) < MEASURE).then_some(self.rounds)
    }
}

fn per_second(count: u64, took: Duration) -> u64 {
    let nanoseconds = took.as_nanos().max(1);
    u64::try_from(u128::from(count) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ask as a guest would that needs `nanoseconds` for an instruction, and more for every other stretch.
    fn measured(nanoseconds: u64, disturbance: Duration) -> (u64, Duration) {
        let mut watch = StopWatch::new();
        let begin = Instant::now();
        let mut now = begin;
        let mut disturbed = false;
        while let Some(rounds) = watch.asked(now) {
            now += Duration::from_nanos(u64::from(rounds) * ROUND * nanoseconds);
            if disturbed {
                now += disturbance;
            }
            disturbed = !disturbed;
        }
        (watch.best, now - begin)
    }

    #[test]
    fn speed_is_that_of_an_undisturbed_stretch() {
        let (speed, took) = measured(1, Duration::from_millis(30));
        assert_eq!(speed, 1_000_000_000);
        assert!(took < 2 * MEASURE, "{took:?}");
        let (speed, took) = measured(700, Duration::from_millis(30));
        assert_eq!(speed, 1_428_571);
        assert!(took < 2 * MEASURE, "{took:?}");
    }

    #[test]
    fn a_clock_that_stands_still_does_no_harm() {
        let mut watch = StopWatch::new();
        let now = Instant::now();
        for _ in 0..100 {
            assert!(watch.asked(now).is_some());
        }
        assert!(watch.best > 0);
    }
}
