//! What one monitor tells another about a machine before it comes: bytes that the engine carries and does not read.

use serde::{Deserialize, Serialize};

use ferry_migration::block::{BlockId, BlockKind};
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::machine::Offer;

use crate::config::MachineConfig;
use crate::cpu::description::Description as GuestDescription;
use crate::memory;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    pub(super) config: MachineConfig,
    /// What the guest has seen of its host, and so must find there.
    pub(super) guest: GuestDescription,
    /// Both sides see the same images: only memory and state cross.
    pub(super) shared_storage: bool,
    // What came later than these is here under a name of its own, and only if the guest uses it: a ferry that is older than
    // it refuses the machine by that name, before anything is copied, and takes all others.
    /// A driver has agreed on VIRTIO_F_RING_RESET.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) virtio_ring_reset: bool,
}

impl Description {
    pub(super) fn encode(&self) -> Result<Vec<u8>, Reason> {
        rmp_serde::to_vec_named(self).map_err(|error| {
            Reason::new(
                Cause::Machine,
                format!("the machine could not be described: {error}"),
            )
        })
    }

    /// Reads an offer's description and holds the offer's blocks against it: both come from a peer.
    pub(super) fn of(offer: &Offer) -> Result<Description, Reason> {
        let refuse = |text: String| Reason::new(Cause::Protocol, text);
        let description: Description = rmp_serde::from_slice(&offer.card.description).map_err(|error| {
            refuse(format!(
                "the machine uses something that this version of ferry does not know: {error}"
            ))
        })?;
        description
            .config
            .validate()
            .map_err(|error| refuse(format!("the machine's configuration: {error}")))?;
        if !description.guest.fits(&description.config) {
            return Err(refuse(
                "the machine's description and its configuration contradict each other".to_owned(),
            ));
        }
        let regions = memory::ranges(description.config.memory.0);
        let disks = if description.shared_storage {
            0
        } else {
            description.config.disks.len()
        };
        let expected = regions.len() + disks;
        if offer.blocks.len() != expected {
            return Err(refuse(format!(
                "the machine should have {expected} blocks of memory and disks, {} are offered",
                offer.blocks.len()
            )));
        }
        for (at, block) in offer.blocks.iter().enumerate() {
            let fits = match regions.get(at) {
                Some((_, bytes)) => block.kind == BlockKind::Memory && block.bytes == *bytes,
                None => block.kind == BlockKind::Disk,
            };
            if !fits || block.id != BlockId(at as u16) {
                return Err(refuse(format!(
                    "{} does not fit the machine's configuration",
                    block.id
                )));
            }
        }
        Ok(description)
    }
}
