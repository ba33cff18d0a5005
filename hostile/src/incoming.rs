//! A peer that sends messages and frames in any order to the incoming side. The machine runs only after a go-ahead that
//! was due.

use std::sync::Arc;

use ferry_migration::arrivals::{Desk, LaneIn, Progress};
use ferry_migration::block::{BlockId, BlockInfo, BlockKind, Name, Sink};
use ferry_migration::clock::HostClock;
use ferry_migration::failure::{Cause, Reason, Side};
use ferry_migration::handover::{Ledger, LedgerId, MachineId, Record, RunPermit, SessionId, Standing};
use ferry_migration::incoming::{Incoming, Room, Terms};
use ferry_migration::machine::{IncomingMachine, MachineCard, Offer};
use ferry_migration::wire::{Message, Purpose};

use crate::input::Input;
use crate::wire::{frame, memory};

const SESSION: SessionId = SessionId([1; 16]);
const MOST_BLOCKS: usize = 4;
const MOST_PAGES: u64 = 256;

/// A ledger that forgets with the process.
struct Book(Vec<Record>);

impl Ledger for Book {
    fn id(&self) -> LedgerId {
        LedgerId([7; 16])
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        self.0
            .retain(|old| (old.session, old.side) != (record.session, record.side));
        self.0.push(record.clone());
        Ok(())
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        let found = self
            .0
            .iter()
            .find(|old| (old.session, old.side) == (session, side));
        Ok(found.cloned())
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        Ok(self
            .0
            .iter()
            .filter(|old| old.machine == machine)
            .cloned()
            .collect())
    }
}

/// A machine of memory alone.
#[derive(Default)]
struct Shell {
    restored: bool,
    runs: Option<SessionId>,
}

impl IncomingMachine for Shell {
    fn admit(&mut self, offer: &Offer) -> Result<(), Reason> {
        let fits = |block: &BlockInfo| {
            block.kind == BlockKind::Memory
                && block.bytes.is_multiple_of(4096)
                && block.bytes / 4096 <= MOST_PAGES
        };
        if offer.blocks.len() > MOST_BLOCKS || !offer.blocks.iter().all(fits) {
            return Err(Reason::new(Cause::NoMemory, "too big for this test"));
        }
        Ok(())
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        let sinks = offer
            .blocks
            .iter()
            .map(|block| memory(block.id.0, (block.bytes / 4096).max(1)));
        Ok(sinks.collect())
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), Reason> {
        self.restored = true;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), Reason> {
        assert!(self.restored, "runs without having been loaded");
        self.runs = Some(permit.session());
        Ok(())
    }

    fn abort(&mut self) {
        assert!(self.runs.is_none(), "taken apart while it runs");
        self.restored = false;
    }
}

/// The messages of a proper crossing, for the fuzzer to take from.
pub(crate) fn proper() -> Vec<Message> {
    let blocks = [(0, 64), (1, 7)].map(|(id, pages)| BlockInfo {
        id: BlockId(id),
        kind: BlockKind::Memory,
        name: format!("memory {id}"),
        bytes: pages * 4096,
    });
    let (session, ledger) = (SESSION, LedgerId([2; 16]));
    let hello = |attempt, purpose| Message::Hello {
        oldest: 1,
        newest: 2,
        session,
        attempt,
        ledger,
        purpose,
    };
    let card = MachineCard {
        machine: MachineId([3; 16]),
        name: "web".to_owned(),
        running: true,
        description: vec![1, 2],
    };
    let blocks = blocks.to_vec();
    vec![
        hello(1, Purpose::Begin),
        Message::Offer {
            epoch: 5,
            lanes: 2,
            offer: Offer { card, blocks },
        },
        Message::Prepare,
        Message::Announce {
            block: BlockId(1),
            first: 0,
            names: vec![Name([9; 32])],
        },
        Message::RoundEnd {
            round: 0,
            frames: vec![0, 0],
        },
        Message::RoundEnd {
            round: 1,
            frames: vec![1, 0],
        },
        Message::StatePart {
            offset: 0,
            bytes: vec![8, 8],
        },
        Message::Load {
            total: 2,
            name: Name::of(&[8, 8]),
        },
        Message::Verify,
        Message::Go { session, epoch: 5 },
        Message::Finish,
        hello(2, Purpose::Resume { since: 0 }),
    ]
}

pub(crate) fn conversation(bytes: &[u8]) {
    let (mut machine, mut book) = (Shell::default(), Book(Vec::new()));
    let (clock, desk) = (HostClock::new(), Desk::new());
    let mut incoming = Incoming::default();
    let (mut lane, mut sequence): (Option<LaneIn>, u64) = (None, 0);
    let (mut loaded, proper) = (false, proper());
    let mut input = Input::new(bytes);
    while let Some(step) = input.u8() {
        let message = match step {
            0x40..0x80 => {
                let len = usize::from(input.u16().unwrap_or(0)) % 4096;
                Message::decode(input.bytes(len)).ok()
            }
            0x80..0xa0 => {
                lane = desk
                    .lane(SESSION, u32::from(step) % 4, u16::from(step) / 4 % 3)
                    .ok();
                sequence = 0;
                None
            }
            0xa0..0xe0 => {
                if let (Some(lane), Some(frame)) = (&mut lane, frame(&mut input, sequence)) {
                    sequence += 1;
                    let _ = lane.frame(&mut frame.as_slice());
                }
                None
            }
            _ => proper.get(usize::from(step) % proper.len()).cloned(),
        };
        let mut room = Room {
            machine: &mut machine,
            ledger: &mut book,
            clock: &clock,
            desk: &desk,
            terms: Terms::default(),
            wait: &|desk, frames| -> Progress { desk.progress(frames) },
        };
        if step >= 0xf0 {
            lane = None;
            incoming = incoming.link_lost(&mut room);
        }
        if let Some(message) = message {
            let go = matches!(message, Message::Go { .. });
            let (next, reply) = incoming.handle(message, &mut room);
            incoming = next;
            if let Some(reply) = &reply.message {
                assert_eq!(Message::decode(&reply.encode()).as_ref(), Ok(reply));
            }
            match machine.runs {
                Some(session) => {
                    assert!(loaded, "runs without having been loaded");
                    let known = book.read(session, Side::Incoming).unwrap().unwrap();
                    assert_eq!(known.standing, Standing::Taken);
                }
                None => assert!(!go || !matches!(reply.message, Some(Message::Running { .. }))),
            }
        }
        loaded = matches!(
            incoming,
            Incoming::Loaded(_) | Incoming::Running(_) | Incoming::Over(_)
        );
    }
}
