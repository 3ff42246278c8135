//! What KVM knows of a VM and its vCPUs, to be kept and put back.
//!
//! Each part is kept as the bytes of KVM's own structure, which is ABI and only ever grows at its end; what an older host has not
//! told is zero.

use crate::blob::Blob;
use crate::vcpu::{libc_error, msr_entries};
use crate::{Error, Vcpu, Vm};
use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MP_STATE_RUNNABLE, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant, SystemTime};
use vmm_sys_util::errno;

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE. KVM forgets it when the local APIC's timer is set, so it comes after that.
const TSC_DEADLINE: u32 = 0x6e0;
/// How far a TSC's frequency may be from what the guest measured, in millionths: KVM's own default (tsc_tolerance_ppm).
const TSC_TOLERANCE_PPM: u64 = 250;
/// DR6 and DR7 of a processor that was just reset; the others are zero.
const RESET_DEBUG_REGS: kvm_debugregs = kvm_debugregs {
    db: [0; 4],
    dr6: 0xffff_0ff0,
    dr7: 0x400,
    flags: 0,
    reserved: [0; 9],
};
/// As many MSRs as one call takes.
const MSRS_AT_ONCE: usize = 128;
/// Most MSRs that one message names.
const MOST_NAMED: usize = 8;

/// A vCPU between two calls of [`Vcpu::run`].
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// What the guest was given of the processor.
    cpuid: Blob,
    /// Frequency of the guest's TSC.
    tsc_khz: Option<u32>,
    regs: Blob,
    sregs: Blob,
    xsave: Blob,
    xcrs: Blob,
    debug_regs: Blob,
    lapic: Blob,
    events: Blob,
    mp_state: Blob,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
}

/// How much later it is for a guest that goes on.
#[derive(Clone, Copy, Debug)]
pub struct Passed {
    /// For which its clocks have not stood still.
    slept: Duration,
    /// When its vCPUs began to be put back. They come one after the other, and their TSCs agree all the same.
    begun: Instant,
}

impl Passed {
    /// Since the VM began to be put back; nothing.
    pub fn nothing() -> Self {
        Self {
            slept: Duration::ZERO,
            begun: Instant::now(),
        }
    }

    fn ticks(&self, khz: u32) -> u64 {
        let ns = (self.slept + self.begun.elapsed()).as_nanos();
        u64::try_from(ns.saturating_mul(khz.into()) / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// Interrupt controllers, timer and clock of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    pic_master: Blob,
    pic_slave: Blob,
    ioapic: Blob,
    pit: Blob,
    clock: Blob,
    /// When it was told: the host's wall clock, in nanoseconds since 1970.
    #[serde(default)]
    told_at: Option<u64>,
}

impl VmState {
    /// What has passed by the host's wall clock since the state was told. Nothing where that is not known, or was later.
    pub fn passed(&self) -> Passed {
        let told = self.told_at.map(Duration::from_nanos);
        let slept = told.and_then(|told| wall_clock().checked_sub(told));
        Passed {
            slept: slept.unwrap_or_default(),
            ..Passed::nothing()
        }
    }
}

fn wall_clock() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
}

impl VcpuState {
    /// What the guest sees of the processor.
    pub fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        self.cpuid.to_all()
    }
}

/// XCR0 alone, and in it nothing but the x87 state.
fn is_reset_xcrs(xcrs: &kvm_xcrs) -> bool {
    let [first, ..] = xcrs.xcrs;
    xcrs.nr_xcrs == 1 && (first.xcr, first.value) == (0, 1)
}

fn failed(call: &'static str) -> impl Fn(errno::Error) -> Error {
    move |e| Error::Ioctl(call, e)
}

fn refused(part: &'static str) -> impl Fn(errno::Error) -> Error {
    move |e| Error::State(part, e)
}

impl Vcpu {
    /// All of the vCPU's state. `msrs` are those of [`crate::Kvm::state_msrs`]. Between two calls of [`Vcpu::run`], of which the
    /// last was interrupted: what an `in` or a load waits for is not part of it.
    pub fn state(&self, msrs: &[u32]) -> Result<VcpuState, Error> {
        let fd = &self.fd;
        // Before all others: KVM takes pending INITs into account here, and changes other state with it.
        let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let regs = self.regs()?;
        let sregs = self.sregs()?;
        let xsave = fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        let xcrs = fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        let debug_regs = fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        let msrs = self.msrs(msrs)?;
        // Behind the others, which may make events of what is pending.
        let events = fd
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            cpuid: Blob::of(&self.given.borrow()[..]),
            tsc_khz: fd.get_tsc_khz().ok(),
            regs: Blob::of(&regs),
            sregs: Blob::of(&sregs),
            xsave: Blob::of(&xsave),
            xcrs: Blob::of(&xcrs),
            debug_regs: Blob::of(&debug_regs),
            lapic: Blob::of(&lapic),
            events: Blob::of(&events),
            mp_state: Blob::of(&mp_state),
            msrs,
        })
    }

    /// Make this vCPU, which has not run, what `state` was; its TSC goes on from where it was, and what has `passed`. One that is put
    /// back within a second of another's (by `passed`) KVM keeps in step with that.
    pub fn restore(&self, state: &VcpuState, passed: &Passed) -> Result<(), Error> {
        let fd = &self.fd;
        self.set_cpuid(&state.cpuid()).map_err(|e| match e {
            Error::Ioctl(_, e) => Error::State("CPUID", e),
            other => other,
        })?;
        let khz = self.restore_tsc_khz(state.tsc_khz)?;
        let mp_state: kvm_mp_state = state.mp_state.to();
        // What a new vCPU is anyway is left out here and below: each call takes as long as the host's kernel takes to load a vCPU.
        if mp_state.mp_state != KVM_MP_STATE_RUNNABLE || !self.is_boot_processor {
            fd.set_mp_state(mp_state)
                .map_err(refused("multiprocessing state"))?;
        }
        // The APIC's base is in the special registers, and decides what the APIC's state means.
        fd.set_sregs(&state.sregs.to::<kvm_sregs>())
            .map_err(refused("special registers"))?;
        fd.set_regs(&state.regs.to::<kvm_regs>())
            .map_err(refused("general registers"))?;
        let xcrs: kvm_xcrs = state.xcrs.to();
        if !is_reset_xcrs(&xcrs) {
            fd.set_xcrs(&xcrs)
                .map_err(refused("extended control registers"))?;
        }
        // SAFETY: KVM reads as much as the vCPU's features need, at most the 4096 bytes that are there: it offers more, by
        // KVM_CAP_XSAVE2, only to processes that have asked for features with more (arch_prctl), and Husk does not.
        unsafe { fd.set_xsave(&state.xsave.to::<kvm_xsave>()) }
            .map_err(refused("floating-point state"))?;
        let debug_regs: kvm_debugregs = state.debug_regs.to();
        if debug_regs != RESET_DEBUG_REGS {
            fd.set_debug_regs(&debug_regs)
                .map_err(refused("debug registers"))?;
        }
        fd.set_lapic(&state.lapic.to::<kvm_lapic_state>())
            .map_err(refused("local APIC"))?;
        let now = |(index, value): (u32, u64)| match index {
            TSC => (index, value.wrapping_add(passed.ticks(khz))),
            _ => (index, value),
        };
        let (deadline, others): (Vec<_>, Vec<_>) = state
            .msrs
            .iter()
            .copied()
            .map(now)
            .partition(|&(index, _)| index == TSC_DEADLINE);
        self.restore_msrs(&others)?;
        self.restore_msrs(&deadline)?;
        fd.set_vcpu_events(&state.events.to::<kvm_vcpu_events>())
            .map_err(refused("pending events"))
    }

    /// Without scaling, KVM lets the TSC run at the host's speed and catch up at exits, or refuses: neither is what the guest had.
    /// Returns how fast it runs; zero where that is not known.
    fn restore_tsc_khz(&self, saved: Option<u32>) -> Result<u32, Error> {
        let here = self.fd.get_tsc_khz().ok();
        let (Some(saved), Some(here)) = (saved, here) else {
            return Ok(saved.or(here).unwrap_or_default());
        };
        let within = u64::from(here) * TSC_TOLERANCE_PPM / 1_000_000;
        if saved == here || (!self.scales_tsc && u64::from(saved.abs_diff(here)) <= within) {
            return Ok(saved);
        }
        let other = Error::TscFrequency { saved, here };
        match self.scales_tsc {
            true => self
                .fd
                .set_tsc_khz(saved)
                .map(|()| saved)
                .map_err(|_| other),
            false => Err(other),
        }
    }

    /// Values of those of `indices` that this vCPU has.
    fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
        let mut values = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let some = &rest[..rest.len().min(MSRS_AT_ONCE)];
            let entries = msr_entries(some.iter().map(|&index| (index, 0)));
            let mut msrs = Msrs::from_entries(&entries)
                .map_err(|_| Error::Ioctl("KVM_GET_MSRS", libc_error(libc::E2BIG)))?;
            let done = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(failed("KVM_GET_MSRS"))?;
            let got = msrs.as_slice().iter().take(done);
            values.extend(got.map(|entry| (entry.index, entry.data)));
            // It stops at the first that the guest's processor does not have.
            rest = rest
                .get(done + usize::from(done < some.len())..)
                .unwrap_or_default();
        }
        Ok(values)
    }

    fn restore_msrs(&self, values: &[(u32, u64)]) -> Result<(), Error> {
        let mut rest = values;
        let mut refused = Vec::new();
        while !rest.is_empty() {
            let some = &rest[..rest.len().min(MSRS_AT_ONCE)];
            let entries = msr_entries(some.iter().copied());
            let msrs = Msrs::from_entries(&entries)
                .map_err(|_| Error::Ioctl("KVM_SET_MSRS", libc_error(libc::E2BIG)))?;
            let done = self.fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
            // It stops at the first that it does not take.
            refused.extend(some.get(done).filter(|_| refused.len() < MOST_NAMED));
            rest = rest
                .get(done + usize::from(done < some.len())..)
                .unwrap_or_default();
        }
        match refused.is_empty() {
            true => Ok(()),
            false => Err(Error::Msrs(refused)),
        }
    }
}

impl Vm {
    /// All but the vCPUs and memory. No vCPU may run meanwhile.
    pub fn state(&self) -> Result<VmState, Error> {
        let chip = |chip_id| -> Result<Blob, Error> {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(failed("KVM_GET_IRQCHIP"))?;
            Ok(Blob::of(&chip))
        };
        let mut clock = self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        // Only KVM_GET_CLOCK has it.
        clock.flags &= !KVM_CLOCK_TSC_STABLE;
        Ok(VmState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: Blob::of(&self.fd.get_pit2().map_err(failed("KVM_GET_PIT2"))?),
            clock: Blob::of(&clock),
            told_at: u64::try_from(wall_clock().as_nanos()).ok(),
        })
    }

    /// Put back what [`Vm::state`] told, into a VM with interrupt controllers and vCPUs, which have been put back, and of which none
    /// has run. The guest's clock goes on from where it was, and what has `passed`.
    pub fn restore(&self, state: &VmState, passed: &Passed) -> Result<(), Error> {
        for (chip, id, part) in [
            (&state.pic_master, KVM_IRQCHIP_PIC_MASTER, "first 8259"),
            (&state.pic_slave, KVM_IRQCHIP_PIC_SLAVE, "second 8259"),
            (&state.ioapic, KVM_IRQCHIP_IOAPIC, "I/O APIC"),
        ] {
            let chip: kvm_irqchip = chip.to();
            if chip.chip_id != id {
                return Err(Error::State(part, libc_error(libc::EINVAL)));
            }
            self.fd.set_irqchip(&chip).map_err(refused(part))?;
        }
        let pit: kvm_pit_state2 = state.pit.to();
        self.fd.set_pit2(&pit).map_err(refused("PIT"))?;
        let mut clock: kvm_clock_data = state.clock.to();
        // KVM can add what has passed (KVM_CLOCK_REALTIME), but to this clock alone, and not on all hosts.
        clock.flags &= !KVM_CLOCK_REALTIME;
        let slept = u64::try_from(passed.slept.as_nanos()).unwrap_or(u64::MAX);
        clock.clock = clock.clock.saturating_add(slept);
        self.fd.set_clock(&clock).map_err(refused("clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Exit, Kvm};

    const TSS: u64 = 0xfffb_d000;
    const CODE: u64 = 0x1000;

    /// A VM of one page at [`CODE`] that counts: `inc ax; out 0x10, ax; jmp`.
    fn counter(kvm: &Kvm) -> (Vm, Vcpu) {
        let page = Box::leak(vec![0u8; 2 << 12].into_boxed_slice());
        let host = page.as_mut_ptr() as u64;
        let aligned = host.next_multiple_of(1 << 12);
        let start = (aligned - host) as usize;
        page[start..start + 5].copy_from_slice(&[0x40, 0xe7, 0x10, 0xeb, 0xfb]);
        let vm = kvm.create_vm().unwrap();
        // SAFETY: the page is there for ever, and nobody else's.
        unsafe { vm.set_memory_slot(0, CODE, 1 << 12, aligned, false) }.unwrap();
        vm.create_interrupt_controllers(TSS).unwrap();
        vm.create_timer().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        (vm, vcpu)
    }

    fn next(vcpu: &mut Vcpu) -> u16 {
        match vcpu.run().unwrap() {
            Exit::PortOut {
                port: 0x10, data, ..
            } => u16::from_le_bytes([data[0], data[1]]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_guest_goes_on_in_another_vm() {
        let kvm = Kvm::open().unwrap();
        let msrs = kvm.state_msrs().unwrap();
        let (vm, mut vcpu) = counter(&kvm);
        let mut sregs = vcpu.sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs {
            rip: CODE,
            rflags: 2,
            ..Default::default()
        })
        .unwrap();
        assert_eq!([next(&mut vcpu), next(&mut vcpu)], [1, 2]);
        assert!(matches!(vcpu.settle().unwrap(), Exit::Interrupted));
        const KERNEL_GS_BASE: u32 = 0xc000_0102;
        assert!(vcpu.set_msr(KERNEL_GS_BASE, 7).unwrap());
        let text = serde_json::to_string(&(vm.state().unwrap(), vcpu.state(&msrs).unwrap()));
        let (vm_state, state): (VmState, VcpuState) = serde_json::from_str(&text.unwrap()).unwrap();
        let (other, mut next_vcpu) = counter(&kvm);
        next_vcpu.restore(&state, &Passed::nothing()).unwrap();
        other.restore(&vm_state, &Passed::nothing()).unwrap();
        assert_eq!(next_vcpu.msr(KERNEL_GS_BASE).unwrap(), Some(7));
        assert_eq!([next(&mut next_vcpu), next(&mut next_vcpu)], [3, 4]);
        // And the first one goes on as if nothing had been.
        assert_eq!(next(&mut vcpu), 3);
    }

    #[test]
    fn state_that_kvm_refuses_is_named() {
        let kvm = Kvm::open().unwrap();
        let (vm, vcpu) = counter(&kvm);
        let msrs = kvm.state_msrs().unwrap();
        let good = || vcpu.state(&msrs).unwrap();
        let mut bad = good();
        // Reserved bits of CR4.
        let mut sregs: kvm_sregs = bad.sregs.to();
        sregs.cr4 = u64::MAX;
        bad.sregs = Blob::of(&sregs);
        let error = vcpu.restore(&bad, &Passed::nothing()).unwrap_err();
        assert!(error.to_string().contains("special registers"), "{error}");
        let mut bad = good();
        bad.msrs.push((0xdead_0000, 1));
        let error = vcpu.restore(&bad, &Passed::nothing()).unwrap_err();
        assert!(error.to_string().contains("0xdead0000"), "{error}");
        let mut bad = vm.state().unwrap();
        let mut ioapic: kvm_irqchip = bad.ioapic.to();
        ioapic.chip_id = 9;
        bad.ioapic = Blob::of(&ioapic);
        let error = vm.restore(&bad, &Passed::nothing()).unwrap_err();
        assert!(error.to_string().contains("I/O APIC"), "{error}");
        vcpu.restore(&good(), &Passed::nothing()).unwrap();
    }

    #[test]
    fn what_a_new_vcpu_has_is_left_out_and_nothing_else() {
        let kvm = Kvm::open().unwrap();
        let msrs = kvm.state_msrs().unwrap();
        let (_vm, vcpu) = counter(&kvm);
        let mut state = vcpu.state(&msrs).unwrap();
        let mut debug_regs: kvm_debugregs = state.debug_regs.to();
        assert_eq!(debug_regs, RESET_DEBUG_REGS);
        let mut xcrs: kvm_xcrs = state.xcrs.to();
        assert!(is_reset_xcrs(&xcrs));
        let mp_state: kvm_mp_state = state.mp_state.to();
        assert_eq!(mp_state.mp_state, KVM_MP_STATE_RUNNABLE);
        (debug_regs.db[0], debug_regs.dr7) = (CODE, 0x401);
        // SSE's state as well.
        xcrs.xcrs[0].value = 3;
        state.debug_regs = Blob::of(&debug_regs);
        state.xcrs = Blob::of(&xcrs);
        let (_other, next) = counter(&kvm);
        next.restore(&state, &Passed::nothing()).unwrap();
        let back = next.state(&msrs).unwrap();
        assert_eq!(back.debug_regs.to::<kvm_debugregs>(), debug_regs);
        assert_eq!(back.xcrs.to::<kvm_xcrs>(), xcrs);
    }

    #[test]
    fn the_guests_clock_goes_on() {
        let kvm = Kvm::open().unwrap();
        let (vm, _vcpu) = counter(&kvm);
        let mut state = vm.state().unwrap();
        let mut clock: kvm_clock_data = state.clock.to();
        clock.clock = 5_000_000_000;
        state.clock = Blob::of(&clock);
        let clock = |state: &VmState, passed| {
            vm.restore(state, &passed).unwrap();
            vm.state().unwrap().clock.to::<kvm_clock_data>().clock
        };
        let now = clock(&state, Passed::nothing());
        assert!((5_000_000_000..6_000_000_000).contains(&now), "{now}");
        state.told_at = Some(wall_clock().as_nanos() as u64 - 100_000_000_000);
        let now = clock(&state, state.passed());
        assert!((105_000_000_000..106_000_000_000).contains(&now), "{now}");
        // A wall clock that was set back.
        state.told_at = Some(u64::MAX);
        let now = clock(&state, state.passed());
        assert!((5_000_000_000..6_000_000_000).contains(&now), "{now}");
    }

    #[test]
    fn time_stamp_counters_agree_however_late_a_vcpu_comes() {
        let kvm = Kvm::open().unwrap();
        let (vm, first) = counter(&kvm);
        let second = vm.create_vcpu(1).unwrap();
        let msrs = kvm.state_msrs().unwrap();
        let states = [&first, &second].map(|vcpu| vcpu.state(&msrs).unwrap());
        let (other, first) = counter(&kvm);
        let second = other.create_vcpu(1).unwrap();
        let khz = u64::from(states[0].tsc_khz.unwrap());
        let slept = Duration::from_secs(1000);
        let passed = Passed {
            slept,
            ..Passed::nothing()
        };
        first.restore(&states[0], &passed).unwrap();
        // More than the second within which KVM takes two for one.
        std::thread::sleep(Duration::from_millis(1200));
        second.restore(&states[1], &passed).unwrap();
        let now = |vcpu: &Vcpu| vcpu.msr(TSC).unwrap().unwrap();
        let (one, two) = (now(&first), now(&second));
        assert!(two.abs_diff(one) < khz * 100, "{one} {two}");
        // Page-table-based KVM leaves a guest the host's own TSC.
        let is_own = first.set_msr(TSC, 1).unwrap() && now(&first) < one;
        if !is_own {
            return eprintln!(
                "this KVM takes no TSC: that it grows by what has passed was not looked at"
            );
        }
        let was = states[0].msrs.iter().find(|(index, _)| *index == TSC);
        let grown = one - was.unwrap().1;
        assert!((1_001_000..1_010_000).contains(&(grown / khz)), "{grown}");
    }
}
