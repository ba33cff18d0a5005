//! What a user asks of a crossing, as it goes over the control socket; and what comes back, line by line.

use std::path::PathBuf;
use std::time::Duration;

use ferry_migration::pages::encode::Compression;
use ferry_migration::policy::Limits;
use ferry_migration::report::{Event, Report};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossingRequest {
    /// `tcp://HOST:PORT`, `unix:PATH`, or `pipe:PATH`: a socket at which one pipe to a receiver is to be had.
    pub destination: String,
    /// What the user called the destination, where it is reached by a pipe.
    #[serde(default)]
    pub named: Option<String>,
    /// A folder as `ferry keys` makes it; only for tcp.
    #[serde(default)]
    pub tls: Option<PathBuf>,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default = "two")]
    pub lanes: u16,
    #[serde(default)]
    pub compression: Compression,
    #[serde(default)]
    pub verify: bool,
    #[serde(default)]
    pub shared_storage: bool,
    /// How long the other side may make no progress.
    #[serde(default = "stall")]
    pub stall: Duration,
    /// How long a broken link is tried again.
    #[serde(default = "reconnect")]
    pub reconnect_for: Duration,
}

fn two() -> u16 {
    2
}

fn stall() -> Duration {
    Duration::from_secs(10)
}

fn reconnect() -> Duration {
    Duration::from_secs(30)
}

/// One line of the answer; the report is the last one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CrossingLine {
    Event(Event),
    Report(Box<Report>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_enough_and_a_misspelt_wish_is_refused() {
        let read = serde_json::from_str::<CrossingRequest>;
        let request = read(r#"{"destination":"tcp://b:7070"}"#).unwrap();
        assert_eq!((request.limits, request.lanes), (Limits::default(), 2));
        let wish =
            read(r#"{"destination":"tcp://b:7070","limits":{"downtime":{"secs":1,"nanos":0}}}"#).unwrap();
        assert_eq!(wish.limits.downtime, Duration::from_secs(1));
        for misspelt in [
            r#"{"destination":"x","verfy":true}"#,
            r#"{"destination":"x","limits":{"downtme":1}}"#,
        ] {
            assert!(read(misspelt).is_err(), "{misspelt}");
        }
    }
}
