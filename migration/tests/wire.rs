//! The wire: bytes that must never change by accident, and bytes from anywhere.
#![allow(clippy::unwrap_used)] // a test's own helpers

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Dice, FakeBlock, FakeIncoming, FakeSink, MemoryLedger, Stage, StepClock, Witness, options};
use ferry_migration::arrivals::Desk;
use ferry_migration::block::{BlockId, BlockInfo, BlockKind, Name, Sink, Span};
use ferry_migration::failure::{Cause, Phase, Reason, Side};
use ferry_migration::handover::{Ledger, LedgerId, MachineId, SessionId, Standing};
use ferry_migration::incoming::{Incoming, Room, Terms};
use ferry_migration::machine::{Loaded, MachineCard, Offer};
use ferry_migration::pages::cache::DeltaCache;
use ferry_migration::pages::decode::{Placement, Scratch};
use ferry_migration::pages::encode::{Compression, Encoder, Memory};
use ferry_migration::pages::sent::SentHashes;
use ferry_migration::report::Woken;
use ferry_migration::units::UnitSet;
use ferry_migration::wire::{
    Encoding, Entry, FrameHeader, Greeting, Message, Purpose, Stage as Held, VERSION, common_version,
    envelope, open_envelope,
};
use proptest::prelude::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn offer() -> Offer {
    let (machine, name) = (MachineId([3; 16]), "web".to_owned());
    let info = |id, kind, name: &str, bytes| BlockInfo {
        id: BlockId(id),
        kind,
        name: name.into(),
        bytes,
    };
    Offer {
        card: MachineCard {
            machine,
            name,
            running: true,
            description: vec![1, 2],
        },
        blocks: vec![
            info(0, BlockKind::Memory, "low", 8192),
            info(1, BlockKind::Disk, "root", 1024),
        ],
    }
}

/// One message of each kind.
fn messages() -> Vec<Message> {
    let (session, ledger) = (SessionId([1; 16]), LedgerId([2; 16]));
    let reason = Reason::new(Cause::NoSpace, "full");
    vec![
        Message::Hello {
            oldest: 1,
            newest: 2,
            session,
            attempt: 3,
            ledger,
            purpose: Purpose::Resume { since: 2 },
        },
        Message::Offer {
            epoch: 5,
            lanes: 4,
            offer: offer(),
        },
        Message::Prepare,
        Message::Announce {
            block: BlockId(1),
            first: 7,
            names: vec![Name([9; 32])],
        },
        Message::RoundEnd {
            round: 6,
            frames: vec![1, 2],
        },
        Message::StatePart {
            offset: 0,
            bytes: vec![8, 8],
        },
        Message::Load {
            total: 2,
            name: Name([7; 32]),
        },
        Message::Verify,
        Message::Go { session, epoch: 5 },
        Message::Finish,
        Message::Cancel {
            cause: Cause::Cancelled,
            phase: Phase::CopyLive,
            message: "no".into(),
        },
        Message::Welcome { version: 2, ledger },
        Message::Holding {
            version: 2,
            stage: Held::Copying,
            frames: vec![3],
        },
        Message::Standing {
            ledger,
            standing: Standing::Declined,
            why: Some(reason.clone()),
        },
        Message::Accepted { lanes: 2 },
        Message::Prepared {
            libraries: vec![BlockId(1)],
        },
        Message::Wanted { units: vec![5] },
        Message::RoundHeld { round: 6 },
        Message::Loaded {
            loaded: Loaded {
                restore: Duration::from_nanos(1),
                flush: Duration::from_nanos(2),
            },
        },
        Message::Hashes {
            names: vec![Name([4; 32])],
            took: Duration::from_nanos(3),
        },
        Message::Running {
            took: Duration::from_nanos(4),
        },
        Message::Refused {
            phase: Phase::Prepare,
            reason,
        },
        Message::Working { frames: 9 },
        Message::Consider {
            epoch: 5,
            offer: offer(),
        },
        Message::Ballast {
            answer: true,
            bytes: vec![6, 6],
        },
        Message::Swallowed,
        Message::Awake {
            woken: Woken {
                until_running: Duration::from_nanos(5),
                until_answer: Duration::from_nanos(6),
            },
            clock_behind: Some(Duration::from_nanos(7)),
        },
    ]
}

#[test]
fn the_bytes_of_every_message_are_these_and_no_other() {
    let golden = include_str!("golden/messages.txt");
    let now: String = messages()
        .iter()
        .map(|message| format!("{} {}\n", message.name(), hex(&message.encode())))
        .collect();
    assert_eq!(
        now, golden,
        "the wire has changed: an older peer would not understand it"
    );
    for message in messages() {
        assert_eq!(Message::decode(&message.encode()).unwrap(), message);
    }
}

#[test]
fn the_bytes_of_heads_and_greetings_are_these_and_no_other() {
    let session = SessionId([1; 16]);
    let greetings = [
        (
            Greeting::Control { session, attempt: 2 },
            "66657272790d0a0000010101010101010101010101010101010200000000002b0f1cd7",
        ),
        (
            Greeting::Lane {
                session,
                attempt: 2,
                index: 3,
            },
            "66657272790d0a000101010101010101010101010101010101020000000300",
        ),
    ];
    for (greeting, golden) in greetings {
        let bytes = greeting.encode();
        assert_eq!(
            Greeting::decode(bytes.as_slice().try_into().unwrap()).unwrap(),
            greeting
        );
        assert!(hex(&bytes).starts_with(&golden[..62]), "{}", hex(&bytes));
    }
    let header = FrameHeader {
        block: BlockId(2),
        entries: 3,
        sequence: 4,
        round: 5,
        payload_bytes: 6,
        checksum: 7,
    };
    assert_eq!(FrameHeader::decode(&header.encode()).unwrap(), header);
    assert!(hex(&header.encode()).starts_with("66726d0a02000300040000000000000005000000060000000700000"));
    let entry = Entry {
        first: 1,
        count: 2,
        encoding: Encoding::Lz4,
        bytes: 3,
    };
    assert_eq!(hex(&entry.encode()), "01000000000000000200030003000000");
    assert_eq!(Entry::decode(&entry.encode()).unwrap(), entry);
}

#[test]
fn the_newest_version_in_common_is_used() {
    assert_eq!(common_version((1, 2), (1, 2)), Some(2));
    assert_eq!(common_version((2, 3), (1, 2)), Some(2));
    assert_eq!(common_version((1, 2), (2, 3)), Some(2));
    assert_eq!(common_version((3, 4), (1, 2)), None);
}

#[test]
fn a_newer_side_crosses_to_the_version_before_and_the_other_way_round() {
    for (ours, theirs) in [((1, 2), (1, 1)), ((1, 1), (1, 2))] {
        let mut stage = Stage::new(3);
        // Content from before is there: version 1 does not speak of it and sends everything.
        let content = stage.outgoing.blocks[2].bytes();
        stage.built.libraries.lock().unwrap().insert(7, content);
        let terms = Terms {
            oldest_version: theirs.0,
            newest_version: theirs.1,
            ..Terms::default()
        };
        stage.set_terms(terms);
        let mut options = options(1, 2);
        (options.oldest_version, options.newest_version) = ours;
        let report = stage.cross(&mut stage.loopback(4), &options);
        assert_eq!(report.outcome.failure, None, "{report:#?}");
        assert_eq!(report.disk.known, 0);
        stage.assert_equal();
    }
}

#[test]
fn no_version_in_common_is_said_before_anything_else_happens() {
    let mut stage = Stage::new(3);
    stage.set_terms(Terms {
        oldest_version: VERSION + 1,
        newest_version: VERSION + 2,
        ..Terms::default()
    });
    let report = stage.cross(&mut stage.loopback(4), &options(1, 2));
    let failure = report.outcome.failure.unwrap();
    assert_eq!((failure.cause, failure.phase), (Cause::Version, Phase::Negotiate));
    let range = format!("{} to {}", VERSION + 1, VERSION + 2);
    assert!(failure.message.contains(&range), "{failure}");
    assert!(stage.witness.runs_here());
}

/// What a peer may send: real messages, real messages with a byte changed, and noise.
fn mail() -> impl Strategy<Value = Vec<u8>> {
    let real = (0..messages().len()).prop_map(|at| messages()[at].encode());
    let bent =
        (0..messages().len(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, place, byte)| {
            let mut bytes = messages()[at].encode();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            bytes
        });
    let noise = proptest::collection::vec(any::<u8>(), 0..200);
    prop_oneof![4 => real, 2 => bent, 1 => noise]
}

/// A proper crossing with messages left out, doubled, and others in between.
fn conversation() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let (session, ledger) = (SessionId([1; 16]), LedgerId([2; 16]));
    let hello = Message::Hello {
        oldest: 1,
        newest: 2,
        session,
        attempt: 1,
        ledger,
        purpose: Purpose::Begin,
    };
    let proper = [
        hello,
        Message::Offer {
            epoch: 5,
            lanes: 2,
            offer: offer(),
        },
        Message::Prepare,
        Message::RoundEnd {
            round: 0,
            frames: vec![0, 0],
        },
        Message::StatePart {
            offset: 0,
            bytes: vec![8, 8],
        },
        Message::Load {
            total: 2,
            name: Name::of(&[8, 8]),
        },
        Message::Go { session, epoch: 5 },
        Message::Finish,
    ];
    let changes = proptest::collection::vec((0u8..12, mail()), proper.len());
    changes.prop_map(move |changes| {
        let mut mails = Vec::new();
        for (message, (change, other)) in proper.iter().zip(changes) {
            match change {
                0 => continue,
                1 => mails.extend([message.encode(), message.encode()]),
                2 => mails.extend([other, message.encode()]),
                3 => mails.push(other),
                _ => mails.push(message.encode()),
            }
        }
        mails
    })
}

proptest! {
    #[test]
    fn decoding_never_panics_and_says_what_it_read(bytes in mail()) {
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(Message::decode(&message.encode()).unwrap(), message);
        }
    }

    #[test]
    fn heads_from_anywhere_never_panic(bytes in any::<[u8; 35]>()) {
        let _ = Greeting::decode(&bytes);
        let _ = FrameHeader::decode(bytes.first_chunk().unwrap());
        let _ = Entry::decode(bytes.first_chunk().unwrap());
        let _ = open_envelope(*bytes.first_chunk().unwrap());
        prop_assert_eq!(open_envelope(envelope(&bytes)).unwrap().0, bytes.len());
    }

    /// Any messages in any order: no panic, and the machine runs only after a go-ahead that was due.
    #[test]
    fn any_messages_in_any_order_end_in_an_answer(mails in conversation()) {
        let witness: Arc<Witness> = Arc::default();
        let built: Arc<common::Built> = Arc::default();
        let mut machine = Careless(FakeIncoming { built, witness: Arc::clone(&witness) });
        let mut ledger = MemoryLedger::new(2, &witness, false);
        let (clock, desk) = (StepClock::default(), Desk::new());
        let mut incoming = Incoming::default();
        let mut loaded = false;
        for bytes in mails {
            let Ok(message) = Message::decode(&bytes) else { continue };
            let go = matches!(message, Message::Go { .. });
            let mut room = Room {
                machine: &mut machine,
                ledger: &mut ledger,
                clock: &clock,
                desk: &desk,
                terms: Terms::default(),
                wait: &|desk, frames| desk.progress(frames),
            };
            let (next, reply) = incoming.handle(message, &mut room);
            incoming = next;
            if witness.runs_there() {
                prop_assert!(loaded, "runs without having been loaded");
                let known = ledger.read(SessionId([1; 16]), Side::Incoming).unwrap().unwrap();
                prop_assert_eq!(known.standing, Standing::Taken);
            } else if go {
                let runs = matches!(reply.message, Some(Message::Running { .. } | Message::Awake { .. }));
                prop_assert!(!runs);
            }
            loaded = matches!(incoming, Incoming::Loaded(_) | Incoming::Running(_) | Incoming::Over(_));
        }
    }

    /// What is encoded is decoded as it was, through all the ways a page can go, round after round.
    #[test]
    fn pages_arrive_as_they_were(seed in any::<u64>(), rounds in 1u32..6, always in any::<bool>()) {
        let compression = if always { Compression::Always } else { Compression::Off };
        let mut dice = Dice::new(seed);
        for (kind, units) in [(BlockKind::Memory, 300u64), (BlockKind::Disk, 20)] {
            let block = FakeBlock::new(0, kind, units);
            block.fill(&mut dice);
            let sink = Arc::new(FakeSink::new(block.info.clone()));
            let placement = Placement::new(&[Arc::clone(&sink) as Arc<dyn Sink>]);
            let memory = Memory {
                cache: DeltaCache::new(1 << 20),
                sent: SentHashes::new(seed, std::slice::from_ref(&block.info)),
            };
            let (mut encoder, mut scratch) = (Encoder::new(compression), Scratch::new());
            let mut dirty = UnitSet::full(units);
            for round in 0..rounds {
                for span in dirty.spans(block.info.id, 16) {
                    encoder.encode(&memory, &*block, &block.info, &[span], round, &StepClock::default()).unwrap();
                    if !encoder.has_frame() {
                        continue;
                    }
                    let frame = encoder.frame(&block.info, 1, round).to_vec();
                    let (head, mut rest) = frame.split_at(FrameHeader::BYTES);
                    let header = FrameHeader::decode(head.try_into().unwrap()).unwrap();
                    placement.place(&header, &mut rest, &mut scratch).unwrap();
                    prop_assert!(rest.is_empty());
                }
                prop_assert!(block.bytes() == sink.bytes(), "round {} of {:?} differs", round, kind);
                dirty.clear();
                for _ in 0..dice.below(40) {
                    let unit = dice.below(units);
                    block.write_unit(unit, &mut dice);
                    dirty.insert(unit);
                }
            }
        }
    }

    /// A frame with anything changed is refused or places only where it says: no panic, nothing out of bounds.
    #[test]
    fn a_frame_with_any_byte_changed_is_noticed(seed in any::<u64>(), place in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut dice = Dice::new(seed);
        let block = FakeBlock::new(0, BlockKind::Memory, 64);
        block.fill(&mut dice);
        let sink = Arc::new(FakeSink::new(block.info.clone()));
        let placement = Placement::new(&[Arc::clone(&sink) as Arc<dyn Sink>]);
        let info = std::slice::from_ref(&block.info);
        let memory = Memory { cache: DeltaCache::new(0), sent: SentHashes::new(seed, info) };
        let mut encoder = Encoder::new(Compression::Always);
        let span = Span { block: block.info.id, first: 0, count: 64 };
        encoder.encode(&memory, &*block, &block.info, &[span], 0, &StepClock::default()).unwrap();
        let mut frame = encoder.frame(&block.info, 1, 0).to_vec();
        let at = place.index(frame.len());
        frame[at] ^= 1 << bit;
        let (head, mut rest) = frame.split_at(FrameHeader::BYTES);
        if let Ok(header) = FrameHeader::decode(head.try_into().unwrap()) {
            prop_assert!(placement.place(&header, &mut rest, &mut Scratch::new()).is_err());
        }
    }

    /// A whole frame made up by a peer that knows the checksums.
    #[test]
    fn a_peer_that_lies_well_still_places_nothing_out_of_bounds(
        entries in proptest::collection::vec((0u64..80, 0u16..70, 0u8..6, 0u32..5000), 0..6),
        payload in proptest::collection::vec(any::<u8>(), 0..6000),
        block in 0u16..2,
    ) {
        let info = BlockInfo { id: BlockId(0), kind: BlockKind::Memory, name: String::new(), bytes: 64 * 4096 };
        let sink = Arc::new(FakeSink::new(info));
        let placement = Placement::new(&[Arc::clone(&sink) as Arc<dyn Sink>]);
        let encodings = [Encoding::Zero, Encoding::Same, Encoding::Raw, Encoding::Lz4, Encoding::Delta, Encoding::MostlySame];
        let mut body: Vec<u8> = entries
            .iter()
            .flat_map(|(first, count, encoding, bytes)| {
                let encoding = encodings[usize::from(*encoding)];
                Entry { first: *first, count: *count, encoding, bytes: *bytes }.encode()
            })
            .collect();
        body.extend_from_slice(&payload);
        let header = FrameHeader {
            block: BlockId(block),
            entries: entries.len() as u16,
            sequence: 1,
            round: 0,
            payload_bytes: payload.len() as u32,
            checksum: crc32c::crc32c(&body),
        };
        let _ = placement.place(&header, &mut body.as_slice(), &mut Scratch::new());
    }
}

/// Takes any description: the peer is anybody.
struct Careless(FakeIncoming);

impl ferry_migration::machine::IncomingMachine for Careless {
    fn admit(&mut self, _: &Offer) -> Result<(), Reason> {
        Ok(())
    }
    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        if offer.blocks.iter().map(|block| block.bytes).sum::<u64>() > 1 << 20 {
            return Err(Reason::new(Cause::NoMemory, "too big"));
        }
        self.0.prepare(offer)
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), Reason> {
        self.0.restore(state)
    }
    fn flush(&mut self) -> Result<(), Reason> {
        self.0.flush()
    }
    fn resume(&mut self, permit: ferry_migration::handover::RunPermit) -> Result<(), Reason> {
        self.0.resume(permit)
    }
    fn abort(&mut self) {
        self.0.abort();
    }
}

/// A peer of the version before gets none of the pages it does not know.
#[test]
fn pages_that_are_mostly_the_same_travel_small_to_those_who_know_them() {
    let block = FakeBlock::new(0, BlockKind::Memory, 4);
    {
        let mut data = block.data.lock().unwrap();
        data.fill(0xab);
        data[..40].fill(1);
    }
    let memory = || Memory {
        cache: DeltaCache::new(0),
        sent: SentHashes::new(1, std::slice::from_ref(&block.info)),
    };
    let span = Span {
        block: block.info.id,
        first: 0,
        count: 4,
    };
    for (version, mostly_same) in [(3, 1), (2, 0)] {
        let mut encoder = Encoder::new(Compression::Auto);
        encoder.speak(version);
        let counts = encoder
            .encode(&memory(), &*block, &block.info, &[span], 0, &StepClock::default())
            .unwrap();
        assert_eq!((counts.same, counts.mostly_same), (3, mostly_same));
        let frame = encoder.frame(&block.info, 1, 0).to_vec();
        let sink = Arc::new(FakeSink::new(block.info.clone()));
        let placement = Placement::new(&[Arc::clone(&sink) as Arc<dyn Sink>]);
        let (head, mut rest) = frame.split_at(FrameHeader::BYTES);
        let header = FrameHeader::decode(head.try_into().unwrap()).unwrap();
        placement.place(&header, &mut rest, &mut Scratch::new()).unwrap();
        assert!(block.bytes() == sink.bytes());
        assert!(version == 2 || frame.len() < 200, "{} bytes", frame.len());
    }
}
