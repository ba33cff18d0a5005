//! Blocks: the memory regions and disks of a machine, where their data comes from and where it goes.

use serde::{Deserialize, Serialize};

use crate::units::UnitSet;

/// Which block of the machine. Both sides use the same numbers; the outgoing side gives them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockId(pub u16);

impl std::fmt::Display for BlockId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "block {}", self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockKind {
    Memory,
    Disk,
}

/// The size of a memory unit (page) in bytes.
pub const PAGE_BYTES: u32 = 4096;
/// The size of a disk unit (cluster) in bytes.
pub const CLUSTER_BYTES: u32 = 65536;

/// What both sides know of a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockInfo {
    pub id: BlockId,
    pub kind: BlockKind,
    /// For people: "memory below 3 GiB", "disk 0".
    pub name: String,
    pub bytes: u64,
}

impl BlockInfo {
    /// The size of a page or cluster of this block.
    pub fn unit_bytes(&self) -> u32 {
        match self.kind {
            BlockKind::Memory => PAGE_BYTES,
            BlockKind::Disk => CLUSTER_BYTES,
        }
    }

    /// How many units the block has; the last one of a disk may be short.
    pub fn units(&self) -> u64 {
        self.bytes.div_ceil(u64::from(self.unit_bytes()))
    }

    /// Where in the block a unit starts.
    pub fn offset(&self, unit: u64) -> u64 {
        unit * u64::from(self.unit_bytes())
    }

    /// How many bytes a span holds; less than units times unit size only at the end of a disk.
    pub fn span_bytes(&self, span: Span) -> usize {
        let start = self.offset(span.first).min(self.bytes);
        let end = self.offset(span.end()).min(self.bytes);
        (end - start) as usize
    }

    /// Whether a span lies inside the block.
    pub fn contains(&self, span: Span) -> bool {
        span.block == self.id
            && span.count > 0
            && span
                .first
                .checked_add(u64::from(span.count))
                .is_some_and(|end| end <= self.units())
    }
}

/// A run of neighbouring units of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Span {
    pub block: BlockId,
    pub first: u64,
    pub count: u32,
}

impl Span {
    pub fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }
}

/// The BLAKE3 hash of a unit's content: equal names mean equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Name(pub [u8; 32]);

impl Name {
    pub fn of(content: &[u8]) -> Self {
        Name(*blake3::hash(content).as_bytes())
    }
}

/// The name of a whole block's content, however it is read.
pub fn name_of_block(
    info: &BlockInfo,
    mut read: impl FnMut(Span, &mut [u8]) -> Result<(), DataError>,
) -> Result<Name, DataError> {
    const PIECE_BYTES: u32 = 1 << 20;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE_BYTES as usize];
    for span in UnitSet::full(info.units()).spans(info.id, PIECE_BYTES / info.unit_bytes()) {
        let room = buffer.get_mut(..info.span_bytes(span)).unwrap_or_default();
        read(span, room)?;
        hasher.update(room);
    }
    Ok(Name(*hasher.finalize().as_bytes()))
}

/// Reading, writing or tracking a block's data failed; `message` is one clear sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DataError {
    pub kind: DataErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataErrorKind {
    /// There is no room for the data (a full disk).
    NoSpace,
    /// Anything else that the host or the medium did.
    Other,
}

impl DataError {
    pub fn new(message: impl Into<String>) -> Self {
        DataError {
            kind: DataErrorKind::Other,
            message: message.into(),
        }
    }

    pub fn no_space(message: impl Into<String>) -> Self {
        DataError {
            kind: DataErrorKind::NoSpace,
            message: message.into(),
        }
    }
}

/// One block of the outgoing machine: its bytes, and which of them changed.
///
/// The machine runs while these are called, from several threads at once, for different spans.
///
/// The order that makes a copy complete: `take` a span (writes from now on are noted anew), *then* `read` it.
/// A write between the two is read and noted; a write after `read` is noted. See `custody` for who owes what.
pub trait Source: Send + Sync {
    fn info(&self) -> BlockInfo;

    /// Begins to note writes. Writes before this call may be noted or not: everything crosses once anyway.
    fn start_tracking(&self) -> Result<(), DataError>;

    /// Ends noting writes, when the crossing is over either way. Called at least once; may be called again.
    fn stop_tracking(&self);

    /// What has to cross at least once: all pages of memory, the allocated clusters of a disk. Called after
    /// `start_tracking`. Units left out arrive as zeroes.
    fn first_pass(&self) -> Result<UnitSet, DataError>;

    /// Adds to `changed` all units noted as written and not taken since. Forgets nothing.
    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError>;

    /// Takes units over: their notes are cleared and writes from now on are noted anew. The spans are
    /// ascending and of this block. A unit that was not noted may be taken (the first pass does).
    fn take(&self, spans: &[Span]) -> Result<(), DataError>;

    /// Notes units as written again, because they were taken and did not arrive. Cannot fail: a note that
    /// is lost here is a page that is lost.
    fn put_back(&self, spans: &[Span]);

    /// Copies a span's content. `out` is exactly as long as the span (`BlockInfo::span_bytes`).
    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError>;

    /// Says which units of the span are all zeroes, where that is cheaper to know than to `read` (a hole in
    /// a disk, a scan in place): `zero[i]` is set for unit `first + i`. The default knows nothing.
    fn find_zeroes(&self, span: Span, zero: &mut [bool]) -> Result<(), DataError> {
        let _ = (span, zero);
        Ok(())
    }
}

/// One block of the incoming machine, which does not run yet: where data is placed.
///
/// Called from several threads at once. The engine never has two calls for the same unit at the same time.
/// A fresh sink is all zeroes.
pub trait Sink: Send + Sync {
    fn info(&self) -> BlockInfo;

    /// Places a span's content. `data` is exactly as long as the span.
    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError>;

    /// Makes a span zero (a hole, where there are holes).
    fn place_zeroes(&self, span: Span) -> Result<(), DataError>;

    /// Lends the span's own memory to `fill`, where it is memory and contiguous, so that data needs no copy on
    /// the way; returns false, without calling `fill`, where it is not. `fill` may fail half way: the content
    /// is then unspecified and will be sent again.
    fn fill_in_place(&self, span: Span, fill: &mut dyn FnMut(&mut [u8])) -> Result<bool, DataError> {
        let _ = (span, fill);
        Ok(false)
    }

    /// Reads back what was placed: for deltas against it and for comparing both sides.
    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError>;

    /// Whether this side may hold content from before (a base image, an earlier snapshot), so that it pays
    /// to send names first.
    fn has_library(&self) -> bool {
        false
    }

    /// If content of this name is at hand, places it as the unit and returns true.
    fn place_known(&self, unit: u64, name: &Name) -> Result<bool, DataError> {
        let _ = (unit, name);
        Ok(false)
    }
}
