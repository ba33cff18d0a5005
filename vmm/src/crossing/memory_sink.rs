//! A region of guest memory as the engine's sink: data is placed straight where the guest will find it.
#![allow(unsafe_code)] // lends guest memory as a plain slice, so that data needs no copy on its way

use ferry_migration::block::{BlockId, BlockInfo, DataError, Sink, Span};
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use super::notes::Notes;
use super::region::Region;

pub struct MemorySink {
    info: BlockInfo,
    region: Region,
    /// Pages that were written to. The others are zero as they came from the host, and stay untouched.
    placed: Notes,
}

impl MemorySink {
    /// `region` must be fresh: no page of it written yet.
    pub fn new(id: BlockId, region: Region) -> MemorySink {
        let info = region.info(id);
        let placed = Notes::new(info.units());
        MemorySink { info, region, placed }
    }

    fn at(&self, span: Span) -> MemoryRegionAddress {
        MemoryRegionAddress(self.info.offset(span.first))
    }
}

fn failed(verb: &str, at: MemoryRegionAddress, error: impl std::fmt::Display) -> DataError {
    DataError::new(format!(
        "guest memory at {:#x} could not be {verb}: {error}",
        at.0
    ))
}

impl Sink for MemorySink {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        let at = self.at(span);
        self.placed.add_spans(&[span]);
        self.region
            .get()?
            .write_slice(data, at)
            .map_err(|error| failed("written", at, error))
    }

    fn place_zeroes(&self, span: Span) -> Result<(), DataError> {
        const ZEROES: [u8; 4096] = [0; 4096];
        for unit in (span.first..span.end()).filter(|unit| self.placed.contains(*unit)) {
            let at = MemoryRegionAddress(self.info.offset(unit));
            self.region
                .get()?
                .write_slice(&ZEROES, at)
                .map_err(|error| failed("written", at, error))?;
        }
        Ok(())
    }

    fn fill_in_place(&self, span: Span, fill: &mut dyn FnMut(&mut [u8])) -> Result<bool, DataError> {
        let at = self.at(span);
        let bytes = self.info.span_bytes(span);
        let slice = self
            .region
            .get()?
            .get_slice(at, bytes)
            .map_err(|error| failed("written", at, error))?;
        self.placed.add_spans(&[span]);
        let guard = slice.ptr_guard_mut();
        // SAFETY: `get_slice` checked that these bytes lie inside the region's mapping, which lives as long as
        // `self.region`. The machine does not run yet and its devices are not started, so neither vCPU nor worker
        // touches guest memory; the engine never has two calls for the same unit at the same time (the trait's
        // contract), so no other reference to these bytes exists while `fill` runs. Any bit pattern is a valid u8.
        let memory = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), bytes) };
        fill(memory);
        Ok(true)
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        let at = self.at(span);
        self.region
            .get()?
            .read_slice(out, at)
            .map_err(|error| failed("read", at, error))
    }
}
