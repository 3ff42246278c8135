use crate::Error;
use kvm_bindings::{
    CpuId, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_IN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_cpuid_entry2, kvm_msr_entry,
    kvm_regs, kvm_run, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use std::cell::RefCell;

/// RFLAGS.IF: maskable interrupts are on.
const RFLAGS_IF: u64 = 1 << 9;

/// A vCPU. It belongs to one thread, the one that runs it.
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) fd: VcpuFd,
    run_size: usize,
    /// Number 0, which alone need not be woken.
    pub(crate) is_boot_processor: bool,
    /// KVM can let the guest's TSC run at another frequency than the host's.
    pub(crate) scales_tsc: bool,
    /// CPUID as it was set. Some KVMs (page-table-based ones) tell of more than that, which they do not support either.
    pub(crate) given: RefCell<Vec<kvm_cpuid_entry2>>,
}

/// Why the guest stopped running on a vCPU.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `in`: fill `data`, elements of `size` bytes each, all from `port` (more than one for `rep ins`).
    PortIn {
        /// I/O port.
        port: u16,
        /// Bytes of one element: 1, 2 or 4.
        size: usize,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// `out`: elements of `size` bytes each, all to `port`.
    PortOut {
        /// I/O port.
        port: u16,
        /// Bytes of one element: 1, 2 or 4.
        size: usize,
        /// What the guest wrote.
        data: &'a [u8],
    },
    /// A load from an address without memory.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// To be filled: 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// A store to an address without memory.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// What the guest wrote: 1 to 8 bytes.
        data: &'a [u8],
    },
    /// `hlt` with nothing to wake it. With in-kernel local APICs KVM does not report it.
    Halt,
    /// Triple fault.
    Shutdown,
    /// A signal came; the guest has not gone on.
    Interrupted,
    /// The processor refused to enter the guest: a hardware reason.
    FailEntry(u64),
    /// KVM gave up: `suberror` (1 = an instruction that it could not emulate) and its data.
    InternalError {
        /// KVM_INTERNAL_ERROR_…
        suberror: u32,
        /// What KVM adds: for suberror 1, flags, length and bytes of the instruction.
        data: Vec<u64>,
    },
    /// KVM_SYSTEM_EVENT_…
    SystemEvent(u32),
    /// An exit that Husk does not ask for.
    Unexpected(u32),
}

impl Vcpu {
    pub(crate) fn new(index: u32, mut fd: VcpuFd, run_size: usize, scales_tsc: bool) -> Self {
        // A process that is forked from this one would keep the VM by it.
        let run: *mut kvm_run = fd.get_kvm_run();
        // SAFETY: the mapping is the vCPU's own, of `run_size` bytes, and the advice changes nothing in this process.
        if unsafe { libc::madvise(run.cast(), run_size, libc::MADV_DONTFORK) } != 0 {
            log::debug!("a vCPU's page is left to forks");
        }
        Self {
            fd,
            run_size,
            is_boot_processor: index == 0,
            scales_tsc,
            given: RefCell::default(),
        }
    }

    /// Set the CPUID leaves that the guest sees.
    pub fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<(), Error> {
        let cpuid = CpuId::from_entries(entries)
            .map_err(|_| Error::Ioctl("KVM_SET_CPUID2", libc_error(libc::E2BIG)))?;
        self.fd
            .set_cpuid2(&cpuid)
            .map_err(|e| Error::Ioctl("KVM_SET_CPUID2", e))?;
        self.given.replace(entries.to_vec());
        Ok(())
    }

    /// Set MSRs, one after the other; one that this host does not have is left out.
    pub fn set_msrs(&self, entries: &[(u32, u64)]) -> Result<(), Error> {
        let mut rest = msr_entries(entries.iter().copied());
        while !rest.is_empty() {
            let msrs = Msrs::from_entries(&rest)
                .map_err(|_| Error::Ioctl("KVM_SET_MSRS", libc_error(libc::E2BIG)))?;
            let done = self
                .fd
                .set_msrs(&msrs)
                .map_err(|e| Error::Ioctl("KVM_SET_MSRS", e))?;
            if let Some(refused) = rest.get(done) {
                log::debug!(
                    "this KVM has no MSR {:#x}; it keeps its reset value",
                    refused.index
                );
            }
            rest.drain(..(done + 1).min(rest.len()));
        }
        Ok(())
    }

    /// The value of MSR `index`; None when this KVM does not have it.
    pub fn msr(&self, index: u32) -> Result<Option<u64>, Error> {
        let mut msrs = one_msr(index, 0, "KVM_GET_MSRS")?;
        let done = self
            .fd
            .get_msrs(&mut msrs)
            .map_err(|e| Error::Ioctl("KVM_GET_MSRS", e))?;
        let value = msrs.as_slice().first().map(|entry| entry.data);
        Ok(value.filter(|_| done == 1))
    }

    /// Set MSR `index`; false when KVM does not take the value.
    pub fn set_msr(&self, index: u32, value: u64) -> Result<bool, Error> {
        self.fd
            .set_msrs(&one_msr(index, value, "KVM_SET_MSRS")?)
            .map(|done| done == 1)
            .map_err(|e| Error::Ioctl("KVM_SET_MSRS", e))
    }

    /// The general registers.
    pub fn regs(&self) -> Result<kvm_regs, Error> {
        self.fd
            .get_regs()
            .map_err(|e| Error::Ioctl("KVM_GET_REGS", e))
    }

    /// Set the general registers.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        self.fd
            .set_regs(regs)
            .map_err(|e| Error::Ioctl("KVM_SET_REGS", e))
    }

    /// The special registers.
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        self.fd
            .get_sregs()
            .map_err(|e| Error::Ioctl("KVM_GET_SREGS", e))
    }

    /// Set the special registers.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        self.fd
            .set_sregs(sregs)
            .map_err(|e| Error::Ioctl("KVM_SET_SREGS", e))
    }

    /// Nothing but another vCPU, or an NMI, can make this vCPU run again: it halted with interrupts off, or was never
    /// started. Only between two calls of [`Vcpu::run`].
    pub fn is_halted_for_good(&self) -> Result<bool, Error> {
        let state = self
            .fd
            .get_mp_state()
            .map_err(|e| Error::Ioctl("KVM_GET_MP_STATE", e))?;
        Ok(match state.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
            KVM_MP_STATE_HALTED => self.regs()?.rflags & RFLAGS_IF == 0,
            _ => false,
        })
    }

    /// The guest has not run for a while: its watchdogs are told not to mind (KVM_KVMCLOCK_CTRL). Between two calls of
    /// [`Vcpu::run`]. False: it could not be told, most likely because it has no paravirtual clock (EINVAL).
    pub fn notify_of_pause(&self) -> bool {
        let told = self.fd.kvmclock_ctrl();
        told.inspect_err(|e| log::debug!("the guest is not told of its pause: {e}"))
            .is_ok()
    }

    /// Complete the `in` or load that the last exit was for, without letting the guest go on. [`Exit::Interrupted`] when there
    /// was none, or it is complete; it may take several accesses.
    pub fn settle(&mut self) -> Result<Exit<'_>, Error> {
        self.fd.set_kvm_immediate_exit(1);
        let result = self.fd.run().map(drop);
        self.fd.set_kvm_immediate_exit(0);
        match result {
            Ok(()) => Ok(decode(self.fd.get_kvm_run(), self.run_size)),
            Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => Ok(Exit::Interrupted),
            Err(e) => Err(Error::Ioctl("KVM_RUN", e)),
        }
    }

    /// Let the guest run on this vCPU until something needs the monitor. An `in` or a load that the caller fills is
    /// completed by the next call.
    pub fn run(&mut self) -> Result<Exit<'_>, Error> {
        match self.fd.run().map(drop) {
            Ok(()) => {}
            Err(e) if e.errno() == libc::EINTR => return Ok(Exit::Interrupted),
            // An application processor that was made ready between two signals.
            Err(e) if e.errno() == libc::EAGAIN => return Ok(Exit::Interrupted),
            Err(e) => return Err(Error::Ioctl("KVM_RUN", e)),
        }
        let size = self.run_size;
        Ok(decode(self.fd.get_kvm_run(), size))
    }
}

pub(crate) fn msr_entries(values: impl Iterator<Item = (u32, u64)>) -> Vec<kvm_msr_entry> {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    values.map(entry).collect()
}

fn one_msr(index: u32, data: u64, call: &'static str) -> Result<Msrs, Error> {
    let entries = msr_entries(std::iter::once((index, data)));
    Msrs::from_entries(&entries).map_err(|_| Error::Ioctl(call, libc_error(libc::E2BIG)))
}

pub(crate) fn libc_error(code: i32) -> vmm_sys_util::errno::Error {
    vmm_sys_util::errno::Error::new(code)
}

/// kvm-ioctls' own decoding does not tell the element size of port accesses, which `rep outs` needs.
fn decode(run: &mut kvm_run, run_size: usize) -> Exit<'_> {
    match run.exit_reason {
        KVM_EXIT_IO => decode_io(run, run_size),
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says that this is the union's valid member; all bit patterns of it are.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let length = (mmio.len as usize).min(mmio.data.len());
            let (address, data) = (mmio.phys_addr, &mut mmio.data[..length]);
            match mmio.is_write {
                0 => Exit::MmioRead { address, data },
                _ => Exit::MmioWrite { address, data },
            }
        }
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let fail = unsafe { run.__bindgen_anon_1.fail_entry };
            Exit::FailEntry(fail.hardware_entry_failure_reason)
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let count = (internal.ndata as usize).min(internal.data.len());
            Exit::InternalError {
                suberror: internal.suberror,
                data: internal.data[..count].to_vec(),
            }
        }
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: as above.
            let event = unsafe { run.__bindgen_anon_1.system_event };
            Exit::SystemEvent(event.type_)
        }
        other => Exit::Unexpected(other),
    }
}

fn decode_io(run: &mut kvm_run, run_size: usize) -> Exit<'_> {
    // SAFETY: the caller has seen KVM_EXIT_IO, so this is the union's valid member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let length = size.saturating_mul(io.count as usize);
    let inside = usize::try_from(io.data_offset)
        .ok()
        .and_then(|offset| offset.checked_add(length))
        .is_some_and(|end| end <= run_size);
    if !inside || size == 0 {
        return Exit::Unexpected(KVM_EXIT_IO);
    }
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM mapped `run_size` bytes at `run`, and the check above keeps the slice within them. The result borrows
    // `run` mutably, so nobody else reads or writes there while it lives; KVM does only inside KVM_RUN.
    let data =
        unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), length) };
    match u32::from(io.direction) {
        KVM_EXIT_IO_IN => Exit::PortIn {
            port: io.port,
            size,
            data,
        },
        _ => Exit::PortOut {
            port: io.port,
            size,
            data,
        },
    }
}
