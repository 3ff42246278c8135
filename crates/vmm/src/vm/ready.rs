//! A machine without devices, and how it becomes a VM.

use super::boot_processor::{BootProcessor, Go, Origin};
use super::{PANIC_WARM, Vm, no_thread, watch_handler};
use crate::changes::Changes;
use crate::devices::{self, Devices, IoThreads, Place};
use crate::error::Error;
use crate::generation;
use crate::host::Host;
use crate::load::load;
use crate::memory::GuestMemory;
use crate::platform::{hotplug_slots, platform};
use crate::snapshot::{Saved, Snapshot};
use crate::standby::Wanted;
use crate::timeline::{Phase, Timeline};
use crate::vcpu::{self, VcpuThread};
use husk_arch::acpi::{self, AcpiConfig, MmioSlot};
use husk_arch::boot::BootState;
use husk_arch::memory_map::Range;
use husk_arch::{layout, mptable};
use husk_config::{MachineConfig, VmConfig};
use husk_devices::boot_timer;
use husk_kvm::bindings::kvm_cpuid_entry2;
use husk_kvm::{Kvm, Passed, Vcpu, VcpuState};
use husk_loader::Kernel;
use husk_sandbox::{Filters, Kind};
use std::sync::Arc;
use std::sync::mpsc::channel;

/// Memory that KVM does not know yet.
pub(super) fn memory(wanted: &Wanted) -> Result<GuestMemory, Error> {
    let (size, pages) = (memory_size(&wanted.machine)?, wanted.machine.huge_pages);
    let mut memory = match wanted.shared_memory {
        true => GuestMemory::shared(size, pages)?,
        false => GuestMemory::new(size, pages)?,
    };
    if wanted.machine.track_dirty_pages {
        memory.track();
    }
    Ok(memory)
}

/// Whether this host can give the memory of `config`.
pub fn check_memory(config: &VmConfig) -> Result<(), Error> {
    memory_size(&config.machine_config).map(drop)
}

/// Memory in bytes, checked against what this host can give.
fn memory_size(machine: &MachineConfig) -> Result<u64, Error> {
    let mib = machine.mem_size_mib;
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    let host_mib = (info.totalram as u64)
        .saturating_add(info.totalswap as u64)
        .saturating_mul(unit)
        >> 20;
    if mib > host_mib {
        return Err(Error::MemoryTooLarge { mib, host_mib });
    }
    let size = mib.checked_mul(1 << 20);
    let end = size.and_then(husk_arch::memory_map::memory_ranges);
    let end = end.map(|(low, high)| high.unwrap_or(low).end());
    // CPUID, which tells the rest, takes long where the host is itself a VM.
    if let Some(size) = size.filter(|_| end.is_some_and(|end| end <= 1 << LEAST_ADDRESS_BITS)) {
        return Ok(size);
    }
    let bits = physical_address_bits();
    let too_large = |bits| Error::AddressBits { mib, bits };
    let (size, end) = size.zip(end).ok_or(too_large(bits))?;
    match 1u64.checked_shl(bits) {
        Some(limit) if end > limit => Err(too_large(bits)),
        _ => Ok(size),
    }
}

/// What every x86-64 processor can address, in bits.
const LEAST_ADDRESS_BITS: u32 = 36;

/// CPUID leaf 0x8000_0008, EAX bits 7:0.
fn physical_address_bits() -> u32 {
    use std::arch::x86_64::__cpuid;
    match __cpuid(0x8000_0000).eax {
        0x8000_0008.. => __cpuid(0x8000_0008).eax & 0xff,
        _ => LEAST_ADDRESS_BITS,
    }
}

/// What threads that make a machine need of the [`Host`].
#[derive(Clone)]
pub struct Aids {
    pub(super) timeline: Arc<Timeline>,
    pub(super) filters: Filters,
}

impl Aids {
    pub fn of(host: &Host) -> Self {
        Self {
            timeline: Arc::clone(&host.timeline),
            filters: host.filters.clone(),
        }
    }
}

/// KVM's VM, bare, and the thread that will be the boot vCPU's: what a VM needs that nothing is known of yet.
pub struct Begun {
    first: BootProcessor,
    vm: husk_kvm::Vm,
    most_vcpus: usize,
}

impl Begun {
    /// Make it. Nothing else runs in this process meanwhile: for the first VM of a host, KVM has something done on each of
    /// its processors, and waits ten times as long for one on which the host's CPUID is asked for.
    pub fn new(origin: Origin<'_>, aids: &Aids) -> Result<Self, Error> {
        let kvm = Arc::new(Kvm::open()?);
        // It takes a while to start, and is there when it is needed.
        let first = BootProcessor::start(Arc::clone(&kvm), origin, aids)?;
        let vm = kvm.create_vm()?;
        first.vm_is_made();
        aids.timeline.reach(Phase::VmCreated);
        let most_vcpus = kvm.max_vcpus();
        Ok(Self {
            first,
            vm,
            most_vcpus,
        })
    }
}

/// A VM that has memory and vCPUs, and neither devices nor anything in its memory. Fields are dropped in order: memory
/// comes after KVM's descriptors.
pub struct Ready {
    first: BootProcessor,
    /// All vCPUs but the boot vCPU, which is its thread's.
    others: Vec<Vcpu>,
    kvm: Arc<husk_kvm::Vm>,
    pub memory: GuestMemory,
}

impl Ready {
    /// Make one, and do something with its memory `meanwhile`.
    ///
    /// This thread has KVM make the machine. What takes a while beside (CPUID, where it traps itself; the filter, which the
    /// host's kernel compiles) is done on the thread that is to be the boot vCPU's, and no other is needed.
    pub fn make<T>(
        wanted: &Wanted,
        aids: &Aids,
        meanwhile: impl FnOnce(&GuestMemory) -> Result<T, Error>,
    ) -> Result<(Self, T), Error> {
        let memory = memory(wanted)?;
        let begun = Begun::new(Origin::Configuration(wanted), aids)?;
        Self::make_of(wanted, aids, (memory, begun), None, meanwhile)
    }

    /// The same of what there is already. Its boot vCPU becomes what it was.
    pub(super) fn make_of<T>(
        wanted: &Wanted,
        aids: &Aids,
        (memory, begun): (GuestMemory, Begun),
        boot_vcpu: BootVcpu,
        meanwhile: impl FnOnce(&GuestMemory) -> Result<T, Error>,
    ) -> Result<(Self, T), Error> {
        // Behind memory, so that KVM's descriptors are dropped before it.
        let Begun {
            mut first,
            vm,
            most_vcpus: most,
        } = begun;
        let cpus = wanted.machine.vcpu_count;
        if cpus as usize > most {
            return Err(Error::TooManyVcpus { cpus, most });
        }
        let (vcpu, others) = furnish(&vm, wanted, memory.slots(), &aids.timeline)?;
        first.furnish(vcpu);
        first.put_back(boot_vcpu);
        // Beside what the boot vCPU's thread does to it. KVM sleeps here, for a thread of its own.
        vm.create_timer()?;
        let done = meanwhile(&memory)?;
        let ready = Self {
            first,
            others,
            kvm: Arc::new(vm),
            memory,
        };
        Ok((ready, done))
    }

    /// Have the boot vCPU become what it was.
    pub(super) fn put_back(&self, boot_vcpu: BootVcpu) {
        self.first.put_back(boot_vcpu);
    }

    /// Add devices, and start the threads of all vCPUs but the boot vCPU's, which wakes them.
    pub(super) fn complete(
        self,
        config: &VmConfig,
        host: &Host,
        loaded: Loaded,
    ) -> Result<Vm, Error> {
        let Loaded {
            devices: opened,
            slots,
            start,
            asked,
        } = loaded;
        // In this order, because when this fails the last of them is dropped first, and memory must be the last to go.
        let Self {
            memory,
            kvm,
            others,
            first,
        } = self;
        let mut changes = Changes::new(&memory, None);
        let mut back = Back::nothing();
        let mut saved_devices = None;
        let mut places = hotplug_slots(config, host);
        let (entry, mut states, rest) = match start {
            Start::Boot(boot) => (Some(boot), Vec::new().into_iter(), None),
            Start::Saved(mut saved, how) => {
                back = how;
                changes = Changes::new(&memory, Some(&mut saved));
                saved_devices = Some(std::mem::take(&mut saved.devices));
                places = saved.platform.hotplug_slots();
                let states = saved.vcpus.into_iter();
                (None, states, Some((saved.vm, saved.platform)))
            }
        };
        let (shared, mut platform) = platform(&kvm, config, host, asked, places)?;
        if entry.is_some() {
            platform.generation_id = Some(layout::GENERATION_ID);
        }
        watch_handler(&memory, &shared, &host.filters)?;
        let place = Place {
            slots,
            bus: &shared.mmio,
            memory: memory.memory(),
            kvm: &kvm,
            filters: &host.filters,
            watch: &host.watch,
            log: memory.log(),
        };
        let devices = Devices::attach(opened, config.pci, &place, saved_devices)?;
        if rest.is_some() {
            shared.pause.begin_stopped();
        }
        let template = first.template()?;
        template.check(&Wanted::of(config), &back.cpuids)?;
        let passed = back.passed;
        let go = Go {
            shared: Arc::clone(&shared),
            entry,
        };
        let mut vm = Vm {
            boot: Some((first, go)),
            threads: Vec::with_capacity(others.len() + 1),
            shared: Arc::clone(&shared),
            platform,
            panic_is_warm: config.boot_source.command_line().contains(PANIC_WARM),
            halted_before: false,
            devices,
            kvm,
            filters: host.filters.clone(),
            watch: Arc::clone(&host.watch),
            changes,
            memory,
        };
        let (say, told) = channel();
        for (index, mut vcpu) in (1u32..).zip(others) {
            let saved = states.next();
            let (template, shared) = (Arc::clone(&template), Arc::clone(&shared));
            let (filters, say) = (host.filters.clone(), say.clone());
            let body = move || {
                let ready = match saved {
                    // Who listens has the fault.
                    Some(state) => {
                        let _ = say.send(vcpu.restore(&state, &passed));
                        Ok(())
                    }
                    None => template.set_up(&vcpu, index),
                };
                drop(say);
                filters.confine(Kind::Vcpu);
                vcpu::enter(index, &mut vcpu, &shared, ready);
            };
            match VcpuThread::start(index, body) {
                Ok(thread) => vm.threads.push(thread),
                Err(e) => {
                    vm.stop();
                    return Err(no_thread(e));
                }
            }
        }
        drop(say);
        if let Some((state, platform)) = rest
            && let Err(e) = vm.put_back(&state, platform, &told, &passed)
        {
            vm.stop();
            return Err(e);
        }
        Ok(vm)
    }
}

/// What makes a VM of a machine that is ready.
pub(super) struct Loaded<'a> {
    pub(super) devices: (Vec<devices::Named>, IoThreads),
    pub(super) slots: &'a [MmioSlot],
    pub(super) start: Start,
    /// When the VM was asked for.
    pub(super) asked: Option<boot_timer::Times>,
}

/// What a VM begins with.
pub(super) enum Start {
    /// A kernel, which is in memory.
    Boot(Box<BootState>),
    /// What was saved, but for the boot vCPU; memory is as it was.
    Saved(Box<Snapshot>, Back),
}

/// The boot vCPU as it was saved, and what has passed since; None for a boot.
type BootVcpu = Option<(VcpuState, Passed)>;

/// How what was saved is put back.
pub(super) struct Back {
    /// All vCPUs' CPUID, where this host may not have it all.
    cpuids: Vec<Vec<kvm_cpuid_entry2>>,
    passed: Passed,
}

impl Back {
    fn nothing() -> Self {
        Self {
            cpuids: Vec::new(),
            passed: Passed::nothing(),
        }
    }

    /// The boot vCPU is taken out of what was saved: its thread makes it what it was beside what else is done. From here on it counts how
    /// long that takes.
    pub(super) fn take(saved: Option<Saved>) -> Result<(Option<(Saved, Self)>, BootVcpu), Error> {
        let Some(mut saved) = saved else {
            return Ok((None, None));
        };
        let vcpus = &mut saved.snapshot.vcpus;
        if vcpus.is_empty() {
            return Err(Error::State("no vCPU was saved"));
        }
        let cpuids = match saved.is_of_this_host {
            true => Vec::new(),
            false => vcpus.iter().map(VcpuState::cpuid).collect(),
        };
        let boot_vcpu = vcpus.remove(0);
        let passed = match saved.clock_realtime {
            true => saved.snapshot.vm.passed(),
            false => Passed::nothing(),
        };
        let back = Self { cpuids, passed };
        Ok((Some((saved, back)), Some((boot_vcpu, passed))))
    }
}

/// Add memory, interrupt controllers and vCPUs; the boot vCPU apart from the others.
///
/// The order counts. To register memory KVM waits for a grace period, which is over at once where nothing was ever changed,
/// and takes milliseconds where the controllers' ports have just been registered (since Linux 6.18, where those do not wait).
fn furnish(
    vm: &husk_kvm::Vm,
    wanted: &Wanted,
    slots: &[(Range, u64)],
    timeline: &Timeline,
) -> Result<(Vcpu, Vec<Vcpu>), Error> {
    let track = wanted.machine.track_dirty_pages;
    for (slot, (range, host)) in (0u32..).zip(slots) {
        // SAFETY: the addresses are GuestMemory's own mapping. `Ready` and `Vm` drop all of KVM's descriptors before it,
        // and so does `Ready::make` when it fails, because it makes the memory first.
        unsafe { vm.set_memory_slot(slot, range.start, range.size, *host, track)? };
    }
    timeline.reach(Phase::MemoryReady);
    vm.create_interrupt_controllers(layout::KVM_TSS)?;
    let first = vm.create_vcpu(0)?;
    let others = (1..wanted.machine.vcpu_count)
        .map(|index| vm.create_vcpu(index))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((first, others))
}

/// Kernel, initrd and tables into memory. The kernel is opened unless it is already.
pub(super) fn prepare_boot(
    config: &VmConfig,
    kernel: Option<Kernel>,
    memory: &GuestMemory,
    host: &Host,
    (slots, root_is_read_only): (&[MmioSlot], bool),
) -> Result<BootState, Error> {
    let cpus = config.machine_config.vcpu_count;
    let kernel = match kernel {
        Some(kernel) => kernel,
        None => Kernel::open(&config.boot_source.kernel_image_path, &host.cache)?,
    };
    let boot = load(
        config,
        &kernel,
        (slots, root_is_read_only),
        memory,
        &host.cache,
    )?;
    let acpi = AcpiConfig {
        cpus,
        virtio_mmio: slots,
        pci: config.pci,
        hotplug_slots: hotplug_slots(config, host) as u32,
        keyboard: config.keyboard,
    };
    memory.write(layout::ACPI, &acpi::tables(&acpi, layout::ACPI)?)?;
    generation::renew(memory, layout::GENERATION_ID)?;
    memory.write(layout::MP_TABLE, &mptable::table(cpus, layout::MP_TABLE)?)?;
    host.timeline.reach(Phase::KernelLoaded);
    Ok(boot)
}
