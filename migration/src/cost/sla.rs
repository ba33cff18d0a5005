//! Rates, sizes, times and service levels as people write them: `256Mbit`, `1MB`, `512M`, `rate=20/s,size=1MB,deadline=1s`.
//!
//! Bandwidths and response sizes follow networking (`Mbit` is 10^6 bits, `MB` 10^6 bytes, `Mibit` and `MiB` the
//! powers of two); `parse_memory` follows memory (`512M` is 512 MiB).

use std::time::Duration;

use super::{Cost, Curve, Queue, Service};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(String);

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim())
}

fn number(text: &str) -> Option<(f64, &str)> {
    let (digits, unit) = split(text);
    let value: f64 = digits.parse().ok()?;
    value.is_finite().then_some((value, unit))
}

fn whole(value: f64) -> Option<u64> {
    (value >= 0.0 && value < u64::MAX as f64).then_some(value.round() as u64)
}

/// `k`, `Mi`, `G`, ... as a factor.
fn prefix(text: &str) -> Option<f64> {
    Some(match text.to_ascii_lowercase().as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        "ki" => 1024.0,
        "mi" => 1024f64.powi(2),
        "gi" => 1024f64.powi(3),
        "ti" => 1024f64.powi(4),
        _ => return None,
    })
}

/// A bandwidth in bytes per second: `256Mbit`, `256Mbit/s`, `1Gbps`, `32MB/s`, `100MiB/s`.
pub fn parse_rate(text: &str) -> Result<u64, ParseError> {
    let wrong = || {
        ParseError(format!(
            "\"{text}\" is not a bandwidth; write for example 256Mbit, 1Gbit/s or 32MB/s"
        ))
    };
    let (value, unit) = number(text).ok_or_else(wrong)?;
    let unit = unit.strip_suffix("/s").unwrap_or(unit);
    let lower = unit.to_ascii_lowercase();
    let (stem, bits) = if let Some(stem) = lower.strip_suffix("bit") {
        (stem, 1.0)
    } else if let Some(stem) = lower.strip_suffix("bps") {
        (stem, 1.0)
    } else if unit.ends_with('B') {
        (&lower[..lower.len() - 1], 8.0)
    } else {
        return Err(wrong());
    };
    let factor = prefix(stem).ok_or_else(wrong)?;
    whole(value * factor * bits / 8.0)
        .filter(|b| *b > 0)
        .ok_or_else(wrong)
}

/// A size in bytes: `1MB` (10^6), `1MiB` (2^20), `125kB`, `4096`.
pub fn parse_size(text: &str) -> Result<u64, ParseError> {
    let wrong = || {
        ParseError(format!(
            "\"{text}\" is not a size; write for example 1MB, 64KiB or 4096"
        ))
    };
    let (value, unit) = number(text).ok_or_else(wrong)?;
    let stem = unit.strip_suffix(['B', 'b']).unwrap_or(unit);
    let factor = prefix(stem).ok_or_else(wrong)?;
    whole(value * factor).ok_or_else(wrong)
}

/// An amount of memory in bytes: `512M` is 512 MiB.
pub fn parse_memory(text: &str) -> Result<u64, ParseError> {
    let wrong = || {
        ParseError(format!(
            "\"{text}\" is not an amount of memory; write for example 512M or 4G"
        ))
    };
    let (value, unit) = number(text).ok_or_else(wrong)?;
    let stem = unit.strip_suffix(['B', 'b']).unwrap_or(unit);
    let stem = stem.strip_suffix(['i', 'I']).unwrap_or(stem);
    let factor = if stem.is_empty() {
        1.0
    } else {
        prefix(&format!("{stem}i")).ok_or_else(wrong)?
    };
    whole(value * factor).filter(|b| *b > 0).ok_or_else(wrong)
}

/// A time: `300ms`, `1s`, `2min`, `1.5h`, `250us`.
pub fn parse_duration(text: &str) -> Result<Duration, ParseError> {
    let wrong = || {
        ParseError(format!(
            "\"{text}\" is not a time; write for example 300ms, 20s or 2min"
        ))
    };
    let (value, unit) = number(text).ok_or_else(wrong)?;
    let seconds = match unit {
        "us" => value / 1e6,
        "ms" => value / 1e3,
        "s" => value,
        "m" | "min" => value * 60.0,
        "h" => value * 3600.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// A service level: `rate=20/s,size=1MB,deadline=1s`, optionally `weight=2` and `share=0.5`; several services
/// are joined with `;` and share the bandwidth by what they need where no share is said.
pub fn parse_sla(text: &str) -> Result<Cost, ParseError> {
    let mut services = Vec::new();
    let mut shares = Vec::new();
    for part in text.split(';') {
        let (queue, weight, share) = parse_service(part)?;
        services.push((queue, weight));
        shares.push(share);
    }
    let needs: f64 = services
        .iter()
        .map(|(q, _)| q.requests_per_sec * q.response_bytes)
        .sum();
    let services = services
        .into_iter()
        .zip(shares)
        .map(|((queue, weight), share)| Service {
            curve: Curve::Queue(queue),
            weight,
            share: share.unwrap_or_else(|| queue.requests_per_sec * queue.response_bytes / needs),
        })
        .collect();
    Ok(Cost { services })
}

fn parse_service(text: &str) -> Result<(Queue, f64, Option<f64>), ParseError> {
    let wrong = |why: &str| {
        ParseError(format!(
            "the service level \"{text}\" {why}; write for example rate=20/s,size=1MB,deadline=1s"
        ))
    };
    let (mut rate, mut size, mut deadline, mut weight, mut share) = (None, None, None, 1.0, None);
    for word in text.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        let (key, value) = word
            .split_once('=')
            .ok_or_else(|| wrong(&format!("has the word \"{word}\" without a value")))?;
        let plain = |v: &str| v.trim().parse::<f64>().ok().filter(|x| x.is_finite() && *x > 0.0);
        match key.trim() {
            "rate" => {
                let digits = value.trim().strip_suffix("/s").unwrap_or(value);
                rate = Some(plain(digits).ok_or_else(|| wrong("has no request rate above 0"))?);
            }
            "size" => {
                let bytes = parse_size(value)?;
                if bytes == 0 {
                    return Err(wrong("has responses of no size"));
                }
                size = Some(bytes as f64);
            }
            "deadline" => {
                let time = parse_duration(value)?;
                if time.is_zero() {
                    return Err(wrong("has no time for a response"));
                }
                deadline = Some(time);
            }
            "weight" => weight = plain(value).ok_or_else(|| wrong("has no weight above 0"))?,
            "share" => {
                let part = plain(value).filter(|s| *s <= 1.0);
                share = Some(part.ok_or_else(|| wrong("has no share between 0 and 1"))?);
            }
            other => return Err(wrong(&format!("has the unknown word \"{other}\""))),
        }
    }
    let queue = Queue {
        requests_per_sec: rate.ok_or_else(|| wrong("does not say the rate"))?,
        response_bytes: size.ok_or_else(|| wrong("does not say the size"))?,
        deadline: deadline.ok_or_else(|| wrong("does not say the deadline"))?,
    };
    Ok((queue, weight, share))
}
