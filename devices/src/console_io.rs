//! What is on the other side of a serial port or console: somewhere to write, and bytes waiting to be read.
//!
//! Output is any `Write + Send`; it is called from a vCPU's or the device's thread, so it must not block for long
//! (drop or buffer when a client does not read). Input is pushed by whoever reads stdin or a socket.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where a console's output goes.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// How much input waits for a guest that does not read. The pusher keeps the rest.
pub const INPUT_LIMIT: usize = 64 << 10;

/// A console that takes input.
pub trait ConsoleInput: Send + Sync {
    /// Takes as many of the bytes as there is room for and says how many; nothing taken is ever lost.
    fn push(&self, bytes: &[u8]) -> usize;
    /// Waits until there is room again; false if there was none in that time.
    fn wait_for_room(&self, at_most: Duration) -> bool;
}

/// Bytes on their way to the guest, bounded.
#[derive(Debug, Default)]
pub(crate) struct InputQueue {
    bytes: Mutex<VecDeque<u8>>,
    room: Condvar,
}

impl InputQueue {
    pub(crate) fn push(&self, bytes: &[u8]) -> usize {
        let mut queue = self.lock();
        let taken = bytes.len().min(INPUT_LIMIT.saturating_sub(queue.len()));
        queue.extend(bytes.iter().take(taken));
        taken
    }

    /// Takes up to `limit` bytes from the front.
    pub(crate) fn take(&self, limit: usize) -> Vec<u8> {
        let mut queue = self.lock();
        let count = limit.min(queue.len());
        let taken = queue.drain(..count).collect();
        if count > 0 {
            self.room.notify_all();
        }
        taken
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub(crate) fn wait_for_room(&self, at_most: Duration) -> bool {
        let full = |queue: &mut VecDeque<u8>| queue.len() >= INPUT_LIMIT;
        let waited = self.room.wait_timeout_while(self.lock(), at_most, full);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !full(&mut queue)
    }

    /// All that waits, for the saved state.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.lock().iter().copied().collect()
    }

    /// Puts back what a saved state had; what is too much is cut.
    pub(crate) fn replace(&self, bytes: &[u8]) {
        *self.lock() = bytes.iter().take(INPUT_LIMIT).copied().collect();
        self.room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_full_queue_takes_what_fits_and_wakes_the_pusher_when_there_is_room() {
        let queue = Arc::new(InputQueue::default());
        assert_eq!(queue.push(&vec![1; INPUT_LIMIT - 2]), INPUT_LIMIT - 2);
        assert_eq!(queue.push(&[2, 3, 4]), 2);
        assert!(!queue.wait_for_room(Duration::from_millis(1)));
        let waiting = queue.clone();
        let waiter = std::thread::spawn(move || waiting.wait_for_room(Duration::from_secs(60)));
        assert_eq!(queue.take(1), [1]);
        assert!(waiter.join().unwrap());
        assert_eq!(queue.push(&[4]), 1);
        assert_eq!(queue.contents()[INPUT_LIMIT - 3..], [2, 3, 4]);
    }
}
