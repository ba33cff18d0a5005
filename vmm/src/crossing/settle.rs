//! A crossing that was cut at the very hand over: what is in doubt, and how it is settled - by the other side's word where
//! it proves something, by the user's where nothing does.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ferry_migration::clock::HostClock;
use ferry_migration::failure::{Reason, Side, Whereabouts};
use ferry_migration::handover::{Ledger, Record, SessionId, Standing};
use ferry_migration::link::Link;
use ferry_migration::resolve::{Evidence, Resolved, resolve};
use ferry_migration::transport::{Address, SocketLink, Tls};
use serde::{Deserialize, Serialize};

use super::pipe::Pipe;
use crate::config::ConfigError;
use crate::error::{MachineError, Result};

/// Where the other side is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// As in a request for a crossing.
    pub destination: String,
    pub tls: Option<PathBuf>,
    pub stall: Duration,
}

/// A machine whose whereabouts are unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InDoubt {
    pub session: SessionId,
    /// Whether it ran before.
    pub ran: bool,
    pub place: Place,
}

/// Whether the machine's whereabouts are unknown, and since which crossing.
#[derive(Default)]
pub struct Doubt(Mutex<Option<InDoubt>>);

impl Doubt {
    pub fn get(&self) -> Option<InDoubt> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, doubt: Option<InDoubt>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = doubt;
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    pub whereabouts: Whereabouts,
    /// What is known, in one sentence.
    pub evidence: String,
}

pub(super) fn open_link(session: SessionId, place: &Place) -> Result<Box<dyn Link>> {
    let refuse = |text: String| MachineError::Config(ConfigError(text));
    if let Some(path) = place.destination.strip_prefix("pipe:") {
        return Ok(Box::new(Pipe::open(session, path, place.stall)?));
    }
    let address: Address = place.destination.parse().map_err(refuse)?;
    let tls = match &place.tls {
        Some(dir) => Some(Tls::from_dir(dir, Vec::new()).map_err(|error| refuse(error.to_string()))?),
        None => None,
    };
    Ok(Box::new(SocketLink::new(session, address, tls, place.stall)))
}

/// Settles a crossing that this host gave away and that nobody confirmed, in the ledger. The other side is asked; only
/// where its word proves nothing does the user's count.
pub fn settle(
    ledger: &mut dyn Ledger,
    session: SessionId,
    place: &Place,
    here: Option<bool>,
) -> Result<Settled> {
    let host = |reason: Reason| MachineError::Host(reason.to_string());
    let record = ledger
        .read(session, Side::Outgoing)
        .map_err(host)?
        .ok_or_else(|| {
            MachineError::Host(format!(
                "the ledger of this host knows nothing of crossing {session}"
            ))
        })?;
    let known = match record.standing {
        Standing::Kept => Some((
            Whereabouts::Here,
            "this host's ledger says that the machine stayed here",
        )),
        Standing::Gone => Some((
            Whereabouts::There,
            "this host's ledger says that the other side has it",
        )),
        _ => None,
    };
    if let Some((whereabouts, evidence)) = known {
        return Ok(Settled {
            whereabouts,
            evidence: evidence.to_owned(),
        });
    }
    let resolved = match open_link(session, place) {
        Ok(mut link) => {
            resolve(&record, link.as_mut(), ledger, &HostClock::new(), place.stall).map_err(host)?
        }
        Err(error) => Resolved::Unknown(Evidence {
            ours: record.clone(),
            theirs: None,
            message: format!("the other side could not be asked: {error}"),
        }),
    };
    match resolved {
        Resolved::There(evidence) => Ok(Settled {
            whereabouts: Whereabouts::There,
            evidence: evidence.message,
        }),
        Resolved::Here(_permit, evidence) => Ok(Settled {
            whereabouts: Whereabouts::Here,
            evidence: evidence.message,
        }),
        Resolved::Unknown(evidence) => by_word(ledger, record, here, evidence),
    }
}

fn by_word(
    ledger: &mut dyn Ledger,
    mut record: Record,
    here: Option<bool>,
    evidence: Evidence,
) -> Result<Settled> {
    let (whereabouts, standing) = match here {
        None => {
            return Ok(Settled {
                whereabouts: Whereabouts::Unknown,
                evidence: format!(
                    "this host gave the machine away in crossing {} and never heard that it arrived; {}",
                    record.session, evidence.message
                ),
            });
        }
        Some(true) => (Whereabouts::Here, Standing::Kept),
        Some(false) => (Whereabouts::There, Standing::Gone),
    };
    record.standing = standing;
    ledger
        .write(&record)
        .map_err(|reason| MachineError::Host(reason.to_string()))?;
    Ok(Settled {
        whereabouts,
        evidence: format!("you said so; {}", evidence.message),
    })
}
