//! Tells the network that a guest has moved: several rounds of frames with growing gaps, sent from its new place.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::frames::{Identity, announcement};
use crate::tap::FrameSender;

/// The first round goes out at once. A switch or neighbour that misses it, because its port is still waking or a
/// queue was full, gets another chance soon and then less and less often: 0, 50, 200, 450, 800, 1250, … ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    pub first_gap: Duration,
    pub step: Duration,
    pub longest_gap: Duration,
    pub rounds: u32,
}

impl Default for Schedule {
    fn default() -> Self {
        Schedule {
            first_gap: Duration::from_millis(50),
            step: Duration::from_millis(100),
            longest_gap: Duration::from_millis(550),
            rounds: 8,
        }
    }
}

impl Schedule {
    /// How long to wait before the given round; None: there is no such round.
    pub fn gap_before(&self, round: u32) -> Option<Duration> {
        if round >= self.rounds {
            return None;
        }
        let Some(steps) = round.checked_sub(1) else {
            return Some(Duration::ZERO);
        };
        let gap = self.step.saturating_mul(steps).saturating_add(self.first_gap);
        Some(gap.min(self.longest_gap))
    }
}

/// What was sent, and when the first of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announced {
    pub rounds: u32,
    pub frames: u64,
    pub failures: u64,
    /// How long the first round took: it lies in the switch.
    pub first_round: Duration,
    pub first_failure: Option<String>,
}

/// Announces in the background. Dropping it stops after the frame that is being sent.
#[derive(Debug)]
pub struct Announcer {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<Announced>>,
    so_far: Announced,
}

fn send_round(to: &FrameSender, frames: &[Vec<u8>], announced: &mut Announced) {
    for frame in frames {
        match to.send(frame) {
            Ok(()) => announced.frames += 1,
            Err(error) => {
                announced.failures += 1;
                announced.first_failure.get_or_insert_with(|| {
                    format!("an announcement could not be sent through {}: {error}", to.name())
                });
            }
        }
    }
    announced.rounds += 1;
}

impl Announcer {
    /// Sends the first round before it returns, the others in the background.
    pub fn start(to: FrameSender, of: &Identity, schedule: Schedule) -> Announcer {
        let frames = announcement(of);
        let mut announced = Announced::default();
        let began = Instant::now();
        if schedule.rounds > 0 {
            send_round(&to, &frames, &mut announced);
        }
        announced.first_round = began.elapsed();

        let (stop, stopped) = mpsc::channel();
        let so_far = announced.clone();
        let work = move || {
            while let Some(gap) = schedule.gap_before(announced.rounds) {
                match stopped.recv_timeout(gap) {
                    Err(RecvTimeoutError::Timeout) => send_round(&to, &frames, &mut announced),
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            if let Some(failure) = &announced.first_failure {
                tracing::warn!(failures = announced.failures, "{failure}");
            }
            announced
        };
        let thread = std::thread::Builder::new().name("announce".into()).spawn(work);
        if let Err(error) = &thread {
            tracing::warn!("only one round of announcements was sent, no thread can be started: {error}");
        }
        Announcer {
            stop: Some(stop),
            thread: thread.ok(),
            so_far,
        }
    }

    /// What the first round did, at once.
    pub fn first_round(&self) -> &Announced {
        &self.so_far
    }

    /// Waits for the last round.
    pub fn finish(mut self) -> Announced {
        let thread = self.thread.take();
        thread
            .and_then(|thread| thread.join().ok())
            .unwrap_or_else(|| self.so_far.clone())
    }

    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_grow_to_the_longest_and_end() {
        let schedule = Schedule::default();
        let gaps: Vec<_> = (0..)
            .map_while(|round| schedule.gap_before(round))
            .map(|gap| gap.as_millis())
            .collect();
        assert_eq!(gaps, [0, 50, 150, 250, 350, 450, 550, 550]);
        assert_eq!(schedule.gap_before(u32::MAX), None);
    }

    #[test]
    fn an_absurd_schedule_does_not_overflow() {
        let schedule = Schedule {
            first_gap: Duration::MAX,
            step: Duration::MAX,
            longest_gap: Duration::from_secs(1),
            rounds: u32::MAX,
        };
        assert_eq!(schedule.gap_before(u32::MAX - 1), Some(Duration::from_secs(1)));
    }
}
