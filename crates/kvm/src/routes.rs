//! Message-signalled interrupts without exits: an eventfd, a GSI and a route to a message for each vector.

use crate::{Error, Vm};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Pins of the I/O APIC: GSIs below are lines, those from here on are messages.
const PINS: u32 = 24;
/// Lines that go to the two 8259s as well.
const PIC_PINS: u32 = 16;

/// A message: guest-physical address and data.
type Message = (u64, u32);

/// The routes of a VM beside those of the interrupt chips, which KVM makes and each change must repeat.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    /// GSIs in use; None before the first message.
    messages: BTreeMap<u32, Option<Message>>,
}

impl Routes {
    /// The lowest GSI that is free.
    fn allocate(&mut self) -> Option<u32> {
        let limit = KVM_MAX_IRQ_ROUTES as u32 - PIC_PINS;
        let gsi = (PINS..limit).find(|gsi| !self.messages.contains_key(gsi))?;
        self.messages.insert(gsi, None);
        Some(gsi)
    }

    /// All of them, as KVM takes them.
    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries = Vec::new();
        for gsi in 0..PINS {
            entries.push(line(gsi, KVM_IRQCHIP_IOAPIC, gsi));
            match gsi {
                0..8 => entries.push(line(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..PIC_PINS => entries.push(line(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => {}
            }
        }
        let messages = self.messages.iter();
        entries.extend(messages.filter_map(|(gsi, message)| Some(route(*gsi, (*message)?))));
        entries
    }
}

fn line(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn route(gsi: u32, (address, data): Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: address as u32,
        address_hi: (address >> 32) as u32,
        data,
        ..Default::default()
    };
    entry
}

/// The MSI-X vectors of one function. Interrupts are writes to eventfds that KVM watches. A vector takes a GSI when it first
/// gets a message, and gives it back when this is dropped.
#[derive(Debug)]
pub struct MsiVectors {
    vm: Arc<Vm>,
    events: Vec<EventFd>,
    /// The GSI of each vector that has had a message.
    gsis: Mutex<Vec<Option<u32>>>,
}

impl MsiVectors {
    /// `count` vectors without messages. Fails only when the host has no more descriptors.
    pub fn new(vm: Arc<Vm>, count: u16) -> std::io::Result<Self> {
        let event = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            vm,
            events: (0..count).map(event).collect::<std::io::Result<_>>()?,
            gsis: Mutex::new(vec![None; count.into()]),
        })
    }

    /// From now on these vectors (number, guest-physical address, data) send these messages. One change of KVM's table for
    /// all of them, none when nothing is new; sleeps in a grace period. After the interrupt controllers. Vectors that do not
    /// exist are left out. After an error, vectors that had a message keep it, and others have none.
    pub fn set(&self, messages: &[(u16, u64, u32)]) -> Result<(), Error> {
        let mut gsis = lock(&self.gsis);
        let mut routes = lock(&self.vm.routes);
        let mut new = BTreeMap::new();
        let planned = plan(&gsis, &mut routes, &mut new, messages);
        let mut result = planned.and_then(|wanted| self.vm.set_messages(&mut routes, &wanted));
        for (vector, gsi) in new {
            let at = usize::from(vector);
            if let (Ok(()), Some(event)) = (&result, self.events.get(at)) {
                // After the route: what was written to the event before is sent with this message.
                result = self.vm.register_irqfd(event, gsi);
            }
            match (&result, gsis.get_mut(at)) {
                (Ok(()), Some(own)) => *own = Some(gsi),
                _ => drop(routes.messages.remove(&gsi)),
            }
        }
        result
    }

    /// From now on a write to `event` sends the message of `vector`, which must have one; what was written before sends it at once.
    pub fn connect(&self, vector: u16, event: &EventFd) -> Result<(), Error> {
        match self.gsi(vector) {
            Some(gsi) => self.vm.register_irqfd(event, gsi),
            None => Err(Error::Ioctl("KVM_IRQFD", errno::Error::new(libc::ENOENT))),
        }
    }

    /// Not any more: what is written to `event`, which was connected with `vector`, stays in it.
    pub fn disconnect(&self, vector: u16, event: &EventFd) {
        let result = match self.gsi(vector) {
            Some(gsi) => self.vm.fd.unregister_irqfd(event, gsi),
            None => Ok(()),
        };
        if let Err(e) = result {
            log::debug!("KVM keeps an irqfd until the VM ends: {e}");
        }
    }

    fn gsi(&self, vector: u16) -> Option<u32> {
        lock(&self.gsis).get(usize::from(vector)).copied().flatten()
    }

    /// Send the message of a vector: a write to its eventfd, no more. Nothing while it has none, or does not exist.
    pub fn trigger(&self, vector: u16) {
        if let Some(event) = self.events.get(usize::from(vector)) {
            // At its maximum the counter is pending already.
            let _ = event.write(1);
        }
    }
}

impl Drop for MsiVectors {
    fn drop(&mut self) {
        let gsis = lock(&self.gsis);
        for (event, gsi) in self.events.iter().zip(gsis.iter()) {
            let Some(gsi) = *gsi else { continue };
            if let Err(e) = self.vm.fd.unregister_irqfd(event, gsi) {
                log::debug!("KVM keeps the irqfd of GSI {gsi} until the VM ends: {e}");
            }
            // KVM's table forgets the route at its next change.
            lock(&self.vm.routes).messages.remove(&gsi);
        }
    }
}

impl Vm {
    /// Change messages, and tell KVM if any is new. An error changes nothing.
    fn set_messages(&self, routes: &mut Routes, wanted: &[(u32, Message)]) -> Result<(), Error> {
        let mut before = Vec::new();
        for (gsi, message) in wanted {
            let old = routes.messages.insert(*gsi, Some(*message)).flatten();
            if old != Some(*message) {
                before.push((*gsi, old));
            }
        }
        if before.is_empty() {
            return Ok(());
        }
        let failed = |e| Error::Ioctl("KVM_SET_GSI_ROUTING", e);
        let result = KvmIrqRouting::from_entries(&routes.entries())
            .map_err(|_| failed(errno::Error::new(libc::ENOSPC)))
            .and_then(|table| self.fd.set_gsi_routing(&table).map_err(failed));
        if result.is_err() {
            // A message that KVM refuses must not spoil the changes of other vectors.
            for (gsi, old) in before.into_iter().rev() {
                routes.messages.insert(gsi, old);
            }
        }
        result
    }
}

/// The GSI of each vector that exists with its message; GSIs that were taken for this are in `new`.
fn plan(
    gsis: &[Option<u32>],
    routes: &mut Routes,
    new: &mut BTreeMap<u16, u32>,
    messages: &[(u16, u64, u32)],
) -> Result<Vec<(u32, Message)>, Error> {
    let mut wanted = Vec::new();
    for &(vector, address, data) in messages {
        let Some(own) = gsis.get(usize::from(vector)) else {
            continue;
        };
        let gsi = match own.or(new.get(&vector).copied()) {
            Some(gsi) => gsi,
            None => {
                let full = Error::Ioctl("KVM_SET_GSI_ROUTING", errno::Error::new(libc::ENOSPC));
                let gsi = routes.allocate().ok_or(full)?;
                new.insert(vector, gsi);
                gsi
            }
        };
        wanted.push((gsi, (address, data)));
    }
    Ok(wanted)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kvm;
    use kvm_ioctls::VcpuFd;
    use std::time::{Duration, Instant};

    /// Spurious-interrupt vector register: the local APIC is on.
    const SVR: usize = 0xf0;
    const IRR: usize = 0x200;
    /// Address of a message to the processor with APIC ID 0.
    const TO_CPU_0: u64 = 0xfee0_0000;

    fn vm() -> (Arc<Vm>, VcpuFd) {
        let vm = Kvm::open().unwrap().create_vm().unwrap();
        vm.create_interrupt_controllers(0xfffb_d000).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[SVR] = 0xffu8 as _;
        lapic.regs[SVR + 1] = 1;
        vcpu.set_lapic(&lapic).unwrap();
        (Arc::new(vm), vcpu)
    }

    fn requested(vcpu: &VcpuFd, vector: usize) -> bool {
        let lapic = vcpu.get_lapic().unwrap();
        let at = IRR + vector / 32 * 16 + vector / 8 % 4;
        lapic.regs[at] as u8 & 1 << (vector % 8) != 0
    }

    /// KVM may take a moment: it then injects from a work queue.
    fn arrives(vcpu: &VcpuFd, vector: usize) -> bool {
        let until = Instant::now() + Duration::from_secs(20);
        while !requested(vcpu, vector) {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        true
    }

    #[test]
    fn a_vector_interrupts_with_its_message_and_with_the_new_one_after_a_change() {
        let (vm, vcpu) = vm();
        let vectors = MsiVectors::new(vm, 3).unwrap();
        vectors
            .set(&[(0, TO_CPU_0, 0x41), (2, TO_CPU_0, 0x42)])
            .unwrap();
        vectors.trigger(2);
        assert!(arrives(&vcpu, 0x42));
        assert!(!requested(&vcpu, 0x41));
        vectors.trigger(0);
        assert!(arrives(&vcpu, 0x41));
        vectors.set(&[(0, TO_CPU_0, 0x71)]).unwrap();
        vectors.trigger(0);
        assert!(arrives(&vcpu, 0x71));
    }

    #[test]
    fn what_was_triggered_before_the_first_message_is_sent_with_it() {
        let (vm, vcpu) = vm();
        let vectors = MsiVectors::new(vm, 1).unwrap();
        vectors.trigger(0);
        vectors.set(&[(0, TO_CPU_0, 0x55)]).unwrap();
        assert!(arrives(&vcpu, 0x55));
    }

    #[test]
    fn an_event_of_anothers_interrupts_while_it_is_connected_and_keeps_what_comes_between() {
        let (vm, vcpu) = vm();
        let vectors = MsiVectors::new(vm, 2).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        assert!(vectors.connect(0, &event).is_err(), "no message yet");
        vectors
            .set(&[(0, TO_CPU_0, 0x41), (1, TO_CPU_0, 0x42)])
            .unwrap();
        vectors.connect(0, &event).unwrap();
        event.write(1).unwrap();
        assert!(arrives(&vcpu, 0x41));
        vectors.disconnect(0, &event);
        event.write(1).unwrap();
        assert!(!requested(&vcpu, 0x42));
        vectors.connect(1, &event).unwrap();
        assert!(arrives(&vcpu, 0x42));
    }

    #[test]
    fn interrupt_lines_go_on_working_beside_messages() {
        let (vm, vcpu) = vm();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        vm.register_irqfd(&line, 5).unwrap();
        let vectors = MsiVectors::new(vm.clone(), 1).unwrap();
        vectors.set(&[(0, TO_CPU_0, 0x41)]).unwrap();
        // I/O APIC pin 5: vector 0x66, fixed, edge, not masked.
        let mut ioapic = kvm_bindings::kvm_ioapic_state {
            base_address: 0xfec0_0000,
            ..Default::default()
        };
        ioapic.redirtbl[5].bits = 0x66;
        let mut chip = kvm_bindings::kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        chip.chip.ioapic = ioapic;
        vm.fd.set_irqchip(&chip).unwrap();
        line.write(1).unwrap();
        assert!(arrives(&vcpu, 0x66));
    }

    #[test]
    fn gsis_are_taken_at_the_first_message_and_given_back() {
        let (vm, vcpu) = vm();
        let in_use = || lock(&vm.routes).messages.len();
        let vectors = MsiVectors::new(vm.clone(), 64).unwrap();
        assert_eq!(in_use(), 0);
        vectors.set(&[(7, TO_CPU_0, 0x41)]).unwrap();
        vectors
            .set(&[(7, TO_CPU_0, 0x41), (8, TO_CPU_0, 0x42)])
            .unwrap();
        vectors.set(&[(64, TO_CPU_0, 0x43)]).unwrap();
        vectors.trigger(64);
        assert_eq!(in_use(), 2);
        let other = MsiVectors::new(vm.clone(), 1).unwrap();
        other.set(&[(0, TO_CPU_0, 0x44)]).unwrap();
        drop(vectors);
        assert_eq!(in_use(), 1);
        // The next one takes a number that was in use.
        let next = MsiVectors::new(vm.clone(), 1).unwrap();
        next.set(&[(0, TO_CPU_0, 0x45), (0, TO_CPU_0, 0x46)])
            .unwrap();
        next.trigger(0);
        assert!(arrives(&vcpu, 0x46));
        other.trigger(0);
        assert!(arrives(&vcpu, 0x44));
        assert!(!requested(&vcpu, 0x41) && !requested(&vcpu, 0x45));
    }

    #[test]
    fn a_change_that_kvm_refuses_changes_nothing() {
        // Without interrupt controllers KVM has no routes.
        let vm = Arc::new(Kvm::open().unwrap().create_vm().unwrap());
        let vectors = MsiVectors::new(vm.clone(), 1).unwrap();
        let error = vectors.set(&[(0, TO_CPU_0, 0x41)]).unwrap_err();
        assert!(error.to_string().contains("KVM_SET_GSI_ROUTING"));
        assert!(lock(&vm.routes).messages.is_empty());
    }

    #[test]
    fn gsis_end_where_kvms_table_is_full() {
        let mut routes = Routes::default();
        let mut count = 0;
        while let Some(gsi) = routes.allocate() {
            routes.messages.insert(gsi, Some((TO_CPU_0, gsi)));
            count += 1;
        }
        assert!(count > 4000);
        assert_eq!(routes.entries().len(), KVM_MAX_IRQ_ROUTES);
    }
}
