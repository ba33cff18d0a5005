//! Negotiate and prepare: until the other side is built, a broken link means beginning again.

use std::sync::Arc;

use crate::carrier::Cargo;
use crate::failure::{Cause, Failure, Phase, Reason};
use crate::handover::Departure;
use crate::link::LinkErrorKind;
use crate::machine::Offer;
use crate::pages::cache::DeltaCache;
use crate::pages::encode::Memory;
use crate::pages::sent::SentHashes;
use crate::talk::Broke;
use crate::wire::{Message, Purpose};

use super::{Crossing, seed};

impl Crossing<'_> {
    pub(super) fn negotiate(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Negotiate);
        let card = self.world.machine.card();
        let card = self.or_fail(card)?;
        self.report.machine = Some(card.machine);
        self.report.name.clone_from(&card.name);
        let opened = Departure::begin(self.world.ledger, self.options.session, card.machine);
        let (departure, permit) = self.or_fail(opened)?;
        (self.departure, self.permit) = (Some(departure), Some(permit));
        let sources = self.world.machine.sources();
        let sources = self.or_fail(sources)?;
        self.cargo = sources
            .into_iter()
            .map(|source| Cargo {
                info: source.info(),
                source,
            })
            .collect();
        let blocks: Vec<_> = self.cargo.iter().map(|cargo| cargo.info.clone()).collect();
        self.memory = Arc::new(Memory {
            cache: DeltaCache::new(self.options.delta_cache_bytes),
            sent: SentHashes::new(seed(self.options), &blocks),
        });
        let offer = Offer { card, blocks };
        self.until_built(|crossing| crossing.greet_and_offer(&offer))
    }

    fn greet_and_offer(&mut self, offer: &Offer) -> Result<(), Broke> {
        self.connect(Purpose::Begin)?;
        let (version, ledger) = match self.hear("Hello", self.options.stall)? {
            Message::Welcome { version, ledger } => (version, ledger),
            other => return Err(Broke::unexpected(&other, "Hello")),
        };
        if !(self.options.oldest_version..=self.options.newest_version).contains(&version) {
            let reason = format!("the other side chose protocol version {version}, which was not offered");
            return Err(Broke::here(Reason::new(Cause::Version, reason)));
        }
        (self.version, self.peer_ledger) = (version, Some(ledger));
        let Some(departure) = self.departure.as_mut() else {
            return Ok(());
        };
        departure.peer_is(ledger);
        let epoch = departure.epoch();
        let lanes = self.options.lanes.clamp(1, self.world.link.most_lanes().max(1));
        self.talk.say(&Message::Offer {
            epoch,
            lanes,
            offer: offer.clone(),
        })?;
        match self.hear("Offer", self.options.stall)? {
            Message::Accepted { lanes: agreed } if (1..=lanes).contains(&agreed) => self.lanes = agreed,
            other => return Err(Broke::unexpected(&other, "Offer")),
        }
        self.report.lanes = self.lanes;
        Ok(())
    }

    pub(super) fn prepare(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Prepare);
        let card = self.world.machine.card();
        let card = self.or_fail(card)?;
        let blocks: Vec<_> = self.cargo.iter().map(|cargo| cargo.info.clone()).collect();
        let offer = Offer { card, blocks };
        let mut first = true;
        self.until_built(|crossing| {
            if !std::mem::take(&mut first) {
                crossing.greet_and_offer(&offer)?;
            }
            crossing.talk.say(&Message::Prepare)?;
            match crossing.hear("Prepare", crossing.options.stall)? {
                Message::Prepared { libraries } => crossing.libraries = libraries,
                other => return Err(Broke::unexpected(&other, "Prepare")),
            }
            Ok(())
        })?;
        self.sent_in = self.attempt;
        if let Err(broke) = self.open_lanes() {
            self.mend(broke)?;
        }
        self.report.prepare = self.now();
        Ok(())
    }

    /// Tries a step again from the start while only the link is to blame.
    fn until_built(&mut self, mut step: impl FnMut(&mut Self) -> Result<(), Broke>) -> Result<(), Failure> {
        let until = self.world.clock.now() + self.options.reconnect_for;
        loop {
            match step(self) {
                Ok(()) => return Ok(()),
                Err(Broke::Link(error)) => {
                    if let Some(word) = self.last_word(&error) {
                        return Err(self.broke(word));
                    }
                    // Nobody there, or somebody else: trying again is the user's decision.
                    let stranger = self.peer_ledger.is_none()
                        && matches!(error.kind, LinkErrorKind::Refused | LinkErrorKind::Malformed);
                    let again = self.reached && !stranger && self.world.link.reconnects();
                    if !again || self.world.clock.now() >= until {
                        return Err(self.broke(Broke::Link(error)));
                    }
                    self.wait_to_retry(&error)?;
                }
                Err(broke) => return Err(self.broke(broke)),
            }
        }
    }

    pub(super) fn connect(&mut self, purpose: Purpose) -> Result<(), Broke> {
        self.talk.end();
        self.carrier.drop_lanes();
        self.attempt += 1;
        let peer = self.world.link.control()?;
        self.reached = true;
        self.talk.begin(peer);
        self.talk.say(&Message::Hello {
            oldest: self.options.oldest_version,
            newest: self.options.newest_version,
            session: self.options.session,
            attempt: self.attempt,
            ledger: self.world.ledger.id(),
            purpose,
        })
    }

    pub(super) fn open_lanes(&mut self) -> Result<(), Broke> {
        let mut lanes = Vec::with_capacity(usize::from(self.lanes));
        for index in 0..self.lanes {
            lanes.push(self.world.link.lane(self.options.session, self.attempt, index)?);
        }
        self.carrier.lanes(lanes, self.version);
        Ok(())
    }
}
