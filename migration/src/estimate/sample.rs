//! A look at some of a machine's pages: how many are empty, and what compression would make of the others.

use std::time::Duration;

use lz4_flex::block::{compress_into, get_maximum_output_size};

use crate::block::{DataError, Source, Span};
use crate::clock::Clock;
use crate::units::UnitSet;

/// What was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampled {
    pub units: u64,
    pub empty_units: u64,
    pub bytes: u64,
    /// Bytes that are not empty, and what LZ4 makes of them where that is smaller.
    pub full_bytes: u64,
    pub compressed_bytes: u64,
    pub read_time: Duration,
    pub compress_time: Duration,
}

impl Sampled {
    pub fn add(&mut self, other: &Sampled) {
        let Sampled {
            units,
            empty_units,
            bytes,
            full_bytes,
            compressed_bytes,
            read_time,
            compress_time,
        } = *other;
        self.units += units;
        self.empty_units += empty_units;
        self.bytes += bytes;
        self.full_bytes += full_bytes;
        self.compressed_bytes += compressed_bytes;
        self.read_time += read_time;
        self.compress_time += compress_time;
    }

    /// Which part of it is empty.
    pub fn empty_part(&self) -> f64 {
        if self.units == 0 {
            return 0.0;
        }
        self.empty_units as f64 / self.units as f64
    }

    /// Wire bytes per byte that is not empty, and bytes per second that one worker makes frames of: compressed where
    /// that is faster than sending the rest would be, which is how the engine decides.
    pub fn on_the_wire(&self, send_bytes_per_sec: f64, may_compress: bool) -> (f64, f64) {
        let read = self.read_time.as_secs_f64() / (self.bytes as f64).max(1.0);
        let plain = (1.0, 1.0 / read.max(1e-12));
        if !may_compress || self.full_bytes == 0 {
            return plain;
        }
        let full = self.full_bytes as f64;
        let ratio = self.compressed_bytes as f64 / full;
        let work = self.compress_time.as_secs_f64() / full;
        if work < (1.0 - ratio) / send_bytes_per_sec.max(1.0) {
            (ratio, 1.0 / (read + work).max(1e-12))
        } else {
            plain
        }
    }
}

/// Looks at up to `most` of the units of `set`, evenly spread.
pub fn sample(
    source: &dyn Source,
    set: &UnitSet,
    most: u64,
    clock: &dyn Clock,
) -> Result<Sampled, DataError> {
    let info = source.info();
    let every = set.count().div_ceil(most.max(1)).max(1);
    let mut seen = Sampled::default();
    let mut content = vec![0; info.unit_bytes() as usize];
    let mut packed = vec![0; get_maximum_output_size(content.len())];
    let mut skip = every / 2;
    for (first, count) in set.runs() {
        let mut unit = first.saturating_add(skip);
        while unit < first + count {
            let span = Span {
                block: info.id,
                first: unit,
                count: 1,
            };
            let room = content.get_mut(..info.span_bytes(span)).unwrap_or_default();
            let start = clock.now();
            source.read(span, room)?;
            let empty = room.iter().all(|byte| *byte == 0);
            let read = clock.now();
            seen.read_time += read.saturating_sub(start);
            seen.units += 1;
            seen.bytes += room.len() as u64;
            if empty {
                seen.empty_units += 1;
            } else {
                let made = compress_into(room, &mut packed).unwrap_or(room.len());
                seen.compress_time += clock.now().saturating_sub(read);
                seen.full_bytes += room.len() as u64;
                // What does not get an eighth smaller goes as it is.
                seen.compressed_bytes += if made < room.len() - room.len() / 8 {
                    made as u64
                } else {
                    room.len() as u64
                };
            }
            unit += every;
        }
        skip = unit - (first + count);
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compressing pays on a slow link and not on a fast one, and never where nothing gets smaller.
    #[test]
    fn the_ratio_is_the_one_that_the_engine_would_choose() {
        let sampled = Sampled {
            units: 10,
            empty_units: 5,
            bytes: 40_960,
            full_bytes: 20_480,
            compressed_bytes: 10_240,
            read_time: Duration::from_micros(10),
            compress_time: Duration::from_micros(40),
        };
        assert_eq!(sampled.empty_part(), 0.5);
        // 2 ns a byte to save half a byte: pays below 250 MB/s.
        let (slow, _) = sampled.on_the_wire(100e6, true);
        let (fast, speed) = sampled.on_the_wire(1e9, true);
        assert_eq!((slow, fast), (0.5, 1.0));
        assert!((speed - 4.096e9).abs() < 1e6, "{speed}");
        assert_eq!(sampled.on_the_wire(100e6, false).0, 1.0);
        assert_eq!(Sampled::default().on_the_wire(100e6, true).0, 1.0);
    }
}
