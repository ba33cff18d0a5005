//! What an evidence page contains: it says which page it is and which version it has, and every word
//! follows from (page, version, seed). Pure.

pub const WORDS: usize = 512;
const HEADER: usize = 5;
const MAGIC: u64 = 0x6567_6150_7972_7246; // "FrryPage"

/// Which page, of which memory, and whether its content can be compressed.
#[derive(Clone, Copy)]
pub struct Identity {
    pub page: u64,
    pub seed: u64,
    pub random: bool,
}

/// `version` counts all writes; `payload` is the version at which the words after the header were written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Version {
    pub version: u32,
    pub payload: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mismatch {
    pub word: usize,
    pub want: u64,
    pub got: u64,
}

/// A good mixer of 64 bits (the finaliser of splitmix64).
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn header(id: Identity, v: Version) -> [u64; HEADER] {
    let versions = v.version as u64 | (v.payload as u64) << 32;
    let sum = mix(mix(mix(id.page ^ MAGIC) ^ versions) ^ id.seed);
    [MAGIC, id.page, versions, id.seed, sum]
}

/// The first state of the payload's stream.
fn origin(id: Identity, payload: u32) -> u64 {
    mix(id.seed ^ mix(id.page << 32 | payload as u64))
}

#[inline]
fn payload_word(origin: u64, random: bool, word: usize) -> u64 {
    if random {
        mix(origin.wrapping_add((word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    } else {
        origin
    }
}

pub fn write_header(words: &mut [u64; WORDS], id: Identity, v: Version) {
    words[..HEADER].copy_from_slice(&header(id, v));
}

pub fn write(words: &mut [u64; WORDS], id: Identity, v: Version) {
    write_header(words, id, v);
    let origin = origin(id, v.payload);
    for (word, place) in words.iter_mut().enumerate().skip(HEADER) {
        *place = payload_word(origin, id.random, word);
    }
}

pub fn check_header(words: &[u64; WORDS], id: Identity, v: Version) -> Result<(), Mismatch> {
    compare(&words[..HEADER], 0, |word| header(id, v)[word])
}

pub fn check(words: &[u64; WORDS], id: Identity, v: Version) -> Result<(), Mismatch> {
    check_header(words, id, v)?;
    let origin = origin(id, v.payload);
    compare(&words[HEADER..], HEADER, |word| {
        payload_word(origin, id.random, word)
    })
}

#[inline]
fn compare(words: &[u64], first: usize, want: impl Fn(usize) -> u64) -> Result<(), Mismatch> {
    let mut difference = 0;
    for (i, &got) in words.iter().enumerate() {
        difference |= got ^ want(first + i);
    }
    if difference == 0 {
        return Ok(());
    }
    let found = words.iter().enumerate().find(|&(i, &got)| got != want(first + i));
    match found {
        Some((i, &got)) => Err(Mismatch {
            word: first + i,
            want: want(first + i),
            got,
        }),
        None => Ok(()),
    }
}

/// The share of pages (in percent) that are random, spread evenly and fixed by the seed.
pub fn is_random(page: u64, seed: u64, percent: u64) -> bool {
    mix(page ^ seed.rotate_left(17)) % 100 < percent
}
