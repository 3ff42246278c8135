//! The devices of a Husk VM, each driven only through [`husk_bus::BusDevice`], event fds and the traits
//! in this crate, so that every one of them runs and is tested without `/dev/kvm`.
//!
//! The platform's devices ([`serial`], [`power`], [`i8042`], [`keyboard`], [`pvpanic`], [`boot_timer`], [`pci_hotplug`]) are registers on a bus; the others are virtio devices
//! ([`husk_virtio::VirtioDevice`]).
//!
//! **Architecture Invariant:** no KVM, and no thread is started here. The platform's devices open nothing; what must wait for
//! the host does so behind a trait that the caller implements.
#![deny(unsafe_code)] // but for the corners that hand guest memory to system calls, in `block` and `net`

pub mod balloon;
pub mod block;
pub mod boot_timer;
pub mod entropy;
pub mod i8042;
pub mod keyboard;
pub mod net;
pub mod pci_hotplug;
pub mod power;
pub mod pvpanic;
pub mod rate_limiter;
pub mod serial;
pub mod vhost_user;
pub mod vsock;

use vmm_sys_util::eventfd::EventFd;

/// What the guest told a platform device about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// ACPI S5: the guest turned itself off.
    PowerOff,
    /// The guest asked for a reset of the machine.
    Reset,
    /// pvpanic: the guest's kernel panicked, and no crash kernel takes over.
    Panicked,
    /// pvpanic: the guest's kernel panicked, and its crash kernel is about to run.
    CrashLoaded,
    /// A byte at the boot mark port: how far the guest has come.
    Mark(u8),
}

/// Where platform devices report what the guest did.
///
/// Called on a vCPU thread, in the middle of the guest's instruction, with no lock held: it must not wait
/// for that vCPU.
pub trait GuestEvents: Send + Sync {
    /// `event` happened.
    fn event(&self, event: GuestEvent);
}

/// One edge on an interrupt line. It fails only when the counter is at its maximum, and then the edge
/// is already pending.
fn pulse(irq: &EventFd) {
    let _ = irq.write(1);
}

/// The registers of `ports` that an access of `len` bytes at `offset` touches, each with its index into
/// the data: an ISA device sees a wide access as one byte for each port.
fn ports_of(offset: u64, len: usize, ports: u64) -> impl Iterator<Item = (u64, usize)> {
    (offset..ports).zip(0..len)
}

#[cfg(test)]
pub(crate) mod test_support {
    use super::*;
    use std::sync::Mutex;

    /// Remembers what it was told.
    #[derive(Default)]
    pub(crate) struct Recorder(pub(crate) Mutex<Vec<GuestEvent>>);

    impl GuestEvents for Recorder {
        fn event(&self, event: GuestEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    /// Guest memory in a file that other processes can map.
    pub(crate) fn shared_memory() -> husk_virtio::GuestMemory {
        use husk_virtio::testing::MEMORY;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("test", flags).unwrap();
        rustix::fs::ftruncate(&file, MEMORY).unwrap();
        let file = vm_memory::FileOffset::new(file.into(), 0);
        let range = (vm_memory::GuestAddress(0), MEMORY as usize, Some(file));
        husk_virtio::GuestMemory::from_ranges_with_files([range]).unwrap()
    }

    /// An interrupt line: the device's end, and ours, which does not wait.
    pub(crate) fn irq() -> (EventFd, EventFd) {
        let line = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        (line.try_clone().unwrap(), line)
    }
}
