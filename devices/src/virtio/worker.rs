//! The thread of a virtio device: waits for kicks and other events, and gives its work back when it is stopped.
//!
//! The work (queues, back end) moves into the thread and comes back out of [`Worker::stop`], so nothing is shared
//! and nothing needs a lock.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::DeviceError;

/// What a device does in its thread.
pub trait Work: Send + 'static {
    /// Registers what to wait for. Tokens are the work's own. Called once, before the thread starts.
    fn register(&mut self, poll: &Poll) -> io::Result<()>;
    /// Something registered under `token` is ready. Readiness is level triggered: drain an event file descriptor
    /// with [`clear`]. Handle a bounded amount (a queue's worth), so that a busy guest cannot keep `stop` waiting;
    /// if more remains, return [`More::Now`] and be called again with the same token.
    fn ready(&mut self, token: u64, poll: &Poll) -> More;
    /// The last call, when the thread is asked to stop: complete everything in flight and take nothing new.
    fn finish(&mut self);
}

/// Whether there is more to do for this token without waiting for a new event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum More {
    Later,
    Now,
}

/// The token the worker keeps for itself.
const STOP: u64 = u64::MAX;
const EVENTS_PER_WAIT: usize = 32;

/// The set of file descriptors a worker waits for.
pub struct Poll {
    epoll: Epoll,
}

impl Poll {
    /// Waits for `file` to become readable.
    pub fn add(&self, file: &impl AsRawFd, token: u64) -> io::Result<()> {
        self.control(ControlOperation::Add, file, token, EventSet::IN)
    }

    /// Waits for other conditions, such as writable.
    pub fn add_for(&self, file: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, file, token, events)
    }

    /// Changes what is waited for; an empty set pauses it.
    pub fn change(&self, file: &impl AsRawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, file, token, events)
    }

    pub fn remove(&self, file: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, file, 0, EventSet::empty())
    }

    fn control(
        &self,
        operation: ControlOperation,
        file: &impl AsRawFd,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        if token == STOP {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.epoll
            .ctl(operation, file.as_raw_fd(), EpollEvent::new(events, token))
    }
}

/// Empties an event file descriptor, so that it is not ready until it is written again.
pub fn clear(event: &EventFd) {
    // Only fails when it is empty already.
    let _ = event.read();
}

/// A running device thread.
#[derive(Debug)]
pub struct Worker<W> {
    thread: JoinHandle<W>,
    stop: EventFd,
}

impl<W: Work> Worker<W> {
    /// Starts the work on a thread of this name (Linux keeps 15 characters). On an error the work is dropped.
    pub fn spawn(name: &str, mut work: W) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let poll = Poll { epoll: Epoll::new()? };
        poll.epoll.ctl(
            ControlOperation::Add,
            stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, STOP),
        )?;
        work.register(&poll)?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            run(&mut work, &poll);
            work.finish();
            work
        })?;
        Ok(Self { thread, stop })
    }

    /// Starts the one thread of a device that has just one.
    pub fn start_only(running: &mut Option<Self>, device: &str, work: W) -> Result<(), DeviceError> {
        let device = || device.to_owned();
        if running.is_some() {
            return Err(DeviceError::AlreadyRunning { device: device() });
        }
        let worker = Self::spawn(&device(), work).map_err(|source| DeviceError::Io {
            device: device(),
            what: "no thread for it",
            source,
        })?;
        *running = Some(worker);
        Ok(())
    }

    /// Asks the thread to finish and waits for it. None if it died; what it owned is then lost.
    pub fn stop(self) -> Option<W> {
        // A write only fails when the counter is full, and then the event is set already.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

fn run(work: &mut impl Work, poll: &Poll) {
    let mut events = vec![EpollEvent::default(); EVENTS_PER_WAIT];
    let mut again: Vec<u64> = Vec::new();
    loop {
        let timeout = if again.is_empty() { -1 } else { 0 };
        let count = match poll.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!("a device thread cannot wait for events and ends: {error}");
                return;
            }
        };
        let ready = events.iter().take(count).map(EpollEvent::data);
        let mut tokens = std::mem::take(&mut again);
        for token in ready {
            if token == STOP {
                return;
            }
            if !tokens.contains(&token) {
                tokens.push(token);
            }
        }
        for token in tokens {
            if work.ready(token, poll) == More::Now {
                again.push(token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Counting {
        kick: EventFd,
        seen: u64,
        finished: bool,
        tell: mpsc::Sender<u64>,
        always_more: bool,
    }

    impl Work for Counting {
        fn register(&mut self, poll: &Poll) -> io::Result<()> {
            poll.add(&self.kick, 7)
        }

        fn ready(&mut self, token: u64, _: &Poll) -> More {
            assert_eq!(token, 7);
            clear(&self.kick);
            self.seen += 1;
            let _ = self.tell.send(self.seen);
            if self.always_more { More::Now } else { More::Later }
        }

        fn finish(&mut self) {
            self.finished = true;
        }
    }

    fn counting(always_more: bool) -> (Counting, EventFd, mpsc::Receiver<u64>) {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (tell, heard) = mpsc::channel();
        let work = Counting {
            kick: kick.try_clone().unwrap(),
            seen: 0,
            finished: false,
            tell,
            always_more,
        };
        (work, kick, heard)
    }

    #[test]
    fn a_kick_is_served_and_stop_gives_the_work_back() {
        let (work, kick, heard) = counting(false);
        let worker = Worker::spawn("test", work).unwrap();
        for expected in 1..=3 {
            kick.write(1).unwrap();
            assert_eq!(heard.recv().unwrap(), expected);
        }
        let work = worker.stop().unwrap();
        assert_eq!((work.seen, work.finished), (3, true));
    }

    #[test]
    fn endless_work_cannot_keep_a_worker_from_stopping() {
        let (work, kick, heard) = counting(true);
        let worker = Worker::spawn("test", work).unwrap();
        kick.write(1).unwrap();
        heard.iter().take(100).for_each(|seen| assert!(seen > 0));
        assert!(worker.stop().unwrap().finished);
    }

    #[test]
    fn a_worker_that_dies_is_not_waited_for() {
        struct Dying(EventFd);
        impl Work for Dying {
            fn register(&mut self, poll: &Poll) -> io::Result<()> {
                poll.add(&self.0, 0)
            }
            fn ready(&mut self, _: u64, _: &Poll) -> More {
                panic!("on purpose")
            }
            fn finish(&mut self) {}
        }
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        kick.write(1).unwrap();
        let worker = Worker::spawn("test", Dying(kick.try_clone().unwrap())).unwrap();
        while !worker.thread.is_finished() {
            std::thread::yield_now();
        }
        assert!(worker.stop().is_none());
    }
}
