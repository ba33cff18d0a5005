//! From an offer to a machine that is built and waits for its data.

use std::sync::Arc;

use crate::failure::{Cause, Phase, Reason};
use crate::handover::{Arrival, check_epoch, settle_returned};
use crate::machine::Offer;
use crate::pages::decode::Placement;
use crate::wire::{MAX_BLOCKS, MAX_LANES, Message, VERSION_WITH_NAMES};

use super::{Copying, Failed, Greeted, Incoming, Offered, Reply, Room};

impl Greeted {
    pub(super) fn offer(
        self,
        epoch: u64,
        lanes: u16,
        offer: Offer,
        room: &mut Room<'_>,
    ) -> Result<(Incoming, Reply), Box<Failed>> {
        may_come(epoch, &offer, room).map_err(Failed::closed)?;
        let lanes = lanes.clamp(1, room.terms.most_lanes.clamp(1, MAX_LANES));
        let offered = Offered {
            greeted: self,
            epoch,
            lanes,
            offer,
        };
        Ok((Incoming::Offered(offered), Reply::of(Message::Accepted { lanes })))
    }

    /// A question: whatever the answer is, this side waits on as if nobody had asked.
    pub(super) fn consider(self, epoch: u64, offer: &Offer, room: &mut Room<'_>) -> (Incoming, Reply) {
        let message = match may_come(epoch, offer, room) {
            Ok(()) => Message::Accepted {
                lanes: room.terms.most_lanes.clamp(1, MAX_LANES),
            },
            Err(reason) => Message::Refused {
                phase: Phase::Negotiate,
                reason,
            },
        };
        (Incoming::Greeted(self), Reply::of(message))
    }
}

fn may_come(epoch: u64, offer: &Offer, room: &mut Room<'_>) -> Result<(), Reason> {
    check_offer(offer)?;
    check_epoch(&room.ledger.records(offer.card.machine)?, epoch)?;
    room.machine.admit(offer)
}

/// What must be true of any offer, before the monitor looks at it.
fn check_offer(offer: &Offer) -> Result<(), Reason> {
    let bad = |text: String| Err(Reason::new(Cause::Protocol, text));
    if offer.blocks.is_empty() || offer.blocks.len() > MAX_BLOCKS {
        return bad(format!(
            "the machine is offered with {} blocks",
            offer.blocks.len()
        ));
    }
    for (at, info) in offer.blocks.iter().enumerate() {
        if offer.blocks.iter().take(at).any(|other| other.id == info.id) {
            return bad(format!("{} is offered twice", info.id));
        }
        let granule = match info.kind {
            crate::block::BlockKind::Memory => u64::from(info.unit_bytes()),
            crate::block::BlockKind::Disk => 512,
        };
        if info.bytes == 0 || !info.bytes.is_multiple_of(granule) {
            return bad(format!("{} is offered with {} bytes", info.id, info.bytes));
        }
    }
    Ok(())
}

impl Offered {
    pub(super) fn prepare(self, room: &mut Room<'_>) -> Result<(Incoming, Reply), Box<Failed>> {
        let Offered {
            greeted:
                Greeted {
                    session,
                    attempt,
                    version,
                    peer,
                },
            epoch,
            lanes,
            offer,
        } = self;
        let settled = room
            .ledger
            .records(offer.card.machine)
            .and_then(|records| check_epoch(&records, epoch))
            .and_then(|doubts| settle_returned(room.ledger, doubts));
        if let Err(reason) = settled {
            return Err(Failed::closed(reason));
        }
        let sinks = room.machine.prepare(&offer).and_then(|sinks| {
            let built: Vec<_> = sinks.iter().map(|sink| sink.info()).collect();
            let fits = built.len() == offer.blocks.len()
                && offer.blocks.iter().all(|o| {
                    built
                        .iter()
                        .any(|b| (b.id, b.kind, b.bytes) == (o.id, o.kind, o.bytes))
                });
            if fits {
                Ok(sinks)
            } else {
                Err(Reason::new(
                    Cause::Machine,
                    "what was built is not what was offered",
                ))
            }
        });
        let sinks = match sinks {
            Ok(sinks) => sinks,
            Err(reason) => {
                room.machine.abort();
                return Err(Failed::closed(reason));
            }
        };
        let arrival = match Arrival::begin(room.ledger, session, offer.card.machine, epoch, peer) {
            Ok(arrival) => arrival,
            Err(reason) => {
                room.machine.abort();
                return Err(Failed::closed(reason));
            }
        };
        let placement = Arc::new(Placement::new(&sinks));
        let libraries = if version >= VERSION_WITH_NAMES {
            placement.libraries()
        } else {
            Vec::new()
        };
        room.desk.open(session, attempt, lanes, Arc::clone(&placement));
        let copying = Copying {
            session,
            attempt,
            version,
            lanes,
            arrival,
            placement,
            earlier: Vec::new(),
            state: Vec::new(),
        };
        Ok((
            Incoming::Copying(Box::new(copying)),
            Reply::of(Message::Prepared { libraries }),
        ))
    }
}
