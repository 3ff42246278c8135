//! What the driver is told of the server's disk: its features and its configuration space (virtio 1.2, 5.2.3, 5.2.4), as far as they can
//! be passed on.

use super::QUEUE_SIZE;
use super::connection::Error;
use super::frontend::Frontend;
use husk_config::{CacheType, Drive};
use std::time::Instant;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Bytes of the configuration space, up to what of it is known here. Servers may refuse to tell more than they know.
pub(super) const SIZE: usize = 60;

/// Offset of the size of the largest segment.
const SIZE_MAX: usize = 8;

/// The most sectors of a disk: its bytes can be counted, with a sign.
const MOST_SECTORS: u64 = 1 << 54;
/// The largest block, a page of the guest's.
const LARGEST_BLOCK: u32 = 4096;

/// What a disk may have that Husk need not take part in. Not: a write-back mode that the driver sets, because that is written to the
/// configuration space; zones and secure erase, whose fields lie behind [`SIZE`].
const PASSED_ON: [u32; 7] = [
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_WRITE_ZEROES,
];

/// What a driver is offered of the disk of `server`: feature bits, and the configuration space.
pub(super) fn learn(
    drive: &Drive,
    server: &Frontend,
    until: Instant,
) -> Result<(u64, Vec<u8>), Error> {
    let mut space = [0; SIZE];
    server.read_config(&mut space, until)?;
    let features = features(drive, server.features(), &space);
    check(&mut space, features, drive.queues)?;
    Ok((features, space.to_vec()))
}

/// The feature bits, of those that the server has with this configuration space.
fn features(drive: &Drive, server: u64, space: &[u8; SIZE]) -> u64 {
    let mut known = PASSED_ON.to_vec();
    if drive.cache_type == CacheType::Writeback {
        known.push(VIRTIO_BLK_F_FLUSH);
    }
    if drive.queues > 1 {
        known.push(VIRTIO_BLK_F_MQ);
    }
    // qemu-storage-daemon says that it has a limit, and does not say which.
    if field(space, SIZE_MAX) == [0; 4] {
        known.retain(|bit| *bit != VIRTIO_BLK_F_SIZE_MAX);
    }
    server & known.iter().fold(0, |all, bit| all | 1 << bit)
}

/// Read the configuration space from `server` again, for a driver that was offered `features`.
pub(super) fn read(
    server: &Frontend,
    features: u64,
    queues: u16,
    until: Instant,
) -> Result<Vec<u8>, Error> {
    let mut space = [0; SIZE];
    server.read_config(&mut space, until)?;
    check(&mut space, features, queues)?;
    Ok(space.to_vec())
}

/// Refuse what a driver could stumble over, and set what is not the server's to say.
fn check(space: &mut [u8; SIZE], features: u64, queues: u16) -> Result<(), Error> {
    let has = |bit: u32| features & 1 << bit != 0;
    let sectors = u64::from_le_bytes(field(space, 0));
    if sectors > MOST_SECTORS {
        return Err(Error::Disk(format!("{sectors} sectors, more than can be")));
    }
    let size_max = u32::from_le_bytes(field(space, SIZE_MAX));
    if has(VIRTIO_BLK_F_SIZE_MAX) && size_max < 512 {
        return Err(Error::Disk(format!("segments of {size_max} bytes")));
    }
    let block = u32::from_le_bytes(field(space, 20));
    if has(VIRTIO_BLK_F_BLK_SIZE)
        && !(block.is_power_of_two() && (512..=LARGEST_BLOCK).contains(&block))
    {
        return Err(Error::Disk(format!(
            "blocks of {block} bytes, which is no power of two from 512 to {LARGEST_BLOCK}"
        )));
    }
    // 2.7.5.3.1: no chain is longer than the queue; a header and a status are in it as well.
    let segments = u32::from_le_bytes(field(space, 12));
    let most = u32::from(QUEUE_SIZE) - 2;
    set(space, 12, segments.clamp(1, most).to_le_bytes());
    // A larger exponent than makes a block of 2 GiB would overflow in drivers.
    let [exponent] = field(space, 24);
    set(space, 24, [exponent.min(22)]);
    // writeback: not negotiated, so that it is not the driver's to read.
    set(space, 32, [0]);
    set(space, 34, queues.to_le_bytes());
    Ok(())
}

fn field<const N: usize>(space: &[u8; SIZE], at: usize) -> [u8; N] {
    let bytes = space.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().unwrap_or([0; N])
}

fn set<const N: usize>(space: &mut [u8; SIZE], at: usize, value: [u8; N]) {
    if let Some(bytes) = space.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *bytes = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;

    /// A disk that is fine, with a field changed.
    fn checked<const N: usize>(at: usize, value: [u8; N]) -> Result<[u8; SIZE], String> {
        let mut space = [0; SIZE];
        set(&mut space, 0, 2048_u64.to_le_bytes());
        set(&mut space, 8, 65536_u32.to_le_bytes());
        set(&mut space, 12, 126_u32.to_le_bytes());
        set(&mut space, 20, 512_u32.to_le_bytes());
        set(&mut space, at, value);
        check(&mut space, ALL, 3).map_err(|e| e.to_string())?;
        Ok(space)
    }

    #[test]
    fn what_the_server_says_is_checked() {
        let fine = checked(0, 4096_u64.to_le_bytes()).unwrap();
        assert_eq!(field(&fine, 0), 4096_u64.to_le_bytes());
        assert_eq!(field(&fine, 12), 126_u32.to_le_bytes());
        assert_eq!(field(&fine, 34), 3_u16.to_le_bytes());
        for (at, value) in [(20, 0_u32), (20, 513), (20, 8192), (20, u32::MAX), (8, 0)] {
            let said = checked(at, value.to_le_bytes()).unwrap_err();
            assert!(said.contains(&value.to_string()), "{said}");
        }
        assert!(checked(0, u64::MAX.to_le_bytes()).is_err());
        for (said, told) in [(0, 1), (254, 254), (u32::MAX, 254_u32)] {
            let space = checked(12, said.to_le_bytes()).unwrap();
            assert_eq!(field(&space, 12), told.to_le_bytes());
        }
        assert_eq!(field(&checked(24, [255]).unwrap(), 24), [22]);
        assert_eq!(field(&checked(32, [1]).unwrap(), 32), [0]);
    }

    #[test]
    fn features_that_need_husk_are_not_offered() {
        let mut drive = Drive::new("d", "");
        let space = [1; SIZE];
        let features = |drive: &Drive, server| super::features(drive, server, &space);
        let offered = features(&drive, u64::MAX);
        assert_ne!(offered & 1 << VIRTIO_BLK_F_SIZE_MAX, 0);
        let limitless = super::features(&drive, u64::MAX, &[0; SIZE]);
        assert_eq!(limitless, offered & !(1 << VIRTIO_BLK_F_SIZE_MAX));
        for bit in [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, 11, 16, 17, 33, 34] {
            assert_eq!(offered & 1 << bit, 0, "{bit}");
        }
        assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
        drive.cache_type = CacheType::Writeback;
        drive.queues = 2;
        let both = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_MQ;
        assert_eq!(features(&drive, u64::MAX), offered | both);
        assert_eq!(features(&drive, 1 << VIRTIO_BLK_F_RO), 1 << VIRTIO_BLK_F_RO);
    }
}
