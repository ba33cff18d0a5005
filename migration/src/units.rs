//! A set of units (pages or clusters) of one block, as a bitmap with the few operations a crossing needs.

use crate::block::{BlockId, Span};

/// Which units of a block: one bit each. The length is fixed when it is made; bits beyond it are never set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnitSet {
    words: Vec<u64>,
    units: u64,
}

impl UnitSet {
    pub fn empty(units: u64) -> Self {
        UnitSet {
            words: vec![0; units.div_ceil(64) as usize],
            units,
        }
    }

    pub fn full(units: u64) -> Self {
        let mut set = UnitSet {
            words: vec![u64::MAX; units.div_ceil(64) as usize],
            units,
        };
        set.trim();
        set
    }

    /// How many units the block has (not how many are in the set).
    pub fn units(&self) -> u64 {
        self.units
    }

    /// The bitmap, least significant bit first, as KVM's dirty log has it.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds every bit of `words`; what lies beyond the block is ignored.
    pub fn insert_words(&mut self, words: &[u64]) {
        for (mine, new) in self.words.iter_mut().zip(words) {
            *mine |= new;
        }
        self.trim();
    }

    fn trim(&mut self) {
        let tail = self.units % 64;
        if tail != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1u64 << tail) - 1;
        }
    }

    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    pub fn contains(&self, unit: u64) -> bool {
        self.words
            .get((unit / 64) as usize)
            .is_some_and(|w| w >> (unit % 64) & 1 == 1)
    }

    pub fn insert(&mut self, unit: u64) {
        self.change(unit, 1, |word, mask| *word |= mask);
    }

    pub fn remove(&mut self, unit: u64) {
        self.change(unit, 1, |word, mask| *word &= !mask);
    }

    /// Adds `count` units from `first`; what lies beyond the block is ignored.
    pub fn insert_run(&mut self, first: u64, count: u64) {
        self.change(first, count, |word, mask| *word |= mask);
    }

    pub fn remove_run(&mut self, first: u64, count: u64) {
        self.change(first, count, |word, mask| *word &= !mask);
    }

    fn change(&mut self, first: u64, count: u64, apply: impl Fn(&mut u64, u64)) {
        let end = first.saturating_add(count).min(self.units);
        let mut at = first;
        while at < end {
            let low = at % 64;
            let bits = (64 - low).min(end - at);
            let mask = if bits == 64 {
                u64::MAX
            } else {
                ((1u64 << bits) - 1) << low
            };
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                apply(word, mask);
            }
            at += bits;
        }
    }

    pub fn union(&mut self, other: &UnitSet) {
        self.insert_words(&other.words);
    }

    /// Removes everything that is in `other`.
    pub fn subtract(&mut self, other: &UnitSet) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Keeps only what is in `other` too.
    pub fn intersect(&mut self, other: &UnitSet) {
        for (at, mine) in self.words.iter_mut().enumerate() {
            *mine &= other.words.get(at).copied().unwrap_or(0);
        }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The first run at or after `from`, as (first, count).
    pub fn next_run(&self, from: u64) -> Option<(u64, u64)> {
        let first = self.find(from, |word| word)?;
        let end = self
            .find(first, |word| !word)
            .unwrap_or(self.units)
            .min(self.units);
        Some((first, end - first))
    }

    fn find(&self, from: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        let mut index = (from / 64) as usize;
        let mut word = view(*self.words.get(index)?) & (u64::MAX << (from % 64));
        while word == 0 {
            index += 1;
            word = view(*self.words.get(index)?);
        }
        let unit = index as u64 * 64 + u64::from(word.trailing_zeros());
        (unit < self.units).then_some(unit)
    }

    /// Every run as (first, count), ascending.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (first, count) = self.next_run(at)?;
            at = first + count;
            Some((first, count))
        })
    }

    /// Every run as spans of `block`, none longer than `longest` units.
    pub fn spans(&self, block: BlockId, longest: u32) -> impl Iterator<Item = Span> + '_ {
        let longest = u64::from(longest.max(1));
        self.runs().flat_map(move |(first, count)| {
            (0..count.div_ceil(longest)).map(move |part| {
                let at = first + part * longest;
                Span {
                    block,
                    first: at,
                    count: longest.min(first + count - at) as u32,
                }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_full_set_has_no_bit_beyond_the_block() {
        let set = UnitSet::full(70);
        assert_eq!(set.count(), 70);
        assert_eq!(set.runs().collect::<Vec<_>>(), vec![(0, 70)]);
        assert!(!set.contains(70));
    }

    proptest! {
        #[test]
        fn it_behaves_as_a_set_of_numbers(
            units in 1u64..300,
            changes in proptest::collection::vec((any::<bool>(), 0u64..320, 0u64..130), 0..20),
        ) {
            let mut set = UnitSet::empty(units);
            let mut model = BTreeSet::new();
            for (add, first, count) in changes {
                if add {
                    set.insert_run(first, count);
                    model.extend((first..first + count).filter(|u| *u < units));
                } else {
                    set.remove_run(first, count);
                    model.retain(|u| !(first..first + count).contains(u));
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            let listed: Vec<u64> = set.runs().flat_map(|(first, count)| first..first + count).collect();
            prop_assert_eq!(&listed, &model.iter().copied().collect::<Vec<_>>());
            let spanned: Vec<u64> = set.spans(BlockId(3), 7)
                .flat_map(|s| s.first..s.first + u64::from(s.count)).collect();
            prop_assert_eq!(spanned, listed);
        }
    }
}
