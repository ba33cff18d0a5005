//! What is said over the control socket, the same types on both sides.

use std::path::PathBuf;
use std::time::SystemTime;

use ferry_devices::virtio::balloon::GuestMemoryStats;
use ferry_migration::failure::Whereabouts;
use serde::{Deserialize, Serialize};

use crate::lifecycle::State;
use crate::machine::Info;
use crate::name::Name;

pub const MACHINE: &str = "/v1/machine";
pub const MACHINE_STATE: &str = "/v1/machine/state";
pub const PULSE: &str = "/v1/pulse";
pub const BALLOON: &str = "/v1/balloon";
pub const EVENTS: &str = "/v1/events";
pub const CROSSING: &str = "/v1/crossing";
pub const REHEARSAL: &str = "/v1/rehearsal";
pub const RESOLVE: &str = "/v1/resolve";

/// A request has at most this much body.
pub const BODY_LIMIT_BYTES: usize = 64 << 10;
/// More pulses in one request than anybody waits for.
pub const MAX_PULSES: u32 = 1_000_000;

/// The answer to `GET /v1/machine`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineInfo {
    pub name: Name,
    pub pid: u32,
    /// The version of the monitor that runs it.
    pub ferry: String,
    /// Since the process began to serve the machine.
    pub uptime_seconds: f64,
    #[serde(flatten)]
    pub machine: Info,
}

/// The body of `PUT /v1/machine/state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantState {
    pub want: Want,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    Paused,
    Running,
    /// Press the power button; the guest decides.
    Stopped,
    /// End it now.
    Killed,
}

/// The body of `POST /v1/pulse`; an empty body means one pulse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PulseRequest {
    pub count: u32,
}

impl Default for PulseRequest {
    fn default() -> Self {
        PulseRequest { count: 1 }
    }
}

/// How long the guest stood still in each of the pulses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PulseReport {
    pub pulses: u32,
    pub median_ms: f64,
    pub longest_ms: f64,
}

/// The answer to `GET` and `PUT /v1/balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// How much memory the guest shall give to the host, and how much it has given.
    pub target_bytes: u64,
    pub actual_bytes: u64,
    /// What the guest says of its memory, if it says anything.
    pub guest: Option<GuestMemoryStats>,
}

/// The body of `PUT /v1/balloon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonTarget {
    pub target_bytes: u64,
}

/// One line of `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Seconds since 1970.
    pub at: f64,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum What {
    /// The machine's state, first as it is and then at every change.
    State(State),
    Pulses(PulseReport),
}

impl Event {
    pub fn now(what: What) -> Event {
        let at = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64();
        Event { at, what }
    }
}

/// The answer to `GET /v1/resolve`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoubtInfo {
    /// The machine stands still because nobody knows whether it runs at the other side.
    pub in_doubt: bool,
    /// The crossing that was cut.
    pub session: Option<String>,
    /// Where it went, as the user said it.
    pub destination: Option<String>,
}

/// The body of `POST /v1/resolve`. The other side is asked, and its word decides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResolveRequest {
    /// The user's word, for when the other side's proves nothing: it runs on here, or it is gone from here.
    pub here: Option<bool>,
    /// Where to ask, as a destination of a crossing; without it, where the machine went.
    pub ask: Option<String>,
    pub tls: Option<PathBuf>,
}

/// The answer: where the machine is now. `unknown` means that nothing was settled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resolution {
    pub whereabouts: Whereabouts,
    /// What is known, in one sentence.
    pub evidence: String,
    pub machine: MachineInfo,
}

/// The answer to `DELETE /v1/crossing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled {
    /// Whether there was a crossing to cancel.
    pub cancelled: bool,
}

/// The body of every refusal: one sentence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: String,
}

impl PulseReport {
    /// None if there was no pulse.
    pub fn of(mut stood_still: Vec<std::time::Duration>) -> Option<PulseReport> {
        stood_still.sort();
        let ms = |d: &std::time::Duration| d.as_secs_f64() * 1e3;
        Some(PulseReport {
            pulses: stood_still.len() as u32,
            median_ms: stood_still.get(stood_still.len() / 2).map(ms)?,
            longest_ms: stood_still.last().map(ms)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;
    use crate::lifecycle::StopReason;

    #[test]
    fn events_and_info_survive_json() {
        for what in [
            What::State(State::Stopped {
                reason: StopReason::DebugExit { code: 3 },
            }),
            What::State(State::Failed { message: "m".into() }),
            What::Pulses(PulseReport {
                pulses: 2,
                median_ms: 1.5,
                longest_ms: 2.0,
            }),
        ] {
            let event = Event { at: 12.5, what };
            let text = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event, "{text}");
        }
        let info = MachineInfo {
            name: "web".parse().unwrap(),
            pid: 7,
            ferry: "0.1.0".into(),
            uptime_seconds: 1.0,
            machine: Info {
                state: State::Paused,
                config: MachineConfig::default(),
                exits: vec![3],
                without: Vec::new(),
            },
        };
        let text = serde_json::to_string(&info).unwrap();
        assert_eq!(serde_json::from_str::<MachineInfo>(&text).unwrap(), info);
    }

    #[test]
    fn unknown_words_are_refused() {
        for bad in [
            r#"{"want":"gone"}"#,
            r#"{"want":"paused","now":true}"#,
            "{}",
            "[]",
            "\"paused\"",
        ] {
            assert!(serde_json::from_str::<WantState>(bad).is_err(), "{bad}");
        }
        assert_eq!(serde_json::from_str::<PulseRequest>("{}").unwrap().count, 1);
        for bad in [r#"{"count":-1}"#, r#"{"counts":1}"#] {
            assert!(serde_json::from_str::<PulseRequest>(bad).is_err(), "{bad}");
        }
    }
}
