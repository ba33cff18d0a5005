//! When the link breaks: a new connection, what the other side holds, and the farewell if there is none.

use crate::failure::{Cause, Failure, Reason, Side, Whereabouts};
use crate::link::{LinkError, LinkErrorKind};
use crate::report::Event;
use crate::talk::Broke;
use crate::wire::{Message, Purpose, Stage, VERSION_WITH_ENDED};

use super::{Crossing, FAREWELL, LAST_WORD, RETRY_AFTER};

impl Crossing<'_> {
    /// Mends the link, or says why not.
    pub(super) fn mend(&mut self, broke: Broke) -> Result<(), Failure> {
        let mut why = match broke {
            Broke::Link(error) => error,
            broke => return Err(self.broke(broke)),
        };
        if let Some(word) = self.last_word(&why) {
            return Err(self.broke(word));
        }
        if !self.world.link.reconnects() {
            return Err(self.broke(Broke::Link(why)));
        }
        let until = self.world.clock.now() + self.options.reconnect_for;
        loop {
            if self.world.clock.now() >= until {
                return Err(self.broke(Broke::Link(why)));
            }
            self.wait_to_retry(&why)?;
            match self.resume_link() {
                Ok(()) => return Ok(()),
                Err(Broke::Link(error)) => why = error,
                Err(broke) => return Err(self.broke(broke)),
            }
        }
    }

    /// A side that gives up closes its lanes and says why on the control connection, which may still hold it when a
    /// lane is already found broken. Where the link itself broke, both ends of it are closed and this takes no time.
    pub(super) fn last_word(&mut self, why: &LinkError) -> Option<Broke> {
        if why.kind == LinkErrorKind::Stalled {
            return None;
        }
        let until = self.world.clock.now() + LAST_WORD;
        loop {
            let left = until.saturating_sub(self.world.clock.now());
            match self.hear("", left) {
                // The answer to something that was asked before.
                Ok(_) => {}
                Err(Broke::Link(_)) => return None,
                Err(word) => return Some(word),
            }
        }
    }

    pub(super) fn wait_to_retry(&mut self, why: &LinkError) -> Result<(), Failure> {
        self.talk.end();
        self.carrier.drop_lanes();
        let attempt = self.attempt + 1;
        self.world.observer.event(&Event::Reconnecting {
            at: self.now(),
            attempt,
            why: why.to_string(),
        });
        // The first try comes at once; a peer that is being restarted gets its time.
        if self.report.reconnects > 0 || why.kind != LinkErrorKind::Closed {
            self.world.clock.sleep(RETRY_AFTER);
        }
        self.report.reconnects += 1;
        match self.interrupted() {
            Some(reason) => Err(self.fail(Side::Outgoing, reason)),
            None => Ok(()),
        }
    }

    fn resume_link(&mut self) -> Result<(), Broke> {
        self.connect(Purpose::Resume { since: self.sent_in })?;
        let (stage, frames) = match self.hear("Hello", self.options.stall)? {
            Message::Holding { stage, frames, .. } => (stage, frames),
            other => return Err(Broke::unexpected(&other, "Hello")),
        };
        self.stage = stage;
        self.rest_unheard = false;
        let mut resent = 0;
        if let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) {
            resent = if stage == Stage::Loaded {
                // It holds everything, or it would not have loaded.
                copying.rest_held(custody);
                0
            } else {
                copying
                    .settled(&self.cargo, custody, &frames, self.world.clock)
                    .map_err(|error| Broke::here(Reason::from(error)))?
            };
        }
        self.sent_in = self.attempt;
        self.report.resent_units += resent;
        self.open_lanes()?;
        let (at, attempt) = (self.now(), self.attempt);
        self.world.observer.event(&Event::Reconnected {
            at,
            attempt,
            resent_units: resent,
        });
        Ok(())
    }

    /// Tells the other side, if it can still hear, so that it need not wait.
    pub(super) fn say_farewell(&mut self, failure: &Failure) {
        let Failure { phase, message, .. } = failure.clone();
        let cause = match self.whereabouts() {
            Whereabouts::Ended if self.version >= VERSION_WITH_ENDED => Cause::Ended,
            // An older side does not know this one.
            _ if failure.cause == Cause::Ended => Cause::Machine,
            _ => failure.cause,
        };
        if self
            .talk
            .say(&Message::Cancel {
                cause,
                phase,
                message,
            })
            .is_ok()
        {
            let _ = self.talk.hear(self.world.clock, FAREWELL, &|| None);
        }
        self.talk.end();
    }
}
