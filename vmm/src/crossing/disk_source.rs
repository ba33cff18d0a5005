//! A disk as the engine's source: what its map calls data crosses, and what the guest writes meanwhile crosses again.

use std::sync::Arc;

use ferry_devices::disk::{AreaKind, CLUSTER_SIZE, Disk};
use ferry_migration::block::{BlockId, BlockInfo, BlockKind, DataError, Source, Span};
use ferry_migration::units::UnitSet;

use super::notes::{Notes, bits_of};

pub struct DiskSource {
    info: BlockInfo,
    disk: Arc<Disk>,
    /// What was harvested from the write tracker and not taken yet, or was put back.
    notes: Notes,
}

impl DiskSource {
    pub fn new(id: BlockId, name: String, disk: Arc<Disk>) -> DiskSource {
        let info = BlockInfo {
            id,
            kind: BlockKind::Disk,
            name,
            bytes: disk.size(),
        };
        DiskSource {
            notes: Notes::new(info.units()),
            info,
            disk,
        }
    }

    fn failed(&self, verb: &str, error: impl std::fmt::Display) -> DataError {
        DataError::new(format!(
            "the disk image {} could not be {verb}: {error}",
            self.disk.path().display()
        ))
    }
}

impl Source for DiskSource {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn start_tracking(&self) -> Result<(), DataError> {
        self.disk.tracker().start();
        Ok(())
    }

    fn stop_tracking(&self) {
        self.disk.tracker().stop();
        self.notes.clear();
    }

    fn first_pass(&self) -> Result<UnitSet, DataError> {
        let mut data = UnitSet::empty(self.info.units());
        for area in self.disk.areas(0..self.info.bytes) {
            let area = area.map_err(|error| self.failed("mapped", error))?;
            if area.kind == AreaKind::Data {
                let first = area.offset / CLUSTER_SIZE;
                data.insert_run(first, (area.offset + area.len).div_ceil(CLUSTER_SIZE) - first);
            }
        }
        Ok(data)
    }

    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
        for run in self.disk.tracker().take() {
            self.notes.add_run(run.start, run.end);
        }
        self.notes.snapshot(changed);
        Ok(())
    }

    fn take(&self, spans: &[Span]) -> Result<(), DataError> {
        let (first_word, words) = bits_of(spans);
        self.notes.remove(first_word, &words);
        Ok(())
    }

    fn put_back(&self, spans: &[Span]) {
        self.notes.add_spans(spans);
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        self.disk
            .read_at(out, self.info.offset(span.first))
            .map_err(|error| self.failed("read", error))
    }

    fn find_zeroes(&self, span: Span, zero: &mut [bool]) -> Result<(), DataError> {
        zero.fill(true);
        let start = self.info.offset(span.first);
        let end = self.info.offset(span.end()).min(self.info.bytes);
        for area in self.disk.areas(start..end) {
            let area = area.map_err(|error| self.failed("mapped", error))?;
            if area.kind == AreaKind::Data {
                let first = (area.offset - start) / CLUSTER_SIZE;
                let last = (area.offset + area.len - start).div_ceil(CLUSTER_SIZE);
                zero.iter_mut()
                    .take(last as usize)
                    .skip(first as usize)
                    .for_each(|unit| *unit = false);
            }
        }
        Ok(())
    }
}
