//! A guest that writes its pages as a trace says.

use super::Rng;
use super::trace::{Stretch, Trace, Window, Writing};

/// Advances in time and tells each page it writes.
pub struct Guest {
    pages: u64,
    now: f64,
    /// 0 to 1: what throttling leaves of its speed.
    speed: f64,
    rng: Rng,
    kind: Kind,
}

enum Kind {
    Classes {
        classes: Vec<Members>,
        stretches: Vec<Stretch>,
        at: usize,
        stretch_ends: f64,
        /// Index of the class that writes next.
        next: usize,
    },
    Recorded {
        windows: Vec<Window>,
        at: usize,
        began: f64,
        /// Writes of the window that are still to come, latest first.
        due: Vec<(f64, u64)>,
    },
}

struct Members {
    pages: Vec<u32>,
    rate: f64,
    next: f64,
}

impl Guest {
    /// A guest of `pages` pages; the pages of a class lie scattered over memory.
    pub fn new(trace: &Trace, pages: u64, seed: u64) -> Guest {
        let mut rng = Rng::new(seed);
        let kind = match &trace.writing {
            Writing::Classes { classes, stretches } => {
                let scattered = rng.shuffled(pages);
                let whole: f64 = classes.iter().map(|c| c.part).sum();
                let (mut before, mut sum) = (0, 0.0);
                let classes = classes
                    .iter()
                    .map(|class| {
                        sum += class.part / whole;
                        let end = ((pages as f64 * sum).round() as usize).min(scattered.len());
                        let members = scattered.get(before..end).unwrap_or(&[]).to_vec();
                        before = end.max(before);
                        Members {
                            pages: members,
                            rate: class.rate,
                            next: f64::INFINITY,
                        }
                    })
                    .collect();
                Kind::Classes {
                    classes,
                    stretch_ends: stretches.first().map_or(f64::INFINITY, |s| s.secs),
                    stretches: stretches.clone(),
                    at: 0,
                    next: 0,
                }
            }
            Writing::Recorded { windows } => Kind::Recorded {
                windows: windows.clone(),
                at: 0,
                began: 0.0,
                due: Vec::new(),
            },
        };
        let mut guest = Guest {
            pages,
            now: 0.0,
            speed: 1.0,
            rng,
            kind,
        };
        guest.plan();
        guest
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Which units belong to each class of the trace; nothing for a recorded one.
    pub fn classes(&self) -> impl Iterator<Item = &[u32]> {
        let classes = match &self.kind {
            Kind::Classes { classes, .. } => classes.as_slice(),
            Kind::Recorded { .. } => &[],
        };
        classes.iter().map(|class| class.pages.as_slice())
    }

    /// Slows the guest: it runs this part of the time.
    pub fn set_speed(&mut self, speed: f64) {
        if speed != self.speed {
            self.speed = speed;
            if let Kind::Classes { .. } = self.kind {
                self.plan();
            }
        }
    }

    /// Draws when each class writes next, or the writes of the recorded window.
    fn plan(&mut self) {
        match &mut self.kind {
            Kind::Classes {
                classes,
                stretches,
                at,
                next,
                ..
            } => {
                let stretch = stretches.get(*at);
                for (index, class) in classes.iter_mut().enumerate() {
                    class.next = self.now
                        + self.rng.wait(
                            class.rate * class.pages.len() as f64 * factor(stretch, index) * self.speed,
                        );
                }
                *next = earliest(classes);
            }
            Kind::Recorded {
                windows,
                at,
                began,
                due,
            } => {
                due.clear();
                if let Some(window) = windows.get(*at) {
                    for (first, count) in &window.written {
                        let end = first.saturating_add(*count).min(self.pages);
                        for page in *first..end {
                            due.push((*began + self.rng.unit() * window.secs, page));
                        }
                    }
                }
                due.sort_by(|a, b| b.0.total_cmp(&a.0));
            }
        }
    }

    /// Writes until `to`, telling each page.
    pub fn advance(&mut self, to: f64, mut write: impl FnMut(u64)) {
        while self.now < to {
            match &mut self.kind {
                Kind::Classes {
                    classes,
                    stretches,
                    at,
                    stretch_ends,
                    next,
                } => {
                    let Some(class) = classes.get_mut(*next) else {
                        self.now = to;
                        return;
                    };
                    let until = to.min(*stretch_ends);
                    if class.next <= until {
                        self.now = class.next;
                        let pick = self.rng.below(class.pages.len() as u64) as usize;
                        if let Some(page) = class.pages.get(pick) {
                            write(u64::from(*page));
                        }
                        let rate = class.rate
                            * class.pages.len() as f64
                            * factor(stretches.get(*at), *next)
                            * self.speed;
                        class.next = self.now + self.rng.wait(rate);
                        *next = earliest(classes);
                    } else {
                        self.now = until;
                        if until >= *stretch_ends {
                            *at = (*at + 1) % stretches.len().max(1);
                            *stretch_ends += stretches.get(*at).map_or(f64::INFINITY, |s| s.secs);
                            self.plan();
                        }
                    }
                }
                Kind::Recorded {
                    windows,
                    at,
                    began,
                    due,
                } => {
                    while let Some((time, page)) = due.last().copied()
                        && time <= to
                    {
                        due.pop();
                        if self.speed >= 1.0 || self.rng.unit() < self.speed {
                            write(page);
                        }
                    }
                    let ends = *began + windows.get(*at).map_or(f64::INFINITY, |w| w.secs);
                    if ends <= to {
                        self.now = ends;
                        *began = ends;
                        *at = (*at + 1) % windows.len().max(1);
                        self.plan();
                    } else {
                        self.now = to;
                    }
                }
            }
        }
    }
}

fn factor(stretch: Option<&Stretch>, class: usize) -> f64 {
    stretch.map_or(1.0, |s| {
        s.factors.get(class).or(s.factors.last()).copied().unwrap_or(1.0)
    })
}

fn earliest(classes: &[Members]) -> usize {
    let mut best = (f64::INFINITY, 0);
    for (index, class) in classes.iter().enumerate() {
        if class.next < best.0 {
            best = (class.next, index);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_every_write() {
        let run = |seed| {
            let mut guest = Guest::new(&Trace::reference(), 5000, seed);
            let mut writes = Vec::new();
            guest.advance(3.0, |page| writes.push(page));
            writes
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn the_reference_trace_writes_as_its_classes_say() {
        let mut guest = Guest::new(&Trace::reference(), 133_233, 3);
        let mut count = 0;
        guest.advance(10.0, |_| count += 1);
        let expected = 10.0 * (1908.0 * 3.291 + 9511.0 * 0.02075 + 121_814.0 * 0.006384);
        assert!(
            (f64::from(count) - expected).abs() < 0.03 * expected,
            "{count} against {expected}"
        );
    }

    #[test]
    fn stretches_change_the_rate_and_throttling_slows_it() {
        let count = |from: f64, to: f64, speed: f64| {
            let mut guest = Guest::new(&Trace::named("phases").unwrap(), 10_000, 5);
            guest.set_speed(speed);
            let mut count = 0u32;
            guest.advance(from, |_| ());
            guest.advance(to, |_| count += 1);
            f64::from(count)
        };
        assert!(count(25.0, 35.0, 1.0) < 0.1 * count(5.0, 15.0, 1.0));
        let slowed = count(5.0, 15.0, 0.25) / count(5.0, 15.0, 1.0);
        assert!((0.2..0.3).contains(&slowed), "{slowed}");
    }

    #[test]
    fn a_recorded_trace_is_replayed_and_starts_again() {
        let text = r#"{"name":"r","writing":{"recorded":{"windows":[
            {"secs":0.5,"written":[[3,2]]},{"secs":0.5,"written":[[9,1],[5000,9]]}]}}}"#;
        let trace = Trace::from_json(text).unwrap();
        let mut guest = Guest::new(&trace, 10, 1);
        let mut writes = Vec::new();
        guest.advance(2.0, |page| writes.push(page));
        writes.sort_unstable();
        assert_eq!(writes, [3, 3, 4, 4, 9, 9]);
    }
}
