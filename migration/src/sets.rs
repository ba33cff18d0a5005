//! One set of units for each block of the cargo.

use crate::block::{BlockId, BlockKind};
use crate::carrier::Cargo;
use crate::units::UnitSet;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sets(Vec<UnitSet>);

impl Sets {
    pub(crate) fn empty(cargo: &[Cargo]) -> Self {
        Sets(
            cargo
                .iter()
                .map(|cargo| UnitSet::empty(cargo.info.units()))
                .collect(),
        )
    }

    pub(crate) fn from(sets: Vec<UnitSet>) -> Self {
        Sets(sets)
    }

    pub(crate) fn as_slice(&self) -> &[UnitSet] {
        &self.0
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut UnitSet> {
        self.0.iter_mut()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(UnitSet::is_empty)
    }

    pub(crate) fn union(&mut self, other: &Sets) {
        self.0
            .iter_mut()
            .zip(&other.0)
            .for_each(|(mine, theirs)| mine.union(theirs));
    }

    pub(crate) fn subtract(&mut self, other: &Sets) {
        self.0
            .iter_mut()
            .zip(&other.0)
            .for_each(|(mine, theirs)| mine.subtract(theirs));
    }

    pub(crate) fn subtract_listed(&mut self, cargo: &[Cargo], listed: &[(BlockId, UnitSet)]) {
        for (cargo, mine) in cargo.iter().zip(&mut self.0) {
            if let Some((_, set)) = listed.iter().find(|(id, _)| *id == cargo.info.id) {
                mine.subtract(set);
            }
        }
    }

    pub(crate) fn without(&self, other: &Sets) -> Sets {
        let mut left = self.clone();
        left.subtract(other);
        left
    }

    pub(crate) fn units(&self, cargo: &[Cargo], kind: BlockKind) -> u64 {
        self.of(cargo, kind).map(UnitSet::count).sum()
    }

    /// Keeps only the blocks of one kind.
    pub(crate) fn only(&self, cargo: &[Cargo], kind: BlockKind) -> Sets {
        let keep = |(cargo, set): (&Cargo, &UnitSet)| {
            if cargo.info.kind == kind {
                set.clone()
            } else {
                UnitSet::empty(set.units())
            }
        };
        Sets(cargo.iter().zip(&self.0).map(keep).collect())
    }

    pub(crate) fn bytes(&self, cargo: &[Cargo]) -> u64 {
        cargo
            .iter()
            .zip(&self.0)
            .map(|(c, set)| set.count() * u64::from(c.info.unit_bytes()))
            .sum()
    }

    pub(crate) fn disk_bytes(&self, cargo: &[Cargo]) -> u64 {
        self.units(cargo, BlockKind::Disk) * u64::from(crate::block::CLUSTER_BYTES)
    }

    fn of<'a>(&'a self, cargo: &'a [Cargo], kind: BlockKind) -> impl Iterator<Item = &'a UnitSet> {
        cargo
            .iter()
            .zip(&self.0)
            .filter(move |(c, _)| c.info.kind == kind)
            .map(|(_, set)| set)
    }
}
