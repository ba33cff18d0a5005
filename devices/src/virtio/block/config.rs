//! What the guest reads about the disk: its configuration space and its features.

use serde::{Deserialize, Serialize};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

pub(super) const SECTOR: u64 = 512;
pub(super) const QUEUE_SIZE: u16 = 256;
/// Ranges in one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u32 = 32;
/// 1 GiB: giving space back costs the host little, whatever its length.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// 32 MiB: where the file system cannot zero a range, it is written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 16;
/// Where `writeback` lies: the one field a guest may write.
const WRITEBACK_AT: u64 = 32;
const CONFIG_LEN: usize = 60;

/// What the guest was told about the disk when it started, and must go on to find wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) discard_granularity: u32,
    pub(super) read_only: bool,
    pub(super) queues: u16,
    /// What GET_ID answers.
    pub(super) serial: String,
}

pub(super) fn features(shape: &Shape) -> u64 {
    let always = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ];
    let writing = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
    let by_kind: &[u32] = if shape.read_only {
        &[VIRTIO_BLK_F_RO]
    } else {
        &writing
    };
    always.iter().chain(by_kind).fold(0, |bits, bit| bits | 1 << bit)
}

/// The whole configuration space, as virtio 1.2 lays it out in section 5.2.4.
fn bytes(shape: &Shape, writeback: bool) -> [u8; CONFIG_LEN] {
    let Shape {
        size,
        block_size,
        discard_granularity,
        read_only,
        queues,
        serial: _,
    } = shape;
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, value: &[u8]| {
        if let Some(place) = config.get_mut(at..at + value.len()) {
            place.copy_from_slice(value);
        }
    };
    put(0, &(size / SECTOR).to_le_bytes());
    // 8: size_max and 16: geometry are not offered.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &block_size.to_le_bytes());
    // Topology: physical blocks of 4 KiB in logical ones, aligned, at least one, best one granule of the image.
    let physical = (4096 / block_size.max(&512)).max(1);
    put(24, &[physical.trailing_zeros() as u8, 0]);
    put(26, &(physical as u16).to_le_bytes());
    put(28, &(discard_granularity / block_size.max(&512)).to_le_bytes());
    put(WRITEBACK_AT as usize, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    if !read_only {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes());
        put(44, &(discard_granularity / SECTOR as u32).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[1]);
    }
    config
}

/// Reads from the configuration space; what is not there reads as zero.
pub(super) fn read(shape: &Shape, writeback: bool, offset: u64, data: &mut [u8]) {
    let config = bytes(shape, writeback);
    for (at, byte) in data.iter_mut().enumerate() {
        let index = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(at));
        *byte = index.and_then(|index| config.get(index)).copied().unwrap_or(0);
    }
}

/// What a write to the configuration space says about write-back, if it says anything.
pub(super) fn written_writeback(offset: u64, data: &[u8]) -> Option<bool> {
    let at = usize::try_from(WRITEBACK_AT.checked_sub(offset)?).ok()?;
    data.get(at).map(|value| value & 1 != 0)
}
