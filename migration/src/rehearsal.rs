//! Asks before a crossing: would the other side take the machine, and what does the link carry? Nothing comes of it
//! there, and nothing is left there.

use std::time::Duration;

use crate::clock::Clock;
use crate::failure::{Cause, Reason};
use crate::handover::{LedgerId, SessionId};
use crate::link::{Link, LinkErrorKind};
use crate::machine::Offer;
use crate::talk::{Broke, Talk};
use crate::wire::{MAX_BALLAST_BYTES, Message, OLDEST_VERSION, Purpose, VERSION, VERSION_WITH_QUESTIONS};

/// What is asked.
pub struct Question<'a> {
    pub session: SessionId,
    /// The asking side's ledger, which tells the other side whether it is its own host that asks.
    pub ledger: LedgerId,
    pub epoch: u64,
    pub offer: Offer,
    pub lanes: u16,
    pub stall: Duration,
    /// Whether to send ballast to see what the link carries.
    pub measure: bool,
    /// Looked at often; true ends the asking.
    pub cancelled: &'a dyn Fn() -> bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Why the other side would not take the machine, or could not be asked. `reached` tells which.
    pub refused: Option<Reason>,
    pub reached: bool,
    pub lanes: u16,
    pub round_trip: Option<Duration>,
    pub link_bytes_per_sec: Option<f64>,
}

/// A batch of ballast that takes so long tells what the link carries; the first ones are small.
const LONG_ENOUGH: Duration = Duration::from_millis(150);
const FIRST_BATCH_BYTES: usize = 64 << 10;
const MOST_BATCH_BYTES: usize = 512 << 20;

/// Asks, hangs up, and tells what was heard.
pub fn rehearse(link: &mut dyn Link, clock: &dyn Clock, question: &Question<'_>) -> Answer {
    let mut answer = Answer {
        refused: None,
        reached: false,
        lanes: 0,
        round_trip: None,
        link_bytes_per_sec: None,
    };
    let mut asking = Asking {
        talk: Talk::default(),
        clock,
        question,
    };
    if let Err(broke) = asking.run(link, &mut answer) {
        answer.refused = Some(match broke {
            Broke::Link(error) => {
                let cause = match error.kind {
                    LinkErrorKind::Stalled => Cause::Stalled,
                    LinkErrorKind::Malformed => Cause::Protocol,
                    LinkErrorKind::Refused => Cause::NotAllowed,
                    LinkErrorKind::Closed => Cause::Link,
                };
                Reason::new(cause, error.message)
            }
            Broke::For(_, reason) => reason,
            Broke::Word { why, .. } => {
                why.unwrap_or_else(|| Reason::new(Cause::Declined, "the other side ended the conversation"))
            }
        });
    }
    asking.talk.end();
    answer
}

struct Asking<'a> {
    talk: Talk,
    clock: &'a dyn Clock,
    question: &'a Question<'a>,
}

impl Asking<'_> {
    fn hear(&mut self) -> Result<Message, Broke> {
        let cancelled = self.question.cancelled;
        self.talk.hear(self.clock, self.question.stall, &|| {
            cancelled().then(|| Reason::new(Cause::Cancelled, "the rehearsal was cancelled"))
        })
    }

    fn run(&mut self, link: &mut dyn Link, answer: &mut Answer) -> Result<(), Broke> {
        let question = self.question;
        self.talk.begin(link.control()?);
        let start = self.clock.now();
        self.talk.say(&Message::Hello {
            oldest: OLDEST_VERSION,
            newest: VERSION,
            session: question.session,
            attempt: 1,
            ledger: question.ledger,
            purpose: Purpose::Begin,
        })?;
        let version = match self.hear()? {
            Message::Welcome { version, .. } => version,
            other => return Err(Broke::unexpected(&other, "Hello")),
        };
        answer.reached = true;
        answer.round_trip = Some(self.clock.now().saturating_sub(start));
        let (epoch, offer) = (question.epoch, question.offer.clone());
        if version < VERSION_WITH_QUESTIONS {
            // An older side knows no questions: it is offered the machine, and left before anything is built.
            let lanes = question.lanes;
            self.talk.say(&Message::Offer { epoch, lanes, offer })?;
            return self.hear_accepted(answer);
        }
        self.talk.say(&Message::Consider { epoch, offer })?;
        let would = self.hear_accepted(answer);
        if question.measure {
            // The link is what it is, whatever the other side thinks of the machine.
            answer.link_bytes_per_sec = Some(self.measure(answer)?);
        }
        would
    }

    fn hear_accepted(&mut self, answer: &mut Answer) -> Result<(), Broke> {
        match self.hear()? {
            Message::Accepted { lanes } => {
                answer.lanes = lanes.min(self.question.lanes);
                Ok(())
            }
            other => Err(Broke::unexpected(&other, "Consider")),
        }
    }

    /// Sends more and more until a batch takes long enough to tell.
    fn measure(&mut self, answer: &mut Answer) -> Result<f64, Broke> {
        let noise = noise(MAX_BALLAST_BYTES);
        let mut batch = FIRST_BATCH_BYTES;
        loop {
            let start = self.clock.now();
            let mut left = batch;
            while left > 0 {
                let count = left.min(noise.len());
                left -= count;
                self.talk.say(&Message::Ballast {
                    answer: left == 0,
                    bytes: noise.get(..count).unwrap_or_default().to_vec(),
                })?;
                if (self.question.cancelled)() {
                    return Err(Broke::here(Reason::new(
                        Cause::Cancelled,
                        "the rehearsal was cancelled",
                    )));
                }
            }
            match self.hear()? {
                Message::Swallowed => {}
                other => return Err(Broke::unexpected(&other, "Ballast")),
            }
            let took = self.clock.now().saturating_sub(start);
            let trip = answer.round_trip.unwrap_or_default().min(took / 2);
            let rate = batch as f64 / (took - trip).as_secs_f64().max(1e-6);
            if took >= LONG_ENOUGH || batch >= MOST_BATCH_BYTES {
                return Ok(rate);
            }
            // As much as should take twice as long as is enough, and at most eight times the last.
            let wanted = rate * LONG_ENOUGH.as_secs_f64() * 2.0;
            batch = (wanted as usize)
                .clamp(batch * 2, batch * 8)
                .min(MOST_BATCH_BYTES);
        }
    }
}

/// Bytes that no link makes smaller.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
