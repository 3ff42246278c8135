//! Configuration space of a virtio function: its identity (4.1.2), and the capabilities that say where the structures are
//! (4.1.4).

use super::{PciTransport, layout};
use husk_bus::BusDevice;
use husk_pci::{ConfigSpace, Error, Identity, Msix};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};

const VENDOR: u16 = 0x1af4;
/// 4.1.2: the device ID is this plus the virtio device ID.
const FIRST_DEVICE: u16 = 0x1040;
/// 4.1.2.1: 1 or more for a device that has no legacy interface.
const REVISION: u8 = 1;

/// PCI capability ID: vendor-specific.
const VENDOR_SPECIFIC: u8 = 9;

/// cfg_type (4.1.4).
mod kind {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// Offsets in `struct virtio_pci_cfg_cap` (4.1.4.9).
mod window {
    pub const BAR: u16 = 4;
    pub const OFFSET: u16 = 8;
    pub const LENGTH: u16 = 12;
    pub const DATA: u16 = 16;
}

/// Where in configuration space the capabilities are that the transport must watch.
pub(super) struct Capabilities {
    msix: u16,
    window: u16,
}

/// The configuration space of a device with this virtio device ID and number of queues.
pub(super) fn build(
    id: u32,
    queues: usize,
    msix: &Msix,
) -> Result<(ConfigSpace, Capabilities), Error> {
    let device = FIRST_DEVICE.wrapping_add(id as u16);
    let identity = Identity {
        vendor: VENDOR,
        device,
        revision: REVISION,
        class: class(id),
        subsystem_vendor: VENDOR,
        // 4.1.2.1: 0x40 or more.
        subsystem: device,
    };
    let mut space = ConfigSpace::new(&identity).with_bar(layout::BAR_SIZE as u32)?;
    let mut add = |kind: u8, offset: u64, length: u64, rest: &[u8], writable: &[u8]| {
        let body = capability(kind, offset, length, rest);
        space.add_capability(VENDOR_SPECIFIC, &body, writable)
    };
    let doorbells = layout::NOTIFY_MULTIPLIER * queues.max(1) as u64;
    let multiplier = (layout::NOTIFY_MULTIPLIER as u32).to_le_bytes();
    add(kind::COMMON, layout::COMMON, layout::COMMON_SIZE, &[], &[])?;
    add(kind::NOTIFY, layout::NOTIFY, doorbells, &multiplier, &[])?;
    add(kind::ISR, layout::ISR, 1, &[], &[])?;
    add(kind::DEVICE, layout::DEVICE, layout::DEVICE_SIZE, &[], &[])?;
    // 4.1.4.9: the driver writes bar, offset, length and data; the mask begins at cap_len.
    let mut writable = [0; 18];
    for (at, mask) in (2..).zip(&mut writable) {
        let own = at == window::BAR || at >= window::OFFSET;
        *mask = if own { 0xff } else { 0 };
    }
    let window = add(kind::PCI, 0, 0, &[0; 4], &writable)?;
    let table = (layout::MSIX_TABLE as u32, layout::MSIX_PENDING as u32);
    let msix = msix.add_capability(&mut space, table.0, table.1)?;
    let capabilities = Capabilities {
        msix: msix.into(),
        window: window.into(),
    };
    Ok((space, capabilities))
}

/// Base class, sub-class, programming interface: virtio drivers do not look, people do.
fn class(id: u32) -> u32 {
    match id {
        VIRTIO_ID_BLOCK => 0x01_80_00,
        VIRTIO_ID_NET => 0x02_00_00,
        _ => 0xff_00_00,
    }
}

/// `struct virtio_pci_cap` behind its first two bytes, in BAR 0, with `rest` behind.
fn capability(kind: u8, offset: u64, length: u64, rest: &[u8]) -> Vec<u8> {
    let size = 16 + rest.len() as u8;
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(rest);
    body
}

impl Capabilities {
    /// MSI-X message control.
    pub(super) fn msix_control(&self, space: &ConfigSpace) -> u16 {
        space.word(self.msix + 2)
    }

    /// Whether an access touches pci_cfg_data, through which the driver looks into the BAR.
    pub(super) fn is_window(&self, offset: u16, length: usize) -> bool {
        let start = usize::from(self.window + window::DATA);
        let offset = usize::from(offset);
        offset < start + 4 && offset + length > start
    }

    /// The access that the driver has described: offset in BAR 0 and length; None where it may not be made (4.1.4.9.1).
    fn described(&self, space: &ConfigSpace) -> Option<(u64, usize)> {
        let at = self.window;
        let [bar, _] = space.word(at + window::BAR).to_le_bytes();
        let offset = u64::from(space.dword(at + window::OFFSET));
        let length = space.dword(at + window::LENGTH);
        let size = u64::from(length);
        let sound = bar == 0
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(size)
            && offset + size <= layout::BAR_SIZE;
        sound.then_some((offset, length as usize))
    }
}

impl PciTransport {
    /// Bring what the driver wants to see into pci_cfg_data.
    pub(super) fn read_through_window(&self) {
        let described = self.capabilities.described(&self.lock_config());
        if let Some((offset, length)) = described {
            let mut data = [0; 4];
            self.read(offset, data.get_mut(..length).unwrap_or_default());
            let at = self.capabilities.window + window::DATA;
            self.lock_config().set(at, &data);
        }
    }

    /// Pass on what the driver has put into pci_cfg_data.
    pub(super) fn write_through_window(&self) {
        let config = self.lock_config();
        let described = self.capabilities.described(&config);
        let data = config.dword(self.capabilities.window + window::DATA);
        drop(config);
        if let Some((offset, length)) = described {
            let data = data.to_le_bytes();
            self.write(offset, data.get(..length).unwrap_or_default());
        }
    }
}
