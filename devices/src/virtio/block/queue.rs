//! The thread of one queue: takes requests from the ring, gives answers to it, and knows when to wait for what.
//!
//! Stopping takes nothing new and waits for everything in flight. After it the file holds all that was answered,
//! guest memory holds all that was read, and both kinds of dirty marks are set. What waits for a rate limit was
//! never taken from the queue: the position handed back stands before it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::flights::{Answer, Flights, NotNow};
use super::request;
use crate::disk::HeldBy;
use crate::virtio::device::VirtioInterrupt;
use crate::virtio::serve::{Done, Served, serve};
use crate::virtio::worker::{More, Poll, Work, clear};

const KICK: u64 = 0;
const ENGINE: u64 = 1;
const TIMER: u64 = 2;
/// A held queue looks again at least this often: the limit may have been lifted meanwhile.
const LONGEST_HOLD: Duration = Duration::from_millis(50);
/// When the kernel is short of something, try again after this.
const BACKLOG_WAIT: Duration = Duration::from_millis(1);

pub(super) struct BlockQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    interrupt: Arc<dyn VirtioInterrupt>,
    flights: Flights,
    timer: OwnedFd,
    held: Option<HeldBy>,
    /// The guest broke the rules on this queue: nothing is taken from it any more.
    broken: bool,
}

impl BlockQueue {
    pub(super) fn new(
        index: u16,
        queue: Queue,
        kick: EventFd,
        interrupt: Arc<dyn VirtioInterrupt>,
        flights: Flights,
    ) -> io::Result<Self> {
        Ok(Self {
            index,
            queue,
            kick,
            interrupt,
            flights,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            held: None,
            broken: false,
        })
    }

    /// The queue at its position, once the thread has stopped.
    pub(super) fn into_queue(self) -> (u16, Queue) {
        (self.index, self.queue)
    }

    /// Answers what is done, takes what there is, and sets it to work.
    fn turn(&mut self) -> More {
        self.release();
        self.advance();
        if self.broken {
            return More::Later;
        }
        let ram = self.flights.ram().clone();
        let flights = &mut self.flights;
        let mut why_not = None;
        let mut why_broken = "its rings cannot be read";
        let served = serve(&mut self.queue, self.index, &ram, &*self.interrupt, |chain| {
            let head = chain.head_index();
            match request::parse(&ram, head, chain, flights.bounds()) {
                Ok(request) => match flights.accept(request) {
                    Ok(()) => Done::Later,
                    Err(not_now) => {
                        why_not = Some(not_now);
                        Done::NotNow
                    }
                },
                Err(why) => {
                    why_broken = why;
                    Done::Broken
                }
            }
        });
        self.advance();
        match (served, why_not) {
            (Served::Empty, _) => More::Later,
            (Served::More, _) => More::Now,
            (Served::Waiting, Some(NotNow::Held(wait, by))) => {
                self.hold(wait, by);
                More::Later
            }
            // Room may have come already; if not, it comes with a completion, which calls us.
            (Served::Waiting, _) if self.flights.has_room() && !self.broken => More::Now,
            (Served::Waiting, _) => More::Later,
            (Served::Broken, _) => {
                self.broke(why_broken);
                More::Later
            }
        }
    }

    /// Moves on what is in flight and tells the guest what is done.
    fn advance(&mut self) {
        let had_engine = self.flights.has_engine();
        if self.flights.advance() {
            self.arm(BACKLOG_WAIT);
        }
        let published = self.publish();
        if had_engine && !self.flights.has_engine() {
            self.breaks("the host cannot serve it");
        } else if let Err(why) = published {
            self.breaks(why);
        }
    }

    fn publish(&mut self) -> Result<(), &'static str> {
        let answers = self
            .flights
            .take_answers()
            .map_err(|_| "a status cannot be put where it belongs")?;
        if answers.is_empty() {
            return Ok(());
        }
        let outside = |_| "its rings are outside memory or its requests do not exist";
        let ram = self.flights.ram();
        for Answer { head, written } in answers {
            self.queue.add_used(ram, head, written).map_err(outside)?;
        }
        if self.queue.needs_notification(ram).map_err(outside)? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    fn breaks(&mut self, why: &str) {
        if !self.broken {
            self.interrupt.needs_reset();
        }
        self.broke(why);
    }

    /// Takes note that the queue is broken; the driver knows already.
    fn broke(&mut self, why: &str) {
        let (shared, index) = (&self.flights.shared, self.index);
        let name = &shared.name;
        let text = || format!("{name}: queue {index} stopped until the guest resets the device: {why}");
        shared.broken.warn(text);
        self.broken = true;
    }

    fn hold(&mut self, wait: Duration, by: HeldBy) {
        self.flights.shared.disk.hold(by, true);
        self.held = Some(by);
        self.arm(wait.min(LONGEST_HOLD));
    }

    fn release(&mut self) {
        if let Some(by) = self.held.take() {
            self.flights.shared.disk.hold(by, false);
        }
    }

    fn arm(&mut self, wait: Duration) {
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Zero would disarm it; and nobody waits for more than a second.
        let nanos = wait.as_nanos().clamp(1_000, 999_999_999) as i64;
        let once = Itimerspec {
            it_interval: none,
            it_value: Timespec {
                tv_sec: 0,
                tv_nsec: nanos,
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!("{}: a timer cannot be set: {error}", self.flights.shared.name);
            self.breaks("the host cannot serve it");
        }
    }

    fn wait_for_engine(&self) -> io::Result<()> {
        let Some(event) = self.flights.event() else {
            return Ok(());
        };
        // A backlog has no event of its own, hence a limit.
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 10_000_000,
        };
        match poll(
            &mut [PollFd::from_borrowed_fd(event, PollFlags::IN)],
            Some(&limit),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Work for BlockQueue {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&self.kick, KICK)?;
        poll.add(&self.timer, TIMER)?;
        self.flights
            .event()
            .map_or(Ok(()), |event| poll.add(&event, ENGINE))
    }

    fn ready(&mut self, token: u64, _: &Poll) -> More {
        match token {
            KICK => clear(&self.kick),
            // Reading makes it quiet; there is nothing to read if it was set again meanwhile.
            TIMER => drop(rustix::io::read(&self.timer, &mut [0; 8])),
            _ => {}
        }
        self.turn()
    }

    fn finish(&mut self) {
        self.release();
        while self.flights.in_flight() > 0 {
            if let Err(error) = self.wait_for_engine() {
                self.flights.fail(&error);
            }
            self.advance();
        }
        self.flights.close();
    }
}
