//! The VM generation ID: a number in guest memory by which a guest learns that it is another VM than the one that it was, because
//! it goes on from a snapshot (Microsoft, "Virtual Machine Generation ID").

use crate::error::Error;
use crate::memory::GuestMemory;

/// Write a new ID to `address`. No vCPU runs.
pub fn renew(memory: &GuestMemory, address: u64) -> Result<(), Error> {
    let mut id = [0; 16];
    crate::fill_random(&mut id)?;
    // A GUID of version 4; the half that has the version is little-endian.
    let [.., version, variant, _, _, _, _, _, _, _] = &mut id;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    Ok(memory.write(address, &id)?)
}
