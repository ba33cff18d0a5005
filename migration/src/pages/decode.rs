//! From a frame to placed pages: everything is checked before it is believed.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use crate::block::{BlockId, BlockInfo, CLUSTER_BYTES, DataError, Name, Sink, Span, name_of_block};
use crate::codec::Malformed;
use crate::pages::{delta, repeat};
use crate::wire::{Encoding, Entry, FrameHeader, MAX_ENTRIES, MAX_PAYLOAD_BYTES, WINDOW_BYTES};

/// Why a frame could not be placed.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the lane broke: {0}")]
    Link(#[from] std::io::Error),
    #[error("a frame is malformed: {0}")]
    Malformed(#[from] Malformed),
    #[error("a frame is not what this crossing allows: {0}")]
    Protocol(String),
    #[error(transparent)]
    Data(#[from] DataError),
}

/// The sinks of a machine, with one lock for each window, so that no two lanes ever place into the same one
/// at the same time, whatever a peer sends.
pub struct Placement {
    blocks: BTreeMap<BlockId, Block>,
}

struct Block {
    info: BlockInfo,
    sink: Arc<dyn Sink>,
    windows: Vec<Mutex<()>>,
}

/// A lane's buffers for decoding.
pub struct Scratch {
    table: Vec<u8>,
    entries: Vec<Entry>,
    payload: Box<[u8]>,
    unit: Box<[u8]>,
}

impl Scratch {
    pub fn new() -> Self {
        Scratch {
            table: vec![0; MAX_ENTRIES * Entry::BYTES],
            entries: Vec::with_capacity(MAX_ENTRIES),
            payload: vec![0; MAX_PAYLOAD_BYTES].into(),
            unit: vec![0; CLUSTER_BYTES as usize].into(),
        }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch::new()
    }
}

/// A raw run from this length on is read straight into its place.
const IN_PLACE_BYTES: usize = 32 << 10;

impl Placement {
    pub fn new(sinks: &[Arc<dyn Sink>]) -> Self {
        let blocks = sinks
            .iter()
            .map(|sink| {
                let info = sink.info();
                let windows = (0..info.bytes.div_ceil(WINDOW_BYTES))
                    .map(|_| Mutex::new(()))
                    .collect();
                (
                    info.id,
                    Block {
                        info,
                        sink: Arc::clone(sink),
                        windows,
                    },
                )
            })
            .collect();
        Placement { blocks }
    }

    pub fn sink(&self, block: BlockId) -> Option<&Arc<dyn Sink>> {
        Some(&self.blocks.get(&block)?.sink)
    }

    /// If the other side's content of this name is at hand here, places it.
    pub fn place_known(&self, block: BlockId, unit: u64, name: &Name) -> Result<bool, DataError> {
        let Some(block) = self.blocks.get(&block).filter(|block| unit < block.info.units()) else {
            return Err(DataError::new(format!("unit {unit} is not in {block}")));
        };
        let at = (block.info.offset(unit) / WINDOW_BYTES) as usize;
        let _lock = block
            .windows
            .get(at)
            .map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
        block.sink.place_known(unit, name)
    }

    /// The BLAKE3 hash of every block, in the order of their ids.
    pub fn names(&self) -> Result<Vec<Name>, DataError> {
        self.blocks
            .values()
            .map(|block| name_of_block(&block.info, |span, out| block.sink.read(span, out)))
            .collect()
    }

    /// Which blocks may have content from before.
    pub fn libraries(&self) -> Vec<BlockId> {
        self.blocks
            .iter()
            .filter(|(_, block)| block.sink.has_library())
            .map(|(id, _)| *id)
            .collect()
    }

    /// Reads the frame after `header` and places its content. After an error the content of the units it names
    /// is unspecified, and the caller must not count the frame as held.
    pub fn place(
        &self,
        header: &FrameHeader,
        lane: &mut dyn Read,
        scratch: &mut Scratch,
    ) -> Result<(), FrameError> {
        let block = self
            .blocks
            .get(&header.block)
            .ok_or_else(|| FrameError::Protocol(format!("{} is not offered", header.block)))?;
        let Scratch {
            table,
            entries,
            payload,
            unit,
        } = scratch;
        table.resize(usize::from(header.entries) * Entry::BYTES, 0);
        lane.read_exact(table)?;
        let checksum = crc32c::crc32c(table);
        read_table(table, &block.info, header.payload_bytes, entries)?;
        let payload_bytes = header.payload_bytes as usize;
        if let [run] = entries.as_slice()
            && run.encoding == Encoding::Raw
            && payload_bytes >= IN_PLACE_BYTES
            && block.fill_in_place(*run, lane, checksum, header.checksum)?
        {
            return Ok(());
        }
        let payload = payload.get_mut(..payload_bytes).unwrap_or_default();
        lane.read_exact(payload)?;
        if crc32c::crc32c_append(checksum, payload) != header.checksum {
            return Err(Malformed::Checksum("frame").into());
        }
        let mut rest = &*payload;
        for entry in entries.iter() {
            let (body, behind) = rest
                .split_at_checked(entry.bytes as usize)
                .ok_or(Malformed::Short("payload"))?;
            rest = behind;
            block.place(*entry, body, unit)?;
        }
        Ok(())
    }
}

/// Checks the table against the block and the payload; afterwards every entry is inside one window of the block,
/// entries ascend without overlap, and their payload adds up.
fn read_table(
    table: &[u8],
    info: &BlockInfo,
    payload_bytes: u32,
    entries: &mut Vec<Entry>,
) -> Result<(), FrameError> {
    entries.clear();
    let (mut at, mut total) = (0u64, 0u64);
    for bytes in table.as_chunks::<{ Entry::BYTES }>().0 {
        let entry = Entry::decode(bytes)?;
        let span = span_of(info, entry);
        if !info.contains(span) {
            return Err(FrameError::Protocol(format!(
                "units {}..{} are not in {} of {} units",
                entry.first,
                entry.first.saturating_add(u64::from(entry.count)),
                info.id,
                info.units()
            )));
        }
        if entry.first < at {
            return Err(FrameError::Protocol(format!(
                "the entries of a frame of {} overlap",
                info.id
            )));
        }
        if info.offset(span.first) / WINDOW_BYTES != info.offset(span.end() - 1) / WINDOW_BYTES {
            return Err(FrameError::Protocol(format!(
                "an entry of {} crosses a window",
                info.id
            )));
        }
        let plain = info.span_bytes(span) as u64;
        let fits = match entry.encoding {
            Encoding::Zero => entry.bytes == 0,
            Encoding::Same => entry.bytes == 8 && plain.is_multiple_of(8),
            Encoding::Raw => u64::from(entry.bytes) == plain,
            Encoding::Lz4 => entry.count == 1 && u64::from(entry.bytes) < plain,
            Encoding::Delta => entry.count == 1 && entry.bytes >= 4 && u64::from(entry.bytes) < plain,
            Encoding::MostlySame => {
                entry.count == 1
                    && plain.is_multiple_of(8)
                    && entry.bytes >= 8
                    && u64::from(entry.bytes) < plain
            }
        };
        if !fits {
            return Err(FrameError::Protocol(format!(
                "{} payload bytes are not {:?} of {} units of {}",
                entry.bytes, entry.encoding, entry.count, info.id
            )));
        }
        at = span.end();
        total += u64::from(entry.bytes);
        entries.push(entry);
    }
    if total != u64::from(payload_bytes) {
        return Err(FrameError::Protocol(
            "the payload of a frame does not add up".into(),
        ));
    }
    Ok(())
}

fn span_of(info: &BlockInfo, entry: Entry) -> Span {
    Span {
        block: info.id,
        first: entry.first,
        count: u32::from(entry.count),
    }
}

impl Block {
    fn window(&self, entry: Entry) -> Option<&Mutex<()>> {
        self.windows
            .get((self.info.offset(entry.first) / WINDOW_BYTES) as usize)
    }

    /// Reads a raw run straight into its place, if the sink lends it. False: nothing was read.
    fn fill_in_place(
        &self,
        entry: Entry,
        lane: &mut dyn Read,
        checksum: u32,
        expected: u32,
    ) -> Result<bool, FrameError> {
        let lock = self
            .window(entry)
            .map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
        let mut outcome = Ok(());
        let filled = self.sink.fill_in_place(span_of(&self.info, entry), &mut |room| {
            outcome = if room.len() != entry.bytes as usize {
                Err(FrameError::Data(DataError::new(
                    "the sink lent room of another length",
                )))
            } else {
                match lane.read_exact(room) {
                    Err(error) => Err(error.into()),
                    Ok(()) if crc32c::crc32c_append(checksum, room) != expected => {
                        Err(Malformed::Checksum("frame").into())
                    }
                    Ok(()) => Ok(()),
                }
            };
        })?;
        drop(lock);
        outcome.map(|()| filled)
    }

    fn place(&self, entry: Entry, body: &[u8], unit: &mut [u8]) -> Result<(), FrameError> {
        let span = span_of(&self.info, entry);
        let _lock = self
            .window(entry)
            .map(|lock| lock.lock().unwrap_or_else(PoisonError::into_inner));
        match entry.encoding {
            Encoding::Zero => self.sink.place_zeroes(span)?,
            Encoding::Raw => self.sink.place(span, body)?,
            Encoding::Same => {
                let word = *body.first_chunk::<8>().ok_or(Malformed::Short("pattern"))?;
                for number in span.first..span.end() {
                    let one = Span {
                        block: span.block,
                        first: number,
                        count: 1,
                    };
                    let room = unit.get_mut(..self.info.span_bytes(one)).unwrap_or_default();
                    repeat(word, room);
                    self.sink.place(one, room)?;
                }
            }
            Encoding::Lz4 => {
                let room = unit.get_mut(..self.info.span_bytes(span)).unwrap_or_default();
                match lz4_flex::block::decompress_into(body, room) {
                    Ok(length) if length == room.len() => self.sink.place(span, room)?,
                    _ => {
                        return Err(FrameError::Protocol(
                            "a compressed unit does not decompress".into(),
                        ));
                    }
                }
            }
            Encoding::MostlySame => {
                let room = unit.get_mut(..self.info.span_bytes(span)).unwrap_or_default();
                let (word, difference) = body.split_first_chunk::<8>().ok_or(Malformed::Short("pattern"))?;
                repeat(*word, room);
                if !delta::apply(room, difference) {
                    return Err(FrameError::Protocol("a difference leads out of its page".into()));
                }
                self.sink.place(span, room)?;
            }
            Encoding::Delta => {
                let room = unit.get_mut(..self.info.span_bytes(span)).unwrap_or_default();
                let (base, difference) = body
                    .split_first_chunk::<4>()
                    .ok_or(Malformed::Short("base of a difference"))?;
                self.sink.read(span, room)?;
                if crc32c::crc32c(room).to_le_bytes() != *base {
                    return Err(FrameError::Protocol(
                        "a difference is against another version".into(),
                    ));
                }
                if !delta::apply(room, difference) {
                    return Err(FrameError::Protocol("a difference leads out of its page".into()));
                }
                self.sink.place(span, room)?;
            }
        }
        Ok(())
    }
}
