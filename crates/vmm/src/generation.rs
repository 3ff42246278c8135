//! The VM generation ID: a number in guest memory by which a guest learns that it is another VM than the one that it was, because
//! it goes on from a snapshot (Microsoft, "Virtual Machine Generation ID").

use crate::error::Error;
use crate::memory::GuestMemory;
use husk_devices::power::PowerPorts;
use husk_kvm::{Vcpu, VcpuState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// Tells the guest of its new ID when the last of its vCPUs has its state: an interrupt that came before would be overwritten.
pub struct News {
    power: Arc<PowerPorts>,
    missing: AtomicU32,
}

impl News {
    /// For a guest of `vcpus`.
    pub fn new(power: &Arc<PowerPorts>, vcpus: u32) -> Arc<Self> {
        Arc::new(Self {
            power: Arc::clone(power),
            missing: AtomicU32::new(vcpus),
        })
    }
}

/// What a vCPU goes on from.
pub struct Kept {
    pub state: VcpuState,
    pub news: Option<Arc<News>>,
}

impl Kept {
    /// Let `vcpu` be what was kept. On its thread, once.
    pub fn restore(self, vcpu: &mut Vcpu) -> Result<(), Error> {
        vcpu.restore(&self.state)?;
        if let Some(news) = self.news
            && news.missing.fetch_sub(1, Ordering::AcqRel) == 1
        {
            news.power.notify_generation();
        }
        Ok(())
    }
}
