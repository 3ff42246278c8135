//! The devices that every VM has.

use crate::devices;
use crate::error::Error;
use crate::host::Host;
use crate::lifecycle::Lifecycle;
use crate::pause::Pause;
use crate::timeline::{Phase, Timeline};
use crate::vcpu::{Census, HaltSearch, Shared};
use husk_arch::layout;
use husk_bus::{Bus, BusDevice};
use husk_config::VmConfig;
use husk_devices::boot_timer::{self, BootTimer};
use husk_devices::i8042::I8042;
use husk_devices::keyboard::Keyboard;
use husk_devices::pci_hotplug::PciHotplug;
use husk_devices::power::{self, PowerPorts};
use husk_devices::pvpanic::PvPanic;
use husk_devices::serial::{Output, Serial};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// Devices of the platform that are asked for something while the VM runs.
pub struct Platform {
    pub serial: Arc<Serial>,
    pub power: Arc<PowerPorts>,
    pub keyboard: Option<Arc<Keyboard>>,
    pub hotplug: Option<Arc<PciHotplug>>,
    /// Places of the PCI bus for devices that come and go, and for the others.
    pub slots: usize,
    /// Where the guest finds its VM generation ID: none where it booted before there was one.
    pub generation_id: Option<u64>,
}

pub fn hotplug_slots(config: &VmConfig, host: &Host) -> usize {
    match host.hotplug {
        true => devices::hotplug_slots(config),
        false => 0,
    }
}

/// The devices of every VM, on their buses. The guest's tables tell of `slots` places for devices that come and go.
pub fn platform(
    vm: &husk_kvm::Vm,
    config: &VmConfig,
    host: &Host,
    start: Option<boot_timer::Times>,
    slots: usize,
) -> Result<(Arc<Shared>, Platform), Error> {
    let event = |gsi| -> Result<EventFd, Error> {
        let event = EventFd::new(EFD_CLOEXEC).map_err(|e| Error::Host("an eventfd", e))?;
        vm.register_irqfd(&event, gsi)?;
        Ok(event)
    };
    let (wake, timeline) = (Arc::clone(&host.wake), Arc::clone(&host.timeline));
    let lifecycle = Lifecycle::new(wake, timeline, Arc::clone(&host.watch));
    let lifecycle = Arc::new(lifecycle.ending_at_mark(host.ends_at_mark));
    let power = Arc::new(PowerPorts::new(
        event(layout::EVENTS_IRQ)?,
        lifecycle.clone(),
    ));
    let stdout = host.console.output.clone();
    let output = match &config.serial {
        Some(serial) => {
            (host.console.open)(serial, stdout).map_err(|(path, e)| Error::Serial(path, e))?
        }
        None => stdout,
    };
    let output = FirstByte {
        output,
        seen: AtomicBool::new(false),
        timeline: Arc::clone(&host.timeline),
    };
    let serial = Serial::new(
        event(layout::COM1_IRQ)?,
        Arc::new(output),
        host.console.wire.clone(),
    );
    let ports = Bus::default();
    let com1 = serial.clone();
    ports.insert(layout::COM1_PORT.into(), layout::COM1_PORTS.into(), com1)?;
    ports.insert(
        layout::SLEEP_CONTROL_PORT.into(),
        power::PORTS,
        power.clone(),
    )?;
    let keyboard = match config.keyboard {
        true => Some(event(layout::KEYBOARD_IRQ)?),
        false => None,
    };
    let keyboard = keyboard.map(|irq| Arc::new(Keyboard::new(irq, lifecycle.clone())));
    let i8042: Arc<dyn BusDevice> = match &keyboard {
        Some(keyboard) => keyboard.clone(),
        None => Arc::new(I8042::new(lifecycle.clone())),
    };
    ports.insert(layout::I8042_PORT.into(), layout::I8042_PORTS.into(), i8042)?;
    let hotplug = (slots > 0).then(|| Arc::new(PciHotplug::new(Arc::clone(&host.wake))));
    if let Some(hotplug) = &hotplug {
        let (first, count) = (layout::PCI_HOTPLUG_PORT, layout::PCI_HOTPLUG_PORTS);
        ports.insert(first.into(), count.into(), hotplug.clone())?;
    }
    let mmio = Bus::default();
    if let Some(start) = start {
        let timer = BootTimer::new(start, lifecycle.clone());
        mmio.insert(layout::BOOT_TIMER, boot_timer::SIZE, Arc::new(timer))?;
    }
    ports.insert(
        layout::PVPANIC_PORT.into(),
        1,
        Arc::new(PvPanic::new(lifecycle.clone())),
    )?;
    let shared = Shared {
        ports,
        mmio,
        lifecycle,
        timeline: Arc::clone(&host.timeline),
        halts: HaltSearch::default(),
        pause: Pause::default(),
        census: Census::default(),
    };
    let platform = Platform {
        serial,
        power,
        keyboard,
        hotplug,
        slots,
        generation_id: None,
    };
    Ok((Arc::new(shared), platform))
}

/// Notes when the guest first writes to its console.
struct FirstByte {
    output: Arc<dyn Output>,
    seen: AtomicBool,
    timeline: Arc<Timeline>,
}

impl Output for FirstByte {
    fn write(&self, bytes: &[u8]) {
        if !self.seen.load(Ordering::Relaxed) && !self.seen.swap(true, Ordering::Relaxed) {
            self.timeline.reach(Phase::FirstConsoleByte);
        }
        self.output.write(bytes);
    }
}
