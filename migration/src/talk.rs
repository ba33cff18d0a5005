//! The outgoing side's conversation: say, hear, and what to make of silence.

use std::time::Duration;

use crate::clock::Clock;
use crate::failure::{Cause, Phase, Reason, Side};
use crate::handover::{LedgerId, Standing};
use crate::link::{LinkError, LinkErrorKind, Peer};
use crate::wire::Message;

/// Why a step did not succeed.
#[derive(Debug)]
pub(crate) enum Broke {
    /// The connection is of no more use; another one may be.
    Link(LinkError),
    /// There is no use in another connection.
    For(Side, Reason),
    /// The other side's final word on the whole crossing.
    Word {
        from: LedgerId,
        taken: bool,
        why: Option<Reason>,
    },
}

impl From<LinkError> for Broke {
    fn from(error: LinkError) -> Self {
        Broke::Link(error)
    }
}

impl Broke {
    pub(crate) fn here(reason: impl Into<Reason>) -> Self {
        Broke::For(Side::Outgoing, reason.into())
    }

    pub(crate) fn unexpected(message: &Message, asked: &str) -> Self {
        Broke::For(
            Side::Incoming,
            Reason::new(
                Cause::Protocol,
                format!("the other side answered {asked} with {}", message.name()),
            ),
        )
    }
}

/// How long to listen between two looks at whether the crossing was cancelled.
const GLANCE: Duration = Duration::from_millis(50);

/// The control connection, once there is one.
#[derive(Default)]
pub(crate) struct Talk {
    peer: Option<Box<dyn Peer>>,
}

impl Talk {
    pub(crate) fn begin(&mut self, peer: Box<dyn Peer>) {
        self.peer = Some(peer);
    }

    pub(crate) fn end(&mut self) {
        self.peer = None;
    }

    pub(crate) fn say(&mut self, message: &Message) -> Result<(), Broke> {
        let peer = self.peer.as_mut().ok_or_else(|| {
            LinkError::new(LinkErrorKind::Closed, "there is no connection to the other side")
        })?;
        Ok(peer.send(&message.encode())?)
    }

    /// The next message that is not a sign of life. `cancelled` is looked at often.
    pub(crate) fn hear(
        &mut self,
        clock: &dyn Clock,
        within: Duration,
        cancelled: &dyn Fn() -> Option<Reason>,
    ) -> Result<Message, Broke> {
        let mut until = clock.now() + within;
        loop {
            if let Some(reason) = cancelled() {
                return Err(Broke::here(reason));
            }
            let peer = self.peer.as_mut().ok_or_else(|| {
                LinkError::new(LinkErrorKind::Closed, "there is no connection to the other side")
            })?;
            let left = until.saturating_sub(clock.now());
            let Some(bytes) = peer.receive(left.min(GLANCE))? else {
                if left.is_zero() {
                    return Err(LinkError::new(
                        LinkErrorKind::Stalled,
                        format!("the other side said nothing for {within:?}"),
                    )
                    .into());
                }
                continue;
            };
            let message = Message::decode(&bytes).map_err(|error| {
                Broke::For(
                    Side::Incoming,
                    Reason::new(
                        Cause::Protocol,
                        format!("the other side's message is malformed: {error}"),
                    ),
                )
            })?;
            match message {
                Message::Working { .. } => until = clock.now() + within,
                Message::Refused {
                    phase: Phase::HandOver,
                    reason,
                } if reason.cause == Cause::Ledger => {
                    // Not a word to build on: it may be asked again.
                    return Err(LinkError::new(LinkErrorKind::Closed, reason.message).into());
                }
                Message::Refused { reason, .. } => return Err(Broke::For(Side::Incoming, reason)),
                Message::Standing {
                    ledger,
                    standing,
                    why,
                } => {
                    return Err(Broke::Word {
                        from: ledger,
                        taken: standing == Standing::Taken,
                        why,
                    });
                }
                message => return Ok(message),
            }
        }
    }
}
