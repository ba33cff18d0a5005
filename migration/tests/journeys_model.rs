//! A machine on a journey between three hosts, as a model over the functions that the engine decides with: every order of
//! offers, go-aheads, answers that come late or twice, questions, crashes, a person's word, and ledgers that are pruned.
//! What happens inside one hand over is `handover_model.rs`'s; this is about what earlier ones leave behind.
//!
//! Safety: never two; and what a ledger calls gone was taken.
#![allow(clippy::unwrap_used)] // a test's own helpers

use std::collections::BTreeSet;

use ferry_migration::failure::Side;
use ferry_migration::handover::{
    Giver, GiverEvent, LedgerId, MachineId, Record, SessionId, Standing, Taker, check_epoch, giver,
    is_needed, next_epoch, taker_after_restart,
};
use stateright::{Checker, Model, Property};

const HOSTS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Mail {
    Go,
    Ask,
    Word { taken: bool },
    Finish,
}

/// A line of a ledger.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Line {
    session: u8,
    outgoing: bool,
    epoch: u64,
    standing: Standing,
    peer: u8,
    heard: bool,
}

impl Line {
    fn record(&self) -> Record {
        Record {
            session: SessionId([self.session; 16]),
            machine: MachineId([7; 16]),
            epoch: self.epoch,
            side: if self.outgoing {
                Side::Outgoing
            } else {
                Side::Incoming
            },
            standing: self.standing,
            peer: Some(LedgerId([self.peer; 16])),
            heard: self.heard,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Host {
    ledger: Vec<Line>,
    runs: bool,
    /// The crossing whose switch goes on.
    armed: Option<u8>,
    /// A machine is built and waits for the go-ahead.
    waiting: Option<u8>,
    /// Copies that stand still, by the crossings that were never confirmed.
    doubts: BTreeSet<u8>,
}

impl Host {
    fn records(&self) -> Vec<Record> {
        self.ledger.iter().map(Line::record).collect()
    }

    fn line(&mut self, session: u8, outgoing: bool) -> Option<&mut Line> {
        let mut lines = self.ledger.iter_mut();
        lines.find(|line| (line.session, line.outgoing) == (session, outgoing))
    }

    /// Whether anything of the machine is there that might run.
    fn has_a_copy(&self) -> bool {
        self.runs || self.armed.is_some() || self.waiting.is_some() || !self.doubts.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    hosts: [Host; HOSTS],
    /// From where to where each crossing goes.
    crossings: Vec<(usize, usize)>,
    /// All that was ever sent: it may arrive at any time, in any order, any number of times, or never.
    mail: BTreeSet<(u8, Mail)>,
    /// Crossings in which the machine ran there.
    took: BTreeSet<u8>,
    crashes_left: u8,
    /// It came back to a host that did not know that it had left.
    returned: bool,
    pruned: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Act {
    Offer {
        from: usize,
        to: usize,
    },
    GoAhead(usize),
    StepBack(usize),
    Ask(u8),
    Deliver(u8, Mail),
    /// The copy's process looks into the ledger.
    Look {
        host: usize,
        session: u8,
    },
    /// A person looked at the other hosts, saw nothing of the machine there, and says that it runs on here.
    SaysHere {
        host: usize,
        session: u8,
    },
    GiveUp(usize),
    Crash(usize),
    Prune(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// A host that was in doubt takes the machine back and leaves its ledger as it was.
    NotSettled,
    /// What was taken is forgotten although the other side may still ask.
    Forgotten,
}

struct Journey {
    crossings: usize,
    crashes: u8,
    broken: Option<Broken>,
}

impl Journey {
    fn offer(&self, world: &mut World, from: usize, to: usize) -> Option<()> {
        let epoch = next_epoch(&world.hosts[from].records()).ok()?;
        let settled = check_epoch(&world.hosts[to].records(), LedgerId([from as u8; 16]), epoch).ok()?;
        let session = world.crossings.len() as u8;
        world.crossings.push((from, to));
        let there = &mut world.hosts[to];
        for doubt in settled {
            world.returned = true;
            if self.broken != Some(Broken::NotSettled) {
                there.line(doubt.session.0[0], true)?.standing = Standing::Gone;
            }
        }
        let line = |outgoing, standing, peer: usize| Line {
            session,
            outgoing,
            epoch,
            standing,
            peer: peer as u8,
            heard: false,
        };
        there.ledger.push(line(false, Standing::Declined, from));
        there.ledger.sort();
        there.waiting = Some(session);
        let here = &mut world.hosts[from];
        here.ledger.push(line(true, Standing::GivenAway, to));
        here.ledger.sort();
        here.armed = Some(session);
        Some(())
    }

    /// The incoming side answers from its ledger, in writing.
    fn answer(world: &mut World, session: u8, to: usize) {
        let there = &mut world.hosts[to];
        let known = there.line(session, false).map(|line| line.standing);
        let taken = taker_after_restart(known) == Taker::Taken;
        world.mail.insert((session, Mail::Word { taken }));
    }

    fn deliver(world: &mut World, session: u8, mail: Mail) {
        let (from, to) = world.crossings[usize::from(session)];
        match mail {
            Mail::Go if world.hosts[to].waiting == Some(session) => {
                let there = &mut world.hosts[to];
                there.waiting = None;
                // A record that is not there any more takes no word: it is never run.
                let Some(line) = there.line(session, false) else {
                    return;
                };
                line.standing = Standing::Taken;
                there.runs = true;
                world.took.insert(session);
                world.mail.insert((session, Mail::Word { taken: true }));
            }
            Mail::Ask if world.hosts[to].waiting == Some(session) => {
                world.hosts[to].waiting = None;
                world.mail.insert((session, Mail::Word { taken: false }));
            }
            Mail::Go | Mail::Ask => Self::answer(world, session, to),
            Mail::Finish => {
                if let Some(line) = world.hosts[to].line(session, false) {
                    line.heard = line.standing == Standing::Taken;
                }
            }
            Mail::Word { taken } => {
                let here = &mut world.hosts[from];
                if here.armed == Some(session) {
                    return;
                }
                let Some(line) = here.line(session, true) else {
                    return;
                };
                if line.standing != Standing::GivenAway {
                    return;
                }
                let heard = GiverEvent::Heard {
                    taken,
                    same_ledger: true,
                };
                match giver(Giver::GivenAway, heard).0 {
                    Giver::Gone => {
                        line.standing = Standing::Gone;
                        here.doubts.remove(&session);
                        world.mail.insert((session, Mail::Finish));
                    }
                    Giver::Holding => {
                        line.standing = Standing::Kept;
                        here.runs |= here.doubts.remove(&session);
                    }
                    _ => {}
                }
            }
        }
    }

    fn act(&self, world: &mut World, act: &Act) -> Option<()> {
        match *act {
            Act::Offer { from, to } => self.offer(world, from, to)?,
            Act::GoAhead(host) => {
                let here = &mut world.hosts[host];
                let session = here.armed.take()?;
                here.runs = false;
                here.doubts.insert(session);
                world.mail.insert((session, Mail::Go));
            }
            Act::StepBack(host) => {
                let here = &mut world.hosts[host];
                let session = here.armed.take()?;
                here.line(session, true)?.standing = Standing::Kept;
            }
            Act::Ask(session) => _ = world.mail.insert((session, Mail::Ask)),
            Act::Deliver(session, mail) => Self::deliver(world, session, mail),
            Act::Look { host, session } => _ = world.hosts[host].doubts.remove(&session),
            Act::SaysHere { host, session } => {
                let here = &mut world.hosts[host];
                here.line(session, true)?.standing = Standing::Kept;
                here.doubts.remove(&session);
                // (Two of one host count as two.)
                if here.runs {
                    world.hosts[(host + 1) % HOSTS].runs = true;
                }
                world.hosts[host].runs = true;
            }
            Act::GiveUp(host) => world.hosts[host].waiting = None,
            Act::Crash(host) => {
                world.crashes_left -= 1;
                let ledger = std::mem::take(&mut world.hosts[host].ledger);
                world.hosts[host] = Host {
                    ledger,
                    ..Host::default()
                };
            }
            Act::Prune(host) => {
                world.pruned = true;
                let there = &mut world.hosts[host];
                let all = there.records();
                let forgets = self.broken == Some(Broken::Forgotten);
                there.ledger.retain(|line| {
                    is_needed(&line.record(), &all) && !(forgets && line.standing == Standing::Taken)
                });
            }
        }
        Some(())
    }
}

impl Model for Journey {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        let mut hosts: [Host; HOSTS] = Default::default();
        hosts[0].runs = true;
        vec![World {
            hosts,
            crossings: Vec::new(),
            mail: BTreeSet::new(),
            took: BTreeSet::new(),
            crashes_left: self.crashes,
            returned: false,
            pruned: false,
        }]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        for (number, host) in world.hosts.iter().enumerate() {
            if host.armed.is_some() {
                acts.extend([Act::GoAhead(number), Act::StepBack(number)]);
            } else if host.runs && world.crossings.len() < self.crossings {
                let others = (0..HOSTS).filter(|to| *to != number);
                let free = others.filter(|to| world.hosts[*to].waiting.is_none() && !world.hosts[*to].runs);
                acts.extend(free.map(|to| Act::Offer { from: number, to }));
            }
            if host.waiting.is_some() {
                acts.push(Act::GiveUp(number));
            }
            for line in host.ledger.iter().filter(|line| line.outgoing) {
                let session = line.session;
                match line.standing {
                    Standing::GivenAway if host.armed != Some(session) => {
                        acts.push(Act::Ask(session));
                        let mut others = world
                            .hosts
                            .iter()
                            .enumerate()
                            .filter(|(other, _)| *other != number);
                        if host.doubts.contains(&session) && others.all(|(_, other)| !other.has_a_copy()) {
                            acts.push(Act::SaysHere {
                                host: number,
                                session,
                            });
                        }
                    }
                    Standing::Gone if host.doubts.contains(&session) => acts.push(Act::Look {
                        host: number,
                        session,
                    }),
                    _ => {}
                }
            }
            if world.crashes_left > 0 && host.has_a_copy() {
                acts.push(Act::Crash(number));
            }
            if !host.ledger.is_empty() {
                acts.push(Act::Prune(number));
            }
        }
        acts.extend(
            world
                .mail
                .iter()
                .map(|(session, mail)| Act::Deliver(*session, *mail)),
        );
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        self.act(&mut next, &act)?;
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two", |_, world: &World| {
                world.hosts.iter().filter(|host| host.runs).count() < 2
            }),
            Property::always("what is called gone was taken", |_, world: &World| {
                world
                    .hosts
                    .iter()
                    .flat_map(|host| &host.ledger)
                    .all(|line| line.standing != Standing::Gone || world.took.contains(&line.session))
            }),
            Property::sometimes("it comes back to a host that was in doubt", |_, world: &World| {
                world.returned && world.took.contains(&((world.crossings.len() - 1) as u8))
            }),
            Property::sometimes(
                "it goes on after a ledger was pruned",
                |model: &Journey, world: &World| world.pruned && world.took.len() == model.crossings,
            ),
        ]
    }
}

fn check(journey: &Journey) -> (usize, Vec<&'static str>) {
    let checker = Journey { ..*journey }.checker().threads(2).spawn_bfs().join();
    if journey.broken.is_none() {
        checker.assert_properties();
    }
    let found = checker.discoveries().into_keys().collect();
    (checker.unique_state_count(), found)
}

#[test]
fn wherever_a_machine_has_been_at_most_one_host_runs_it() {
    for (crossings, crashes) in [(3, 0), (2, 1)] {
        let (states, _) = check(&Journey {
            crossings,
            crashes,
            broken: None,
        });
        println!("{crossings} crossings, {crashes} crashes: {states} states");
        assert!(states > 1_000);
    }
}

/// The model can fail: each of these mistakes is found.
#[test]
fn a_host_that_forgets_or_does_not_write_is_found_out() {
    for broken in [Broken::NotSettled, Broken::Forgotten] {
        let (_, found) = check(&Journey {
            crossings: 2,
            crashes: 0,
            broken: Some(broken),
        });
        assert!(found.contains(&"never two"), "{found:?}");
    }
}
