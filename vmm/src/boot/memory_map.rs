//! The memory map (e820) that both boot protocols hand to the kernel.

use crate::layout;
use crate::memory::Region;

const USABLE: u32 = 1;
const RESERVED: u32 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) kind: u32,
}

pub(super) fn of(regions: &[Region]) -> Vec<Piece> {
    let piece = |range: std::ops::Range<u64>, kind| Piece {
        start: range.start,
        len: range.end - range.start,
        kind,
    };
    let mut map = vec![
        piece(0..layout::EBDA, USABLE),
        piece(layout::EBDA..layout::ONE_MIB, RESERVED),
    ];
    for region in regions {
        let end = region.guest + region.size;
        map.push(piece(region.guest.max(layout::ONE_MIB)..end, USABLE));
    }
    // Linux believes the MCFG table only where the map agrees.
    map.push(piece(layout::ECAM, RESERVED));
    map.sort_by_key(|piece| piece.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_neither_overlap_nor_lose_memory() {
        let low = Region {
            slot: 0,
            guest: 0,
            size: layout::LOW_RAM_END,
        };
        let high = Region {
            slot: 1,
            guest: layout::HIGH_RAM,
            size: 1 << 30,
        };
        let map = of(&[low, high]);
        assert!(
            map.windows(2)
                .all(|pair| pair[0].start + pair[0].len <= pair[1].start),
            "{map:?}"
        );
        let usable: u64 = map.iter().filter(|p| p.kind == USABLE).map(|p| p.len).sum();
        assert_eq!(usable, (4 << 30) - (layout::ONE_MIB - layout::EBDA));
    }
}
