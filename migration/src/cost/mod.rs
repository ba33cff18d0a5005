//! What a residual bandwidth costs the services in the machine: the fraction of requests that come too late.
//!
//! The unit of cost is the second of outage: while the machine stands still, a service of weight 1 costs one
//! second per second; while it runs with `residual` bytes per second of the link for itself, it costs
//! [`Cost::at`] of that.

mod fit;
mod queue;
mod sla;
mod table;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use fit::fit_queue;
pub use queue::Queue;
pub use sla::{ParseError, parse_duration, parse_memory, parse_rate, parse_size, parse_sla};
pub use table::{Table, TableError};

/// How late requests depend on bandwidth, for one service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Curve {
    Queue(Queue),
    Table(Table),
}

/// One service in the machine (or on the link that the crossing uses).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub curve: Curve,
    /// How much a second of its outage counts.
    pub weight: f64,
    /// Which part of the residual bandwidth is its.
    pub share: f64,
}

/// The sum of several services; none if nobody said what the service promises.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    pub services: Vec<Service>,
}

impl Cost {
    /// Nothing is known of the service: only downtime costs.
    pub fn unknown() -> Self {
        Cost::default()
    }

    pub fn queue(queue: Queue) -> Self {
        Cost {
            services: vec![Service {
                curve: Curve::Queue(queue),
                weight: 1.0,
                share: 1.0,
            }],
        }
    }

    pub fn table(table: Table) -> Self {
        Cost {
            services: vec![Service {
                curve: Curve::Table(table),
                weight: 1.0,
                share: 1.0,
            }],
        }
    }

    pub fn is_known(&self) -> bool {
        !self.services.is_empty()
    }

    /// Seconds of outage per second while the services have `residual_bytes_per_sec` of the link.
    pub fn at(&self, residual_bytes_per_sec: f64) -> f64 {
        self.at_load(residual_bytes_per_sec, 1.0)
    }

    /// The same when requests arrive `load` times as often as the SLA says.
    pub fn at_load(&self, residual_bytes_per_sec: f64, load: f64) -> f64 {
        self.services
            .iter()
            .map(|s| s.weight * s.curve.late(residual_bytes_per_sec * s.share, load))
            .sum()
    }

    /// The same when the services go first on a link of this capacity, and lose at most `delay` to the crossing.
    pub fn at_first_place(&self, link_bytes_per_sec: f64, load: f64, delay: f64) -> f64 {
        self.services
            .iter()
            .map(|s| {
                let residual = link_bytes_per_sec * s.share;
                s.weight
                    * match &s.curve {
                        Curve::Queue(q) => q.late_after(residual, load, delay),
                        Curve::Table(t) => t.late(residual / load.max(1e-9)),
                    }
            })
            .sum()
    }

    /// Seconds of outage per second while the machine stands still.
    pub fn down(&self) -> f64 {
        if self.services.is_empty() {
            return 1.0;
        }
        self.services.iter().map(|s| s.weight).sum()
    }

    /// Requests per second that the SLA expects, over all services, where it says so.
    pub fn requests_per_sec(&self) -> Option<f64> {
        self.services
            .iter()
            .map(|s| match &s.curve {
                Curve::Queue(q) => Some(q.requests_per_sec),
                Curve::Table(_) => None,
            })
            .sum()
    }

    /// The bandwidth that the services need on average, where the SLA says so.
    pub fn offered_bytes_per_sec(&self) -> Option<f64> {
        self.services
            .iter()
            .map(|s| match &s.curve {
                Curve::Queue(q) => Some(q.requests_per_sec * q.response_bytes),
                Curve::Table(_) => None,
            })
            .sum()
    }

    /// The bandwidth at which copying one more byte for good is cheapest, on a link shared by reservation:
    /// the b in (dirty, link] with the least `(F(link - b) + time_price) / (b - dirty)`, and that price in
    /// seconds of outage per byte. `None` if no bandwidth is above the dirtying rate.
    pub fn cheapest(&self, link: f64, dirty: f64, time_price: f64, load: f64) -> Option<(f64, f64)> {
        if !link.is_finite() || !dirty.is_finite() || link <= dirty {
            return None;
        }
        let dirty = dirty.max(0.0);
        let price = |b: f64| (self.at_load(link - b, load) + time_price) / (b - dirty);
        const STEPS: u32 = 256;
        let step = (link - dirty) / f64::from(STEPS);
        let mut best = (link, price(link));
        let mut at = STEPS;
        for i in 1..STEPS {
            let b = dirty + step * f64::from(i);
            let p = price(b);
            if p < best.1 {
                best = (b, p);
                at = i;
            }
        }
        // The curve may be steep: look closer between the neighbours of the best point.
        let (mut low, mut high) = (
            dirty + step * (f64::from(at) - 1.0).max(1e-3),
            (dirty + step * f64::from(at + 1)).min(link),
        );
        let ratio = (5f64.sqrt() - 1.0) / 2.0;
        for _ in 0..48 {
            let (a, b) = (high - ratio * (high - low), low + ratio * (high - low));
            if price(a) <= price(b) {
                high = b;
            } else {
                low = a;
            }
        }
        let middle = (low + high) / 2.0;
        let p = price(middle);
        Some(if p < best.1 { (middle, p) } else { best })
    }
}

impl Curve {
    /// The fraction of requests that come too late, when the service has `residual` bytes per second and
    /// requests arrive `load` times as often as the curve was made for.
    pub fn late(&self, residual_bytes_per_sec: f64, load: f64) -> f64 {
        match self {
            Curve::Queue(q) => q.late_after(residual_bytes_per_sec, load, 0.0),
            // A measured curve knows one load: twice the requests need twice the bandwidth.
            Curve::Table(t) => t.late(residual_bytes_per_sec / load.max(1e-9)),
        }
    }
}
