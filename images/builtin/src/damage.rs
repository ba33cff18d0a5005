//! The first thing found wrong is kept and reported again and again, so that nobody can miss it.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::line::Line;

#[derive(Clone, Copy)]
pub struct Damage {
    /// What kind of evidence it is.
    pub kind: &'static str,
    /// Page, slot, record or row.
    pub item: u64,
    /// The address of the word (0 where the evidence is not in memory).
    pub gpa: u64,
    pub want: u64,
    pub got: u64,
    pub at_ns: u64,
}

struct First(UnsafeCell<Damage>);
// SAFETY: written once, by whoever raises COUNT from 0, and read only after READY says so.
unsafe impl Sync for First {}

static FIRST: First = First(UnsafeCell::new(Damage {
    kind: "",
    item: 0,
    gpa: 0,
    want: 0,
    got: 0,
    at_ns: 0,
}));
static COUNT: AtomicU64 = AtomicU64::new(0);
static READY: AtomicU64 = AtomicU64::new(0);

pub fn found(damage: Damage) {
    if COUNT.fetch_add(1, Ordering::SeqCst) == 0 {
        // SAFETY: only the first finder comes here, and readers wait for READY.
        unsafe { *FIRST.0.get() = damage };
        READY.store(1, Ordering::SeqCst);
    }
}

pub fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Composes the damage line, if there is damage.
pub fn first() -> Option<impl FnOnce(&mut Line)> {
    if READY.load(Ordering::SeqCst) == 0 {
        return None;
    }
    // SAFETY: READY was set after the only write.
    let d = unsafe { *FIRST.0.get() };
    Some(move |l: &mut Line| {
        l.word("t", "damage")
            .word("kind", d.kind)
            .number("page", d.item)
            .hex("gpa", d.gpa);
        l.hex("want", d.want)
            .hex("got", d.got)
            .number("ns", d.at_ns)
            .number("count", count());
    })
}
