//! What a lane carries: a frame is a head, a table of runs of units, and their payload.

use crate::block::BlockId;
use crate::codec::{Malformed, Reader};

/// A frame's plain content never crosses a window of this size, and is never longer than one.
pub const WINDOW_BYTES: u64 = 1 << 20;
pub const MAX_ENTRIES: usize = 256;
pub const MAX_PAYLOAD_BYTES: usize = WINDOW_BYTES as usize;
pub const MAX_FRAME_BYTES: usize = FrameHeader::BYTES + MAX_ENTRIES * Entry::BYTES + MAX_PAYLOAD_BYTES;

const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"frm\n");

/// The head of a frame on a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    pub block: BlockId,
    pub entries: u16,
    /// Counts the frames of this lane from 1.
    pub sequence: u64,
    pub round: u32,
    pub payload_bytes: u32,
    /// CRC32C of table and payload.
    pub checksum: u32,
}

impl FrameHeader {
    pub const BYTES: usize = 4 + 2 + 2 + 8 + 4 + 4 + 4 + 4;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let FrameHeader {
            block,
            entries,
            sequence,
            round,
            payload_bytes,
            checksum,
        } = *self;
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&block.0.to_le_bytes());
        bytes[6..8].copy_from_slice(&entries.to_le_bytes());
        bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&round.to_le_bytes());
        bytes[20..24].copy_from_slice(&payload_bytes.to_le_bytes());
        bytes[24..28].copy_from_slice(&checksum.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let (head, sum) = bytes.split_at(Self::BYTES - 4);
        let mut r = Reader::new(head);
        if r.u32("frame")? != FRAME_MAGIC || crc32c::crc32c(head).to_le_bytes() != *sum {
            return Err(Malformed::Checksum("frame header"));
        }
        let header = FrameHeader {
            block: BlockId(r.u16("block")?),
            entries: r.u16("number of entries")?,
            sequence: r.u64("sequence")?,
            round: r.u32("round")?,
            payload_bytes: r.u32("payload length")?,
            checksum: r.u32("checksum")?,
        };
        let limit = |what, got: u64, most: u64| {
            if got > most {
                Err(Malformed::TooMuch { what, got, most })
            } else {
                Ok(())
            }
        };
        limit("number of entries", u64::from(header.entries), MAX_ENTRIES as u64)?;
        limit(
            "payload length",
            u64::from(header.payload_bytes),
            MAX_PAYLOAD_BYTES as u64,
        )?;
        Ok(header)
    }
}

/// How long the frame is that begins here, if that can be told yet.
pub fn frame_bytes(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(head) = bytes.first_chunk() else {
        return Ok(None);
    };
    let header = FrameHeader::decode(head)?;
    let table = usize::from(header.entries) * Entry::BYTES;
    Ok(Some(FrameHeader::BYTES + table + header.payload_bytes as usize))
}

/// What a unit became on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Encoding {
    /// All zeroes; no payload.
    Zero,
    /// Eight bytes, repeated.
    Same,
    /// As it is.
    Raw,
    /// LZ4 block, one unit.
    Lz4,
    /// Difference to what the other side holds, one unit.
    Delta,
    /// Eight bytes, and a difference to a page that repeats them, one unit.
    MostlySame,
}

/// One run of units in a frame, in the same encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub first: u64,
    pub count: u16,
    pub encoding: Encoding,
    /// Payload bytes of this entry.
    pub bytes: u32,
}

impl Entry {
    pub const BYTES: usize = 16;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..8].copy_from_slice(&self.first.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.count.to_le_bytes());
        bytes[10] = match self.encoding {
            Encoding::Zero => 0,
            Encoding::Same => 1,
            Encoding::Raw => 2,
            Encoding::Lz4 => 3,
            Encoding::Delta => 4,
            Encoding::MostlySame => 5,
        };
        bytes[12..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let (first, count) = (r.u64("first unit")?, r.u16("number of units")?);
        let encoding = match r.u8("encoding")? {
            0 => Encoding::Zero,
            1 => Encoding::Same,
            2 => Encoding::Raw,
            3 => Encoding::Lz4,
            4 => Encoding::Delta,
            5 => Encoding::MostlySame,
            got => {
                return Err(Malformed::Unknown {
                    what: "encoding",
                    got: u64::from(got),
                });
            }
        };
        match r.u8("reserved byte")? {
            0 => {}
            got => {
                return Err(Malformed::Unknown {
                    what: "reserved byte",
                    got: u64::from(got),
                });
            }
        }
        Ok(Entry {
            first,
            count,
            encoding,
            bytes: r.u32("length of an entry")?,
        })
    }
}
