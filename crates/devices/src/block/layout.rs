//! What the driver is told: features and configuration space (5.2.3, 5.2.4).

use super::disk::Disk;
use super::{MAX_DISCARD_SEGMENTS, SECTOR, SEGMENT_SIZE, SEGMENTS};
use husk_config::{CacheType, Drive};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Offset of the capacity in the configuration space.
pub(super) const CAPACITY: usize = 0;
/// Offset of blk_size.
pub(super) const BLOCK_SIZE: usize = 20;
/// Bytes of the configuration space.
const SIZE: usize = 60;

/// The most sectors in a segment of a discard: the host frees these at once.
const DISCARD_FILE: u32 = sectors(4 << 30);
/// Of a device, for which the I/O thread waits.
const DISCARD_DEVICE: u32 = sectors(256 << 20);
/// The most sectors to fill with zeroes: the host may have to write them.
const ZEROES: u32 = sectors(64 << 20);

/// The most sectors in a segment of a discard, and of zeroes.
pub(super) fn segment_limits(disk: &Disk) -> (u32, u32) {
    match disk.is_device {
        true => (DISCARD_DEVICE, ZEROES),
        false => (DISCARD_FILE, ZEROES),
    }
}

/// The feature bits.
pub(super) fn features(drive: &Drive) -> u64 {
    let mut bits = vec![
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
    ];
    if drive.queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    match drive.read_only() {
        true => bits.push(VIRTIO_BLK_F_RO),
        false => bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
    }
    if drive.cache_type == CacheType::Writeback && !drive.read_only() {
        bits.push(VIRTIO_BLK_F_FLUSH);
    }
    bits.iter().fold(0, |all, bit| all | 1 << bit)
}

/// The configuration space.
pub(super) fn config(drive: &Drive, disk: &Disk) -> Vec<u8> {
    let (discard, zeroes) = segment_limits(disk);
    // Powers of two, so that the ratio's logarithm is the difference of theirs.
    let exponent = disk
        .physical_size
        .ilog2()
        .saturating_sub(disk.block_size.ilog2()) as u8;
    let blocks = 1_u16 << exponent.min(15);
    let alignment = disk.physical_size / SECTOR as u32;
    let mut config = Vec::with_capacity(SIZE);
    config.extend(disk.sectors().to_le_bytes()); // 0: capacity
    config.extend(SEGMENT_SIZE.to_le_bytes()); // 8: size_max
    config.extend(SEGMENTS.to_le_bytes()); // 12: seg_max
    config.extend([0; 4]); // 16: geometry
    config.extend(disk.block_size.to_le_bytes()); // 20: blk_size
    config.extend([exponent, 0]); // 24: topology: physical_block_exp, alignment_offset
    config.extend(blocks.to_le_bytes()); // 26: min_io_size
    config.extend(0_u32.to_le_bytes()); // 28: opt_io_size
    config.extend([0; 2]); // 32: writeback, unused0
    config.extend(drive.queues.to_le_bytes()); // 34: num_queues
    config.extend(discard.to_le_bytes()); // 36: max_discard_sectors
    config.extend(MAX_DISCARD_SEGMENTS.to_le_bytes()); // 40: max_discard_seg
    config.extend(alignment.to_le_bytes()); // 44: discard_sector_alignment
    config.extend(zeroes.to_le_bytes()); // 48: max_write_zeroes_sectors
    config.extend(1_u32.to_le_bytes()); // 52: max_write_zeroes_seg
    config.extend([1, 0, 0, 0]); // 56: write_zeroes_may_unmap, unused1
    config
}

const fn sectors(bytes: u64) -> u32 {
    (bytes / SECTOR) as u32
}
