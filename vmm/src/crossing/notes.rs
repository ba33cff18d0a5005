//! Which units of a block were written and not taken yet: harvested from a log that forgets, or put back.

use std::sync::atomic::{AtomicU64, Ordering};

use ferry_migration::block::Span;
use ferry_migration::units::UnitSet;

pub(super) struct Notes {
    words: Box<[AtomicU64]>,
}

impl Notes {
    pub(super) fn new(units: u64) -> Notes {
        Notes {
            words: (0..units.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The number of 64-unit words, which is how KVM counts too.
    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    pub(super) fn add_words(&self, words: &[u64]) {
        for (note, word) in self.words.iter().zip(words) {
            if *word != 0 {
                note.fetch_or(*word, Ordering::AcqRel);
            }
        }
    }

    pub(super) fn add_spans(&self, spans: &[Span]) {
        for span in spans {
            self.add_run(span.first, span.end());
        }
    }

    pub(super) fn add_run(&self, first: u64, end: u64) {
        for (word, mask) in masks(first, end) {
            if let Some(note) = self.words.get(word) {
                note.fetch_or(mask, Ordering::AcqRel);
            }
        }
    }

    /// Forgets the units set in `words`, which begin at word `first_word`.
    pub(super) fn remove(&self, first_word: usize, words: &[u64]) {
        for (note, word) in self.words.iter().skip(first_word).zip(words) {
            if *word != 0 {
                note.fetch_and(!word, Ordering::AcqRel);
            }
        }
    }

    pub(super) fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    pub(super) fn contains(&self, unit: u64) -> bool {
        self.words
            .get((unit / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) >> (unit % 64) & 1 == 1)
    }

    pub(super) fn words_from(&self, first_word: usize) -> impl Iterator<Item = u64> + '_ {
        let words = self.words.iter().skip(first_word);
        words.map(|word| word.load(Ordering::Acquire))
    }

    pub(super) fn snapshot(&self, into: &mut UnitSet) {
        let words: Vec<u64> = self
            .words
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect();
        into.insert_words(&words);
    }
}

/// The spans' units as bits, from the word that holds the first one on; the spans are ascending.
pub(super) fn bits_of(spans: &[Span]) -> (usize, Vec<u64>) {
    let (Some(first), Some(last)) = (spans.first(), spans.last()) else {
        return (0, Vec::new());
    };
    let first_word = (first.first / 64) as usize;
    let mut bits = vec![0; (last.end().div_ceil(64) as usize).saturating_sub(first_word)];
    for span in spans {
        for (word, mask) in masks(span.first, span.end()) {
            if let Some(bits) = word.checked_sub(first_word).and_then(|at| bits.get_mut(at)) {
                *bits |= mask;
            }
        }
    }
    (first_word, bits)
}

/// The words that a run touches, each with the run's bits in it.
fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / 64..end.div_ceil(64)).map(move |word| {
        let low = first.saturating_sub(word * 64).min(63);
        let high = (end - word * 64).min(64);
        let mask = u64::MAX << low & u64::MAX >> (64 - high);
        (word as usize, mask)
    })
}
