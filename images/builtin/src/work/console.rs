//! Talks on the virtio console: numbered lines go out, and what comes in goes out again.

use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{Next, Pace};
use crate::virtio::lane::{BUFFER, Lane};

pub static IN: AtomicU64 = AtomicU64::new(0);
pub static OUT: AtomicU64 = AtomicU64::new(0);

/// The device's two queues.
pub struct Lines {
    pub incoming: Lane,
    pub outgoing: Lane,
}

pub struct Console {
    pub lines: &'static mut Lines,
    pub pace: Option<Pace>,
    pub number: u64,
}

impl Console {
    pub fn step(&mut self, now: u64) -> Next {
        let Lines { incoming, outgoing } = self.lines;
        while outgoing.take(|_, _| ()).is_some() {}
        while outgoing.has_room()
            && incoming
                .take(|buffer, length| {
                    IN.fetch_add(length as u64, Ordering::Relaxed);
                    outgoing.give(|out| {
                        out[..length].copy_from_slice(&buffer[..length]);
                        length
                    });
                })
                .is_some()
        {}
        while incoming.has_room() {
            incoming.give(|_| BUFFER);
        }
        let (due, next) = match &mut self.pace {
            Some(pace) if outgoing.has_room() => pace.due(now, 4),
            _ => (0, Next::At(u64::MAX)),
        };
        for _ in 0..due {
            self.number += 1;
            outgoing.give(|out| {
                let mut text = Text { out, used: 0 };
                let _ = writeln!(text, "line {} of the console", self.number);
                OUT.fetch_add(text.used as u64, Ordering::Relaxed);
                text.used
            });
        }
        outgoing.kick();
        incoming.kick();
        let has_come = incoming.listen() | outgoing.listen();
        if has_come { Next::Now } else { next }
    }
}

struct Text<'a> {
    out: &'a mut [u8; BUFFER],
    used: usize,
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let room = self
            .out
            .get_mut(self.used..self.used + text.len())
            .ok_or(core::fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.used += text.len();
        Ok(())
    }
}
