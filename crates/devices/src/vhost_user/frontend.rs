//! The front end's part of the vhost-user protocol: what a server is asked to set a device up, to start its queues and to stop them.

use super::connection::{Connection, Error, Request};
use husk_virtio::{ActiveQueue, F_VERSION_1, GuestMemory};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::Instant;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Feature bit of the server, not of the device: there are protocol features, and queues are enabled one by one.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features.
mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const CONFIG: u64 = 1 << 9;
}

/// Memory is known to a server by addresses of this process as well, and rings by these alone. The protocol does not say that anything
/// is there: any numbers do that the server can tell apart. So it does not learn where this process has its memory. Not 0: that is no
/// address for some.
const FIRST: u64 = 1 << 46;

/// A server that is ready to start the queues of a device.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    /// What the device can do, and what is the rings'.
    features: u64,
}

impl Frontend {
    /// Call the server at `path`, for a device with so many queues.
    pub fn open(path: &Path, queues: u16, until: Instant) -> Result<Self, Error> {
        let mut connection = Connection::open(path, until)?;
        let features = connection.ask(Request::GetFeatures, until)?;
        if features & F_PROTOCOL_FEATURES == 0 {
            return Err(Error::Lacks("protocol features"));
        }
        if features & F_VERSION_1 == 0 {
            return Err(Error::Lacks("virtio 1 (VIRTIO_F_VERSION_1)"));
        }
        let protocol = connection.ask(Request::GetProtocolFeatures, until)?;
        if protocol & protocol::CONFIG == 0 {
            return Err(Error::Lacks(
                "configuration space (VHOST_USER_PROTOCOL_F_CONFIG)",
            ));
        }
        let wanted = protocol & (protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG);
        connection.tell(
            Request::SetProtocolFeatures,
            &wanted.to_le_bytes(),
            &[],
            until,
        )?;
        connection.answers_all = wanted & protocol::REPLY_ACK != 0;
        let has = match wanted & protocol::MQ {
            0 => 1,
            _ => connection.ask(Request::GetQueueNum, until)?,
        };
        if has < u64::from(queues) {
            return Err(Error::Queues {
                has,
                wanted: queues,
            });
        }
        connection.tell(Request::SetOwner, &[], &[], until)?;
        Ok(Self {
            connection,
            features: features & !F_PROTOCOL_FEATURES,
        })
    }

    /// What the server offers: features of the device and of the rings.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Fill `space` from the device's configuration space.
    pub fn read_config(&self, space: &mut [u8], until: Instant) -> Result<(), Error> {
        const HEADER: usize = 12;
        // Offset, size, flags, and room for the answer, which has the same form.
        let size = u32::try_from(space.len()).unwrap_or(u32::MAX);
        let mut message = vec![0; HEADER + space.len()];
        if let Some(field) = message.get_mut(4..8) {
            field.copy_from_slice(&size.to_le_bytes());
        }
        let mut answer = message.clone();
        self.connection
            .exchange(Request::GetConfig, &message, &mut answer, until)?;
        if let Some(bytes) = answer.get(HEADER..) {
            space.copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Start `queues`, which all lie in the same memory, with what the driver has accepted.
    pub fn start(
        &self,
        features: u64,
        queues: &[ActiveQueue],
        until: Instant,
    ) -> Result<(), Error> {
        if features & !self.features != 0 {
            return Err(Error::Changed);
        }
        let tell =
            |request, body: &[u8], fds: &[RawFd]| self.connection.tell(request, body, fds, until);
        let features = features | F_PROTOCOL_FEATURES;
        tell(Request::SetFeatures, &features.to_le_bytes(), &[])?;
        if let Some(first) = queues.first() {
            let (table, fds) = memory_table(first.memory())?;
            tell(Request::SetMemTable, &table, &fds)?;
        }
        for queue in queues {
            let (index, state) = (u32::from(queue.index()), queue.state());
            let with = |value: u32| pair(index, value);
            tell(Request::SetVringNum, &with(state.size.into()), &[])?;
            tell(
                Request::SetVringBase,
                &with(state.next_available.into()),
                &[],
            )?;
            let mut addresses = pair(index, 0).to_vec();
            for address in [state.descriptors, state.used, state.available] {
                // The queue lies in memory, as was checked when it was made.
                let address = address.checked_add(FIRST).ok_or(Error::Memory)?;
                addresses.extend(address.to_le_bytes());
            }
            addresses.extend(0_u64.to_le_bytes()); // no log
            tell(Request::SetVringAddr, &addresses, &[])?;
            let call = queue.interrupt().remote(queue.index());
            let call = call.ok_or(Error::Interrupt)?;
            let number = u64::from(index).to_le_bytes();
            tell(Request::SetVringCall, &number, &[call])?;
            tell(Request::SetVringKick, &number, &[queue.kick().as_raw_fd()])?;
        }
        for queue in queues {
            tell(Request::SetVringEnable, &pair(queue.index().into(), 1), &[])?;
        }
        // One that does not answer all answers this, and has done then what was before it.
        if !self.connection.answers_all {
            self.connection.ask(Request::GetFeatures, until)?;
        }
        Ok(())
    }

    /// Stop a queue after what is in flight; the number of chains that were taken from it, modulo 65536.
    pub fn stop(&self, queue: &ActiveQueue, until: Instant) -> Result<u16, Error> {
        let index = u32::from(queue.index());
        let mut answer = [0; 8];
        let request = Request::GetVringBase;
        self.connection
            .exchange(request, &pair(index, 0), &mut answer, until)?;
        let [a, b, c, d, base @ ..] = answer;
        let base = u16::try_from(u32::from_le_bytes(base));
        match base {
            Ok(base) if u32::from_le_bytes([a, b, c, d]) == index => Ok(base),
            _ => Err(Error::Wrong(super::connection::Step(request))),
        }
    }
}

fn pair(first: u32, second: u32) -> [u8; 8] {
    (u64::from(second) << 32 | u64::from(first)).to_le_bytes()
}

/// The regions of memory, and the files that they are in.
fn memory_table(memory: &GuestMemory) -> Result<(Vec<u8>, Vec<RawFd>), Error> {
    let mut fds = Vec::new();
    let mut table = (memory.num_regions() as u64).to_le_bytes().to_vec();
    for region in memory.iter() {
        let file = region.file_offset().ok_or(Error::Memory)?;
        let start = region.start_addr().raw_value();
        let user = start.checked_add(FIRST).ok_or(Error::Memory)?;
        for field in [start, region.len(), user, file.start()] {
            table.extend(field.to_le_bytes());
        }
        fds.push(file.file().as_raw_fd());
    }
    Ok((table, fds))
}
