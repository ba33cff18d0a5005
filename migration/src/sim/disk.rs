//! A simulated disk: how large, what of it holds data, and how the guest writes to it and discards.

use serde::{Deserialize, Serialize};

use super::trace::TraceError;
use crate::block::CLUSTER_BYTES;
use crate::cost::{parse_memory, parse_rate};

/// Which part of the writes the hot part of a disk takes, where only its size is said.
const HOT_TAKES: f64 = 0.9;
/// The most a simulated disk may have: its clusters are kept one by one.
const MOST_BYTES: u64 = 4 << 40;

/// What clusters hold when the crossing begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Holds {
    Data,
    /// Allocated, and nothing but zeroes.
    Zeroes,
    /// Never written: it does not cross.
    Hole,
}

/// Clusters that hold the same kind of thing and are written equally often, scattered over the disk.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Which part of the disk; the parts are scaled to add up to 1.
    pub part: f64,
    pub holds: Holds,
    /// To each of its clusters.
    pub writes_per_sec: f64,
    /// Of each of its clusters. A cluster that was discarded and is written again is allocated again.
    pub discards_per_sec: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub bytes: u64,
    pub parts: Vec<Part>,
}

impl Disk {
    /// A disk as people write it: `4G,allocated=50%,zero=10%,rate=20MB/s,hot=5%,discard=1MB/s`. The hot part takes
    /// 9 of 10 writes; each write is one cluster.
    pub fn parse(text: &str) -> Result<Disk, TraceError> {
        let wrong = |why: &str| {
            TraceError(format!(
                "the disk \"{text}\" {why}; write for example 4G,allocated=50%,zero=10%,rate=20MB/s,hot=5%,discard=1MB/s"
            ))
        };
        let said = |e: &dyn std::fmt::Display| TraceError(format!("the disk \"{text}\": {e}"));
        let mut words = text.split(',').map(str::trim);
        let bytes = parse_memory(words.next().unwrap_or("")).map_err(|e| said(&e))?;
        if bytes == 0 || bytes > MOST_BYTES {
            return Err(wrong("has a size that is not between 1 byte and 4 TiB"));
        }
        let (mut allocated, mut zero, mut hot) = (0.5, 0.0, 0.1);
        let (mut written, mut discarded) = (0.0, 0.0);
        for word in words.filter(|word| !word.is_empty()) {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| wrong(&format!("has the word \"{word}\" without a value")))?;
            let share =
                || share(value).ok_or_else(|| wrong(&format!("has no part of 0% to 100% in \"{word}\"")));
            match key.trim() {
                "allocated" if value.contains('%') => allocated = share()?,
                "allocated" => {
                    let said = parse_memory(value).map_err(|e| said(&e))?;
                    if said > bytes {
                        return Err(wrong("has more allocated than there is"));
                    }
                    allocated = said as f64 / bytes as f64;
                }
                "zero" => zero = share()?,
                "hot" => hot = share()?,
                "rate" => written = parse_rate(value).map_err(|e| said(&e))? as f64,
                "discard" => discarded = parse_rate(value).map_err(|e| said(&e))? as f64,
                other => return Err(wrong(&format!("has the unknown word \"{other}\""))),
            }
        }
        if allocated == 0.0 && (written > 0.0 || discarded > 0.0) {
            return Err(wrong("is written to and has nothing allocated"));
        }
        let clusters = bytes as f64 / f64::from(CLUSTER_BYTES);
        let each = |rate: f64, part: f64| {
            let count = clusters * part;
            if count > 0.0 {
                rate / f64::from(CLUSTER_BYTES) / count
            } else {
                0.0
            }
        };
        let (hot_part, rest) = (allocated * hot, allocated * (1.0 - hot));
        // Where everything or nothing is hot, all writes go to the same clusters.
        let takes = if hot_part == 0.0 {
            0.0
        } else if rest == 0.0 {
            1.0
        } else {
            HOT_TAKES
        };
        let part = |part: f64, holds: Holds, takes: f64, discards: bool| Part {
            part,
            holds,
            writes_per_sec: each(written * takes, part),
            discards_per_sec: if discards { each(discarded, allocated) } else { 0.0 },
        };
        let blank = rest * zero;
        let cold_takes = if rest > 0.0 { (1.0 - takes) / rest } else { 0.0 };
        Ok(Disk {
            bytes,
            parts: vec![
                part(hot_part, Holds::Data, takes, true),
                part(rest - blank, Holds::Data, cold_takes * (rest - blank), true),
                part(blank, Holds::Zeroes, cold_takes * blank, true),
                part(1.0 - allocated, Holds::Hole, 0.0, false),
            ],
        })
    }

    pub fn clusters(&self) -> u64 {
        self.bytes.div_ceil(u64::from(CLUSTER_BYTES))
    }

    /// What the guest writes at full speed.
    pub fn bytes_per_sec(&self) -> f64 {
        let whole: f64 = self.parts.iter().map(|p| p.part).sum();
        let writes: f64 = self.parts.iter().map(|p| p.part * p.writes_per_sec).sum();
        writes / whole.max(1e-12) * self.bytes as f64
    }
}

/// `25%`.
fn share(text: &str) -> Option<f64> {
    let number = text.trim().strip_suffix('%')?.trim().parse::<f64>().ok()?;
    (0.0..=100.0).contains(&number).then_some(number / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_written_and_discarded_as_it_was_said() {
        let disk = Disk::parse("4G,allocated=2G,zero=10%,rate=20MB/s,hot=5%,discard=1MB/s").unwrap();
        assert_eq!(disk.clusters(), 65_536);
        assert!(
            (disk.bytes_per_sec() - 20e6).abs() < 1.0,
            "{}",
            disk.bytes_per_sec()
        );
        let whole: f64 = disk.parts.iter().map(|p| p.part).sum();
        let discards: f64 = disk.parts.iter().map(|p| p.part * p.discards_per_sec).sum();
        assert!((whole - 1.0).abs() < 1e-9);
        assert!((discards * disk.bytes as f64 - 1e6).abs() < 1.0);
        let hot = disk.parts[0].part * disk.parts[0].writes_per_sec * disk.bytes as f64;
        assert!((hot - 18e6).abs() < 1.0, "{hot}");
        // Everything hot, and a disk that nobody writes.
        assert!((Disk::parse("1G,hot=100%,rate=1MB/s").unwrap().bytes_per_sec() - 1e6).abs() < 1.0);
        assert_eq!(Disk::parse("1G").unwrap().bytes_per_sec(), 0.0);
    }

    #[test]
    fn what_is_no_disk_is_refused_in_a_sentence() {
        for (text, part) in [
            ("", "amount of memory"),
            ("0", "amount of memory"),
            ("70000G", "size"),
            ("4G,allocated=5G", "more allocated"),
            ("4G,hot=110%", "0% to 100%"),
            ("4G,hot=0.1", "0% to 100%"),
            ("4G,rate", "without a value"),
            ("4G,rate=fast", "not a bandwidth"),
            ("4G,speed=1MB/s", "unknown word"),
            ("4G,allocated=0%,rate=1MB/s", "nothing allocated"),
        ] {
            let error = Disk::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
