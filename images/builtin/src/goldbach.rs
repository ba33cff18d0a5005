//! The calculation service: an even number as the sum of two primes. Pure.

use core::fmt::Write;

/// The split of an even number above 2 whose first prime is the smallest.
pub fn split(n: u64) -> Option<(u64, u64)> {
    if n < 4 || !n.is_multiple_of(2) {
        return None;
    }
    if n == 4 {
        return Some((2, 2));
    }
    (3..=n / 2)
        .step_by(2)
        .find(|&p| is_prime(p) && is_prime(n - p))
        .map(|p| (p, n - p))
}

pub fn is_prime(n: u64) -> bool {
    const WITNESSES: [u64; 12] = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37];
    if n < 2 {
        return false;
    }
    for p in WITNESSES {
        if n.is_multiple_of(p) {
            return n == p;
        }
    }
    // Miller and Rabin; these witnesses decide every 64-bit number.
    let twos = (n - 1).trailing_zeros();
    let odd = (n - 1) >> twos;
    WITNESSES.iter().all(|&witness| {
        let mut x = power(witness, odd, n);
        if x == 1 || x == n - 1 {
            return true;
        }
        (1..twos).any(|_| {
            x = times(x, x, n);
            x == n - 1
        })
    })
}

fn times(a: u64, b: u64, n: u64) -> u64 {
    (a as u128 * b as u128 % n as u128) as u64
}

fn power(base: u64, exponent: u64, n: u64) -> u64 {
    let (mut base, mut exponent, mut result) = (base % n, exponent, 1);
    while exponent > 0 {
        if exponent & 1 != 0 {
            result = times(result, base, n);
        }
        base = times(base, base, n);
        exponent >>= 1;
    }
    result
}

/// The answer to a request line: `N` gives `N = p + q`; `S N`, where S is the client's sequence number,
/// gives `S N = p + q`. What has no split gives `N = ?`, and what is no number `?`.
pub fn answer(request: &str, out: &mut impl Write) {
    let mut words = request.split_ascii_whitespace();
    let (first, second) = (words.next(), words.next());
    let (sequence, number) = if second.is_some() {
        (first, second)
    } else {
        (None, first)
    };
    let parsed = number
        .and_then(|n| n.parse::<u64>().ok())
        .filter(|_| words.next().is_none());
    if let (Some(sequence), Some(_)) = (sequence.and_then(|s| s.parse::<u64>().ok()), parsed) {
        let _ = write!(out, "{sequence} ");
    }
    let _ = match (parsed, parsed.and_then(split)) {
        (Some(n), Some((p, q))) => writeln!(out, "{n} = {p} + {q}"),
        (Some(n), None) => writeln!(out, "{n} = ?"),
        (None, _) => writeln!(out, "?"),
    };
}
