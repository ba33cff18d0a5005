//! How often each page is written, as far as the dirty log shows: decayed counters, and groups made of them.
//!
//! Feed every survey window to [`Heat::observe`]: the units that were written in it. For that the log must be
//! armed again after each survey (the engine takes what was noted and owes it), so that a page that is
//! written all the time shows up in every window, sent or not.

use serde::{Deserialize, Serialize};

use crate::units::UnitSet;

/// How many groups there are. Group 0 holds what was not seen written lately.
pub const GROUPS: usize = 7;

/// Writes per second at which a unit belongs to the next group.
const BOUNDS: [f32; GROUPS - 1] = [0.02, 0.08, 0.3, 1.2, 5.0, 20.0];

/// After this long a write counts 1/e.
const UNIT_MEMORY_SECS: f64 = 20.0;

/// The same for the rate of a group; shorter, because a group has many witnesses.
const GROUP_MEMORY_SECS: f64 = 2.0;

/// Units that are written about equally often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub bytes: u64,
    /// How much of it would have to be copied now.
    pub dirty_bytes: u64,
    /// How often one of its units is written, as measured after the unit had come into the group.
    pub writes_per_sec: f64,
}

impl Group {
    pub fn clean_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.dirty_bytes)
    }

    /// How fast what is clean gets dirty again.
    pub fn dirty_bytes_per_sec(&self) -> f64 {
        self.clean_bytes() as f64 * self.writes_per_sec
    }
}

/// Adds up the groups of several blocks.
pub fn sum(groups: &[Vec<Group>]) -> Vec<Group> {
    (0..GROUPS)
        .map(|at| {
            let mut total = Group::default();
            let mut flow = 0.0;
            for group in groups.iter().filter_map(|g| g.get(at)) {
                total.bytes += group.bytes;
                total.dirty_bytes += group.dirty_bytes;
                flow += group.bytes as f64 * group.writes_per_sec;
            }
            if total.bytes > 0 {
                total.writes_per_sec = flow / total.bytes as f64;
            }
            total
        })
        .collect()
}

/// The heat of every unit of one block. Nine bytes each.
#[derive(Clone, Debug)]
pub struct Heat {
    unit_bytes: u32,
    /// Decayed number of windows in which the unit was written, as of `stamp`.
    score: Vec<f32>,
    stamp: Vec<f32>,
    group: Vec<u8>,
    watched_secs: f64,
    units_in: [u64; GROUPS],
    /// Decayed, per group: how often a unit was looked at and seen written, and unit-seconds watched.
    looks: [f64; GROUPS],
    seen: [f64; GROUPS],
    exposure: [f64; GROUPS],
    /// Where the slow sweep that cools units down goes on.
    cursor: usize,
}

impl Heat {
    pub fn new(units: u64, unit_bytes: u32) -> Self {
        let units = units as usize;
        let mut units_in = [0; GROUPS];
        units_in[0] = units as u64;
        Heat {
            unit_bytes,
            score: vec![0.0; units],
            stamp: vec![0.0; units],
            group: vec![0; units],
            watched_secs: 0.0,
            units_in,
            looks: [0.0; GROUPS],
            seen: [0.0; GROUPS],
            exposure: [0.0; GROUPS],
            cursor: 0,
        }
    }

    /// Notes which units were written in a window of `window_secs`.
    pub fn observe(&mut self, written: &UnitSet, window_secs: f64) {
        if window_secs.is_nan() || window_secs <= 0.0 {
            return;
        }
        self.watched_secs += window_secs;
        let mut seen = [0u64; GROUPS];
        let before = self.units_in;
        for (first, count) in written.runs() {
            for unit in first as usize..(first + count) as usize {
                let Some(group) = self.group.get(unit) else {
                    break;
                };
                seen[usize::from(*group)] += 1;
                self.settle(unit, 1.0);
            }
        }
        let keep = (-window_secs / GROUP_MEMORY_SECS).exp();
        for at in 0..GROUPS {
            let units = before[at] as f64;
            self.seen[at] = self.seen[at] * keep + seen[at] as f64;
            self.looks[at] = self.looks[at] * keep + units;
            self.exposure[at] = self.exposure[at] * keep + units * window_secs;
        }
        self.cool(window_secs);
    }

    /// Units that are not written any more move to colder groups: every unit is looked at once a second or so.
    fn cool(&mut self, window_secs: f64) {
        let units = self.group.len();
        let part = ((units as f64 * window_secs.min(1.0)) as usize + 64).min(units);
        for _ in 0..part {
            if self.cursor >= units {
                self.cursor = 0;
            }
            if self.group.get(self.cursor).is_some_and(|g| *g > 0) {
                self.settle(self.cursor, 0.0);
            }
            self.cursor += 1;
        }
    }

    fn settle(&mut self, unit: usize, add: f32) {
        let now = self.watched_secs;
        let (Some(score), Some(stamp), Some(group)) = (
            self.score.get_mut(unit),
            self.stamp.get_mut(unit),
            self.group.get_mut(unit),
        ) else {
            return;
        };
        let age = now - f64::from(*stamp);
        *score = *score * (-age / UNIT_MEMORY_SECS).exp() as f32 + add;
        *stamp = now as f32;
        let watched = UNIT_MEMORY_SECS * (1.0 - (-now / UNIT_MEMORY_SECS).exp());
        let rate = *score / watched.max(1.0) as f32;
        let new = BOUNDS.iter().filter(|b| rate >= **b).count();
        let old = usize::from(*group);
        if new != old {
            self.units_in[old] -= 1;
            self.units_in[new] += 1;
            *group = new as u8;
        }
    }

    /// The group a unit is in.
    pub fn group_of(&self, unit: u64) -> usize {
        self.group.get(unit as usize).map_or(0, |g| usize::from(*g))
    }

    /// How often a unit of a group is written; 0 while no unit of it was watched. A unit written twice in a
    /// window shows once, so the share seen written is turned into a rate.
    pub fn writes_per_sec(&self, group: usize) -> f64 {
        let at = |list: &[f64; GROUPS]| list.get(group).copied().unwrap_or(0.0);
        let (looks, seen, exposure) = (at(&self.looks), at(&self.seen), at(&self.exposure));
        if looks <= 0.0 || exposure <= 0.0 {
            return 0.0;
        }
        let share = (seen / looks).min(1.0 - 0.5 / (looks + 1.0));
        -(-share).ln_1p() * looks / exposure
    }

    /// The groups, coldest first, with what of each is in `dirty`.
    pub fn groups(&self, dirty: &UnitSet) -> Vec<Group> {
        let mut dirty_units = [0u64; GROUPS];
        for (first, count) in dirty.runs() {
            for unit in first..first + count {
                dirty_units[self.group_of(unit)] += 1;
            }
        }
        let bytes = u64::from(self.unit_bytes);
        (0..GROUPS)
            .map(|at| Group {
                bytes: self.units_in[at] * bytes,
                dirty_bytes: dirty_units[at] * bytes,
                writes_per_sec: self.writes_per_sec(at),
            })
            .collect()
    }

    /// At most `most` units of `dirty`, coldest groups first, none of groups from `hold_back_from` on; within
    /// the last group that fits, from unit `from` on and around.
    pub fn coldest(&self, dirty: &UnitSet, hold_back_from: usize, most: u64, from: u64) -> UnitSet {
        let mut chosen = UnitSet::empty(dirty.units());
        let mut left = most;
        for at in 0..GROUPS.min(hold_back_from) {
            if left == 0 {
                break;
            }
            let (mut after, mut before) = (Vec::new(), Vec::new());
            for (first, count) in dirty.runs() {
                for unit in first..first + count {
                    if self.group_of(unit) == at {
                        if unit >= from {
                            after.push(unit);
                        } else {
                            before.push(unit);
                        }
                    }
                }
                if after.len() as u64 >= left {
                    break;
                }
            }
            for unit in after.into_iter().chain(before).take(left as usize) {
                chosen.insert(unit);
                left -= 1;
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For 60 s units 0..10 are written about 2.8 times a second, 10..60 every ten seconds, the rest never.
    fn watched() -> Heat {
        let mut heat = Heat::new(1000, 4096);
        let mut state = 7u64;
        let mut chance = |p: f64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 11) as f64 / (1u64 << 53) as f64) < p
        };
        for _ in 0..240 {
            let mut written = UnitSet::empty(1000);
            for unit in 0..60 {
                if chance(if unit < 10 { 0.5 } else { 0.025 }) {
                    written.insert(unit);
                }
            }
            heat.observe(&written, 0.25);
        }
        heat
    }

    #[test]
    fn pages_written_more_often_are_in_hotter_groups() {
        let heat = watched();
        let mean = |units: std::ops::Range<u64>| {
            let count = (units.end - units.start) as f64;
            units.map(|u| heat.group_of(u) as f64).sum::<f64>() / count
        };
        let (hot, warm, cold) = (mean(0..10), mean(10..60), mean(60..1000));
        assert!(
            hot > warm + 1.0 && warm > cold + 1.0,
            "hot {hot} warm {warm} cold {cold}"
        );
        assert_eq!(cold, 0.0);
    }

    #[test]
    fn the_rate_of_a_group_is_what_its_pages_do() {
        let heat = watched();
        // Seen in half of all windows of 0.25 s: ln 2 / 0.25 s = 2.8 writes a second.
        let rate = heat.writes_per_sec(heat.group_of(3));
        assert!((2.0..4.0).contains(&rate), "{rate}");
        // All groups together show all the writing: 10 units at 2.8 and 50 at 0.1 writes a second.
        let all: f64 = heat
            .groups(&UnitSet::empty(1000))
            .iter()
            .map(Group::dirty_bytes_per_sec)
            .sum();
        assert!((25.0..45.0).contains(&(all / 4096.0)), "{}", all / 4096.0);
    }

    #[test]
    fn a_page_that_is_left_alone_cools_down() {
        let mut heat = watched();
        let quiet = UnitSet::empty(1000);
        for _ in 0..800 {
            heat.observe(&quiet, 0.25);
        }
        assert_eq!(heat.group_of(3), 0);
        assert!(heat.writes_per_sec(0) < 1e-6);
    }

    #[test]
    fn coldest_first_keeps_the_hot_pages_for_last() {
        let heat = watched();
        let all = UnitSet::full(1000);
        let chosen = heat.coldest(&all, usize::MAX, 980, 0);
        assert_eq!(chosen.count(), 980);
        assert!((60..1000).all(|u| chosen.contains(u)));
        assert!((0..10).all(|u| !chosen.contains(u)));
        // Held back, hot pages do not go even if there is room.
        let hold = (0..10).map(|u| heat.group_of(u)).min().unwrap();
        assert!(heat.coldest(&all, hold, 1000, 0).count() <= 990);
    }

    #[test]
    fn groups_add_up_over_blocks() {
        let heat = watched();
        let dirty = UnitSet::full(1000);
        let one = heat.groups(&dirty);
        let both = sum(&[one.clone(), one.clone()]);
        let bytes: u64 = both.iter().map(|g| g.bytes).sum();
        assert_eq!(bytes, 2 * 1000 * 4096);
        assert_eq!(both.iter().map(|g| g.dirty_bytes).sum::<u64>(), bytes);
        for (two, one) in both.iter().zip(&one) {
            assert!(one.bytes == 0 || (two.writes_per_sec - one.writes_per_sec).abs() < 1e-9);
        }
    }
}
