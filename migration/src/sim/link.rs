//! The simulated link: capacity that may change, outages, delay, and the service's own traffic on it.

use serde::{Deserialize, Serialize};

/// How the crossing and the service share the link.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// What the crossing takes is taken from the service (CALM's model).
    Reserved,
    /// A crossing that yields gets what the service leaves idle, and starts `reaction_secs` after the service
    /// fell silent; a request may wait as long for the crossing to yield.
    ServiceFirst { reaction_secs: f64 },
}

/// From a moment on, the capacity or the request rate is this many times what it was at the start.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub at_secs: f64,
    pub factor: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub bytes_per_sec: f64,
    pub delay_secs: f64,
    pub sharing: Sharing,
    /// In order of time. A factor of 0 is a lost connection until the next change.
    pub capacity: Vec<Change>,
    /// In order of time; `period_secs` repeats them.
    pub load: Vec<Change>,
    pub load_period_secs: Option<f64>,
}

impl Link {
    pub fn new(bytes_per_sec: f64) -> Self {
        Link {
            bytes_per_sec,
            delay_secs: 0.0,
            sharing: Sharing::Reserved,
            capacity: Vec::new(),
            load: Vec::new(),
            load_period_secs: None,
        }
    }

    /// What the link carries at a moment.
    pub fn capacity_at(&self, secs: f64) -> f64 {
        self.bytes_per_sec * factor_at(&self.capacity, secs)
    }

    /// How often requests come at a moment, against what the SLA says.
    pub fn load_at(&self, secs: f64) -> f64 {
        let secs = match self.load_period_secs {
            Some(period) if period > 0.0 => secs % period,
            _ => secs,
        };
        factor_at(&self.load, secs)
    }

    /// Which part of the link a crossing that yields gets: the idle time of the service's queue, less the time
    /// to notice each silence. For exponential gaps between requests both are exact.
    pub fn idle_share(&self, capacity: f64, service_bytes_per_sec: f64, requests_per_sec: f64) -> f64 {
        let Sharing::ServiceFirst { reaction_secs } = self.sharing else {
            return 1.0;
        };
        let idle = (1.0 - service_bytes_per_sec / capacity.max(1.0)).max(0.0);
        idle * (-requests_per_sec * reaction_secs).exp()
    }
}

fn factor_at(changes: &[Change], secs: f64) -> f64 {
    changes
        .iter()
        .take_while(|c| c.at_secs <= secs)
        .last()
        .map_or(1.0, |c| c.factor.max(0.0))
}
