//! A generational heap that moves its objects: new ones in a nursery, survivors copied to one of two old
//! spaces. Roots are kept outside the heap and say what each object must contain; objects refer to each
//! other by address, so a collection that moves one must find all who point at it.

use core::sync::atomic::{AtomicU64, Ordering};

use super::{Next, Pace};
use crate::content::mix;
use crate::damage::{self, Damage};

pub static ALLOCATED: AtomicU64 = AtomicU64::new(0);
pub static MOVED: AtomicU64 = AtomicU64::new(0);
pub static COLLECTIONS: AtomicU64 = AtomicU64::new(0);
pub static MAJOR: AtomicU64 = AtomicU64::new(0);
pub static CHECKED: AtomicU64 = AtomicU64::new(0);

/// Words of an object before its payload: identity, size, link, identity of the link's target.
const HEADER: usize = 4;
const LARGEST: usize = 128;
const MOVED_MARK: u64 = u64::MAX;
const BATCH: usize = 64;

/// What the mutator knows of an object. Index 0 of the heap is never an object, so `at` 0 means none.
#[derive(Clone, Copy)]
pub struct Root {
    at: usize,
    version: u32,
    size: u32,
}

#[derive(Clone, Copy)]
struct Space {
    from: usize,
    to: usize,
    next: usize,
}

impl Space {
    fn holds(self, at: usize) -> bool {
        (self.from..self.to).contains(&at)
    }

    fn room(self) -> usize {
        self.to - self.next
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Work,
    /// Copying what the roots from this index on hold.
    Copy(usize),
    /// Mending the links of the live objects from this root on.
    Mend(usize),
}

pub struct Collector {
    heap: &'static mut [u64],
    roots: &'static mut [Root],
    nursery: Space,
    old: Space,
    spare: Space,
    major: bool,
    phase: Phase,
    state: u64,
    check_cursor: usize,
    pace: Option<Pace>,
    id: u64,
}

impl Collector {
    /// How many roots a heap of this many words has: objects of average size fill less than half of an old
    /// space, and the nursery's survivors fit beside them.
    pub fn roots_for(words: usize) -> usize {
        const AVERAGE: usize = HEADER + (LARGEST - HEADER) / 2;
        (words * 7 / 16 * 9 / 20 / AVERAGE).max(1)
    }

    pub fn new(
        heap: &'static mut [u64],
        roots: &'static mut [Root],
        pace: Option<Pace>,
        id: u64,
    ) -> Collector {
        let words = heap.len();
        let (nursery_end, old_end) = (words / 8, words / 8 + words * 7 / 16);
        let space = |from, to| Space { from, to, next: from };
        Collector {
            heap,
            roots,
            nursery: space(1, nursery_end),
            old: space(nursery_end, old_end),
            spare: space(old_end, words),
            major: false,
            phase: Phase::Work,
            state: mix(id),
            check_cursor: 0,
            pace,
            id,
        }
    }

    pub fn step(&mut self, now: u64) -> Next {
        match self.phase {
            Phase::Work => {
                let (due, next) = match &mut self.pace {
                    None => (BATCH as u64, Next::Now),
                    Some(pace) => pace.due(now, BATCH as u64),
                };
                for _ in 0..due {
                    if self.nursery.room() < LARGEST {
                        // A collection may move everything that is in the nursery.
                        self.major = self.old.room() < self.nursery.to - self.nursery.from;
                        self.phase = Phase::Copy(0);
                        return Next::Now;
                    }
                    self.allocate(now);
                    if self.draw(4) == 0 {
                        self.check_next(now);
                    }
                }
                return next;
            }
            Phase::Copy(first) => {
                let last = (first + BATCH).min(self.roots.len());
                for root in first..last {
                    self.move_object(root, now);
                }
                self.phase = if last == self.roots.len() {
                    Phase::Mend(0)
                } else {
                    Phase::Copy(last)
                };
            }
            Phase::Mend(first) => {
                let last = (first + BATCH).min(self.roots.len());
                for root in first..last {
                    self.mend_link(root);
                }
                self.phase = Phase::Mend(last);
                if last == self.roots.len() {
                    self.finish();
                }
            }
        }
        Next::Now
    }

    fn draw(&mut self, below: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        crate::pick::below(mix(self.state), below as u64) as usize
    }

    fn identity(root: usize, version: u32) -> u64 {
        (root as u64) << 32 | version as u64
    }

    /// Most objects die young: nine in ten replace one of a tenth of the roots.
    fn draw_to_replace(&mut self) -> usize {
        let young = self.roots.len().div_ceil(10);
        let among = if self.draw(10) == 0 {
            self.roots.len()
        } else {
            young
        };
        self.draw(among)
    }

    /// A new object takes the place of a root's old one, which is checked a last time, and points at some other.
    fn allocate(&mut self, now: u64) {
        let slot = self.draw_to_replace();
        self.check(slot, now);
        let size = HEADER + self.draw(LARGEST - HEADER + 1);
        let other = self.draw(self.roots.len());
        let at = self.nursery.next;
        self.nursery.next += size;
        let version = self.roots[slot].version.wrapping_add(1);
        let identity = Self::identity(slot, version);
        let target = self.roots[other];
        let object = &mut self.heap[at..at + size];
        object[..HEADER].copy_from_slice(&[
            identity,
            size as u64,
            target.at as u64,
            Self::identity(other, target.version),
        ]);
        let origin = mix(identity ^ self.id);
        for (i, word) in object.iter_mut().enumerate().skip(HEADER) {
            *word = origin.wrapping_mul(i as u64 | 1);
        }
        self.roots[slot] = Root {
            at,
            version,
            size: size as u32,
        };
        ALLOCATED.fetch_add(1, Ordering::Relaxed);
    }

    fn check_next(&mut self, now: u64) {
        let slot = self.check_cursor;
        self.check_cursor = (slot + 1) % self.roots.len();
        self.check(slot, now);
    }

    /// Checks a root's object: who it is, every word of it, and whom it points at.
    fn check(&mut self, slot: usize, now: u64) {
        let root = self.roots[slot];
        if root.at == 0 {
            return;
        }
        let identity = Self::identity(slot, root.version);
        let origin = mix(identity ^ self.id);
        for i in 0..root.size as usize {
            let want = match i {
                0 => identity,
                1 => root.size as u64,
                2 | 3 => continue,
                _ => origin.wrapping_mul(i as u64 | 1),
            };
            self.judge(root.at + i, want, slot, now);
        }
        let (link, target) = (self.word(root.at + 2) as usize, self.word(root.at + 3));
        if link != 0 {
            self.judge(link, target, slot, now);
        }
        CHECKED.fetch_add(1, Ordering::Relaxed);
    }

    fn word(&self, at: usize) -> u64 {
        self.heap.get(at).copied().unwrap_or(0)
    }

    fn judge(&self, at: usize, want: u64, slot: usize, now: u64) {
        let got = self.word(at);
        if got != want {
            let gpa = self.heap.as_ptr() as u64 + 8 * at as u64;
            damage::found(Damage {
                kind: "heap",
                item: slot as u64,
                gpa,
                want,
                got,
                at_ns: now,
            });
        }
    }

    fn leaves(&self, at: usize) -> bool {
        self.nursery.holds(at) || self.major && self.old.holds(at)
    }

    fn move_object(&mut self, slot: usize, now: u64) {
        let Root { at, version, size } = self.roots[slot];
        if at == 0 || !self.leaves(at) {
            return;
        }
        self.judge(at, Self::identity(slot, version), slot, now);
        let size = size as usize;
        let space = if self.major {
            &mut self.spare
        } else {
            &mut self.old
        };
        let to = space.next;
        space.next += size;
        self.heap.copy_within(at..at + size, to);
        self.heap[at] = MOVED_MARK;
        self.heap[at + 1] = to as u64;
        self.roots[slot].at = to;
        MOVED.fetch_add(1, Ordering::Relaxed);
    }

    /// Points a live object's link at where its target went, or at nothing if the target died.
    fn mend_link(&mut self, slot: usize) {
        let at = self.roots[slot].at;
        let link = if at == 0 { 0 } else { self.word(at + 2) as usize };
        if link != 0 && self.leaves(link) {
            let moved = self.word(link) == MOVED_MARK;
            self.heap[at + 2] = if moved { self.word(link + 1) } else { 0 };
        }
    }

    fn finish(&mut self) {
        self.nursery.next = self.nursery.from;
        if self.major {
            core::mem::swap(&mut self.old, &mut self.spare);
            self.spare.next = self.spare.from;
            MAJOR.fetch_add(1, Ordering::Relaxed);
        }
        self.major = false;
        self.phase = Phase::Work;
        COLLECTIONS.fetch_add(1, Ordering::Relaxed);
    }
}
