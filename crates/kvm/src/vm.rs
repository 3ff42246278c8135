use crate::routes::Routes;
use crate::{Error, Vcpu};
use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY,
    kvm_irqchip, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use std::sync::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// A KVM VM. Its methods may be called from several threads at once; KVM orders them.
#[derive(Debug)]
pub struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) routes: Mutex<Routes>,
}

impl Vm {
    pub(crate) fn new(fd: VmFd) -> Self {
        Self {
            fd,
            routes: Mutex::default(),
        }
    }

    /// Create the in-kernel interrupt controllers: two 8259s, an I/O APIC, a local APIC for each vCPU to come. Before the first vCPU, and
    /// after memory: see [`Vm::set_memory_slot`].
    ///
    /// `tss` is where KVM puts three pages for itself on Intel hosts without unrestricted guests.
    pub fn create_interrupt_controllers(&self, tss: u64) -> Result<(), Error> {
        let tss = usize::try_from(tss).unwrap_or(usize::MAX);
        self.fd
            .set_tss_address(tss)
            .map_err(|e| Error::Ioctl("KVM_SET_TSS_ADDR", e))?;
        self.fd
            .create_irq_chip()
            .map_err(|e| Error::Ioctl("KVM_CREATE_IRQCHIP", e))?;
        self.mask_pics()
    }

    /// Create the PIT, once there are interrupt controllers. It has a thread of the host's kernel, which takes a while to start.
    pub fn create_timer(&self) -> Result<(), Error> {
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd
            .create_pit2(pit)
            .map_err(|e| Error::Ioctl("KVM_CREATE_PIT2", e))
    }

    /// Mask all lines of both 8259s, as firmware would leave them.
    ///
    /// KVM creates them unmasked, with vector base 0, and the boot processor's LINT0 open to them. A kernel that takes the
    /// hardware-reduced platform at its word never programs them, so an early edge on an interrupt line would reach it as
    /// a processor exception.
    fn mask_pics(&self) -> Result<(), Error> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(|e| Error::Ioctl("KVM_GET_IRQCHIP", e))?;
            chip.chip.pic.imr = 0xff;
            self.fd
                .set_irqchip(&chip)
                .map_err(|e| Error::Ioctl("KVM_SET_IRQCHIP", e))?;
        }
        Ok(())
    }

    /// Back `size` bytes of guest-physical memory at `address` with host memory at `host`. With `track_dirty_pages` KVM notes
    /// which pages of it the guest writes. Sleeps in a grace period of the host's kernel, a long one if ports or addresses were
    /// registered just before (Linux 6.18).
    ///
    /// # Safety
    /// `host..host + size` must be a mapping that stays there, and is used for nothing but this guest's memory, until
    /// this VM and all of its vCPUs are dropped.
    pub unsafe fn set_memory_slot(
        &self,
        slot: u32,
        address: u64,
        size: u64,
        host: u64,
        track_dirty_pages: bool,
    ) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: match track_dirty_pages {
                true => KVM_MEM_LOG_DIRTY_PAGES,
                false => 0,
            },
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller answers for the mapping behind `host`.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|source| Error::MemorySlot {
            address,
            size,
            source,
        })
    }

    /// The pages of memory slot `slot`, of `size` bytes, that the guest or KVM itself has written since the last call: a bit for each, lowest
    /// first. Only where [`Vm::set_memory_slot`] was told to track.
    pub fn dirty_log(&self, slot: u32, size: u64) -> Result<Vec<u64>, Error> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.fd
            .get_dirty_log(slot, size)
            .map_err(|e| Error::Ioctl("KVM_GET_DIRTY_LOG", e))
    }

    /// Pulse interrupt line `gsi` whenever `event` is written, with no exit to the monitor.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|e| Error::Ioctl("KVM_IRQFD", e))
    }

    /// Write to `event` whenever the guest writes `value` (32 bits; None: anything) at guest-physical `address`, with no exit to the
    /// monitor. Sleeps in a grace period.
    pub fn register_doorbell(
        &self,
        address: u64,
        value: Option<u32>,
        event: &EventFd,
    ) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.fd.register_ioevent(event, &address, value),
            None => self.fd.register_ioevent(event, &address, NoDatamatch),
        }
        .map_err(|e| Error::Ioctl("KVM_IOEVENTFD", e))
    }

    /// Take back what [`Vm::register_doorbell`] was given.
    pub fn unregister_doorbell(
        &self,
        address: u64,
        value: Option<u32>,
        event: &EventFd,
    ) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.fd.unregister_ioevent(event, &address, value),
            None => self.fd.unregister_ioevent(event, &address, NoDatamatch),
        }
        .map_err(|e| Error::Ioctl("KVM_IOEVENTFD", e))
    }

    /// Create vCPU `index`, which is also its APIC id. After the interrupt controllers.
    pub fn create_vcpu(&self, index: u32) -> Result<Vcpu, Error> {
        self.fd
            .create_vcpu(u64::from(index))
            .map(|fd| {
                Vcpu::new(
                    index,
                    fd,
                    self.fd.run_size(),
                    self.fd.check_extension(Cap::TscControl),
                )
            })
            .map_err(|e| Error::CreateVcpu(index, e))
    }
}

#[cfg(test)]
mod tests {
    use crate::Kvm;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn a_doorbell_can_move() {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        let (one, two) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        for value in [None, Some(3)] {
            vm.register_doorbell(0xd000_3000, value, &one).unwrap();
            let taken = vm.register_doorbell(0xd000_3000, value, &two);
            assert!(taken.is_err(), "two doorbells at one address");
            vm.unregister_doorbell(0xd000_3000, value, &one).unwrap();
            vm.register_doorbell(0xd000_3000, value, &two).unwrap();
            assert!(
                vm.unregister_doorbell(0xd000_3000, value, &one).is_err(),
                "not there any more"
            );
            vm.unregister_doorbell(0xd000_3000, value, &two).unwrap();
        }
    }

    #[test]
    fn written_pages_are_noted_only_where_it_is_asked() {
        // Never given back: KVM may keep it for as long as it likes.
        let host = Box::leak(vec![0u8; 3 << 12].into_boxed_slice()).as_mut_ptr() as u64;
        let host = host.next_multiple_of(1 << 12);
        for track in [false, true] {
            let vm = Kvm::open().unwrap().create_vm().unwrap();
            // SAFETY: the memory is there for ever, and nobody else's.
            unsafe { vm.set_memory_slot(0, 0, 2 << 12, host, track) }.unwrap();
            let log = vm.dirty_log(0, 2 << 12);
            assert_eq!(log.is_ok(), track, "{log:?}");
        }
    }
}
