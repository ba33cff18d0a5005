//! How a device takes requests from a queue: in bounded helpings, with the driver told when it asked to be.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::device::VirtioInterrupt;
use crate::ram::Ram;

/// What a device did with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// It is finished, with so many bytes written into the guest's buffers.
    Used(u32),
    /// It is at work and will be added to the used ring later.
    Later,
    /// It cannot be taken now and stays in the queue; nothing behind it is looked at.
    NotNow,
    /// The guest broke the rules so that the queue cannot go on.
    Broken,
}

/// How a helping ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The queue is empty, and the driver will kick for the next request.
    Empty,
    /// There is more; serve again soon.
    More,
    /// A request waits that was `NotNow`.
    Waiting,
    /// Serve no more until the driver resets the device.
    Broken,
}

/// One request.
pub type Request<'a> = DescriptorChain<&'a Ram>;

/// Serves at most a queue's worth of requests. The driver is interrupted at the end, if it wants to be.
pub fn serve(
    queue: &mut Queue,
    index: u16,
    ram: &Ram,
    interrupt: &dyn VirtioInterrupt,
    mut handle: impl FnMut(Request<'_>) -> Done,
) -> Served {
    let mut left = queue.size();
    let mut added = false;
    let served = loop {
        match helping(queue, ram, &mut left, &mut added, &mut handle) {
            Ok(Served::Empty) => match queue.enable_notification(ram) {
                Ok(false) => break Served::Empty,
                Ok(true) if left == 0 => break Served::More,
                Ok(true) => {}
                Err(_) => break Served::Broken,
            },
            Ok(served) => break served,
            Err(_) => break Served::Broken,
        }
    };
    if served == Served::Broken {
        interrupt.needs_reset();
    }
    if added && queue.needs_notification(ram).unwrap_or(true) {
        interrupt.queue(index);
    }
    served
}

fn helping(
    queue: &mut Queue,
    ram: &Ram,
    left: &mut u16,
    added: &mut bool,
    handle: &mut impl FnMut(Request<'_>) -> Done,
) -> Result<Served, virtio_queue::Error> {
    queue.disable_notification(ram)?;
    loop {
        if *left == 0 {
            return Ok(Served::More);
        }
        let Some(request) = queue.iter(ram)?.next() else {
            return Ok(Served::Empty);
        };
        *left -= 1;
        let head = request.head_index();
        match handle(request) {
            Done::Used(len) => {
                queue.add_used(ram, head, len)?;
                *added = true;
            }
            Done::Later => {}
            Done::NotNow => {
                queue.go_to_previous_position();
                return Ok(Served::Waiting);
            }
            Done::Broken => return Ok(Served::Broken),
        }
    }
}
