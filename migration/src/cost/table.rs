//! A measured curve: points of (bandwidth, fraction late), made monotone, linear in between.

use serde::{Deserialize, Serialize};

/// Points in ascending bandwidth with a fraction late that never rises.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(f64, f64)>", into = "Vec<(f64, f64)>")]
pub struct Table {
    points: Vec<(f64, f64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TableError(String);

impl Table {
    /// Takes measured points in any order. Where the measurement rises (noise), neighbours are averaged until
    /// it does not: the monotone curve with the least squared error.
    pub fn new(points: &[(f64, f64)]) -> Result<Self, TableError> {
        if points.is_empty() {
            return Err(TableError(
                "a cost table needs at least one point of bandwidth and fraction late".into(),
            ));
        }
        for (bandwidth, late) in points {
            if !bandwidth.is_finite() || *bandwidth < 0.0 || !(0.0..=1.0).contains(late) {
                return Err(TableError(format!(
                    "a cost table has the point ({bandwidth}, {late}): the bandwidth must be a number from 0 on and the fraction late between 0 and 1"
                )));
            }
        }
        let mut sorted = points.to_vec();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Pool adjacent violators: each pool is (sum of late, points in it).
        let mut pools: Vec<(f64, usize)> = Vec::new();
        for (_, late) in &sorted {
            let mut pool = (*late, 1);
            while let Some(last) = pools.last().copied()
                && last.0 / (last.1 as f64) < pool.0 / (pool.1 as f64)
            {
                pools.pop();
                pool = (pool.0 + last.0, pool.1 + last.1);
            }
            pools.push(pool);
        }
        let smooth = pools
            .iter()
            .flat_map(|(sum, count)| std::iter::repeat_n(sum / (*count as f64), *count));
        let points = sorted.iter().map(|p| p.0).zip(smooth).collect();
        Ok(Table { points })
    }

    /// The fraction late at a bandwidth: 1 at none, linear between the points, and the last point's beyond.
    pub fn late(&self, residual_bytes_per_sec: f64) -> f64 {
        if residual_bytes_per_sec.is_nan() || residual_bytes_per_sec <= 0.0 {
            return 1.0;
        }
        let mut before = (0.0, 1.0);
        for point in &self.points {
            if residual_bytes_per_sec <= point.0 {
                let width = point.0 - before.0;
                if width <= 0.0 {
                    return point.1;
                }
                let part = (residual_bytes_per_sec - before.0) / width;
                return before.1 + part * (point.1 - before.1);
            }
            before = *point;
        }
        before.1
    }
}

impl TryFrom<Vec<(f64, f64)>> for Table {
    type Error = TableError;

    fn try_from(points: Vec<(f64, f64)>) -> Result<Self, TableError> {
        Table::new(&points)
    }
}

impl From<Table> for Vec<(f64, f64)> {
    fn from(table: Table) -> Self {
        table.points
    }
}
