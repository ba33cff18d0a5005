//! A machine on a journey between three hosts, as a model over the functions that the engine decides with: every order of
//! offers that come late, go-aheads, answers that come late or twice, questions, crashes, a person's word, and ledgers that
//! are pruned.
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
use stateright::{Checker, HasDiscoveries, Model, Property};

const HOSTS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Mail {
    Offer { epoch: u64 },
    Accepted { epoch: u64 },
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
            boot: None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Host {
    ledger: Vec<Line>,
    runs: bool,
    /// The crossing whose offer is out.
    offers: Option<u8>,
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

    fn write(&mut self, session: u8, outgoing: bool, epoch: u64, standing: Standing, peer: usize) {
        self.ledger.push(Line {
            session,
            outgoing,
            epoch,
            standing,
            peer: peer as u8,
            heard: false,
        });
        self.ledger.sort();
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
    /// All that was ever sent: it may arrive at any time, in any order, any number of times (an offer once), or never.
    mail: BTreeSet<(u8, Mail)>,
    /// Crossings in which the machine ran there.
    took: BTreeSet<u8>,
    crashes_left: u8,
    /// It came back to a host that did not know that it had left.
    returned: bool,
    /// And from another host than the one that it had gone to.
    by_way: bool,
    pruned: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Act {
    Offer {
        from: usize,
        to: usize,
    },
    /// The offer is given up; it may still arrive.
    Withdraw(usize),
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    /// A host that was in doubt takes the machine back and leaves its ledger as it was.
    NotSettled,
    /// What was taken is forgotten although the other side may still ask.
    Forgotten,
    /// The same, once the machine has left for a third host.
    ForgottenWhenLeft,
    /// A host in doubt takes any offer for the word that it waits for, also one from before.
    AnyEpoch,
}

struct Journey {
    crossings: usize,
    crashes: u8,
    /// An offer may arrive when the one who sent it has long given it up. Otherwise it arrives at once.
    late_offers: bool,
    broken: Option<Broken>,
}

impl Journey {
    fn offer(&self, world: &mut World, from: usize, to: usize) -> Option<()> {
        let epoch = next_epoch(&world.hosts[from].records()).ok()?;
        let session = world.crossings.len() as u8;
        world.crossings.push((from, to));
        world.hosts[from].offers = Some(session);
        if self.late_offers {
            world.mail.insert((session, Mail::Offer { epoch }));
            return Some(());
        }
        self.is_offered(world, session, epoch)?;
        Self::arm(world, session, epoch);
        Some(())
    }

    /// The incoming side settles its doubts and builds the machine.
    fn is_offered(&self, world: &mut World, session: u8, epoch: u64) -> Option<()> {
        let (from, to) = world.crossings[usize::from(session)];
        let there = &mut world.hosts[to];
        if there.waiting.is_some() || there.runs || there.line(session, false).is_some() {
            return None;
        }
        let records = there.records();
        let settled = match check_epoch(&records, epoch) {
            Ok(settled) => settled,
            Err(_) if self.broken == Some(Broken::AnyEpoch) => {
                let doubts = records.into_iter();
                doubts
                    .filter(|doubt| doubt.standing == Standing::GivenAway)
                    .collect()
            }
            Err(_) => return None,
        };
        for doubt in settled {
            world.returned = true;
            world.by_way |= doubt.peer != Some(LedgerId([from as u8; 16]));
            if self.broken != Some(Broken::NotSettled) {
                there.line(doubt.session.0[0], true)?.standing = Standing::Gone;
            }
        }
        // (`Waiting` of this boot, which reads so.)
        there.write(session, false, epoch, Standing::Declined, from);
        there.waiting = Some(session);
        Some(())
    }

    /// The outgoing side has heard that it was built there, and begins the switch.
    fn arm(world: &mut World, session: u8, epoch: u64) {
        let (from, to) = world.crossings[usize::from(session)];
        let here = &mut world.hosts[from];
        here.offers = None;
        here.write(session, true, epoch, Standing::GivenAway, to);
        here.armed = Some(session);
    }

    /// The incoming side answers from its ledger, in writing.
    fn answer(world: &mut World, session: u8, to: usize) {
        let there = &mut world.hosts[to];
        let known = there.line(session, false).map(|line| line.standing);
        let taken = taker_after_restart(known) == Taker::Taken;
        world.mail.insert((session, Mail::Word { taken }));
    }

    fn deliver(&self, world: &mut World, session: u8, mail: Mail) -> Option<()> {
        let (from, to) = world.crossings[usize::from(session)];
        match mail {
            Mail::Offer { epoch } => {
                // Late, but not twice: a connection brings it, and is a new one each time.
                world.mail.remove(&(session, mail));
                if self.is_offered(world, session, epoch).is_some() {
                    world.mail.insert((session, Mail::Accepted { epoch }));
                }
            }
            Mail::Accepted { epoch } => {
                if world.hosts[from].offers == Some(session) {
                    Self::arm(world, session, epoch);
                }
            }
            Mail::Go if world.hosts[to].waiting == Some(session) => {
                let there = &mut world.hosts[to];
                there.waiting = None;
                // A record that is not there any more takes no word: it is never run.
                let line = there.line(session, false)?;
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
                    return None;
                }
                let line = here.line(session, true)?;
                if line.standing != Standing::GivenAway {
                    return None;
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
        Some(())
    }

    fn act(&self, world: &mut World, act: &Act) -> Option<()> {
        match *act {
            Act::Offer { from, to } => self.offer(world, from, to)?,
            Act::Withdraw(host) => world.hosts[host].offers = None,
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
            Act::Deliver(session, mail) => self.deliver(world, session, mail)?,
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
                let left = all.iter().any(|record| record.standing == Standing::Gone);
                let forgets = match self.broken {
                    Some(Broken::Forgotten) => true,
                    Some(Broken::ForgottenWhenLeft) => left,
                    _ => false,
                };
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
            by_way: false,
            pruned: false,
        }]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        for (number, host) in world.hosts.iter().enumerate() {
            if host.armed.is_some() {
                acts.extend([Act::GoAhead(number), Act::StepBack(number)]);
            } else if host.offers.is_some() {
                acts.push(Act::Withdraw(number));
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
                "it comes back by way of a third host",
                |model: &Journey, world: &World| {
                    model.crossings < 3
                        || (world.by_way && world.took.contains(&((world.crossings.len() - 1) as u8)))
                },
            ),
            Property::sometimes(
                "it goes on after a ledger was pruned",
                |model: &Journey, world: &World| world.pruned && world.took.len() == model.crossings,
            ),
        ]
    }
}

/// Walks everything; returns how many states that were.
fn check(journey: &Journey) -> usize {
    let checker = Journey { ..*journey }.checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    checker.unique_state_count()
}

#[test]
fn wherever_a_machine_has_been_at_most_one_host_runs_it() {
    let mut journeys = vec![(3, 0, true), (2, 1, true)];
    if std::env::var_os("FERRY_JOURNEYS").is_some() {
        // Some minutes, and gigabytes.
        journeys.push((4, 0, false));
    }
    for (crossings, crashes, late_offers) in journeys {
        let states = check(&Journey {
            crossings,
            crashes,
            late_offers,
            broken: None,
        });
        println!("{crossings} crossings, {crashes} crashes, late offers {late_offers}: {states} states");
        assert!(states > 1_000);
    }
}

/// The model can fail: each of these mistakes is found.
#[test]
fn a_host_that_forgets_or_does_not_write_is_found_out() {
    for (broken, crossings) in [
        (Broken::NotSettled, 2),
        (Broken::Forgotten, 2),
        (Broken::ForgottenWhenLeft, 2),
        (Broken::AnyEpoch, 3),
    ] {
        let wanted = match broken {
            // The copy in doubt is given up for an offer that proves nothing.
            Broken::AnyEpoch => "what is called gone was taken",
            _ => "never two",
        };
        let journey = Journey {
            crossings,
            crashes: 0,
            late_offers: broken == Broken::AnyEpoch,
            broken: Some(broken),
        };
        let until = HasDiscoveries::AnyOf([wanted].into());
        let checker = journey.checker().threads(2).finish_when(until).spawn_bfs().join();
        let found = checker.discoveries();
        assert!(found.contains_key(wanted), "{broken:?}: {:?}", found.keys());
    }
}
