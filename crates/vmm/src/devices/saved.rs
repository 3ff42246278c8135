//! Virtio devices in snapshots.

use super::{Devices, Transport, failed};
use crate::error::Error;
use husk_virtio::DeviceError;
use husk_virtio::transport::mmio::MmioTransport;
use husk_virtio::transport::pci::PciTransport;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::atomic::Ordering;

/// What a snapshot holds of the devices and of their bus.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    devices: Vec<Device>,
    /// Configuration space of the PCI host bridge; nothing without one.
    host_bridge: Vec<u8>,
}

/// One of them.
#[derive(Debug, Serialize, Deserialize)]
struct Device {
    id: String,
    /// Device number on the PCI bus. Those of devices that came later and of some that went need not follow each other.
    number: Option<u8>,
    /// Of its transport, and all behind it.
    state: Value,
}

/// Where a device was, and as what.
pub type Saved = (Option<u8>, Value);

impl State {
    /// Take what was saved of the device called `id`.
    pub fn take(&mut self, id: &str) -> Result<Saved, Error> {
        let at = self.devices.iter().position(|device| device.id == id);
        let at = at.ok_or(Error::State(
            "the snapshot lacks the state of one of its devices",
        ))?;
        let Device { number, state, .. } = self.devices.swap_remove(at);
        Ok((number, state))
    }

    /// The host bridge's configuration space.
    pub fn host_bridge(&self) -> &[u8] {
        &self.host_bridge
    }
}

impl Devices {
    /// Stop all devices as they are, after what is in flight. The guest must not run.
    pub fn suspend(&self) {
        self.suspended.store(true, Ordering::Release);
        for (_, transport) in &self.attached {
            match transport {
                Transport::Mmio(transport) => transport.suspend(),
                Transport::Pci(transport, _) => transport.suspend(),
            }
        }
    }

    /// They were suspended, or have been loaded, and have not gone on.
    pub fn are_suspended(&self) -> bool {
        !self.attached.is_empty() && self.suspended.load(Ordering::Acquire)
    }

    /// Let them go on. Their interrupts reach the vCPUs from here on.
    pub fn resume(&self) {
        for (_, transport) in &self.attached {
            match transport {
                Transport::Mmio(transport) => transport.resume(),
                Transport::Pci(transport, _) => transport.resume(),
            }
        }
        self.suspended.store(false, Ordering::Release);
    }

    /// What a snapshot must hold. Only while they are suspended.
    pub fn save(&self) -> Result<State, Error> {
        let save = |(id, transport): &(String, Transport)| -> Result<Device, Error> {
            let (number, state) = match transport {
                Transport::Mmio(transport) => (None, transport.save().map(serde_json::to_value)),
                Transport::Pci(transport, number) => {
                    (Some(*number), transport.save().map(serde_json::to_value))
                }
            };
            let lost = "is lost, since its I/O thread has failed";
            let state = state.ok_or_else(|| failed(id, DeviceError::Driver(lost)))?;
            Ok(Device {
                id: id.clone(),
                number,
                state: state.map_err(|e| Error::Json(e.to_string()))?,
            })
        };
        let bridge = self.bridge.as_ref();
        Ok(State {
            devices: self.attached.iter().map(save).collect::<Result<_, _>>()?,
            host_bridge: bridge.map_or(Vec::new(), |bridge| bridge.own_config()),
        })
    }
}

/// Make the device called `id`, which no driver has seen, what it was.
pub fn load_mmio(id: &str, transport: &MmioTransport, state: Value) -> Result<(), Error> {
    let loaded = transport.load(understand(id, state)?);
    loaded.map_err(|e| failed(id, e))
}

/// The same on PCI, before it is on its bus.
pub fn load_pci(id: &str, transport: &PciTransport, state: Value) -> Result<(), Error> {
    let loaded = transport.load(understand(id, state)?);
    loaded.map_err(|e| failed(id, e))
}

fn understand<T: DeserializeOwned>(id: &str, state: Value) -> Result<T, Error> {
    serde_json::from_value(state).map_err(|e| failed(id, e))
}
