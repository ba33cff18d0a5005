//! The life of a machine as one transition table. Everything that changes a machine's state asks `next`.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state")]
pub enum State {
    /// Everything is there, no instruction has run.
    Created,
    Running,
    Paused,
    /// The guest ended, or was ended, in an orderly way.
    Stopped {
        reason: StopReason,
    },
    /// The guest cannot go on; the message says why.
    Failed {
        message: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The guest turned itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote to the debug-exit port; the code is what the process exits with.
    DebugExit { code: u32 },
    /// The user asked for it.
    Requested,
    /// The guest now runs at the other side of a crossing.
    HandedOver,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Start,
    Pause,
    Resume,
    /// Saved state was put into a machine that was only created.
    Restore,
    Stop(StopReason),
    Fail(String),
}

/// The transition table: what may follow what. Anything else is refused with a sentence.
pub fn next(state: &State, event: Event) -> Result<State, Refused> {
    use State::{Created, Failed, Paused, Running, Stopped};
    match (state, event) {
        (Created, Event::Start) => Ok(Running),
        (Created, Event::Restore) => Ok(Paused),
        (Running, Event::Pause) => Ok(Paused),
        (Paused, Event::Resume) => Ok(Running),
        (Created | Running | Paused, Event::Stop(reason)) => Ok(Stopped { reason }),
        (Created | Running | Paused, Event::Fail(message)) => Ok(Failed { message }),
        (state, event) => Err(Refused {
            state: state.clone(),
            event,
        }),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub state: State,
    pub event: Event,
}

impl std::error::Error for Refused {}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wish = match &self.event {
            Event::Start => "started",
            Event::Pause => "paused",
            Event::Resume => "resumed",
            Event::Restore => "restored into",
            Event::Stop(_) | Event::Fail(_) => "stopped",
        };
        write!(f, "the machine cannot be {wish}: it is {}", self.state)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Created => f.write_str("created"),
            State::Running => f.write_str("running"),
            State::Paused => f.write_str("paused"),
            State::Stopped { reason } => write!(f, "stopped ({reason})"),
            State::Failed { message } => write!(f, "failed: {message}"),
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StopReason::PowerOff => f.write_str("the guest powered off"),
            StopReason::Reset => f.write_str("the guest asked for a reset"),
            StopReason::DebugExit { code } => write!(f, "the guest ended itself with code {code}"),
            StopReason::Requested => f.write_str("as requested"),
            StopReason::HandedOver => f.write_str("it runs at the other side now"),
        }
    }
}

impl State {
    /// Nothing can follow.
    pub fn is_final(&self) -> bool {
        matches!(self, State::Stopped { .. } | State::Failed { .. })
    }
}

/// The one place that holds a machine's state: changes go through `next`, and whoever waits is told.
pub struct Lifecycle {
    state: Mutex<State>,
    changed: Condvar,
    told: watch::Sender<State>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle {
            state: Mutex::new(State::Created),
            changed: Condvar::new(),
            told: watch::Sender::new(State::Created),
        }
    }
}

impl Lifecycle {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A state is replaced whole, so a panic elsewhere cannot have left half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn state(&self) -> State {
        self.lock().clone()
    }

    pub fn apply(&self, event: Event) -> Result<State, Refused> {
        let mut state = self.lock();
        *state = next(&state, event)?;
        self.told.send_replace(state.clone());
        self.changed.notify_all();
        Ok(state.clone())
    }

    /// For asynchronous callers: a receiver that always holds the newest state.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.told.subscribe()
    }

    /// Waits until `wanted` holds; None when the time is up first.
    pub fn wait(&self, wanted: impl Fn(&State) -> bool, limit: Duration) -> Option<State> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if wanted(&state) {
                return Some(state.clone());
            }
            let left = end
                .checked_duration_since(Instant::now())
                .filter(|d| !d.is_zero())?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_allows_exactly_what_it_says() {
        let states = [
            State::Created,
            State::Running,
            State::Paused,
            State::Stopped {
                reason: StopReason::PowerOff,
            },
            State::Failed { message: "m".into() },
        ];
        let events = [
            Event::Start,
            Event::Pause,
            Event::Resume,
            Event::Restore,
            Event::Stop(StopReason::Reset),
            Event::Fail("f".into()),
        ];
        let allowed: Vec<Vec<bool>> = states
            .iter()
            .map(|s| events.iter().map(|e| next(s, e.clone()).is_ok()).collect())
            .collect();
        let yes = true;
        let no = false;
        assert_eq!(
            allowed,
            vec![
                // start pause resume restore stop fail
                vec![yes, no, no, yes, yes, yes],
                vec![no, yes, no, no, yes, yes],
                vec![no, no, yes, no, yes, yes],
                vec![no; 6],
                vec![no; 6],
            ]
        );
    }

    #[test]
    fn a_refusal_says_where_the_machine_is() {
        let refused = next(&State::Created, Event::Pause).unwrap_err();
        assert_eq!(refused.to_string(), "the machine cannot be paused: it is created");
    }

    #[test]
    fn waiting_sees_a_change_from_another_thread_and_gives_up_in_time() {
        let life = std::sync::Arc::new(Lifecycle::default());
        let other = life.clone();
        let thread = std::thread::spawn(move || other.apply(Event::Start).unwrap());
        assert_eq!(
            life.wait(|s| *s == State::Running, Duration::from_secs(5)),
            Some(State::Running)
        );
        thread.join().unwrap();
        assert_eq!(life.wait(State::is_final, Duration::from_millis(10)), None);
        assert_eq!(*life.watch().borrow(), State::Running);
    }
}
