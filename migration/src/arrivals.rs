//! The lanes as the incoming side sees them: who may open one, how far each has come, and waiting for them.

use std::io::{ErrorKind, Read};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::failure::{Cause, Reason};
use crate::handover::SessionId;
use crate::pages::decode::{FrameError, Placement, Scratch};
use crate::wire::FrameHeader;

/// Hands lanes out and keeps their progress. Shared by the control side and the lanes.
#[derive(Default)]
pub struct Desk {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    open: Option<Open>,
    /// How many frames of each lane are held, of this attempt.
    frames: Vec<u64>,
    broken: Option<Reason>,
    looked_at: u64,
}

struct Open {
    session: SessionId,
    attempt: u32,
    placement: Arc<Placement>,
    taken: Vec<bool>,
}

/// How a lane stands, to somebody who waits for it.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Reached,
    NotYet,
    Broken(Reason),
}

impl Desk {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on `lanes` lanes of this attempt may come, each once.
    pub fn open(&self, session: SessionId, attempt: u32, lanes: u16, placement: Arc<Placement>) {
        let taken = vec![false; usize::from(lanes)];
        let frames = vec![0; usize::from(lanes)];
        *self.lock() = State {
            open: Some(Open {
                session,
                attempt,
                placement,
                taken,
            }),
            frames,
            broken: None,
            looked_at: 0,
        };
        self.moved.notify_all();
    }

    /// No lane may come any more; what comes on the open ones does not count.
    pub fn close(&self) {
        self.lock().open = None;
        self.moved.notify_all();
    }

    /// How many frames of each lane are held, of the attempt opened last.
    pub fn frames(&self) -> Vec<u64> {
        self.lock().frames.clone()
    }

    /// Whether a lane ended other than it should.
    pub fn is_broken(&self) -> bool {
        self.lock().broken.is_some()
    }

    /// Why a lane ended, if it was for something that a new connection does not mend.
    pub fn fatal(&self) -> Option<Reason> {
        self.lock()
            .broken
            .clone()
            .filter(|reason| !matches!(reason.cause, Cause::Link | Cause::Damaged))
    }

    /// A lane greets.
    pub fn lane(self: &Arc<Self>, session: SessionId, attempt: u32, index: u16) -> Result<LaneIn, Reason> {
        let mut state = self.lock();
        let open = state
            .open
            .as_mut()
            .filter(|open| open.session == session && open.attempt == attempt)
            .ok_or_else(|| Reason::new(Cause::Protocol, "a lane came that no crossing here waits for"))?;
        match open.taken.get_mut(usize::from(index)) {
            Some(taken @ false) => *taken = true,
            _ => {
                return Err(Reason::new(
                    Cause::Protocol,
                    format!("lane {index} came twice or was not agreed"),
                ));
            }
        }
        Ok(LaneIn {
            desk: Arc::clone(self),
            attempt,
            index: usize::from(index),
            placement: Arc::clone(&open.placement),
            scratch: Scratch::new(),
            held: 0,
        })
    }

    /// Whether every lane holds as many frames as it should.
    pub fn progress(&self, wanted: &[u64]) -> Progress {
        Self::compare(&self.lock(), wanted)
    }

    fn compare(state: &State, wanted: &[u64]) -> Progress {
        if let Some(reason) = &state.broken {
            return Progress::Broken(reason.clone());
        }
        if state.frames.len() != wanted.len()
            || state.frames.iter().zip(wanted).any(|(have, want)| have > want)
        {
            return Progress::Broken(Reason::new(
                Cause::Protocol,
                format!(
                    "the lanes hold {:?} frames, and {wanted:?} were announced",
                    state.frames
                ),
            ));
        }
        if state.frames == wanted {
            Progress::Reached
        } else {
            Progress::NotYet
        }
    }

    /// Waits until the lanes hold what they should, something moved, or `most` has passed.
    pub fn wait(&self, wanted: &[u64], most: std::time::Duration) -> Progress {
        let state = self.lock();
        match Self::compare(&state, wanted) {
            Progress::NotYet => {}
            settled => return settled,
        }
        let (state, _) = self
            .moved
            .wait_timeout(state, most)
            .unwrap_or_else(PoisonError::into_inner);
        Self::compare(&state, wanted)
    }

    pub fn is_open(&self, attempt: u32) -> bool {
        self.lock()
            .open
            .as_ref()
            .is_some_and(|open| open.attempt == attempt)
    }

    /// Whether any frame came since this was asked last.
    pub fn moved_since_last_look(&self) -> bool {
        let mut state = self.lock();
        let total = state.frames.iter().sum();
        std::mem::replace(&mut state.looked_at, total) != total
    }

    /// Frames held over all lanes: whether anything moves.
    pub fn total(&self) -> u64 {
        self.lock().frames.iter().sum()
    }
}

/// One lane at the incoming side.
pub struct LaneIn {
    desk: Arc<Desk>,
    attempt: u32,
    index: usize,
    placement: Arc<Placement>,
    scratch: Scratch,
    held: u64,
}

impl LaneIn {
    /// Reads and places one frame; false at the lane's proper end. After an error the lane is finished.
    pub fn frame(&mut self, lane: &mut dyn Read) -> Result<bool, FrameError> {
        match self.try_frame(lane) {
            Ok(more) => Ok(more),
            Err(error) => {
                self.broke(&error);
                Err(error)
            }
        }
    }

    fn try_frame(&mut self, lane: &mut dyn Read) -> Result<bool, FrameError> {
        let mut head = [0; FrameHeader::BYTES];
        let first = loop {
            match lane.read(&mut head) {
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        };
        if first == 0 {
            return Ok(false);
        }
        lane.read_exact(head.get_mut(first..).unwrap_or_default())?;
        let header = FrameHeader::decode(&head)?;
        if header.sequence != self.held + 1 {
            return Err(FrameError::Protocol(format!(
                "frame {} came on lane {} after frame {}",
                header.sequence, self.index, self.held
            )));
        }
        self.placement.place(&header, lane, &mut self.scratch)?;
        self.held = header.sequence;
        let mut state = self.desk.lock();
        if state
            .open
            .as_ref()
            .is_some_and(|open| open.attempt == self.attempt)
            && let Some(frames) = state.frames.get_mut(self.index)
        {
            *frames = header.sequence;
            drop(state);
            self.desk.moved.notify_all();
        }
        Ok(true)
    }

    fn broke(&self, error: &FrameError) {
        let cause = match error {
            FrameError::Link(_) => Cause::Link,
            FrameError::Malformed(crate::codec::Malformed::Checksum(_)) => Cause::Damaged,
            FrameError::Malformed(_) | FrameError::Protocol(_) => Cause::Protocol,
            FrameError::Data(data) => Reason::from(data.clone()).cause,
        };
        // What is wrong with a disk is no matter of lanes.
        let message = match error {
            FrameError::Data(data) => data.message.clone(),
            error => format!("lane {}: {error}", self.index),
        };
        let mut state = self.desk.lock();
        if state
            .open
            .as_ref()
            .is_some_and(|open| open.attempt == self.attempt)
            && state.broken.is_none()
        {
            state.broken = Some(Reason::new(cause, message));
            drop(state);
            self.desk.moved.notify_all();
        }
    }
}
