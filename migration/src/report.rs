//! Every number shown to anyone: what happens now (events) and what happened (the report).

use serde::{Deserialize, Serialize};

use crate::failure::Phase;

/// Something an observer may want to show. Grows; match with a wildcard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    Phase { phase: Phase },
}
