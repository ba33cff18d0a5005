//! Several services that cross one after the other over one link: who goes first.
//!
//! While one crosses, those that wait still answer their clients over the same link. So the order matters where
//! the services are hurt differently: what crosses early stops sharing the link early.

use serde::{Deserialize, Serialize};

/// One service's crossing, as an estimate or a plan gives it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Crossing {
    /// How long the link is taken.
    pub secs: f64,
    /// What its own copying and switch cost, in seconds of outage.
    pub own_cost: f64,
    /// What each second costs that it still waits at the old host (its clients share the link with the crossings
    /// before it, or the host is about to fail): seconds of outage per second.
    pub waiting_cost_per_sec: f64,
}

/// The total cost of crossing in this order.
pub fn total_cost(crossings: &[Crossing], order: &[usize]) -> f64 {
    let (mut before, mut total) = (0.0, 0.0);
    for crossing in order.iter().filter_map(|at| crossings.get(*at)) {
        total += crossing.own_cost + crossing.waiting_cost_per_sec * before;
        before += crossing.secs;
    }
    total
}

/// The order of least total cost: by waiting cost per second of crossing, dearest first. Exchanging two
/// neighbours changes the total by w_a * t_b - w_b * t_a and nothing else, so no other order is better.
pub fn best_order(crossings: &[Crossing]) -> Vec<usize> {
    let urgency = |c: &Crossing| c.waiting_cost_per_sec / c.secs.max(1e-9);
    let mut order: Vec<usize> = (0..crossings.len()).collect();
    order.sort_by(|a, b| {
        let of = |at: &usize| crossings.get(*at).map_or(0.0, urgency);
        of(b).total_cmp(&of(a)).then(a.cmp(b))
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn permutations(count: usize) -> Vec<Vec<usize>> {
        if count == 0 {
            return vec![vec![]];
        }
        let mut all = Vec::new();
        for rest in permutations(count - 1) {
            for at in 0..=rest.len() {
                let mut order = rest.clone();
                order.insert(at, count - 1);
                all.push(order);
            }
        }
        all
    }

    proptest! {
        #[test]
        fn no_permutation_is_cheaper(list in proptest::collection::vec((0.1f64..100.0, 0.0f64..20.0, 0.0f64..1.0), 1..6)) {
            let crossings: Vec<Crossing> = list
                .iter()
                .map(|(secs, own_cost, waiting)| Crossing { secs: *secs, own_cost: *own_cost, waiting_cost_per_sec: *waiting })
                .collect();
            let ours = total_cost(&crossings, &best_order(&crossings));
            for order in permutations(crossings.len()) {
                prop_assert!(ours <= total_cost(&crossings, &order) * (1.0 + 1e-12) + 1e-12);
            }
        }
    }
}
