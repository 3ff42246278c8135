//! Devices that are open: files, taps and sockets are there, and no bus yet.

use super::failed;
use crate::error::Error;
use husk_config::{Drive, NetworkInterface, VmConfig};
use husk_devices::block::Block;
use husk_devices::net::Net;
use husk_devices::vhost_user::VhostUserBlock;
use husk_devices::vsock::Vsock;
use husk_virtio::VirtioDevice;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::BTreeMap;

/// Devices that were opened when they were configured, by name.
#[derive(Default)]
pub struct Opened {
    pub drives: BTreeMap<String, Disk>,
    pub interfaces: BTreeMap<String, Net>,
    pub vsock: BTreeMap<String, Vsock>,
}

impl Opened {
    /// Open a disk. The one of its name, which may hold the same file, is closed before; when this fails, it is opened again
    /// as `before` has it.
    pub fn drive(&mut self, drive: &Drive, before: &VmConfig) -> Result<(), Error> {
        let id = drive.drive_id.as_str();
        let old = before.drives.iter().find(|old| old.drive_id == id);
        replace(
            &mut self.drives,
            id,
            || open_drive(drive),
            || old.map(open_drive),
        )
    }

    /// Whether the root device is one of a server's, and the server lets nobody write it. It is opened for that if it is not yet.
    pub fn root_is_read_only(&mut self, config: &VmConfig) -> Result<bool, Error> {
        let mut drives = config.drives.iter();
        let Some(root) = drives.find(|d| d.is_root_device && d.socket.is_some()) else {
            return Ok(false);
        };
        let id = &root.drive_id;
        let disk = take(&mut self.drives, id, || open_drive(root))?;
        let read_only = matches!(&disk, Disk::Remote(block) if block.is_read_only());
        self.drives.insert(id.clone(), disk);
        Ok(read_only)
    }

    /// The same for a network interface.
    pub fn interface(
        &mut self,
        interface: &NetworkInterface,
        before: &VmConfig,
    ) -> Result<(), Error> {
        let id = interface.iface_id.as_str();
        let mut interfaces = before.network_interfaces.iter();
        let old = interfaces.find(|old| old.iface_id == id);
        let new = || open_interface(interface);
        replace(&mut self.interfaces, id, new, || old.map(open_interface))
    }

    /// The same for the vsock device.
    pub fn vsock(&mut self, vsock: &husk_config::Vsock, before: &VmConfig) -> Result<(), Error> {
        let old = before.vsock.as_ref();
        replace(
            &mut self.vsock,
            VSOCK,
            || open_vsock(vsock),
            || old.map(open_vsock),
        )
    }
}

fn replace<T>(
    opened: &mut BTreeMap<String, T>,
    id: &str,
    new: impl FnOnce() -> Result<T, Error>,
    old: impl FnOnce() -> Option<Result<T, Error>>,
) -> Result<(), Error> {
    opened.remove(id);
    let (device, result) = match new() {
        Ok(device) => (Some(device), Ok(())),
        Err(e) => (old().and_then(Result::ok), Err(e)),
    };
    opened.extend(device.map(|device| (id.to_owned(), device)));
    result
}

/// The device called `id`, opened now if it is not yet.
pub fn take<T>(
    opened: &mut BTreeMap<String, T>,
    id: &str,
    open: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    opened.remove(id).map_or_else(open, Ok)
}

/// The vsock device's name.
pub const VSOCK: &str = "vsock";

/// A disk, of Husk's own or of a server's.
pub enum Disk {
    Own(Box<Block>),
    Remote(Box<VhostUserBlock>),
}

impl Disk {
    pub fn device(self) -> Box<dyn VirtioDevice> {
        match self {
            Disk::Own(block) => block,
            Disk::Remote(block) => block,
        }
    }
}

pub fn open_drive(drive: &Drive) -> Result<Disk, Error> {
    let id = &drive.drive_id;
    Ok(match drive.socket {
        None => Disk::Own(Box::new(Block::new(drive).map_err(|e| failed(id, e))?)),
        Some(_) => Disk::Remote(Box::new(
            VhostUserBlock::new(drive).map_err(|e| failed(id, e))?,
        )),
    })
}

pub fn open_interface(interface: &NetworkInterface) -> Result<Net, Error> {
    Net::new(interface).map_err(|e| failed(&interface.iface_id, e))
}

pub fn open_vsock(vsock: &husk_config::Vsock) -> Result<Vsock, Error> {
    raise_descriptor_limit();
    Vsock::new(vsock).map_err(|e| failed(VSOCK, e))
}

/// Each vsock connection takes a descriptor, and the usual soft limit is made for programs that use select().
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        log::debug!("the limit on descriptors stays: {e}");
    }
}
