//! Settling a hand over that was never confirmed: ask the other side for its final word, and weigh it.

use std::time::Duration;

use crate::clock::Clock;
use crate::failure::{Cause, Reason, Side};
use crate::handover::{Departure, Ledger, LedgerId, Record, RunPermit, Standing, Verdict};
use crate::link::Link;
use crate::talk::{Broke, Talk};
use crate::wire::{Message, OLDEST_VERSION, Purpose, VERSION};

/// What is known, for a person who has to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// What this side wrote down.
    pub ours: Record,
    /// What the other side said just now, and from which ledger; none if it could not be reached.
    pub theirs: Option<(Standing, LedgerId)>,
    /// In words.
    pub message: String,
}

/// How it is settled.
#[derive(Debug)]
pub enum Resolved {
    /// The other side has the machine. What is here is an old copy.
    There(Evidence),
    /// The other side never ran it and never will: it may run here again.
    Here(RunPermit, Evidence),
    /// Nobody can know. Both sides stay stopped.
    Unknown(Evidence),
}

/// Asks the other side about a crossing that this side gave away. The answer is written down before it is returned.
/// Asking makes a side that still waits for the go-ahead decline it for ever.
pub fn resolve(
    record: &Record,
    link: &mut dyn Link,
    ledger: &mut dyn Ledger,
    clock: &dyn Clock,
    within: Duration,
) -> Result<Resolved, Reason> {
    let mut departure = Departure::reopen(record)?;
    if ledger.read(record.session, Side::Outgoing)?.as_ref() != Some(record) {
        let message = format!("crossing {} was settled meanwhile", record.session);
        return Err(Reason::new(Cause::Ledger, message));
    }
    let evidence = |theirs, message: String| Evidence {
        ours: record.clone(),
        theirs,
        message,
    };
    let (from, taken) = match ask(record, link, ledger.id(), clock, within) {
        Ok(word) => word,
        Err(reason) => {
            let message = match reason.cause {
                Cause::Ledger => format!("the other side gives no word: {reason}"),
                _ => format!("the other side could not be asked: {reason}"),
            };
            return Ok(Resolved::Unknown(evidence(None, message)));
        }
    };
    let theirs = Some((
        if taken {
            Standing::Taken
        } else {
            Standing::Declined
        },
        from,
    ));
    Ok(match departure.heard(ledger, from, taken)? {
        Verdict::Gone => Resolved::There(evidence(theirs, "the other side took the machine".into())),
        Verdict::Back(permit) => {
            let message = "the other side wrote down that it never will run the machine".into();
            Resolved::Here(permit, evidence(theirs, message))
        }
        Verdict::InDoubt(message) => Resolved::Unknown(evidence(theirs, message)),
    })
}

fn ask(
    record: &Record,
    link: &mut dyn Link,
    ledger: LedgerId,
    clock: &dyn Clock,
    within: Duration,
) -> Result<(LedgerId, bool), Reason> {
    let mut talk = Talk::default();
    let said = link.control().map_err(Broke::from).and_then(|peer| {
        talk.begin(peer);
        talk.say(&Message::Hello {
            oldest: OLDEST_VERSION,
            newest: VERSION,
            session: record.session,
            // Newer than any connection of the crossing itself.
            attempt: u32::MAX,
            ledger,
            purpose: Purpose::Ask,
        })?;
        talk.hear(clock, within, &|| None)
    });
    match said {
        Err(Broke::Word { from, taken, .. }) => Ok((from, taken)),
        Err(Broke::Link(error)) => Err(Reason::new(Cause::Link, error.message)),
        Err(Broke::For(Side::Outgoing | Side::Incoming, reason)) => Err(reason),
        Ok(other) => Err(Reason::new(
            Cause::Protocol,
            format!("it answered with {}", other.name()),
        )),
    }
}
