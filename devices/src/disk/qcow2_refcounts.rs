//! Whether imago can be let loose on an image's reference counts.
//!
//! THE DANGER: to allocate a cluster, imago wants the refcount block that covers it, and allocates that block from the
//! first cluster it thinks free. Where the table of those blocks has a gap, that cluster may lie in the gap again, and so
//! on until the stack is full and the whole monitor dies of it: a panic could be caught, this cannot. Without a gap the
//! search passes through blocks that are there, and a block at the end covers itself.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::DiskError;
use super::qcow2_header::Qcow2Header;

/// QEMU's own limit, enough for 64 TiB in the smallest usual clusters.
const MAX_TABLE_BYTES: u64 = 8 << 20;
const CHUNK: usize = 64 << 10;

/// Refuses an image whose table of refcount blocks has a gap. Only writing allocates, so only that needs it.
pub(crate) fn check(path: &Path, file: &File, header: &Qcow2Header) -> Result<(), DiskError> {
    let damaged = || {
        DiskError::unsupported(
            path,
            "has gaps in its reference counts and cannot be written to; repair it with `qemu-img check -r all`, copy it \
            with `qemu-img convert -O qcow2`, or attach it with `readonly`",
        )
    };
    let bytes = header.refcount_table_clusters.checked_mul(header.cluster_size);
    let bytes = bytes
        .filter(|bytes| (1..=MAX_TABLE_BYTES).contains(bytes))
        .ok_or_else(damaged)?;
    let (mut at, mut is_over) = (0, false);
    let mut chunk = vec![0; CHUNK];
    while at < bytes {
        let piece = chunk
            .get_mut(..(bytes - at).min(CHUNK as u64) as usize)
            .unwrap_or_default();
        let place = header.refcount_table.checked_add(at).ok_or_else(damaged)?;
        file.read_exact_at(piece, place).map_err(|_| damaged())?;
        let entries = piece.chunks_exact(8).enumerate();
        for (index, entry) in entries {
            let is_there = entry.iter().any(|byte| *byte != 0);
            let is_first = at == 0 && index == 0;
            if is_there && is_over || is_first && !is_there {
                return Err(damaged());
            }
            is_over |= !is_there;
        }
        at += piece.len() as u64;
    }
    Ok(())
}
