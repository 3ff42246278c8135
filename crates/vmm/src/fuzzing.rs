//! What a snapshot's files are good for without KVM, for the fuzz target `snapshot`. No release has it.

use crate::devices;
use crate::error::Error;
use crate::generation;
use crate::memory::GuestMemory;
use crate::platform::Platform;
use crate::snapshot::Saved;
use husk_arch::host_check;
use husk_bus::BusDevice;
use husk_config::LoadSnapshot;
use husk_devices::keyboard::Keyboard;
use husk_devices::pci_hotplug::PciHotplug;
use husk_devices::power::PowerPorts;
use husk_devices::serial::{Output, Serial, Wire};
use husk_devices::{GuestEvent, GuestEvents};
use husk_kvm::VcpuState;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Most memory that is mapped: a machine may have as much as the host can describe.
const MOST_MEMORY: u64 = 4 << 30;

/// Nobody.
#[derive(Default)]
struct Deaf(AtomicUsize);

impl GuestEvents for Deaf {
    fn event(&self, _: GuestEvent) {}
}

impl Output for Deaf {
    fn write(&self, bytes: &[u8]) {
        self.0.fetch_add(bytes.len(), Relaxed);
    }
}

/// As for a VM that is to go on from `load`: files, overrides, configuration, memory, processors, and the devices of every VM, which
/// a guest then reads and writes.
pub fn load_without_kvm(load: &LoadSnapshot) -> Result<(), Error> {
    let mut saved = Saved::open(load)?;
    load.apply_overrides(&mut saved.config)?;
    let config = &saved.config;
    config.validate()?;
    devices::slots(config)?;
    let size = config.machine_config.mem_size_mib << 20;
    if size > MOST_MEMORY {
        return Ok(());
    }
    let mut memory = GuestMemory::new(size, config.machine_config.huge_pages)?;
    if config.machine_config.track_dirty_pages {
        memory.track();
    }
    saved.fill(&memory)?;
    let mut snapshot = saved.snapshot;
    let cpuids: Vec<_> = snapshot.vcpus.iter().map(VcpuState::cpuid).collect();
    // A message, at most.
    if let Some(first) = cpuids.first() {
        let checked = cpuids.iter().map(|cpuid| host_check::check(cpuid, first));
        for refused in checked.filter_map(Result::err) {
            assert!(refused.to_string().len() < 8192, "{refused}");
        }
    }
    snapshot.vm.passed();
    for drive in &config.drives {
        drop(snapshot.devices.take(&drive.drive_id));
    }
    let slots = snapshot.platform.hotplug_slots();
    let mut platform = platform(slots)?;
    snapshot.platform.restore(&mut platform);
    if let Some(address) = platform.generation_id {
        generation::renew(&memory, address)?;
        platform.power.notify_generation();
    }
    use_it(&platform);
    Ok(())
}

fn platform(slots: usize) -> Result<Platform, Error> {
    let event = || EventFd::new(EFD_NONBLOCK).map_err(|e| Error::Host("an eventfd", e));
    let deaf = Arc::new(Deaf::default());
    let wire = Arc::new(Wire::new(|| ()));
    Ok(Platform {
        serial: Serial::new(event()?, deaf.clone(), wire),
        power: Arc::new(PowerPorts::new(event()?, deaf.clone())),
        keyboard: Some(Arc::new(Keyboard::new(event()?, deaf.clone()))),
        hotplug: Some(Arc::new(PciHotplug::new(Arc::new(|| ())))),
        slots,
        generation_id: None,
    })
}

/// Read and write all that there is, some of it more than once.
fn use_it(platform: &Platform) {
    let serial: &dyn BusDevice = &*platform.serial;
    let power: &dyn BusDevice = &*platform.power;
    let mut ports = vec![serial, power];
    if let Some(keyboard) = &platform.keyboard {
        ports.push(&**keyboard);
        keyboard.press_ctrl_alt_del();
    }
    if let Some(hotplug) = &platform.hotplug {
        ports.push(&**hotplug);
        hotplug.take_gone().for_each(drop);
    }
    for device in ports {
        for round in 0u8..40 {
            for offset in 0..12 {
                let mut data = [round; 4];
                device.read(offset, &mut data[..1 + usize::from(round % 4)]);
                device.write(offset, &[round.rotate_left(offset as u32); 1]);
            }
        }
    }
    platform.power.remind();
}
