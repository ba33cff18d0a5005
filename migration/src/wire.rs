//! Every byte that crosses the link: greetings, messages, limits and the version here, frames in `wire/frame.rs`.
//!
//! Two kinds of connection. The **control** connection carries [`Message`]s, each in an envelope of length and
//! CRC32C. A **lane** carries frames: a [`FrameHeader`], a table of [`Entry`]s and their payload, one behind
//! the other. Every connection begins with a [`Greeting`]. All numbers are little endian.
//!
//! Versions: both sides say the oldest and the newest they speak, and use the newest common one.
//! 1: everything but names. 2: content names (`Announce`, `Wanted`). 3: pages that are mostly the same. 4: questions
//! before a crossing (`Consider`, `Ballast`, `Swallowed`), and `Awake` in place of `Running`. 5: `Cause::Ended`.

mod frame;
mod parts;

use std::time::Duration;

use crate::block::{BlockId, Name};
use crate::codec::{Malformed, Reader, Writer};
use crate::failure::{Cause, Phase, Reason};
use crate::handover::{LedgerId, SessionId, Standing};
use crate::machine::{Loaded, Offer};
use crate::report::Woken;

pub use frame::{
    Encoding, Entry, FrameHeader, MAX_ENTRIES, MAX_FRAME_BYTES, MAX_PAYLOAD_BYTES, WINDOW_BYTES, frame_bytes,
};
use parts::{
    cause_code, nanos, phase_code, read_cause, read_names, read_numbers, read_offer, read_phase,
    read_standing, standing_code, write_names, write_numbers, write_offer,
};

pub const VERSION: u16 = 5;
pub const OLDEST_VERSION: u16 = 1;
/// The version that brought content names.
pub const VERSION_WITH_NAMES: u16 = 2;
/// The version that brought [`Encoding::MostlySame`].
pub const VERSION_WITH_MOSTLY_SAME: u16 = 3;
/// The version that brought questions before a crossing.
pub const VERSION_WITH_QUESTIONS: u16 = 4;
/// The version in which the incoming side says when the guest ran.
pub const VERSION_WITH_AWAKE: u16 = 4;

/// The version in which a side says of a guest that it has ended.
pub const VERSION_WITH_ENDED: u16 = 5;

pub const MAX_MESSAGE_BYTES: usize = 2 << 20;
pub const MAX_DESCRIPTION_BYTES: usize = 1 << 20;
pub const MAX_STATE_BYTES: u64 = 256 << 20;
pub const STATE_PART_BYTES: usize = 1 << 20;
pub const MAX_BLOCKS: usize = 256;
pub const MAX_BLOCK_BYTES: u64 = 1 << 46;
pub const MAX_LANES: u16 = 64;
pub const MAX_NAMES: usize = 16 << 10;
pub const MAX_TEXT_BYTES: usize = 1024;
pub const MAX_BALLAST_BYTES: usize = 1 << 20;

const GREETING_MAGIC: [u8; 8] = *b"ferry\r\n\0";

/// The newest version both ranges hold.
pub fn common_version(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0)).then_some(newest)
}

/// What a connection is for; its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    Control {
        session: SessionId,
        attempt: u32,
    },
    Lane {
        session: SessionId,
        attempt: u32,
        index: u16,
    },
}

impl Greeting {
    pub const BYTES: usize = 8 + 1 + 16 + 4 + 2 + 4;

    pub fn session(&self) -> SessionId {
        match self {
            Greeting::Control { session, .. } | Greeting::Lane { session, .. } => *session,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.raw(&GREETING_MAGIC);
        match *self {
            Greeting::Control { session, attempt } => w.u8(0).raw(&session.0).u32(attempt).u16(0),
            Greeting::Lane {
                session,
                attempt,
                index,
            } => w.u8(1).raw(&session.0).u32(attempt).u16(index),
        };
        let mut bytes = w.finish();
        let sum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let (head, sum) = bytes.split_at(Self::BYTES - 4);
        let mut r = Reader::new(head);
        if r.array("greeting")? != GREETING_MAGIC || crc32c::crc32c(head).to_le_bytes() != *sum {
            return Err(Malformed::Checksum("greeting"));
        }
        let kind = r.u8("kind of connection")?;
        let (session, attempt) = (SessionId(r.array("session")?), r.u32("attempt")?);
        let index = r.u16("lane")?;
        match kind {
            0 => Ok(Greeting::Control { session, attempt }),
            1 if index < MAX_LANES => Ok(Greeting::Lane {
                session,
                attempt,
                index,
            }),
            1 => Err(Malformed::TooMuch {
                what: "lane",
                got: u64::from(index),
                most: u64::from(MAX_LANES) - 1,
            }),
            got => Err(Malformed::Unknown {
                what: "kind of connection",
                got: u64::from(got),
            }),
        }
    }
}

/// Why a connection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A crossing begins (or begins again, if the incoming side was not prepared yet).
    Begin,
    /// The link broke: what do you hold of what was sent in attempt `since`?
    Resume { since: u32 },
    /// After the go-ahead: did you take the machine?
    Ask,
}

/// How far the incoming side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Copying,
    Loaded,
}

/// What the control connection carries. Above the line the outgoing side speaks, below it the incoming side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Hello {
        oldest: u16,
        newest: u16,
        session: SessionId,
        attempt: u32,
        ledger: LedgerId,
        purpose: Purpose,
    },
    Offer {
        epoch: u64,
        lanes: u16,
        offer: Offer,
    },
    Prepare,
    Announce {
        block: BlockId,
        first: u64,
        names: Vec<Name>,
    },
    RoundEnd {
        round: u32,
        frames: Vec<u64>,
    },
    StatePart {
        offset: u64,
        bytes: Vec<u8>,
    },
    Load {
        total: u64,
        name: Name,
    },
    Verify,
    Go {
        session: SessionId,
        epoch: u64,
    },
    Finish,
    Cancel {
        cause: Cause,
        phase: Phase,
        message: String,
    },
    /// Would you take this machine? Answered like an offer, and nothing comes of it.
    Consider {
        epoch: u64,
        offer: Offer,
    },
    /// Bytes that mean nothing, to see what the link carries. Answered if asked for.
    Ballast {
        answer: bool,
        bytes: Vec<u8>,
    },
    // ------------------------------------------------------------------
    Welcome {
        version: u16,
        ledger: LedgerId,
    },
    Holding {
        version: u16,
        stage: Stage,
        frames: Vec<u64>,
    },
    /// The final word on a session, and why, as far as it is remembered.
    Standing {
        ledger: LedgerId,
        standing: Standing,
        why: Option<Reason>,
    },
    Accepted {
        lanes: u16,
    },
    Prepared {
        libraries: Vec<BlockId>,
    },
    Wanted {
        units: Vec<u64>,
    },
    RoundHeld {
        round: u32,
    },
    Loaded {
        loaded: Loaded,
    },
    Hashes {
        names: Vec<Name>,
        took: Duration,
    },
    Running {
        took: Duration,
    },
    Refused {
        phase: Phase,
        reason: Reason,
    },
    /// A sign of life while an answer takes its time; so many frames arrived so far.
    Working {
        frames: u64,
    },
    /// The ballast so far has arrived.
    Swallowed,
    /// The machine runs; what `Running` says, and more.
    Awake {
        woken: Woken,
        clock_behind: Option<Duration>,
    },
}

impl Message {
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello { .. } => "Hello",
            Message::Offer { .. } => "Offer",
            Message::Prepare => "Prepare",
            Message::Announce { .. } => "Announce",
            Message::RoundEnd { .. } => "RoundEnd",
            Message::StatePart { .. } => "StatePart",
            Message::Load { .. } => "Load",
            Message::Verify => "Verify",
            Message::Go { .. } => "Go",
            Message::Finish => "Finish",
            Message::Cancel { .. } => "Cancel",
            Message::Consider { .. } => "Consider",
            Message::Ballast { .. } => "Ballast",
            Message::Welcome { .. } => "Welcome",
            Message::Holding { .. } => "Holding",
            Message::Standing { .. } => "Standing",
            Message::Accepted { .. } => "Accepted",
            Message::Prepared { .. } => "Prepared",
            Message::Wanted { .. } => "Wanted",
            Message::RoundHeld { .. } => "RoundHeld",
            Message::Loaded { .. } => "Loaded",
            Message::Hashes { .. } => "Hashes",
            Message::Running { .. } => "Running",
            Message::Refused { .. } => "Refused",
            Message::Working { .. } => "Working",
            Message::Swallowed => "Swallowed",
            Message::Awake { .. } => "Awake",
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Message::Hello {
                oldest,
                newest,
                session,
                attempt,
                ledger,
                purpose,
            } => {
                w.u8(1)
                    .u16(*oldest)
                    .u16(*newest)
                    .raw(&session.0)
                    .u32(*attempt)
                    .raw(&ledger.0);
                match purpose {
                    Purpose::Begin => w.u8(0).u32(0),
                    Purpose::Resume { since } => w.u8(1).u32(*since),
                    Purpose::Ask => w.u8(2).u32(0),
                };
            }
            Message::Offer { epoch, lanes, offer } => {
                w.u8(2).u64(*epoch).u16(*lanes);
                write_offer(&mut w, offer);
            }
            Message::Prepare => _ = w.u8(3),
            Message::Announce { block, first, names } => {
                w.u8(4).u16(block.0).u64(*first);
                write_names(&mut w, names);
            }
            Message::RoundEnd { round, frames } => {
                w.u8(5).u32(*round);
                write_numbers(&mut w, frames);
            }
            Message::StatePart { offset, bytes } => _ = w.u8(6).u64(*offset).bytes(bytes),
            Message::Load { total, name } => _ = w.u8(7).u64(*total).raw(&name.0),
            Message::Verify => _ = w.u8(8),
            Message::Go { session, epoch } => _ = w.u8(9).raw(&session.0).u64(*epoch),
            Message::Finish => _ = w.u8(10),
            Message::Cancel {
                cause,
                phase,
                message,
            } => {
                w.u8(11)
                    .u8(cause_code(*cause))
                    .u8(phase_code(*phase))
                    .text(message, MAX_TEXT_BYTES);
            }
            Message::Consider { epoch, offer } => {
                w.u8(12).u64(*epoch);
                write_offer(&mut w, offer);
            }
            Message::Ballast { answer, bytes } => _ = w.u8(13).flag(*answer).bytes(bytes),
            Message::Welcome { version, ledger } => _ = w.u8(65).u16(*version).raw(&ledger.0),
            Message::Holding {
                version,
                stage,
                frames,
            } => {
                w.u8(66).u16(*version).flag(*stage == Stage::Loaded);
                write_numbers(&mut w, frames);
            }
            Message::Standing {
                ledger,
                standing,
                why,
            } => {
                w.u8(67)
                    .raw(&ledger.0)
                    .u8(standing_code(*standing))
                    .flag(why.is_some());
                if let Some(Reason { cause, message }) = why {
                    w.u8(cause_code(*cause)).text(message, MAX_TEXT_BYTES);
                }
            }
            Message::Accepted { lanes } => _ = w.u8(68).u16(*lanes),
            Message::Prepared { libraries } => {
                w.u8(69).u32(libraries.len() as u32);
                libraries.iter().for_each(|block| _ = w.u16(block.0));
            }
            Message::Wanted { units } => {
                w.u8(70);
                write_numbers(&mut w, units);
            }
            Message::RoundHeld { round } => _ = w.u8(71).u32(*round),
            Message::Loaded {
                loaded: Loaded { restore, flush },
            } => {
                w.u8(72).u64(nanos(*restore)).u64(nanos(*flush));
            }
            Message::Hashes { names, took } => {
                w.u8(73).u64(nanos(*took));
                write_names(&mut w, names);
            }
            Message::Running { took } => _ = w.u8(74).u64(nanos(*took)),
            Message::Working { frames } => _ = w.u8(76).u64(*frames),
            Message::Swallowed => _ = w.u8(77),
            Message::Awake {
                woken:
                    Woken {
                        until_running,
                        until_answer,
                    },
                clock_behind,
            } => {
                w.u8(78).u64(nanos(*until_running)).u64(nanos(*until_answer));
                w.flag(clock_behind.is_some());
                w.u64(clock_behind.map_or(0, nanos));
            }
            Message::Refused {
                phase,
                reason: Reason { cause, message },
            } => {
                w.u8(75)
                    .u8(phase_code(*phase))
                    .u8(cause_code(*cause))
                    .text(message, MAX_TEXT_BYTES);
            }
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let message = match r.u8("kind of message")? {
            1 => {
                let (oldest, newest) = (r.u16("oldest version")?, r.u16("newest version")?);
                let (session, attempt) = (SessionId(r.array("session")?), r.u32("attempt")?);
                let ledger = LedgerId(r.array("ledger")?);
                let (purpose, since) = (r.u8("purpose")?, r.u32("earlier attempt")?);
                let purpose = match purpose {
                    0 => Purpose::Begin,
                    1 => Purpose::Resume { since },
                    2 => Purpose::Ask,
                    got => {
                        return Err(Malformed::Unknown {
                            what: "purpose",
                            got: u64::from(got),
                        });
                    }
                };
                Message::Hello {
                    oldest,
                    newest,
                    session,
                    attempt,
                    ledger,
                    purpose,
                }
            }
            2 => {
                let epoch = r.u64("epoch")?;
                let lanes = r.u16("number of lanes")?;
                let offer = read_offer(&mut r)?;
                Message::Offer { epoch, lanes, offer }
            }
            3 => Message::Prepare,
            4 => Message::Announce {
                block: BlockId(r.u16("block")?),
                first: r.u64("first unit")?,
                names: read_names(&mut r)?,
            },
            5 => Message::RoundEnd {
                round: r.u32("round")?,
                frames: read_numbers(&mut r, usize::from(MAX_LANES), "number of lanes")?,
            },
            6 => Message::StatePart {
                offset: r.u64("offset")?,
                bytes: r.bytes(STATE_PART_BYTES, "part of the state")?,
            },
            7 => {
                let total = r.u64("size of the state")?;
                if total > MAX_STATE_BYTES {
                    return Err(Malformed::TooMuch {
                        what: "size of the state",
                        got: total,
                        most: MAX_STATE_BYTES,
                    });
                }
                Message::Load {
                    total,
                    name: Name(r.array("name of the state")?),
                }
            }
            8 => Message::Verify,
            9 => Message::Go {
                session: SessionId(r.array("session")?),
                epoch: r.u64("epoch")?,
            },
            10 => Message::Finish,
            11 => Message::Cancel {
                cause: read_cause(&mut r)?,
                phase: read_phase(&mut r)?,
                message: r.text(MAX_TEXT_BYTES, "reason")?,
            },
            12 => Message::Consider {
                epoch: r.u64("epoch")?,
                offer: read_offer(&mut r)?,
            },
            13 => Message::Ballast {
                answer: r.flag("answer")?,
                bytes: r.bytes(MAX_BALLAST_BYTES, "ballast")?,
            },
            65 => Message::Welcome {
                version: r.u16("version")?,
                ledger: LedgerId(r.array("ledger")?),
            },
            66 => Message::Holding {
                version: r.u16("version")?,
                stage: if r.flag("stage")? {
                    Stage::Loaded
                } else {
                    Stage::Copying
                },
                frames: read_numbers(&mut r, usize::from(MAX_LANES), "number of lanes")?,
            },
            67 => {
                let ledger = LedgerId(r.array("ledger")?);
                let standing = read_standing(&mut r)?;
                let why = match r.flag("reason")? {
                    true => Some(Reason {
                        cause: read_cause(&mut r)?,
                        message: r.text(MAX_TEXT_BYTES, "reason")?,
                    }),
                    false => None,
                };
                Message::Standing {
                    ledger,
                    standing,
                    why,
                }
            }
            68 => Message::Accepted {
                lanes: r.u16("number of lanes")?,
            },
            69 => {
                let count = r.count(MAX_BLOCKS, 2, "number of libraries")?;
                let mut libraries = Vec::with_capacity(count);
                for _ in 0..count {
                    libraries.push(BlockId(r.u16("block")?));
                }
                Message::Prepared { libraries }
            }
            70 => Message::Wanted {
                units: read_numbers(&mut r, MAX_NAMES / 64, "wanted units")?,
            },
            71 => Message::RoundHeld {
                round: r.u32("round")?,
            },
            72 => Message::Loaded {
                loaded: Loaded {
                    restore: Duration::from_nanos(r.u64("time to restore")?),
                    flush: Duration::from_nanos(r.u64("time to flush")?),
                },
            },
            73 => {
                let took = Duration::from_nanos(r.u64("time to hash")?);
                Message::Hashes {
                    names: read_names(&mut r)?,
                    took,
                }
            }
            74 => Message::Running {
                took: Duration::from_nanos(r.u64("time to resume")?),
            },
            76 => Message::Working {
                frames: r.u64("number of frames")?,
            },
            77 => Message::Swallowed,
            78 => {
                let woken = Woken {
                    until_running: Duration::from_nanos(r.u64("time until the guest ran")?),
                    until_answer: Duration::from_nanos(r.u64("time until the answer")?),
                };
                let known = r.flag("clock measured")?;
                let behind = Duration::from_nanos(r.u64("clock behind")?);
                if !known && !behind.is_zero() {
                    return Err(Malformed::Unknown {
                        what: "clock behind",
                        got: nanos(behind),
                    });
                }
                Message::Awake {
                    woken,
                    clock_behind: known.then_some(behind),
                }
            }
            75 => Message::Refused {
                phase: read_phase(&mut r)?,
                reason: Reason {
                    cause: read_cause(&mut r)?,
                    message: r.text(MAX_TEXT_BYTES, "reason")?,
                },
            },
            got => {
                return Err(Malformed::Unknown {
                    what: "kind of message",
                    got: u64::from(got),
                });
            }
        };
        r.end()?;
        Ok(message)
    }
}

/// The envelope of a message on a stream: length, checksum.
pub const ENVELOPE_BYTES: usize = 8;

pub fn envelope(message: &[u8]) -> [u8; ENVELOPE_BYTES] {
    let mut bytes = [0; ENVELOPE_BYTES];
    bytes[..4].copy_from_slice(&(message.len() as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&crc32c::crc32c(message).to_le_bytes());
    bytes
}

/// The length of the message that follows, and its checksum.
pub fn open_envelope(bytes: [u8; ENVELOPE_BYTES]) -> Result<(usize, u32), Malformed> {
    let mut r = Reader::new(&bytes);
    let length = r.u32("length")? as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(Malformed::TooMuch {
            what: "length",
            got: length as u64,
            most: MAX_MESSAGE_BYTES as u64,
        });
    }
    Ok((length, r.u32("checksum")?))
}
