//! The outside end of a serial port or console: one place that the guest writes to, any number of readers, and the way
//! back for input. The guest never waits for a reader: who is too slow loses the oldest output, and is told how much.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_devices::console_io::ConsoleInput;

/// How much output is kept for readers that are behind or that come later.
pub const HISTORY_BYTES: usize = 256 << 10;
/// How long a reader waits for the rest of a line, so that it is not woken for every byte.
const LINE_LINGER: Duration = Duration::from_millis(5);
/// How long input waits for a guest that does not read before the pusher looks whether to go on.
const INPUT_WAIT: Duration = Duration::from_millis(100);

#[derive(Clone, Default)]
pub struct Hub(Arc<Inner>);

#[derive(Default)]
struct Inner {
    output: Mutex<Output>,
    written: Condvar,
    input: Mutex<Option<Arc<dyn ConsoleInput>>>,
}

#[derive(Default)]
struct Output {
    history: VecDeque<u8>,
    /// Bytes ever written; the history ends here.
    end: u64,
    closed: bool,
    /// Readers with nothing to read: only they need to be woken for a byte in the middle of a line.
    idle_readers: usize,
}

/// A place in the output. Each reader has its own.
pub struct Reader {
    hub: Hub,
    at: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes that were overwritten before this reader came to them.
    pub lost: u64,
    pub bytes: Vec<u8>,
}

impl Hub {
    /// Where input goes from now on.
    pub fn attach(&self, input: Arc<dyn ConsoleInput>) {
        *self.0.input.lock().unwrap_or_else(PoisonError::into_inner) = Some(input);
    }

    /// No device takes input until the next `attach`. A device holds its hub and the hub its device: without this neither
    /// would ever be dropped.
    pub fn detach(&self) {
        *self.0.input.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Gives bytes to the guest, waiting while it has no room. False: the hub was closed before all were taken.
    pub fn push(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.lock().closed {
                return false;
            }
            let input = self
                .0
                .input
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            let Some(input) = input else {
                std::thread::sleep(INPUT_WAIT);
                continue;
            };
            let taken = input.push(bytes);
            bytes = bytes.get(taken..).unwrap_or_default();
            if !bytes.is_empty() {
                input.wait_for_room(INPUT_WAIT);
            }
        }
        true
    }

    /// A reader that begins with all that is remembered.
    pub fn reader(&self) -> Reader {
        let output = self.lock();
        Reader {
            hub: self.clone(),
            at: output.end - output.history.len() as u64,
        }
    }

    /// No more output: readers get the rest and then None.
    pub fn close(&self) {
        self.lock().closed = true;
        self.0.written.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl io::Write for Hub {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.lock();
        output.history.extend(bytes);
        let excess = output.history.len().saturating_sub(HISTORY_BYTES);
        output.history.drain(..excess);
        output.end += bytes.len() as u64;
        if output.idle_readers > 0 || bytes.contains(&b'\n') {
            self.0.written.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What waiting for output came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Chunk(Chunk),
    /// Nothing was written in that time.
    Quiet,
    /// The hub was closed and everything was read.
    End,
}

impl Reader {
    /// Begins at most so many bytes before the end, at the beginning of a line where there is one.
    pub fn skip_to_last(&mut self, bytes: usize) {
        let output = self.hub.lock();
        let excess = output.history.len().saturating_sub(bytes);
        if excess > 0 {
            let after_line = output
                .history
                .iter()
                .skip(excess)
                .position(|b| *b == b'\n')
                .map_or(0, |n| n + 1);
            self.at = output.end - output.history.len() as u64 + (excess + after_line) as u64;
        }
    }

    pub fn wait(&mut self, limit: Duration) -> Next {
        let mut output = self.hub.lock();
        let written = &self.hub.0.written;
        if output.end == self.at && !output.closed {
            output.idle_readers += 1;
            let nothing = |output: &mut Output| output.end == self.at && !output.closed;
            let waited = written.wait_timeout_while(output, limit, nothing);
            output = waited.unwrap_or_else(PoisonError::into_inner).0;
            output.idle_readers -= 1;
            if output.end == self.at {
                return if output.closed { Next::End } else { Next::Quiet };
            }
        }
        if output.end == self.at {
            return Next::End;
        }
        if output.history.back() != Some(&b'\n') && !output.closed {
            output = written
                .wait_timeout(output, LINE_LINGER)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let start = output.end - output.history.len() as u64;
        let lost = start.saturating_sub(self.at);
        let skip = self.at.saturating_sub(start) as usize;
        let bytes = output.history.iter().skip(skip).copied().collect();
        self.at = output.end;
        Next::Chunk(Chunk { lost, bytes })
    }
}

impl Iterator for Reader {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        loop {
            match self.wait(Duration::from_secs(3600)) {
                Next::Chunk(chunk) => return Some(chunk),
                Next::Quiet => {}
                Next::End => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::thread;

    #[test]
    fn every_reader_gets_everything_and_a_late_one_gets_what_is_remembered() {
        let mut hub = Hub::default();
        let mut early = hub.reader();
        hub.write_all(b"one\n").unwrap();
        assert_eq!(early.next().unwrap().bytes, b"one\n");
        hub.write_all(b"two\n").unwrap();
        assert_eq!(early.next().unwrap().bytes, b"two\n");
        assert_eq!(hub.reader().next().unwrap().bytes, b"one\ntwo\n");
        hub.close();
        assert_eq!(early.next(), None);
    }

    #[test]
    fn a_visitor_gets_the_last_lines_only() {
        let mut hub = Hub::default();
        hub.write_all(b"first line\nsecond line\nlogin: ").unwrap();
        let mut visitor = hub.reader();
        visitor.skip_to_last(25);
        assert_eq!(visitor.next().unwrap().bytes, b"second line\nlogin: ");
        assert_eq!(visitor.wait(Duration::from_millis(1)), Next::Quiet);
        hub.close();
        assert_eq!(visitor.wait(Duration::from_secs(60)), Next::End);
    }

    #[test]
    fn a_slow_reader_never_stops_the_guest_and_learns_what_it_lost() {
        let mut hub = Hub::default();
        let mut slow = hub.reader();
        let all: Vec<u8> = (0..HISTORY_BYTES + 1000).map(|n| n as u8).collect();
        all.chunks(1).for_each(|byte| hub.write_all(byte).unwrap());
        hub.close();
        let chunk = slow.next().unwrap();
        assert_eq!(chunk.lost, 1000);
        assert_eq!(chunk.bytes, all[1000..]);
        assert_eq!(slow.next(), None);
    }

    #[test]
    fn bytes_written_one_by_one_from_another_thread_all_arrive() {
        let mut hub = Hub::default();
        let mut reader = hub.reader();
        let sent: Vec<u8> = (0..20_000u32).map(|n| (n % 97) as u8).collect();
        let writer = {
            let sent = sent.clone();
            thread::spawn(move || {
                sent.chunks(1).for_each(|byte| hub.write_all(byte).unwrap());
                hub.close();
            })
        };
        let mut got = Vec::new();
        for chunk in &mut reader {
            assert_eq!(chunk.lost, 0);
            got.extend(chunk.bytes);
        }
        writer.join().unwrap();
        assert_eq!(got, sent);
    }

    #[derive(Default)]
    struct Guest(Mutex<Vec<u8>>);

    impl ConsoleInput for Guest {
        fn push(&self, bytes: &[u8]) -> usize {
            self.0.lock().unwrap().extend(bytes.iter().take(3));
            bytes.len().min(3)
        }
        fn wait_for_room(&self, _: Duration) -> bool {
            true
        }
    }

    #[test]
    fn input_waits_for_a_guest_with_little_room_and_goes_to_the_newest_device() {
        let hub = Hub::default();
        let (old, new) = (Arc::new(Guest::default()), Arc::new(Guest::default()));
        hub.attach(old.clone());
        assert!(hub.push(b"0123456789"));
        hub.attach(new.clone());
        assert!(hub.push(b"abcdef"));
        assert_eq!(*old.0.lock().unwrap(), b"0123456789");
        assert_eq!(*new.0.lock().unwrap(), b"abcdef");
        hub.close();
        assert!(!hub.push(b"x"));
    }
}
