//! The hand over as a model over the very functions the engine runs: every interleaving of loss, doubling, delay,
//! crash and restart of either side, between any two steps. Of the incoming side, whose book is not always on the disk, the
//! process may die or the whole host.
//!
//! Safety: never two. A side runs only with the right to, and a word once given is never taken back.
//! Liveness: from every state that can be reached, if nothing breaks any more, both sides come to the same outcome.
#![allow(clippy::unwrap_used)] // a test's own helpers

use std::collections::BTreeSet;

use ferry_migration::failure::Side;
use ferry_migration::handover::{
    BootId, Giver, GiverEvent, GiverStep, LedgerId, MachineId, Record, SessionId, Standing, Taker,
    TakerEvent, TakerStep, giver, giver_after_restart, taker, taker_after_restart,
};
use stateright::{Checker, Model, Property};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Mail {
    Go,
    Ask,
    Word { taken: bool },
}

/// One side: what it knows, what it still has to do for it, whether its machine runs, and its disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Outgoing {
    state: Giver,
    todo: Vec<GiverStep>,
    up: bool,
    /// The machine's memory is still there (a crash loses it).
    memory: bool,
    runs: bool,
    ledger: Option<Standing>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Incoming {
    state: Taker,
    todo: Vec<TakerStep>,
    up: bool,
    runs: bool,
    /// It ran an instruction at some time: the machine's history went on there.
    ran: bool,
    /// What its processes read.
    ledger: Standing,
    /// What a crash of the host leaves.
    on_disk: Standing,
    /// The host is the one in whose boot the machine was built.
    same_boot: bool,
}

impl Incoming {
    /// As a process reads it now.
    fn standing(&self) -> Standing {
        let record = Record {
            session: SessionId([0; 16]),
            machine: MachineId([0; 16]),
            epoch: 1,
            side: Side::Incoming,
            standing: self.ledger,
            peer: Some(LedgerId([0; 16])),
            heard: false,
            boot: Some(BootId([0; 16])),
        };
        record.standing_in(Some(BootId([u8::from(!self.same_boot); 16])))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct World {
    outgoing: Outgoing,
    incoming: Incoming,
    /// Mail on its way, in no order: it may be delivered, doubled, or lost.
    to_incoming: BTreeSet<Mail>,
    to_outgoing: BTreeSet<Mail>,
    crashes_left: u8,
    asks_left: u8,
    /// Everything that was ever answered.
    said: BTreeSet<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Act {
    Arm,
    StepBack,
    GiveAway,
    /// The outgoing side, in doubt, gets a connection and sends the go-ahead again.
    LinkBack,
    /// Somebody runs `resolve`.
    Resolve,
    OutgoingStep,
    IncomingStep {
        start_fails: bool,
    },
    /// Delivered, and maybe delivered again later.
    DeliverToIncoming {
        mail: Mail,
        keep: bool,
    },
    DeliverToOutgoing {
        mail: Mail,
        keep: bool,
    },
    LoseToIncoming(Mail),
    LoseToOutgoing(Mail),
    /// The incoming side waited long enough.
    Patience,
    CrashOutgoing,
    CrashIncoming,
    CrashIncomingHost,
    RestartOutgoing,
    RestartIncoming,
}

struct HandOver {
    crashes: u8,
    /// Broken on purpose, to see that the model notices.
    broken: Option<Broken>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// The outgoing side sends the go-ahead without having written that it gives away.
    NeverWritten,
    /// A restarted incoming side answers without writing it down.
    AnswerWithoutWriting,
    /// The outgoing side takes silence for a no.
    SilenceIsNo,
    /// The incoming side believes its ledger also after a crash of its host.
    NoteSurvives,
}

impl HandOver {
    fn give(&self, world: &mut World, event: GiverEvent) {
        let (state, steps) = giver(world.outgoing.state, event);
        world.outgoing.state = state;
        world.outgoing.todo = steps.to_vec();
        if self.broken == Some(Broken::NeverWritten) && event == GiverEvent::Arm {
            world.outgoing.todo.clear();
        }
        if event == GiverEvent::GoAhead {
            // The permit is consumed before anything else happens.
            world.outgoing.runs = false;
        }
    }

    fn take(&self, world: &mut World, event: TakerEvent) {
        let (state, steps) = taker(world.incoming.state, event);
        world.incoming.state = state;
        world.incoming.todo = steps.to_vec();
        if self.broken == Some(Broken::AnswerWithoutWriting) {
            world
                .incoming
                .todo
                .retain(|step| *step != TakerStep::Write(Standing::Declined));
        }
    }

    fn act(&self, world: &mut World, act: &Act) {
        match act {
            Act::Arm => self.give(world, GiverEvent::Arm),
            Act::StepBack => self.give(world, GiverEvent::StepBack),
            Act::GiveAway => self.give(world, GiverEvent::GoAhead),
            Act::LinkBack => self.give(world, GiverEvent::LinkBack),
            Act::Resolve => {
                world.asks_left -= 1;
                world.to_incoming.insert(Mail::Ask);
            }
            Act::OutgoingStep => match world.outgoing.todo.remove(0) {
                GiverStep::Write(standing) => world.outgoing.ledger = Some(standing),
                GiverStep::SendGo => _ = world.to_incoming.insert(Mail::Go),
                GiverStep::Run => world.outgoing.runs = world.outgoing.memory,
            },
            Act::IncomingStep { start_fails } => match world.incoming.todo.remove(0) {
                TakerStep::Write(standing) => {
                    (world.incoming.ledger, world.incoming.on_disk) = (standing, standing);
                }
                TakerStep::Note(standing) => world.incoming.ledger = standing,
                TakerStep::Settle => world.incoming.on_disk = world.incoming.ledger,
                TakerStep::Run if *start_fails => self.take(world, TakerEvent::StartFailed),
                TakerStep::Run => {
                    (world.incoming.runs, world.incoming.ran) = (true, true);
                    self.take(world, TakerEvent::Started);
                }
                TakerStep::Discard => {}
                TakerStep::Answer { taken } => {
                    world.said.insert(taken);
                    world.to_outgoing.insert(Mail::Word { taken });
                }
            },
            Act::DeliverToIncoming { mail, keep } => {
                if !keep {
                    world.to_incoming.remove(mail);
                }
                match mail {
                    Mail::Go => self.take(world, TakerEvent::Go),
                    Mail::Ask => self.take(world, TakerEvent::Ask),
                    Mail::Word { .. } => {}
                }
            }
            Act::DeliverToOutgoing { mail, keep } => {
                if !keep {
                    world.to_outgoing.remove(mail);
                }
                if let Mail::Word { taken } = mail {
                    self.give(
                        world,
                        GiverEvent::Heard {
                            taken: *taken,
                            same_ledger: true,
                        },
                    );
                }
            }
            Act::LoseToIncoming(mail) => {
                world.to_incoming.remove(mail);
                if self.broken == Some(Broken::SilenceIsNo) {
                    self.give(
                        world,
                        GiverEvent::Heard {
                            taken: false,
                            same_ledger: true,
                        },
                    );
                }
            }
            Act::LoseToOutgoing(mail) => {
                world.to_outgoing.remove(mail);
                if self.broken == Some(Broken::SilenceIsNo) {
                    self.give(
                        world,
                        GiverEvent::Heard {
                            taken: false,
                            same_ledger: true,
                        },
                    );
                }
            }
            Act::Patience => self.take(world, TakerEvent::GiveUp),
            Act::CrashOutgoing => {
                world.crashes_left -= 1;
                world.outgoing.up = false;
                (world.outgoing.runs, world.outgoing.memory) = (false, false);
                world.outgoing.todo.clear();
            }
            Act::CrashIncoming | Act::CrashIncomingHost => {
                world.crashes_left -= 1;
                world.incoming.up = false;
                world.incoming.runs = false;
                world.incoming.todo.clear();
                if *act == Act::CrashIncomingHost {
                    world.incoming.ledger = world.incoming.on_disk;
                    world.incoming.same_boot = self.broken == Some(Broken::NoteSurvives);
                }
            }
            Act::RestartOutgoing => {
                world.outgoing.up = true;
                world.outgoing.state = giver_after_restart(world.outgoing.ledger);
            }
            Act::RestartIncoming => {
                world.incoming.up = true;
                world.incoming.state = taker_after_restart(Some(world.incoming.standing()));
            }
        }
    }

    fn possible(&self, world: &World, acts: &mut Vec<Act>) {
        let (outgoing, incoming) = (&world.outgoing, &world.incoming);
        let idle_out = outgoing.up && outgoing.todo.is_empty();
        let idle_in = incoming.up && incoming.todo.is_empty();
        // What is over on both sides and cannot be moved any more is left alone.
        if idle_out {
            match outgoing.state {
                Giver::Holding if outgoing.runs && outgoing.ledger.is_none() => acts.push(Act::Arm),
                Giver::Armed => acts.extend([Act::GiveAway, Act::StepBack]),
                Giver::GivenAway if !world.to_incoming.contains(&Mail::Go) => acts.push(Act::LinkBack),
                _ => {}
            }
            if outgoing.state == Giver::GivenAway && world.asks_left > 0 {
                acts.push(Act::Resolve);
            }
            for mail in &world.to_outgoing {
                acts.push(Act::DeliverToOutgoing {
                    mail: *mail,
                    keep: false,
                });
                acts.push(Act::DeliverToOutgoing {
                    mail: *mail,
                    keep: true,
                });
            }
        }
        if outgoing.up && !outgoing.todo.is_empty() {
            acts.push(Act::OutgoingStep);
        }
        if idle_in {
            for mail in &world.to_incoming {
                acts.push(Act::DeliverToIncoming {
                    mail: *mail,
                    keep: false,
                });
                acts.push(Act::DeliverToIncoming {
                    mail: *mail,
                    keep: true,
                });
            }
            if incoming.state == Taker::Waiting {
                acts.push(Act::Patience);
            }
        }
        if incoming.up && !incoming.todo.is_empty() {
            acts.push(Act::IncomingStep { start_fails: false });
            if incoming.todo.first() == Some(&TakerStep::Run) {
                acts.push(Act::IncomingStep { start_fails: true });
            }
        }
        acts.extend(world.to_incoming.iter().map(|mail| Act::LoseToIncoming(*mail)));
        acts.extend(world.to_outgoing.iter().map(|mail| Act::LoseToOutgoing(*mail)));
        if world.crashes_left > 0 {
            if outgoing.up {
                acts.push(Act::CrashOutgoing);
            }
            if incoming.up {
                acts.extend([Act::CrashIncoming, Act::CrashIncomingHost]);
            }
        }
        if !outgoing.up {
            acts.push(Act::RestartOutgoing);
        }
        if !incoming.up {
            acts.push(Act::RestartIncoming);
        }
    }

    /// From here on nothing breaks: both sides are up, mail arrives, patience runs out. Where does it end?
    fn heal(&self, world: &World) -> World {
        let mut world = world.clone();
        for _ in 0..100 {
            if !world.outgoing.up {
                self.act(&mut world, &Act::RestartOutgoing);
            } else if !world.incoming.up {
                self.act(&mut world, &Act::RestartIncoming);
            } else if !world.outgoing.todo.is_empty() {
                self.act(&mut world, &Act::OutgoingStep);
            } else if !world.incoming.todo.is_empty() {
                self.act(&mut world, &Act::IncomingStep { start_fails: false });
            } else if let Some(mail) = world.to_incoming.first().copied() {
                self.act(&mut world, &Act::DeliverToIncoming { mail, keep: false });
            } else if let Some(mail) = world.to_outgoing.first().copied() {
                self.act(&mut world, &Act::DeliverToOutgoing { mail, keep: false });
            } else if world.outgoing.state == Giver::GivenAway {
                self.act(&mut world, &Act::LinkBack);
            } else if world.outgoing.state == Giver::Armed {
                self.act(&mut world, &Act::StepBack);
            } else if world.outgoing.state == Giver::Holding && world.incoming.state == Taker::Waiting {
                self.act(&mut world, &Act::Patience);
            } else {
                break;
            }
        }
        world
    }
}

impl Model for HandOver {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            outgoing: Outgoing {
                state: Giver::Holding,
                todo: vec![],
                up: true,
                memory: true,
                runs: true,
                ledger: None,
            },
            incoming: Incoming {
                state: Taker::Waiting,
                todo: vec![],
                up: true,
                runs: false,
                ran: false,
                ledger: Standing::Waiting,
                on_disk: Standing::Waiting,
                same_boot: true,
            },
            to_incoming: BTreeSet::new(),
            to_outgoing: BTreeSet::new(),
            crashes_left: self.crashes,
            asks_left: 1,
            said: BTreeSet::new(),
        }]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        self.possible(world, acts);
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        self.act(&mut next, &act);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two", |_, world: &World| {
                !(world.outgoing.runs && world.incoming.runs)
            }),
            Property::always("what ran there never runs here again", |_, world: &World| {
                !(world.incoming.ran && world.outgoing.runs)
            }),
            Property::always("a word is never taken back", |_, world: &World| {
                world.said.len() < 2
            }),
            Property::always(
                "a kept record means that it never ran there",
                |_, world: &World| !(world.outgoing.ledger == Some(Standing::Kept) && world.incoming.ran),
            ),
            Property::always(
                "a gone record means that it was taken there",
                |_, world: &World| {
                    world.outgoing.ledger != Some(Standing::Gone) || world.incoming.ledger == Standing::Taken
                },
            ),
            Property::always(
                "when nothing breaks any more, both come to one outcome",
                |model, world| {
                    let end = model.heal(world);
                    match end.outgoing.state {
                        // In doubt for ever: only where nobody can know, and both stand still.
                        Giver::GivenAway => {
                            end.incoming.state == Taker::Unsure && !end.incoming.runs && !end.outgoing.runs
                        }
                        Giver::Armed => false,
                        Giver::Gone => end.incoming.state == Taker::Taken,
                        // Kept, or never given away; unless a crash lost its memory, it runs here.
                        Giver::Holding => {
                            end.incoming.state != Taker::Taken && end.outgoing.runs == end.outgoing.memory
                        }
                    }
                },
            ),
            Property::sometimes("it is handed over", |_, world: &World| {
                world.incoming.runs && world.outgoing.state == Giver::Gone
            }),
            Property::sometimes("it comes back", |_, world: &World| {
                world.outgoing.runs && world.outgoing.ledger == Some(Standing::Kept)
            }),
            Property::sometimes("nobody can know that it ran", |_, world: &World| {
                world.incoming.state == Taker::Unsure && world.incoming.ran
            }),
            Property::sometimes("there is doubt", |_, world: &World| {
                world.outgoing.state == Giver::GivenAway && world.outgoing.todo.is_empty()
            }),
        ]
    }
}

#[test]
fn every_interleaving_keeps_at_most_one_runner_and_ends_in_one_outcome() {
    let checker = HandOver {
        crashes: 4,
        broken: None,
    }
    .checker()
    .threads(2)
    .spawn_bfs()
    .join();
    checker.assert_properties();
    println!("{} states", checker.unique_state_count());
    assert!(checker.unique_state_count() > 1_000);
}

/// The model can fail: each of these mistakes is found.
#[test]
fn a_protocol_that_is_broken_on_purpose_is_found_out() {
    for broken in [
        Broken::NeverWritten,
        Broken::AnswerWithoutWriting,
        Broken::SilenceIsNo,
        Broken::NoteSurvives,
    ] {
        let checker = HandOver {
            crashes: 3,
            broken: Some(broken),
        }
        .checker()
        .threads(2)
        .spawn_bfs()
        .join();
        let found = checker.discoveries().keys().any(|name| {
            ![
                "it is handed over",
                "it comes back",
                "there is doubt",
                "nobody can know that it ran",
            ]
            .contains(name)
        });
        assert!(found);
    }
}
