//! A vCPU's thread: into the guest, out to a device, and back.

use crate::lifecycle::{Lifecycle, Outcome};
use crate::pause::Pause;
use crate::timeline::{Phase, Timeline};
use husk_bus::Bus;
use husk_devices::{GuestEvent, GuestEvents};
use husk_kvm::{Exit, Vcpu, VcpuState};
use husk_metrics::{METRICS, VcpuMetrics};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// What all vCPU threads of a VM share.
pub struct Shared {
    /// I/O ports.
    pub ports: Bus,
    /// Addresses without memory.
    pub mmio: Bus,
    /// How the VM ends.
    pub lifecycle: Arc<Lifecycle>,
    /// Phases of the boot.
    pub timeline: Arc<Timeline>,
    /// The search for a guest that has halted for good.
    pub halts: HaltSearch,
    /// Keeps the vCPUs out of the guest.
    pub pause: Pause,
    /// What they tell of themselves then.
    pub census: Census,
}

/// The state of all vCPUs, which each tells on its own thread.
#[derive(Default)]
pub struct Census {
    told: Mutex<Told>,
    changed: Condvar,
}

#[derive(Default)]
struct Told {
    /// The MSRs that are asked for.
    msrs: Arc<[u32]>,
    states: BTreeMap<u32, Result<VcpuState, husk_kvm::Error>>,
}

impl Census {
    /// The state of `count` vCPUs that are parked, by their numbers; `ask` has each of them tell.
    pub fn take(
        &self,
        msrs: Vec<u32>,
        count: u32,
        ask: impl FnOnce(),
        limit: Duration,
    ) -> Result<Vec<VcpuState>, crate::Error> {
        *self.lock() = Told {
            msrs: msrs.into(),
            states: BTreeMap::new(),
        };
        ask();
        let missing = |told: &mut Told| told.states.len() < count as usize;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, missing);
        let (mut told, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if missing(&mut told) {
            return Err(crate::Error::State("a vCPU does not tell its state"));
        }
        let states = std::mem::take(&mut told.states);
        Ok(states.into_values().collect::<Result<_, _>>()?)
    }

    fn tell(&self, index: u32, vcpu: &Vcpu) {
        let msrs = Arc::clone(&self.lock().msrs);
        let state = vcpu.state(&msrs);
        self.lock().states.insert(index, state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rounds in which each vCPU is asked whether it has halted for good.
///
/// A vCPU that has can still be woken by one that has not, so a guest is dead only when all of its vCPUs said so in two
/// rounds that follow each other.
#[derive(Default)]
pub struct HaltSearch {
    round: AtomicU32,
    /// Bit N: vCPU N has halted for good. There are at most 64.
    halted: AtomicU64,
}

impl HaltSearch {
    /// Begin a round; how many vCPUs have halted for good in the one before.
    pub fn next_round(&self) -> u32 {
        let halted = self.halted.swap(0, Ordering::AcqRel);
        self.round.fetch_add(1, Ordering::AcqRel);
        halted.count_ones()
    }

    fn halted(&self, index: u32) {
        let bit = 1u64.checked_shl(index).unwrap_or(0);
        self.halted.fetch_or(bit, Ordering::AcqRel);
    }
}

/// How often the guest left for the monitor, by reason and address.
pub type ExitCounts = BTreeMap<(&'static str, u64), u64>;

/// KVM_SYSTEM_EVENT_SHUTDOWN, _RESET and _CRASH.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;
const SYSTEM_EVENT_CRASH: u32 = 3;
/// KVM_INTERNAL_ERROR_EMULATION: KVM met an instruction that it cannot emulate.
const INTERNAL_ERROR_EMULATION: u32 = 1;
/// A vCPU thread uses little stack: its devices keep their buffers elsewhere.
const STACK_SIZE: usize = 256 << 10;

/// A running vCPU thread.
pub struct VcpuThread(JoinHandle<()>);

impl VcpuThread {
    /// Start the thread of vCPU `index`.
    pub fn start(index: u32, body: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_SIZE)
            .spawn(body)
            .map(Self)
    }

    /// Wait for a thread that is about to end by itself.
    pub fn join(self) {
        if self.0.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }

    /// Make the vCPU leave the guest for a moment. A signal that comes just before it enters is lost.
    pub fn kick(&self) {
        if let Err(e) = self.0.kill(SIGRTMIN()) {
            log::debug!("a vCPU thread cannot be signalled: {e}");
        }
    }

    /// Make the thread leave the guest and end. The VM's lifecycle must have ended before.
    ///
    /// A signal that arrives just before the thread enters the guest is lost, so it is sent until the thread is gone.
    pub fn stop(self) {
        while !self.0.is_finished() {
            self.kick();
            std::thread::sleep(Duration::from_micros(100));
        }
        self.join();
    }
}

/// Let a vCPU thread be interrupted in the guest. Once per process.
pub fn install_kick_handler() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), kicked)
}

/// Run `vcpu` on this thread until the VM ends, if it is `ready`.
pub fn enter(index: u32, vcpu: &mut Vcpu, shared: &Shared, ready: Result<(), crate::Error>) {
    if let Err(e) = ready {
        let why = crate::error::chain(&e);
        let why = format!("vCPU {index} cannot be set up: {why}");
        shared.lifecycle.end(Outcome::Kvm(why));
        return;
    }
    if index == 0 {
        shared.timeline.reach(Phase::GuestEntered);
    }
    run(index, vcpu, shared);
}

fn run(index: u32, vcpu: &mut Vcpu, shared: &Shared) {
    let mut first = index == 0;
    let mut asked = 0;
    let metrics = METRICS.vcpu.member(&index.to_string());
    while !shared.lifecycle.has_ended() {
        let is_wanted = shared.pause.is_wanted();
        let result = match is_wanted {
            // What the last exit was for is complete then, and all of the state can be told.
            true => vcpu.settle(),
            false => vcpu.run(),
        };
        if is_wanted && matches!(result, Ok(Exit::Interrupted)) {
            let (census, own) = (&shared.census, &*vcpu);
            let has_ended = || shared.lifecycle.has_ended();
            shared.pause.park(has_ended, || census.tell(index, own));
            if !vcpu.notify_of_pause() {
                metrics.kvmclock_ctrl_fails.inc();
            }
            continue;
        }
        let end = match result {
            Ok(exit) => {
                if first && !matches!(exit, Exit::Interrupted) {
                    shared.timeline.reach(Phase::FirstExit);
                    first = false;
                }
                if let Some(counts) = shared.timeline.exits() {
                    count(&exit, counts);
                }
                measure(exit, shared, &metrics)
            }
            Err(e) => {
                metrics.failures.inc();
                Some(Outcome::Kvm(crate::error::chain(&e)))
            }
        };
        if let Some(outcome) = end {
            if outcome == Outcome::TripleFault || matches!(outcome, Outcome::Kvm(_)) {
                log_registers(index, vcpu);
            }
            shared.lifecycle.end(outcome);
        }
        let round = shared.halts.round.load(Ordering::Acquire);
        if round != asked {
            asked = round;
            if vcpu.is_halted_for_good().unwrap_or(false) {
                shared.halts.halted(index);
            }
        }
    }
}

/// Answer an exit, and count it. Some when it ends the VM.
fn measure(exit: Exit<'_>, shared: &Shared, metrics: &VcpuMetrics) -> Option<Outcome> {
    let m = metrics;
    let (count, latency) = match &exit {
        Exit::PortIn { .. } => (&m.exit_io_in, Some(&m.exit_io_in_agg)),
        Exit::PortOut { .. } => (&m.exit_io_out, Some(&m.exit_io_out_agg)),
        Exit::MmioRead { .. } => (&m.exit_mmio_read, Some(&m.exit_mmio_read_agg)),
        Exit::MmioWrite { .. } => (&m.exit_mmio_write, Some(&m.exit_mmio_write_agg)),
        Exit::Interrupted => (&m.exit_interrupted, None),
        Exit::Halt => (&m.exit_halt, None),
        Exit::Shutdown => (&m.exit_shutdown, None),
        Exit::SystemEvent(_) => (&m.exit_system_event, None),
        Exit::FailEntry(_) | Exit::InternalError { .. } | Exit::Unexpected(_) => {
            (&m.failures, None)
        }
    };
    count.inc();
    let begun = latency.map(|latency| (latency, Instant::now()));
    let outcome = handle(exit, shared);
    if let Some((latency, begun)) = begun {
        latency.record(begun.elapsed());
    }
    outcome
}

/// Answer an exit. Some when it ends the VM.
fn handle(exit: Exit<'_>, shared: &Shared) -> Option<Outcome> {
    match exit {
        Exit::PortOut { port, size, data } => {
            if !shared.ports.write_repeated(u64::from(port), data, size) {
                log::trace!(
                    "the guest writes {} bytes to absent port {port:#x}",
                    data.len()
                );
            }
        }
        Exit::PortIn { port, size, data } => {
            for element in data.chunks_mut(size) {
                if !shared.ports.read(u64::from(port), element) {
                    log::trace!("the guest reads absent port {port:#x}");
                }
            }
        }
        Exit::MmioRead { address, data } => {
            if !shared.mmio.read(address, data) {
                log::trace!("the guest reads absent memory at {address:#x}");
            }
        }
        Exit::MmioWrite { address, data } => {
            if !shared.mmio.write(address, data) {
                log::trace!("the guest writes {data:x?} to absent memory at {address:#x}");
            }
        }
        Exit::Interrupted | Exit::Halt => {}
        Exit::Shutdown => return Some(Outcome::TripleFault),
        Exit::SystemEvent(SYSTEM_EVENT_SHUTDOWN) => return Some(Outcome::PowerOff),
        Exit::SystemEvent(SYSTEM_EVENT_RESET) => return Some(Outcome::Reset),
        Exit::SystemEvent(SYSTEM_EVENT_CRASH) => shared.lifecycle.event(GuestEvent::Panicked),
        Exit::SystemEvent(other) => {
            return Some(Outcome::Kvm(format!("an unknown system event {other}")));
        }
        Exit::FailEntry(reason) => {
            return Some(Outcome::Kvm(format!(
                "the processor refused to enter the guest, hardware reason {reason:#x}"
            )));
        }
        Exit::InternalError { suberror, data } => {
            return Some(Outcome::Kvm(internal_error(suberror, &data)));
        }
        Exit::Unexpected(reason) => {
            return Some(Outcome::Kvm(format!("an unexpected exit, reason {reason}")));
        }
    }
    None
}

fn internal_error(suberror: u32, data: &[u64]) -> String {
    // flags, then 1 byte of length and 15 bytes of instruction, when flag 0 says that they are there.
    let instruction = match data {
        [flags, first, second, ..] if suberror == INTERNAL_ERROR_EMULATION && flags & 1 == 1 => {
            let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
            let length = usize::from(bytes.first().copied().unwrap_or(0)).min(15);
            bytes.get(1..=length).map(|bytes| format!(" {bytes:02x?}"))
        }
        _ => None,
    };
    match suberror {
        INTERNAL_ERROR_EMULATION => format!(
            "it cannot emulate the instruction{}",
            instruction.unwrap_or_default()
        ),
        _ => format!("internal error {suberror}, data {data:x?}"),
    }
}

fn count(exit: &Exit<'_>, counts: &Mutex<ExitCounts>) {
    let key = match exit {
        Exit::PortIn { port, .. } => ("in from port", u64::from(*port)),
        Exit::PortOut { port, .. } => ("out to port", u64::from(*port)),
        Exit::MmioRead { address, .. } => ("read at", *address),
        Exit::MmioWrite { address, .. } => ("write at", *address),
        Exit::Interrupted => ("interrupted", 0),
        _ => ("other", 0),
    };
    // Addresses are the guest's: a scan of its address space must not fill the monitor's memory.
    const MOST: usize = 4096;
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    if counts.len() < MOST || counts.contains_key(&key) {
        *counts.entry(key).or_default() += 1;
    }
}

fn log_registers(index: u32, vcpu: &Vcpu) {
    match (vcpu.regs(), vcpu.sregs()) {
        (Ok(r), Ok(s)) => log::error!(
            "vCPU {index}: rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
            r.rip,
            r.rsp,
            r.rflags,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer
        ),
        (Err(e), _) | (_, Err(e)) => log::error!("vCPU {index}: no registers: {e}"),
    }
}
