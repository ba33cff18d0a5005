//! Reads orders: `key=value` words. Pure.

/// The value of the last word `key=...`.
pub fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .rfind(|(k, _)| *k == key)
        .map(|(_, v)| v)
}

/// `250ms`, `5s`, `100us`, `7ns`; a bare number is seconds.
pub fn duration_ns(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..end].parse().ok()?;
    number.checked_mul(match &text[end..] {
        "" | "s" => 1_000_000_000,
        "ms" => 1_000_000,
        "us" => 1000,
        "ns" => 1,
        _ => return None,
    })
}

/// `4096`, `64K`, `512M`, `2G`.
pub fn size_bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..end].parse().ok()?;
    number.checked_mul(match &text[end..] {
        "" => 1,
        "K" | "k" | "KiB" => 1 << 10,
        "M" | "m" | "MiB" => 1 << 20,
        "G" | "g" | "GiB" => 1 << 30,
        _ => return None,
    })
}

/// 0 to 100.
pub fn percent(text: &str) -> Option<u64> {
    text.parse().ok().filter(|p| *p <= 100)
}

/// `3.291` in millionths.
pub fn decimal_micro(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = part.len();
    if digits > 6 || !part.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let part = if digits == 0 {
        0
    } else {
        part.parse::<u64>().ok()? * 10u64.pow(6 - digits as u32)
    };
    let whole = if whole.is_empty() && digits > 0 {
        0
    } else {
        whole.parse::<u64>().ok()?
    };
    whole.checked_mul(1_000_000)?.checked_add(part)
}

/// A comma-separated list of at most `N` items.
pub fn list<T: Copy, const N: usize>(text: &str, read: impl Fn(&str) -> Option<T>) -> Option<[Option<T>; N]> {
    let mut items = [None; N];
    for (i, word) in text.split(',').enumerate() {
        *items.get_mut(i)? = Some(read(word)?);
    }
    Some(items)
}

/// `10.0.0.2`
pub fn address(text: &str) -> Option<[u8; 4]> {
    let mut address = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut address {
        *byte = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(address)
}

/// `10.0.0.2/24`; without a prefix, 24.
pub fn address_and_prefix(text: &str) -> Option<([u8; 4], u8)> {
    let (text, prefix) = text.split_once('/').unwrap_or((text, "24"));
    Some((address(text)?, prefix.parse().ok().filter(|p| *p <= 32)?))
}
