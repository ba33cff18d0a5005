//! Plays with memory that the host may take: a stock of pages that are written, given away, lent and called free, and
//! looked at wherever their content is still ours.
//!
//! A page that was given, lent or hinted may come back with any content. It is ours again with the first write to it,
//! and from then on not a bit of it may change: a host that leaves a page behind because it was free once loses it.

use core::sync::atomic::{AtomicU64, Ordering};

use super::{Next, Pace};
use crate::content::mix;
use crate::damage::{self, Damage};
use crate::memory::{PAGE, Pages};
use crate::virtio::balloon::{Balloon, MOST_NUMBERS, Move};

/// Pages that the host has.
pub static GIVEN: AtomicU64 = AtomicU64::new(0);
/// Pages that were lent to it, and pages that it was told are free.
pub static REPORTED: AtomicU64 = AtomicU64::new(0);
pub static HINTED: AtomicU64 = AtomicU64::new(0);
pub static CHECKED: AtomicU64 = AtomicU64::new(0);

/// Pages lent at a time.
const LOAN: u64 = 16;
/// After so many pages written, a loan.
const LOAN_EVERY: u64 = 64;
/// How often the host's wishes are looked at, at least.
const LOOK_NS: u64 = 20_000_000;
const WORDS: u64 = PAGE / 8;
/// A page's content: none that we know, the host has it, or the version it was written with.
const UNKNOWN: u32 = 0;
const AWAY: u32 = u32::MAX;

pub struct Keeper {
    balloon: &'static mut Balloon,
    stock: Pages,
    contents: &'static mut [u32],
    total_bytes: u64,
    pace: Option<Pace>,
    version: u32,
    cursor: u64,
    since_loan: u64,
    moving: Option<(Move, u64, u64)>,
    given: u64,
    lent: Option<u64>,
}

impl Keeper {
    pub fn new(
        balloon: &'static mut Balloon,
        stock: Pages,
        contents: &'static mut [u32],
        total_bytes: u64,
        pace: Option<Pace>,
    ) -> Keeper {
        balloon.tell_given(0);
        GIVEN.store(0, Ordering::Relaxed);
        Keeper {
            balloon,
            stock,
            contents,
            total_bytes,
            pace,
            version: UNKNOWN,
            cursor: 0,
            since_loan: 0,
            moving: None,
            given: 0,
            lent: None,
        }
    }

    pub fn step(&mut self, now: u64) -> Next {
        self.follow_target();
        if self.balloon.asked_for_hints() {
            self.hint();
        }
        if self.balloon.report_done() {
            self.lent = None;
        }
        let free = (self.stock.count() - self.given) * PAGE;
        self.balloon.tell_stats(free, self.total_bytes);
        let (due, next) = match &mut self.pace {
            Some(pace) => pace.due(now, 16),
            None => (16, Next::Now),
        };
        for _ in 0..due {
            self.write(now);
        }
        match next {
            Next::At(_) if self.balloon.listen() => Next::Now,
            Next::At(at) => Next::At(at.min(now + LOOK_NS)),
            Next::Now => Next::Now,
        }
    }

    /// The balloon is the stock's end, from `count - given` on.
    fn follow_target(&mut self) {
        let count = self.stock.count();
        if let Some((what, first, pages)) = self.moving {
            if !self.balloon.move_done(what) {
                return;
            }
            self.moving = None;
            if what == Move::TakeBack {
                self.mark(first, pages, UNKNOWN);
                self.given -= pages;
            } else {
                self.given += pages;
            }
            self.balloon.tell_given(self.given);
            GIVEN.store(self.given, Ordering::Relaxed);
        }
        let wanted = self.balloon.target().min(count);
        let most = MOST_NUMBERS as u64;
        let (what, first, pages) = if wanted > self.given {
            let pages = (wanted - self.given).min(most);
            (Move::Give, count - self.given - pages, pages)
        } else if wanted < self.given {
            (
                Move::TakeBack,
                count - self.given,
                (self.given - wanted).min(most),
            )
        } else {
            return;
        };
        // What is lent comes back before it is given for good.
        if self.lent.is_some_and(|lent| lent + LOAN > first) {
            return;
        }
        if what == Move::Give {
            self.mark(first, pages, AWAY);
        }
        let stock = self.stock;
        let addresses = (first..first + pages).map(|page| stock.address(page));
        if self.balloon.start_move(what, addresses) {
            self.moving = Some((what, first, pages));
        }
    }

    /// All that the host has not got is free: nothing of it need travel until it is written again.
    fn hint(&mut self) {
        let (stock, held) = (self.stock, self.held());
        self.mark(0, held, UNKNOWN);
        HINTED.fetch_add(held, Ordering::Relaxed);
        let mut first = 0;
        let runs = stock.ranges().iter().filter_map(move |(from, to)| {
            let pages = ((to - from) / PAGE).min(held.saturating_sub(first));
            first += pages;
            (pages > 0).then_some((*from, pages * PAGE))
        });
        self.balloon.hint(runs);
    }

    /// Pages in front of the balloon.
    fn held(&self) -> u64 {
        let moving = self.moving.map_or(self.stock.count(), |(_, first, _)| first);
        (self.stock.count() - self.given).min(moving)
    }

    fn mark(&mut self, first: u64, pages: u64, content: u32) {
        self.contents[first as usize..(first + pages) as usize].fill(content);
    }

    /// Checks the next page and writes it anew; now and then lends some.
    fn write(&mut self, now: u64) {
        let held = self.held();
        if held == 0 {
            return;
        }
        self.cursor = if self.cursor + 1 < held {
            self.cursor + 1
        } else {
            0
        };
        let page = self.cursor;
        self.since_loan += 1;
        if self.since_loan >= LOAN_EVERY && self.balloon.can_report() && page + LOAN <= held {
            self.lend(page);
        }
        if self.lent.is_some_and(|lent| (lent..lent + LOAN).contains(&page)) {
            return;
        }
        let old = self.contents[page as usize];
        if old != UNKNOWN {
            self.check(page, old, now);
        }
        self.version = (self.version + 1) % AWAY;
        self.version = self.version.max(1);
        self.contents[page as usize] = self.version;
        let at = self.stock.address(page) as *mut u64;
        for word in 0..WORDS {
            // SAFETY: a page of the stock, which this worker alone uses and the host does not have.
            unsafe {
                at.add(word as usize)
                    .write_volatile(word_of(page, self.version, word))
            };
        }
    }

    fn lend(&mut self, page: u64) {
        // A loan is one range of addresses.
        let address = self.stock.address(page);
        if self.stock.address(page + LOAN - 1) != address + (LOAN - 1) * PAGE {
            return;
        }
        self.since_loan = 0;
        self.mark(page, LOAN, UNKNOWN);
        if self.balloon.report(address, LOAN * PAGE) {
            self.lent = Some(page);
            REPORTED.fetch_add(LOAN, Ordering::Relaxed);
        }
    }

    fn check(&self, page: u64, version: u32, now: u64) {
        let at = self.stock.address(page);
        CHECKED.fetch_add(1, Ordering::Relaxed);
        for word in 0..WORDS {
            // SAFETY: as in `write`.
            let got = unsafe { ((at + 8 * word) as *const u64).read_volatile() };
            let want = word_of(page, version, word);
            if got != want {
                return damage::found(Damage {
                    kind: "stock",
                    item: page,
                    gpa: at + 8 * word,
                    want,
                    got,
                    at_ns: now,
                });
            }
        }
    }
}

fn word_of(page: u64, version: u32, word: u64) -> u64 {
    mix(page << 41 ^ (version as u64) << 9 ^ word)
}
