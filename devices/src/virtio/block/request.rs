//! What a guest asks for: from a chain of descriptors, which may hold anything, to a request that is within bounds.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;

use super::config::{MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZERO_SECTORS, SECTOR};
use crate::ram::Ram;

/// A chain may have the largest number of data buffers, and one each for header and status.
const MAX_DESCRIPTORS: usize = 1024;
/// Larger than any driver asks for; bounds what one request can make us copy.
pub(super) const MAX_DATA: u64 = 64 << 20;
const HEADER: usize = 16;

/// Guest memory in pieces.
type Pieces = Vec<(GuestAddress, usize)>;

/// The disk as requests must respect it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) size: u64,
    pub(super) block_size: u32,
    pub(super) read_only: bool,
}

/// A request that can be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) head: u16,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// What to do, or the status that says why not.
    pub(super) action: Result<Action, Refusal>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read { offset: u64, len: u64, into: Pieces },
    Write { offset: u64, len: u64, from: Pieces },
    Flush,
    GetId { into: Pieces },
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// A part of the disk that is inside its bounds and not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The space need not be kept.
    pub(super) unmap: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u8,
    pub(super) why: &'static str,
}

fn refuse(why: &'static str) -> Refusal {
    Refusal {
        status: VIRTIO_BLK_S_IOERR as u8,
        why,
    }
}

fn unsupported(why: &'static str) -> Refusal {
    Refusal {
        status: VIRTIO_BLK_S_UNSUPP as u8,
        why,
    }
}

/// Reads a chain. An error means that there is nowhere to put an answer: the device needs a reset.
pub(super) fn parse(
    ram: &Ram,
    head: u16,
    chain: impl Iterator<Item = Descriptor>,
    bounds: Bounds,
) -> Result<Request, &'static str> {
    let (mut readable, mut writable) = (Pieces::new(), Pieces::new());
    let mut in_order = true;
    let mut complete = false;
    for (count, descriptor) in chain.enumerate() {
        if count >= MAX_DESCRIPTORS + 2 {
            return Err("a request has more than 1026 descriptors");
        }
        // The iterator also ends where a chain is broken or goes in circles; then the last one still has a next.
        complete = !descriptor.has_next();
        let piece = (descriptor.addr(), descriptor.len() as usize);
        if descriptor.is_write_only() {
            writable.push(piece);
        } else {
            in_order &= writable.is_empty();
            readable.push(piece);
        }
    }
    if !complete {
        return Err("a chain of descriptors is broken or has no end");
    }
    let status = cut_status(ram, &mut writable).ok_or("a request has no place for its status")?;
    let action = if in_order {
        action(ram, readable, writable, bounds)
    } else {
        Err(refuse("a request mixes what to read and what to write"))
    };
    Ok(Request { head, status, action })
}

/// The last writable byte.
fn cut_status(ram: &Ram, writable: &mut Pieces) -> Option<GuestAddress> {
    loop {
        let (address, len) = writable.last_mut()?;
        let Some(rest) = len.checked_sub(1) else {
            writable.pop();
            continue;
        };
        *len = rest;
        let status = GuestAddress(address.0.checked_add(rest as u64)?);
        return ram.address_in_range(status).then_some(status);
    }
}

fn action(ram: &Ram, mut readable: Pieces, writable: Pieces, bounds: Bounds) -> Result<Action, Refusal> {
    let header: [u8; HEADER] = cut_bytes(ram, &mut readable)?;
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    let writes = matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    if writes && bounds.read_only {
        return Err(refuse("it writes to a disk that may only be read"));
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            let (offset, len) = place(sector, total(&writable), bounds)?;
            Ok(Action::Read {
                offset,
                len,
                into: writable,
            })
        }
        VIRTIO_BLK_T_OUT => {
            let (offset, len) = place(sector, total(&readable), bounds)?;
            Ok(Action::Write {
                offset,
                len,
                from: readable,
            })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Action::GetId { into: writable }),
        VIRTIO_BLK_T_DISCARD => ranges(ram, readable, bounds, MAX_DISCARD_SECTORS, 0).map(Action::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            ranges(ram, readable, bounds, MAX_ZERO_SECTORS, flags).map(Action::WriteZeroes)
        }
        _ => Err(unsupported("it is of a kind that this device does not know")),
    }
}

/// Where a transfer takes place, if that is inside the disk and of whole blocks.
fn place(sector: u64, len: u64, bounds: Bounds) -> Result<(u64, u64), Refusal> {
    let block = u64::from(bounds.block_size);
    let offset = sector.checked_mul(SECTOR).ok_or(PAST_END)?;
    if len == 0 {
        return Err(refuse("it moves no data"));
    }
    if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
        return Err(refuse("it is not of whole blocks"));
    }
    if len > MAX_DATA {
        return Err(refuse("it moves more than 64 MiB at once"));
    }
    if offset.checked_add(len).is_none_or(|end| end > bounds.size) {
        return Err(PAST_END);
    }
    Ok((offset, len))
}

const PAST_END: Refusal = Refusal {
    status: VIRTIO_BLK_S_IOERR as u8,
    why: "it goes past the end of the disk",
};

fn ranges(
    ram: &Ram,
    mut readable: Pieces,
    bounds: Bounds,
    max_sectors: u32,
    allowed_flags: u32,
) -> Result<Vec<Range>, Refusal> {
    let len = total(&readable);
    let each = HEADER as u64;
    if len == 0 || !len.is_multiple_of(each) || len / each > u64::from(MAX_SEGMENTS) {
        return Err(refuse("its list of ranges is empty, too long or cut off"));
    }
    let mut ranges = Vec::new();
    for _ in 0..len / each {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = cut_bytes(ram, &mut readable)?;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !allowed_flags != 0 {
            return Err(unsupported("it has flags that this device does not know"));
        }
        if sectors > max_sectors {
            return Err(refuse(
                "it discards or zeroes more at once than the device allows",
            ));
        }
        let offset = sector.checked_mul(SECTOR).ok_or(PAST_END)?;
        let len = u64::from(sectors) * SECTOR;
        if offset.checked_add(len).is_none_or(|end| end > bounds.size) {
            return Err(PAST_END);
        }
        if len > 0 {
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            ranges.push(Range { offset, len, unmap });
        }
    }
    Ok(ranges)
}

pub(super) fn total(pieces: &Pieces) -> u64 {
    // A chain has at most 1026 lengths of 32 bits.
    pieces.iter().map(|(_, len)| *len as u64).sum()
}

/// Takes bytes from the front, however they are spread over pieces.
fn cut_bytes(ram: &Ram, pieces: &mut Pieces) -> Result<[u8; HEADER], Refusal> {
    let mut bytes = [0; HEADER];
    let mut at = 0;
    while at < HEADER {
        let Some((address, len)) = pieces.first_mut() else {
            return Err(refuse("it has no complete header"));
        };
        let now = (*len).min(HEADER - at);
        let target = bytes.get_mut(at..at + now).unwrap_or_default();
        ram.read_slice(target, *address)
            .map_err(|_| refuse("its header is outside memory"))?;
        at += now;
        *len -= now;
        *address = GuestAddress(address.0.wrapping_add(now as u64));
        if *len == 0 {
            pieces.remove(0);
        }
    }
    Ok(bytes)
}
