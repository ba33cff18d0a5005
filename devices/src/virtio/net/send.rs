//! From the guest to the host: one writev for each chain, straight from the guest's buffers.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT};

use super::buffers::Pieces;
use super::neighbours::{LOOK_BYTES, may_claim};
use super::ring::{Broken, Ring};
use super::shared::{Direction, Shared};
use super::stats::NetTotals;
use super::{HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES};
use crate::ram::Ram;

/// Frames in one go, so that receiving and stopping get their turn.
const BATCH: usize = 128;
const ETHERNET_BYTES: usize = 14;

/// Why it stopped sending for now.
#[derive(Debug)]
pub(super) enum Pause {
    /// The guest has nothing. It will kick.
    Empty,
    /// There may be more; others first.
    Batch,
    /// The host takes nothing right now.
    Blocked,
    Limited(Duration),
    Gone(io::Error),
}

pub(super) struct Sender {
    pub(super) ring: Ring,
    ram: Ram,
    pieces: Pieces,
}

impl Sender {
    pub(super) fn new(ring: Ring, ram: Ram) -> Self {
        Self {
            ring,
            pieces: Pieces::new(ram.clone()),
            ram,
        }
    }

    pub(super) fn send(&mut self, file: BorrowedFd<'_>, shared: &Shared) -> Result<Pause, Broken> {
        let mut done = NetTotals::default();
        let result = self.send_some(file, shared, &mut done);
        shared.counters.add(done);
        result
    }

    fn send_some(
        &mut self,
        file: BorrowedFd<'_>,
        shared: &Shared,
        done: &mut NetTotals,
    ) -> Result<Pause, Broken> {
        self.ring.spare_kicks(&self.ram)?;
        for _ in 0..BATCH {
            if let Some(wait) = shared.must_wait(Direction::Send) {
                return Ok(Pause::Limited(wait));
            }
            let Some((head, bytes)) = self.take()? else {
                if !self.ring.ask_for_kick(&self.ram)? {
                    return Ok(Pause::Empty);
                }
                // There is one, says the index; if it cannot be taken all the same, the ring is unreadable.
                let (head, bytes) = self.take()?.ok_or(Broken::Available)?;
                if let Some(pause) = self.pass(head, bytes, file, shared, done)? {
                    return Ok(pause);
                }
                continue;
            };
            if let Some(pause) = self.pass(head, bytes, file, shared, done)? {
                return Ok(pause);
            }
        }
        Ok(Pause::Batch)
    }

    /// The next chain, its buffers in `pieces`.
    fn take(&mut self) -> Result<Option<(u16, usize)>, Broken> {
        let mut available = self.ring.queue.iter(&self.ram).map_err(|_| Broken::Available)?;
        let Some(chain) = available.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        self.pieces.clear();
        let bytes = self.pieces.push_chain(chain, false)?;
        Ok(Some((head, bytes)))
    }

    /// Sends the frame in `pieces` or drops it; either way the guest gets its buffers back. Only a host that is busy
    /// leaves it for later.
    fn pass(
        &mut self,
        head: u16,
        bytes: usize,
        file: BorrowedFd<'_>,
        shared: &Shared,
        done: &mut NetTotals,
    ) -> Result<Option<Pause>, Broken> {
        let mut pause = None;
        if !(HEADER_BYTES + MIN_FRAME_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES).contains(&bytes) {
            shared.complain(|| format!("the guest sent a frame of {bytes} bytes, which was dropped"));
            done.sent_dropped += 1;
        } else if !shared.link_is_up() {
            done.sent_dropped += 1;
        } else {
            match self.pieces.write_to(file) {
                Ok(_) => {
                    let frame = (bytes - HEADER_BYTES) as u64;
                    done.sent_packets += 1;
                    done.sent_bytes += frame;
                    shared.charge(Direction::Send, frame);
                    self.learn(shared);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.ring.put_back(1);
                    return Ok(Some(Pause::Blocked));
                }
                Err(error) => {
                    done.sent_dropped += 1;
                    if is_gone(&error) {
                        pause = Some(Pause::Gone(error));
                    } else {
                        // EINVAL: a header that makes no sense. EIO: the interface is down at the host.
                        shared.complain(|| format!("the host refused a frame of the guest: {error}"));
                    }
                }
            }
        }
        self.ring.publish(&self.ram, &[(head, 0)])?;
        Ok(pause)
    }

    fn learn(&self, shared: &Shared) {
        let mut frame = [0u8; LOOK_BYTES];
        let (ethernet, rest) = frame.split_at_mut(ETHERNET_BYTES);
        if self.pieces.copy_out(HEADER_BYTES, ethernet) == ETHERNET_BYTES && may_claim(ethernet) {
            let more = self.pieces.copy_out(HEADER_BYTES + ETHERNET_BYTES, rest);
            if let Some(seen) = frame.get(..ETHERNET_BYTES + more) {
                shared.learn(seen);
            }
        }
    }

    pub(super) fn wants_interrupt(&mut self) -> bool {
        self.ring.wants_interrupt(&self.ram)
    }

    pub(super) fn finish(self) -> (u16, Queue) {
        (self.ring.index, self.ring.queue)
    }
}

/// The interface was removed, or the peer of a socket has closed it.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EBADFD
                | libc::ENODEV
                | libc::ENXIO
                | libc::EPIPE
                | libc::ECONNRESET
                | libc::ECONNREFUSED
                | libc::ENOTCONN
        )
    )
}
