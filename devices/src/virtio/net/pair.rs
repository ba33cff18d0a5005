//! The thread of one queue pair, and in the first pair's thread the control queue too.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::control::{MAX_COMMAND_BYTES, parse};
use super::receive::{self, Receiver};
use super::ring::Broken;
use super::send::{self, Sender};
use super::shared::Shared;
use crate::ram::Ram;
use crate::virtio::device::VirtioInterrupt;
use crate::virtio::serve::{Done, Request, Served, serve};
use crate::virtio::worker::{More, Poll, Work, clear};

const FILE: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const SEND_KICK: u64 = 2;
const CONTROL_KICK: u64 = 3;
const WAKE: u64 = 4;
const TIMER: u64 = 5;

pub(super) struct Control {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) max_pairs: u16,
}

pub(super) struct Pair {
    pub(super) index: u16,
    pub(super) shared: Arc<Shared>,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
    pub(super) ram: Ram,
    pub(super) file: OwnedFd,
    pub(super) wake: EventFd,
    pub(super) timer: TimerFd,
    pub(super) receiver: Option<(Receiver, EventFd)>,
    pub(super) sender: Option<(Sender, EventFd)>,
    pub(super) control: Option<Control>,
    pub(super) waits: Waits,
}

/// What keeps the pair from going on, and what it has told epoll because of that.
#[derive(Default)]
pub(super) struct Waits {
    /// The guest has not given enough buffers.
    hungry: bool,
    receive_limited: bool,
    send_limited: bool,
    /// The host was busy.
    send_blocked: bool,
    /// The guest broke its rings: nothing is touched until it resets the device.
    broken: bool,
    timer_at: Option<Instant>,
    registered: Option<EventSet>,
}

/// What a pair gives back when it stops.
pub(super) struct Remains {
    pub(super) pair: u16,
    pub(super) queues: Vec<(u16, Queue)>,
    pub(super) pending: Option<Vec<u8>>,
}

impl Work for Pair {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        if let Some((_, kick)) = &self.receiver {
            poll.add(kick, RECEIVE_KICK)?;
        }
        if let Some((_, kick)) = &self.sender {
            poll.add(kick, SEND_KICK)?;
        }
        if let Some(control) = &self.control {
            poll.add(&control.kick, CONTROL_KICK)?;
        }
        poll.add(&self.wake, WAKE)?;
        poll.add(&self.timer, TIMER)?;
        self.watch_file(poll)
    }

    fn ready(&mut self, token: u64, poll: &Poll) -> More {
        let result = match token {
            FILE => self.file_ready(),
            RECEIVE_KICK => {
                if let Some((_, kick)) = &self.receiver {
                    clear(kick);
                }
                self.waits.hungry = false;
                self.receive()
            }
            SEND_KICK => {
                if let Some((_, kick)) = &self.sender {
                    clear(kick);
                }
                self.send()
            }
            CONTROL_KICK => self.obey(),
            WAKE | TIMER => {
                self.look_again(token);
                self.send()
            }
            _ => Ok(More::Later),
        };
        let more = result.unwrap_or_else(|broken| self.give_up(broken));
        if let Err(error) = self.watch_file(poll) {
            self.shared.backend_gone(&error);
        }
        more
    }

    fn finish(&mut self) {
        self.tell_driver();
    }
}

impl Pair {
    pub(super) fn into_remains(self) -> Remains {
        let mut queues = Vec::new();
        let mut pending = None;
        if let Some((receiver, _)) = self.receiver {
            let (index, queue, frame) = receiver.finish();
            queues.push((index, queue));
            pending = frame;
        }
        if let Some((sender, _)) = self.sender {
            queues.push(sender.finish());
        }
        if let Some(control) = self.control {
            queues.push((control.index, control.queue));
        }
        Remains {
            pair: self.index,
            queues,
            pending,
        }
    }

    fn is_active(&self) -> bool {
        self.index < self.shared.active_pairs()
    }

    /// Listens to the host's file only for what could be done now. Errors of a file are reported whatever one listens
    /// for, so the file of an interface that was removed is taken out altogether.
    fn watch_file(&mut self, poll: &Poll) -> io::Result<()> {
        let usable = !self.waits.broken && self.is_active() && !self.shared.is_gone();
        let mut wanted = EventSet::empty();
        if usable && self.may_receive() && !self.waits.hungry {
            wanted |= EventSet::IN;
        }
        if usable && self.waits.send_blocked {
            wanted |= EventSet::OUT;
        }
        let wanted = (!wanted.is_empty()).then_some(wanted);
        if wanted != self.waits.registered {
            match (self.waits.registered, wanted) {
                (None, Some(events)) => poll.add_for(&self.file, FILE, events)?,
                (Some(_), Some(events)) => poll.change(&self.file, FILE, events)?,
                (Some(_), None) => poll.remove(&self.file)?,
                (None, None) => {}
            }
            self.waits.registered = wanted;
        }
        Ok(())
    }

    fn may_receive(&self) -> bool {
        self.receiver.is_some() && self.shared.link_is_up() && !self.waits.receive_limited
    }

    fn file_ready(&mut self) -> Result<More, Broken> {
        if self.waits.send_blocked {
            self.waits.send_blocked = false;
            self.send()?;
        }
        self.receive()?;
        // The file is still ready if there is more.
        Ok(More::Later)
    }

    fn receive(&mut self) -> Result<More, Broken> {
        if self.waits.broken || !self.is_active() || !self.may_receive() {
            return Ok(More::Later);
        }
        let Some((receiver, _)) = &mut self.receiver else {
            return Ok(More::Later);
        };
        let pause = receiver.receive(self.file.as_fd(), &self.shared)?;
        self.waits.hungry = matches!(pause, receive::Pause::NoBuffers);
        match pause {
            receive::Pause::Empty | receive::Pause::Batch | receive::Pause::NoBuffers => {}
            receive::Pause::Limited(wait) => {
                self.waits.receive_limited = true;
                self.wake_after(wait);
            }
            receive::Pause::Gone(error) => self.shared.backend_gone(&error),
        }
        self.tell_driver();
        Ok(More::Later)
    }

    fn send(&mut self) -> Result<More, Broken> {
        if self.waits.broken || self.waits.send_limited || self.waits.send_blocked {
            return Ok(More::Later);
        }
        let Some((sender, _)) = &mut self.sender else {
            return Ok(More::Later);
        };
        let pause = sender.send(self.file.as_fd(), &self.shared)?;
        let mut more = More::Later;
        match pause {
            send::Pause::Empty => {}
            send::Pause::Batch => more = More::Now,
            send::Pause::Blocked => self.waits.send_blocked = true,
            send::Pause::Limited(wait) => {
                self.waits.send_limited = true;
                self.wake_after(wait);
            }
            send::Pause::Gone(error) => {
                self.shared.backend_gone(&error);
                more = More::Now;
            }
        }
        self.tell_driver();
        Ok(more)
    }

    fn wake_after(&mut self, wait: Duration) {
        let at = Instant::now() + wait.min(Duration::from_secs(3600));
        if self.waits.timer_at.is_some_and(|set| set <= at) {
            return;
        }
        if let Err(error) = self.timer.reset(wait.max(Duration::from_micros(1)), None) {
            self.shared
                .complain(|| format!("a timer cannot be set, the rate limit is off: {error}"));
            self.waits.receive_limited = false;
            self.waits.send_limited = false;
            return;
        }
        self.waits.timer_at = Some(at);
    }

    /// Limits, link or number of pairs have changed, or the time has come.
    fn look_again(&mut self, token: u64) {
        if token == TIMER {
            // Level triggered: what was counted must be read. It does not block, because the timer has fired.
            let _ = self.timer.wait();
        } else {
            clear(&self.wake);
        }
        self.waits.timer_at = None;
        self.waits.receive_limited = false;
        self.waits.send_limited = false;
        self.waits.send_blocked = false;
    }

    fn tell_driver(&mut self) {
        if let Some((receiver, _)) = &mut self.receiver
            && receiver.wants_interrupt()
        {
            self.interrupt.queue(receiver.ring.index);
        }
        if let Some((sender, _)) = &mut self.sender
            && sender.wants_interrupt()
        {
            self.interrupt.queue(sender.ring.index);
        }
    }

    fn give_up(&mut self, broken: Broken) -> More {
        if !self.waits.broken {
            self.waits.broken = true;
            self.shared
                .complain(|| format!("the guest's queues are broken and the device needs a reset: {broken}"));
            self.interrupt.needs_reset();
        }
        More::Later
    }

    fn obey(&mut self) -> Result<More, Broken> {
        let Some(control) = &mut self.control else {
            return Ok(More::Later);
        };
        clear(&control.kick);
        if self.waits.broken {
            return Ok(More::Later);
        }
        let Control {
            index,
            queue,
            max_pairs,
            ..
        } = control;
        let served = serve(
            queue,
            *index,
            &self.ram,
            self.interrupt.as_ref(),
            |request| match answer(request, &self.shared, *max_pairs) {
                Ok(written) => Done::Used(written),
                Err(_) => Done::Broken,
            },
        );
        match served {
            Served::Empty | Served::Waiting => Ok(More::Later),
            Served::More => Ok(More::Now),
            Served::Broken => {
                // The driver has been told by `serve`.
                self.waits.broken = true;
                Ok(More::Later)
            }
        }
    }
}

/// Carries out one control command and returns how many bytes of answer were written.
fn answer(request: Request<'_>, shared: &Shared, max_pairs: u16) -> Result<u32, Broken> {
    let ram = request.memory().clone();
    let mut command = Vec::new();
    let mut fits = true;
    let mut answer: Option<GuestAddress> = None;
    for descriptor in request {
        if descriptor.is_write_only() {
            if descriptor.len() > 0 {
                answer.get_or_insert(descriptor.addr());
            }
            continue;
        }
        let start = command.len();
        let len = descriptor.len() as usize;
        if start + len > MAX_COMMAND_BYTES {
            fits = false;
            continue;
        }
        command.resize(start + len, 0);
        let part = command.get_mut(start..).unwrap_or_default();
        ram.read_slice(part, descriptor.addr())
            .map_err(|_| Broken::Descriptor)?;
    }
    let done = fits && parse(&command).is_some_and(|c| shared.command(c, max_pairs));
    if !done {
        shared.complain(|| "a control command of the guest was refused".to_owned());
    }
    let Some(address) = answer else {
        return Ok(0);
    };
    ram.write_obj(u8::from(!done), address)
        .map_err(|_| Broken::Descriptor)?;
    Ok(1)
}
