//! The hand over and what follows it: see `handover` for why it is done like this.

use std::time::Duration;

use crate::failure::{Cause, Failure, Phase, Reason, Side, Whereabouts};
use crate::handover::{LedgerId, Verdict};
use crate::report::Woken;
use crate::talk::Broke;
use crate::wire::{Message, Purpose, Stage};

use super::{Crossing, RETRY_AFTER, cancelled};

impl Crossing<'_> {
    pub(super) fn hand_over(&mut self) -> Result<(), Failure> {
        self.enter(Phase::HandOver);
        if let Some(reason) = cancelled(self.world.handle) {
            return Err(self.fail(Side::Outgoing, reason));
        }
        let (Some(departure), Some(permit)) = (self.departure.as_mut(), self.permit.take()) else {
            return Err(self.fail(
                Side::Outgoing,
                Reason::new(Cause::Ledger, "there is no permit to give away"),
            ));
        };
        let epoch = departure.epoch();
        if let Err((permit, reason)) = departure.go_ahead(permit) {
            self.permit = Some(permit);
            return Err(self.fail(Side::Outgoing, reason));
        }
        let go = Message::Go {
            session: self.options.session,
            epoch,
        };
        let until = self.world.clock.now() + self.options.doubt_for;
        let mut broke = self.ask_to_run(&go);
        loop {
            broke = match broke {
                Broke::Word { from, taken, why } => {
                    // It runs there, or provably nowhere: the rest is bookkeeping.
                    let took = self.mark();
                    let (resume, answer) = match self.woken.take() {
                        Some(woken) if taken => woken.cut(took),
                        _ => (took, Duration::ZERO),
                    };
                    self.report.downtime.resume += resume;
                    self.report.downtime.answer += answer;
                    match self.heard(from, taken, why)? {
                        None => return Ok(()),
                        Some(doubt) => Broke::here(Reason::new(Cause::Link, doubt)),
                    }
                }
                broke if self.world.clock.now() >= until || !self.world.link.reconnects() => {
                    let mut failure = self.broke(broke);
                    failure.whereabouts = Whereabouts::Unknown;
                    return Err(failure);
                }
                _ => {
                    self.world.clock.sleep(RETRY_AFTER);
                    self.ask_again_to_run(&go)
                }
            };
        }
    }

    fn ask_to_run(&mut self, go: &Message) -> Broke {
        if let Err(broke) = self.talk.say(go) {
            return broke;
        }
        // Cancelling has no effect any more.
        match self.talk.hear(self.world.clock, self.options.stall, &|| None) {
            Ok(Message::Running { took }) => {
                // An older side: it does not say when the go-ahead came, only how long starting took.
                self.runs_there(Woken {
                    until_running: took,
                    until_answer: took,
                })
            }
            Ok(Message::Awake { woken, clock_behind }) => {
                self.report.clock_behind = clock_behind;
                self.runs_there(woken)
            }
            Ok(other) => Broke::unexpected(&other, "Go"),
            Err(broke) => broke,
        }
    }

    fn runs_there(&mut self, woken: Woken) -> Broke {
        self.report.downtime.resume_there = woken.until_running;
        self.woken = Some(woken);
        match self.peer_ledger {
            Some(from) => Broke::Word {
                from,
                taken: true,
                why: None,
            },
            None => Broke::here(Reason::new(Cause::Protocol, "the other side has no ledger")),
        }
    }

    /// In doubt: a new connection, and either its word or the go-ahead again.
    fn ask_again_to_run(&mut self, go: &Message) -> Broke {
        if let Err(broke) = self.connect(Purpose::Resume { since: self.sent_in }) {
            return broke;
        }
        match self.talk.hear(self.world.clock, self.options.stall, &|| None) {
            Ok(Message::Holding {
                stage: Stage::Loaded, ..
            }) => {
                let word = self.ask_to_run(go);
                // Which of the go-aheads started it, and when that came, nobody knows here: all of the time counts.
                self.woken = None;
                word
            }
            Ok(other) => Broke::unexpected(&other, "Hello"),
            Err(broke) => broke,
        }
    }

    /// `None`: it is there. `Some`: the word proves nothing.
    pub(super) fn heard(
        &mut self,
        from: LedgerId,
        taken: bool,
        why: Option<Reason>,
    ) -> Result<Option<String>, Failure> {
        let Some(departure) = self.departure.as_mut() else {
            return Ok(None);
        };
        match departure.heard(self.world.ledger, from, taken) {
            Ok(Verdict::Gone) => Ok(None),
            Ok(Verdict::Back(permit)) => {
                self.permit = Some(permit);
                let why = why.map_or_else(String::new, |reason| format!(": {reason}"));
                let reason = format!("the other side did not take the machine{why}");
                Err(self.fail(Side::Incoming, Reason::new(Cause::Declined, reason)))
            }
            Ok(Verdict::InDoubt(doubt)) => Ok(Some(doubt)),
            // It is there, only our own book does not say so yet.
            Err(_) if taken => Ok(None),
            Err(reason) => {
                let mut failure = self.fail(Side::Outgoing, reason);
                failure.whereabouts = Whereabouts::Unknown;
                Err(failure)
            }
        }
    }

    pub(super) fn finish(&mut self) {
        self.enter(Phase::Finish);
        if let Some(custody) = &self.custody {
            custody.delivered_all();
        }
        self.cargo.iter().for_each(|cargo| cargo.source.stop_tracking());
        let _ = self.talk.say(&Message::Finish);
        self.world.machine.departed();
    }
}
