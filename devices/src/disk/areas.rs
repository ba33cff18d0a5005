//! The map of a disk: which areas hold data, which are known to be zero, which were never written or were given back.

use std::io;
use std::ops::Range;

use super::Disk;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AreaKind {
    /// May hold anything.
    Data,
    /// Reads as zeroes, and the image says so.
    Zero,
    /// Reads as zeroes and takes no space: never written, or discarded.
    Hole,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub offset: u64,
    pub len: u64,
    pub kind: AreaKind,
}

/// Walks over the areas of a range, in order, without gaps; neighbours may be of the same kind.
///
/// It may run beside the guest's writes: what they change after an area was reported, the write tracker knows.
/// So start the tracker, then walk.
#[derive(Debug)]
pub struct Areas<'a> {
    disk: &'a Disk,
    rest: Range<u64>,
}

impl<'a> Areas<'a> {
    pub(super) fn new(disk: &'a Disk, range: Range<u64>) -> Self {
        let end = range.end.min(disk.size());
        Self {
            disk,
            rest: range.start.min(end)..end,
        }
    }
}

impl Iterator for Areas<'_> {
    type Item = io::Result<Area>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let area = self.disk.area(self.rest.start, self.rest.end);
        // An error ends the walk.
        self.rest.start = area.as_ref().map_or(self.rest.end, |area| area.offset + area.len);
        Some(area)
    }
}
