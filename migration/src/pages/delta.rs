//! The difference between two versions of a page: runs of equal bytes are skipped, the rest is copied.
//!
//! `[skip: u16][length: u16][length bytes]…` until the page ends; equal bytes at the end need no entry.

/// Equal runs shorter than this are cheaper copied than skipped.
const SHORTEST_SKIP: usize = 8;

/// Writes the difference into `out` and returns its length, or `None` if it does not fit there.
pub fn encode(old: &[u8], new: &[u8], out: &mut [u8]) -> Option<usize> {
    if old.len() != new.len() || new.len() > usize::from(u16::MAX) {
        return None;
    }
    let (mut at, mut used) = (0, 0);
    while at < new.len() {
        let start = at + equal(old.get(at..)?, new.get(at..)?);
        if start == new.len() {
            break;
        }
        let mut end = start;
        while end < new.len() {
            let same = equal(old.get(end..)?, new.get(end..)?);
            if same >= SHORTEST_SKIP || end + same == new.len() {
                break;
            }
            end += same;
            end += different(old.get(end..)?, new.get(end..)?);
        }
        let literal = new.get(start..end)?;
        let room = out.get_mut(used..used + 4 + literal.len())?;
        let (head, body) = room.split_at_mut(4);
        head.copy_from_slice(&((start - at) as u32 | (literal.len() as u32) << 16).to_le_bytes());
        body.copy_from_slice(literal);
        used += 4 + literal.len();
        at = end;
    }
    Some(used)
}

/// Eight bytes that a page may consist of but for some places: those that most of a few samples agree on.
pub fn common_word(page: &[u8]) -> Option<[u8; 8]> {
    const SAMPLES: usize = 16;
    let stride = (page.len() / SAMPLES).max(8) & !7;
    // The last word of each stride: the first ones of a page are the likeliest to be a head of another kind.
    let samples = || {
        page.chunks_exact(stride)
            .filter_map(|chunk| chunk.last_chunk::<8>())
    };
    let (mut word, mut votes) = (samples().next()?, 0);
    for sample in samples() {
        if votes == 0 {
            word = sample;
        }
        votes += if sample == word { 1 } else { -1 };
    }
    (samples().filter(|sample| *sample == word).count() * 2 > SAMPLES).then_some(*word)
}

/// How many bytes at the front are equal.
fn equal(a: &[u8], b: &[u8]) -> usize {
    let words = a
        .chunks_exact(8)
        .zip(b.chunks_exact(8))
        .take_while(|(x, y)| x == y)
        .count()
        * 8;
    words + a.iter().zip(b).skip(words).take_while(|(x, y)| x == y).count()
}

/// How many bytes at the front are different.
fn different(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x != y).count()
}

/// Turns the old version into the new one; false if the difference is not one.
#[must_use]
pub fn apply(page: &mut [u8], mut difference: &[u8]) -> bool {
    let mut at = 0;
    while let Some((head, rest)) = difference.split_first_chunk::<4>() {
        let head = u32::from_le_bytes(*head);
        let (skip, length) = ((head & 0xffff) as usize, (head >> 16) as usize);
        let Some((literal, rest)) = rest.split_at_checked(length) else {
            return false;
        };
        at += skip;
        let Some(place) = page.get_mut(at..at + length) else {
            return false;
        };
        place.copy_from_slice(literal);
        at += length;
        difference = rest;
    }
    difference.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_difference_leads_from_old_to_new(
            old in proptest::collection::vec(any::<u8>(), 4096),
            changes in proptest::collection::vec((0usize..4096, any::<u8>(), 1usize..200), 0..30),
        ) {
            let mut new = old.clone();
            for (at, value, count) in changes {
                let end = (at + count).min(4096);
                new[at..end].fill(value);
            }
            let mut out = vec![0; 8192];
            let used = encode(&old, &new, &mut out).unwrap();
            let mut page = old.clone();
            prop_assert!(apply(&mut page, &out[..used]));
            prop_assert_eq!(page, new);
        }

        #[test]
        fn bytes_from_anywhere_never_panic(
            mut page in proptest::collection::vec(any::<u8>(), 0..300),
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = apply(&mut page, &bytes);
        }
    }

    #[test]
    fn one_word_changed_costs_a_dozen_bytes() {
        let old = vec![7u8; 4096];
        let mut new = old.clone();
        new[1000..1008].fill(9);
        assert_eq!(encode(&old, &new, &mut [0; 64]), Some(12));
        assert_eq!(encode(&old, &old, &mut [0; 64]), Some(0));
        assert_eq!(encode(&old, &vec![1u8; 4096], &mut [0; 64]), None);
    }

    #[test]
    fn the_common_word_is_what_most_of_a_page_says() {
        let mut page = vec![7u8; 4096];
        page[..1000].fill(1);
        assert_eq!(common_word(&page), Some([7; 8]));
        let noise: Vec<u8> = (0..4096u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        assert_eq!(common_word(&noise), None);
        assert_eq!(common_word(&[]), None);
    }
}
