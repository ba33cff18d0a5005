//! What the guest tells about its memory.

use serde::{Deserialize, Serialize};

/// In bytes or events, as the guest counts them. What it does not tell is missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemoryStats {
    pub swapped_in_bytes: Option<u64>,
    pub swapped_out_bytes: Option<u64>,
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    pub free_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
    pub available_bytes: Option<u64>,
    pub disk_cache_bytes: Option<u64>,
}

/// A tag and a value.
pub(super) const ENTRY_LEN: usize = 10;

impl GuestMemoryStats {
    /// Reads the guest's list; tags this program does not know are skipped, and so is a cut entry at the end.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for entry in bytes.chunks_exact(ENTRY_LEN) {
            let [t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] = *entry else {
                continue;
            };
            let value = Some(u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]));
            match u16::from_le_bytes([t0, t1]) {
                0 => stats.swapped_in_bytes = value,
                1 => stats.swapped_out_bytes = value,
                2 => stats.major_faults = value,
                3 => stats.minor_faults = value,
                4 => stats.free_bytes = value,
                5 => stats.total_bytes = value,
                6 => stats.available_bytes = value,
                7 => stats.disk_cache_bytes = value,
                _ => {}
            }
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_tags_are_read_and_others_skipped() {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, 1000u64), (999, 5), (5, 4000)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([6, 0, 1]);
        let expected = GuestMemoryStats {
            free_bytes: Some(1000),
            total_bytes: Some(4000),
            ..GuestMemoryStats::default()
        };
        assert_eq!(GuestMemoryStats::parse(&bytes), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_harmless(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            GuestMemoryStats::parse(&bytes);
        }
    }
}
