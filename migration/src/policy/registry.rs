//! The policies by name, and what holds for all of them.

use serde::{Deserialize, Serialize};

use super::{DeadlineAction, Decision, History, Limits, Reason};
use super::{calm_adaptive, calm_fixed, calm_live, cloud_hypervisor, fixed, qemu, virtualbox, xen};
use crate::cost::parse_rate;

/// Which policy, as users name it. The bandwidths are in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Policy {
    /// A bandwidth; `fixed:200Mbit`.
    Fixed {
        bandwidth_bytes_per_sec: u64,
    },
    Max,
    XenBasic,
    XenCode,
    Qemu,
    CloudHypervisor,
    VirtualBox,
    /// CALM's best constant bandwidth, or a given one; `calm-fixed:58Mbit`.
    CalmFixed {
        bandwidth_bytes_per_sec: Option<u64>,
    },
    CalmAdaptive,
    CalmLive,
}

/// A policy for people.
pub struct About {
    pub name: &'static str,
    pub policy: Policy,
    pub sentence: &'static str,
}

/// Every policy, in the order of tables.
pub const ALL: &[About] = &[
    About {
        name: "fixed",
        policy: Policy::Fixed {
            bandwidth_bytes_per_sec: 0,
        },
        sentence: "copies at a given bandwidth (fixed:200Mbit) and stops when the rest fits into the downtime",
    },
    About {
        name: "max",
        policy: Policy::Max,
        sentence: "copies with all the link gives and stops when the rest fits into the downtime",
    },
    About {
        name: "xen-basic",
        policy: Policy::XenBasic,
        sentence: "the dirtying rate plus 50 Mbit/s each round, until 256 KiB are left or the link is too small",
    },
    About {
        name: "xen-code",
        policy: Policy::XenCode,
        sentence: "Xen's own source: from 100 up to 500 Mbit/s, only ever faster, at most 29 rounds",
    },
    About {
        name: "qemu",
        policy: Policy::Qemu,
        sentence: "full speed until the rest fits into the downtime at the measured bandwidth",
    },
    About {
        name: "cloud-hypervisor",
        policy: Policy::CloudHypervisor,
        sentence: "full speed until the next round fits into the downtime at the last round's bandwidth",
    },
    About {
        name: "virtualbox",
        policy: Policy::VirtualBox,
        sentence: "full speed until the dirty pages vote, by short and long averages, that it gets no better",
    },
    About {
        name: "calm-fixed",
        policy: Policy::CalmFixed {
            bandwidth_bytes_per_sec: None,
        },
        sentence: "the one bandwidth and stop point of least cost, from one page write rate",
    },
    About {
        name: "calm-adaptive",
        policy: Policy::CalmAdaptive,
        sentence: "the cheapest bandwidth for each page, from one page write rate, until stopping is cheaper",
    },
    About {
        name: "calm-live",
        policy: Policy::CalmLive,
        sentence: "least total cost from what is measured: page groups, the service's traffic, the link, the switch",
    },
];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PolicyError(String);

impl Policy {
    pub(super) fn decide(&self, history: &History, limits: &Limits) -> (Decision, Reason) {
        match *self {
            Policy::Fixed {
                bandwidth_bytes_per_sec,
            } => fixed::decide(bandwidth_bytes_per_sec, history, limits),
            Policy::Max => fixed::decide_max(history, limits),
            Policy::XenBasic => xen::decide_basic(history, limits),
            Policy::XenCode => xen::decide_code(history, limits),
            Policy::Qemu => qemu::decide(history, limits),
            Policy::CloudHypervisor => cloud_hypervisor::decide(history, limits),
            Policy::VirtualBox => virtualbox::decide(history, limits),
            Policy::CalmFixed {
                bandwidth_bytes_per_sec,
            } => calm_fixed::decide(bandwidth_bytes_per_sec, history, limits),
            Policy::CalmAdaptive => calm_adaptive::decide(history, limits),
            Policy::CalmLive => calm_live::decide(history, limits),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Policy::Fixed { .. } => "fixed",
            Policy::Max => "max",
            Policy::XenBasic => "xen-basic",
            Policy::XenCode => "xen-code",
            Policy::Qemu => "qemu",
            Policy::CloudHypervisor => "cloud-hypervisor",
            Policy::VirtualBox => "virtualbox",
            Policy::CalmFixed { .. } => "calm-fixed",
            Policy::CalmAdaptive => "calm-adaptive",
            Policy::CalmLive => "calm-live",
        }
    }
}

impl std::str::FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let (name, bandwidth) = match text.split_once(':') {
            Some((name, bandwidth)) => {
                let bandwidth =
                    parse_rate(bandwidth).map_err(|e| PolicyError(format!("policy \"{text}\": {e}")))?;
                (name, Some(bandwidth))
            }
            None => (text, None),
        };
        let about = ALL.iter().find(|a| a.name == name).ok_or_else(|| {
            let names: Vec<_> = ALL.iter().map(|a| a.name).collect();
            PolicyError(format!(
                "there is no policy \"{name}\"; there are {}",
                names.join(", ")
            ))
        })?;
        match (about.policy, bandwidth) {
            (Policy::Fixed { .. }, Some(bandwidth_bytes_per_sec)) => Ok(Policy::Fixed {
                bandwidth_bytes_per_sec,
            }),
            (Policy::Fixed { .. }, None) => Err(PolicyError(
                "the policy \"fixed\" needs its bandwidth; write for example fixed:200Mbit".into(),
            )),
            (Policy::CalmFixed { .. }, bandwidth_bytes_per_sec) => Ok(Policy::CalmFixed {
                bandwidth_bytes_per_sec,
            }),
            (policy, None) => Ok(policy),
            (_, Some(_)) => Err(PolicyError(format!(
                "the policy \"{name}\" chooses the bandwidth itself; write it without \":...\""
            ))),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Policy::Fixed {
                bandwidth_bytes_per_sec,
            }
            | Policy::CalmFixed {
                bandwidth_bytes_per_sec: Some(bandwidth_bytes_per_sec),
            } => {
                let bits = u128::from(*bandwidth_bytes_per_sec) * 8;
                let (number, unit) = [(1_000_000, "Mbit"), (1_048_576, "Mibit"), (1, "bit")]
                    .into_iter()
                    .find(|(unit, _)| bits % unit == 0)
                    .map_or((bits, "bit"), |(unit, name)| (bits / unit, name));
                write!(f, "{}:{number}{unit}", self.name())
            }
            _ => f.write_str(self.name()),
        }
    }
}

impl TryFrom<String> for Policy {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> Self {
        policy.to_string()
    }
}

/// What the deadline says, if it has come; the same for every policy.
pub(super) fn deadline(history: &History, limits: &Limits) -> Option<(Decision, Reason)> {
    let limit = limits.deadline.filter(|limit| history.elapsed >= *limit)?;
    let decision = match limits.on_deadline {
        DeadlineAction::Cancel => Decision::give_up(),
        DeadlineAction::PauseAndFinish => Decision::switch(),
        DeadlineAction::GoOn => return None,
    };
    let reason = Reason::Deadline {
        elapsed_secs: history.elapsed.as_secs_f64(),
        limit_secs: limit.as_secs_f64(),
    };
    Some((decision, reason))
}
