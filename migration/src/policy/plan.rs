//! CALM's mathematics: how many pages are clean after a while, how long it takes, what a step costs, when to
//! stop. All pages are written at one rate `lam` (1/s); bandwidths are in pages per second.
//!
//! The paper's formulas with three corrections: an unreachable target takes for ever, the cost of a step holds
//! from the first page on, and the copying stops at the *first* step that costs at least what stopping costs.

/// A page's share of clean pages lost between two sends: 1 - q^(1/b), without losing digits.
fn loss(lam: f64, pages_per_sec: f64) -> f64 {
    -(-lam / pages_per_sec).exp_m1()
}

/// Expected clean pages after `secs` from `clean` clean pages (the paper's equation 2).
pub fn expected_clean(clean: f64, secs: f64, pages_per_sec: f64, lam: f64) -> f64 {
    let kept = (-lam * secs).exp();
    clean * kept + (-(-lam * secs).exp_m1()) / loss(lam, pages_per_sec)
}

/// Seconds from `from` to `to` clean pages (equation 3); infinite where `to` is never reached.
pub fn time_to_clean(from: f64, to: f64, pages_per_sec: f64, lam: f64) -> f64 {
    if to <= from {
        return 0.0;
    }
    if lam <= 0.0 {
        return (to - from) / pages_per_sec;
    }
    let a = loss(lam, pages_per_sec);
    if to * a >= 1.0 {
        return f64::INFINITY;
    }
    -((-to * a).ln_1p() - (-from * a).ln_1p()) / lam
}

/// What the planners need to know.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    pub pages: f64,
    /// The link, in pages per second.
    pub link: f64,
    pub lam: f64,
    /// F: the cost per second of leaving the services this many pages per second.
    pub cost: &'a dyn Fn(f64) -> f64,
    /// The cost of a second of downtime.
    pub down: f64,
}

/// A constant bandwidth and how many pages to have clean before stopping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedPlan {
    pub bandwidth: f64,
    pub clean: f64,
    pub copy_secs: f64,
    pub down_secs: f64,
    pub cost: f64,
}

impl Problem<'_> {
    /// The best number of clean pages to stop at for a constant bandwidth.
    pub fn best_clean(&self, bandwidth: f64) -> f64 {
        let late = (self.cost)(self.link - bandwidth) / self.down;
        if self.lam <= 0.0 {
            return if late * self.link < bandwidth {
                self.pages
            } else {
                0.0
            };
        }
        let a = loss(self.lam, bandwidth);
        ((1.0 - late * a * self.link / self.lam) / a).clamp(0.0, self.pages)
    }

    /// The whole price of a constant bandwidth with a given stop.
    pub fn fixed_at(&self, bandwidth: f64, clean: f64) -> FixedPlan {
        let copy_secs = time_to_clean(0.0, clean, bandwidth, self.lam);
        let down_secs = (self.pages - clean).max(0.0) / self.link;
        let copying = if clean > 0.0 {
            copy_secs * (self.cost)(self.link - bandwidth)
        } else {
            0.0
        };
        FixedPlan {
            bandwidth,
            clean,
            copy_secs,
            down_secs,
            cost: copying + down_secs * self.down,
        }
    }

    /// The best constant bandwidth and its stop; `clean` fixes the stop instead. A coarse grid over the link, then
    /// a fine one around its best point: exact to a 16,384th of the link.
    pub fn best_fixed(&self, clean: Option<f64>) -> FixedPlan {
        const STEPS: u32 = 128;
        let mut best = self.fixed_at(self.link, 0.0);
        let mut consider = |bandwidth: f64| {
            let stop = clean.unwrap_or_else(|| self.best_clean(bandwidth));
            let plan = self.fixed_at(bandwidth, stop);
            if plan.cost < best.cost {
                best = plan;
            }
            best.bandwidth
        };
        let step = self.link / f64::from(STEPS);
        let mut coarse = self.link;
        for i in 1..=STEPS {
            coarse = consider(step * f64::from(i));
        }
        for i in 1..2 * STEPS {
            let bandwidth = coarse + step * (f64::from(i) / f64::from(STEPS) - 1.0);
            if bandwidth > 0.0 && bandwidth <= self.link {
                consider(bandwidth);
            }
        }
        best
    }

    /// The cheapest way from `i - 1` to `i` clean pages among these bandwidths: (cost, bandwidth).
    pub fn step(&self, i: f64, bandwidths: &[f64]) -> (f64, f64) {
        let mut best = (f64::INFINITY, self.link);
        for b in bandwidths.iter().copied().chain([self.link]) {
            if b <= 0.0 || b > self.link {
                continue;
            }
            let cost = (self.cost)(self.link - b) * time_to_clean(i - 1.0, i, b, self.lam);
            if cost < best.0 {
                best = (cost, b);
            }
        }
        best
    }

    /// Whether a step that costs this is the first not worth doing. A tie stops.
    pub fn stops_at(&self, step_cost: f64) -> bool {
        step_cost.is_nan() || step_cost >= (1.0 - 1e-9) * self.down / self.link
    }

    /// CALM-adaptive with an exponential F that falls by e per `increment` pages per second: steps to the stop.
    pub fn adaptive(&self, increment: f64) -> AdaptivePlan {
        let (mut clean, mut copy_secs, mut cost) = (0.0, 0.0, 0.0);
        while clean < self.pages {
            let i = clean + 1.0;
            let (step, b) = self.step(i, &[self.lam * i + increment]);
            if self.stops_at(step) {
                break;
            }
            copy_secs += time_to_clean(clean, i, b, self.lam);
            cost += step;
            clean = i;
        }
        let down_secs = (self.pages - clean) / self.link;
        AdaptivePlan {
            clean,
            copy_secs,
            copy_cost: cost,
            down_secs,
            cost: cost + down_secs * self.down,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptivePlan {
    pub clean: f64,
    pub copy_secs: f64,
    pub copy_cost: f64,
    pub down_secs: f64,
    pub cost: f64,
}
