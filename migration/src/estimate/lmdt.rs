//! The transfer cost formula of Sliwko and Getov: an exponential in the memory that the application uses.

use serde::Serialize;

/// MF: the factor of the exponential, in MB, in all their experiments.
pub const FACTOR_MB: f64 = 9.6;

/// One line of the paper's table, for a machine of 1024 MB.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Application {
    pub name: &'static str,
    /// CMDT: what is moved when machine and application are idle, in MB.
    pub idle_mb: f64,
    /// AF in 1/MB; none for an idle machine.
    pub growth_per_mb: Option<f64>,
    /// What the formula gives for 100 MB, as worked out by hand.
    pub printed_at_100_mb: f64,
}

pub const TABLE: &[Application] = &[
    app("Idle VM", 90.0, None, 90.0),
    app("Apache", 175.0, Some(0.00682), 194.0),
    app("SPECjvm2008", 115.0, Some(0.03305), 376.6),
    app("PostgreSQL", 145.0, Some(0.01072), 173.0),
    app("VM-Allocator WWS 10%", 213.0, Some(0.00620), 230.8),
    app("VM-Allocator WWS 20%", 213.0, Some(0.00676), 231.9),
    app("VM-Allocator WWS 30%", 213.0, Some(0.00714), 232.6),
];

/// The paper's curve of SPECjvm2008 with 1 to 8 processes of 15.5 MB.
pub const SPECJVM_MB: [f64; 8] = [131.0, 142.0, 160.0, 190.0, 239.0, 323.0, 461.0, 693.0];

const fn app(
    name: &'static str,
    idle_mb: f64,
    growth_per_mb: Option<f64>,
    printed_at_100_mb: f64,
) -> Application {
    Application {
        name,
        idle_mb,
        growth_per_mb,
        printed_at_100_mb,
    }
}

impl Application {
    /// LMDT for `used_mb` of memory beyond the canonical; less than none counts as none.
    pub fn moved_mb(&self, used_mb: f64) -> f64 {
        match self.growth_per_mb {
            Some(growth) => self.idle_mb + FACTOR_MB * (growth * used_mb.max(0.0)).exp(),
            None => self.idle_mb,
        }
    }
}

/// AF from trial migrations (used MB, moved MB): the line through the origin of ln((moved - idle) / factor).
/// Samples that moved no more than the idle machine tell nothing; `None` if no other is left.
pub fn fit_growth(idle_mb: f64, samples: &[(f64, f64)]) -> Option<f64> {
    let (mut product, mut square) = (0.0, 0.0);
    for (used, moved) in samples {
        if *moved > idle_mb && *used > 0.0 {
            product += used * ((moved - idle_mb) / FACTOR_MB).ln();
            square += used * used;
        }
    }
    (square > 0.0).then(|| product / square)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formula_gives_the_papers_table() {
        for app in TABLE {
            let got = app.moved_mb(100.0);
            assert!((got - app.printed_at_100_mb).abs() < 0.06, "{}: {got}", app.name);
        }
        let jvm = TABLE.iter().find(|a| a.name == "SPECjvm2008").unwrap();
        for (count, printed) in SPECJVM_MB.iter().enumerate() {
            let got = jvm.moved_mb(15.5 * (count as f64 + 1.0));
            assert!((got - printed).abs() <= 1.0, "{} processes: {got}", count + 1);
        }
        assert_eq!(jvm.moved_mb(-50.0), 115.0 + FACTOR_MB);
    }

    #[test]
    fn the_growth_is_found_again_from_samples() {
        let jvm = TABLE.iter().find(|a| a.name == "SPECjvm2008").unwrap();
        let mut samples: Vec<_> = (1..9)
            .map(|i| f64::from(i) * 15.5)
            .map(|mb| (mb, jvm.moved_mb(mb)))
            .collect();
        samples.push((40.0, 100.0));
        assert!((fit_growth(115.0, &samples).unwrap() - 0.03305).abs() < 1e-9);
        assert_eq!(fit_growth(115.0, &[(10.0, 90.0)]), None);
    }
}
