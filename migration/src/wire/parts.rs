//! The pieces that messages are made of: names, numbers, an offer, and the codes of phases, causes and standings.

use std::time::Duration;

use super::{MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_DESCRIPTION_BYTES, MAX_NAMES, MAX_TEXT_BYTES};
use crate::block::{BlockId, BlockInfo, BlockKind, Name};
use crate::codec::{Malformed, Reader, Writer};
use crate::failure::{Cause, Phase};
use crate::handover::{MachineId, Standing};
use crate::machine::{MachineCard, Offer};

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn write_names(w: &mut Writer, names: &[Name]) {
    w.u32(names.len() as u32);
    names.iter().for_each(|name| _ = w.raw(&name.0));
}

pub(super) fn read_names(r: &mut Reader<'_>) -> Result<Vec<Name>, Malformed> {
    let count = r.count(MAX_NAMES, 32, "number of names")?;
    (0..count).map(|_| Ok(Name(r.array("name")?))).collect()
}

pub(super) fn write_numbers(w: &mut Writer, numbers: &[u64]) {
    w.u32(numbers.len() as u32);
    numbers.iter().for_each(|number| _ = w.u64(*number));
}

pub(super) fn read_numbers(
    r: &mut Reader<'_>,
    most: usize,
    what: &'static str,
) -> Result<Vec<u64>, Malformed> {
    let count = r.count(most, 8, what)?;
    (0..count).map(|_| r.u64(what)).collect()
}

pub(super) fn write_offer(w: &mut Writer, offer: &Offer) {
    let Offer { card, blocks } = offer;
    let MachineCard {
        machine,
        name,
        running,
        description,
    } = card;
    w.raw(&machine.0).text(name, MAX_TEXT_BYTES);
    w.flag(*running).bytes(description).u32(blocks.len() as u32);
    for BlockInfo {
        id,
        kind,
        name,
        bytes,
    } in blocks
    {
        w.u16(id.0)
            .u8(block_kind_code(*kind))
            .text(name, MAX_TEXT_BYTES)
            .u64(*bytes);
    }
}

pub(super) fn read_offer(r: &mut Reader<'_>) -> Result<Offer, Malformed> {
    let machine = MachineId(r.array("machine")?);
    let name = r.text(MAX_TEXT_BYTES, "machine name")?;
    let running = r.flag("running")?;
    let description = r.bytes(MAX_DESCRIPTION_BYTES, "machine description")?;
    let count = r.count(MAX_BLOCKS, 15, "number of blocks")?;
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        blocks.push(read_block(r)?);
    }
    let card = MachineCard {
        machine,
        name,
        running,
        description,
    };
    Ok(Offer { card, blocks })
}

fn block_kind_code(kind: BlockKind) -> u8 {
    match kind {
        BlockKind::Memory => 0,
        BlockKind::Disk => 1,
    }
}

fn read_block(r: &mut Reader<'_>) -> Result<BlockInfo, Malformed> {
    let id = BlockId(r.u16("block")?);
    let kind = match r.u8("kind of block")? {
        0 => BlockKind::Memory,
        1 => BlockKind::Disk,
        got => {
            return Err(Malformed::Unknown {
                what: "kind of block",
                got: u64::from(got),
            });
        }
    };
    let name = r.text(MAX_TEXT_BYTES, "block name")?;
    let bytes = r.u64("block size")?;
    if bytes > MAX_BLOCK_BYTES {
        return Err(Malformed::TooMuch {
            what: "block size",
            got: bytes,
            most: MAX_BLOCK_BYTES,
        });
    }
    Ok(BlockInfo {
        id,
        kind,
        name,
        bytes,
    })
}

/// The numbers of phases, causes and standings on the wire: their places in these tables.
const PHASES: [Phase; 9] = [
    Phase::Negotiate,
    Phase::Prepare,
    Phase::CopyLive,
    Phase::Pause,
    Phase::CopyRest,
    Phase::SendState,
    Phase::Verify,
    Phase::HandOver,
    Phase::Finish,
];

const CAUSES: [Cause; 18] = [
    Cause::Link,
    Cause::Stalled,
    Cause::Version,
    Cause::Protocol,
    Cause::Damaged,
    Cause::Incompatible,
    Cause::NoMemory,
    Cause::NoSpace,
    Cause::NotAllowed,
    Cause::Busy,
    Cause::Data,
    Cause::Machine,
    Cause::Ledger,
    Cause::Cancelled,
    Cause::Deadline,
    Cause::NotConverging,
    Cause::Declined,
    Cause::Ended,
];

const STANDINGS: [Standing; 5] = [
    Standing::GivenAway,
    Standing::Gone,
    Standing::Kept,
    Standing::Taken,
    Standing::Declined,
];

fn code_in<T: PartialEq>(table: &[T], value: &T) -> u8 {
    table
        .iter()
        .position(|entry| entry == value)
        .map_or(u8::MAX, |at| at as u8)
}

fn value_in<T: Copy>(table: &[T], code: u8, what: &'static str) -> Result<T, Malformed> {
    table.get(usize::from(code)).copied().ok_or(Malformed::Unknown {
        what,
        got: u64::from(code),
    })
}

pub(super) fn phase_code(phase: Phase) -> u8 {
    code_in(&PHASES, &phase)
}

pub(super) fn read_phase(r: &mut Reader<'_>) -> Result<Phase, Malformed> {
    value_in(&PHASES, r.u8("phase")?, "phase")
}

pub(super) fn cause_code(cause: Cause) -> u8 {
    code_in(&CAUSES, &cause)
}

pub(super) fn read_cause(r: &mut Reader<'_>) -> Result<Cause, Malformed> {
    value_in(&CAUSES, r.u8("cause")?, "cause")
}

pub(super) fn standing_code(standing: Standing) -> u8 {
    code_in(&STANDINGS, &standing)
}

pub(super) fn read_standing(r: &mut Reader<'_>) -> Result<Standing, Malformed> {
    value_in(&STANDINGS, r.u8("standing")?, "standing")
}
