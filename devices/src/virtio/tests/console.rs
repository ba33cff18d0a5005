//! Console: both streams arrive whole and in order, across any number of crossings.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use crate::console_io::ConsoleInput;
use crate::testing::driver::{Buffer, Driver};
use crate::testing::guest::{Guest, Memory};
use crate::testing::suspendable::Bench;
use crate::virtio::console::{Console, Input};
use crate::virtio::device::VirtioDevice;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const RECEIVE_LEN: u32 = 100;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
pub(super) struct ConsoleBench {
    sink: Sink,
    input: Option<Arc<Input>>,
    round: u64,
    sent_out: Vec<u8>,
    sent_in: Vec<u8>,
    received: Vec<u8>,
    posted: Vec<(u16, u64)>,
    /// How long each text is that is under way out.
    transmitting: VecDeque<usize>,
    /// After a reset or an attack there may be bytes of before.
    leftovers: bool,
}

impl ConsoleBench {
    fn post_receive_buffers(&mut self, guest: &Guest, driver: &mut Driver) {
        while self.posted.len() < 8 && driver.room(RECEIVE) > 0 {
            let address = driver.allocate(RECEIVE_LEN);
            let head = driver.add(
                guest,
                RECEIVE,
                &[Buffer {
                    address,
                    len: RECEIVE_LEN,
                    device_writes: true,
                }],
            );
            self.posted.push((head, address));
        }
        driver.kick(guest, RECEIVE);
    }

    fn take_received(&mut self, guest: &Guest, head: u16, len: u32) {
        let at = self.posted.iter().position(|posted| posted.0 == head).unwrap();
        let (_, address) = self.posted.remove(at);
        self.received.extend(guest.memory.read(address, len as usize));
    }

    fn same(&self, got: &[u8], expected: &[u8]) -> bool {
        if self.leftovers {
            got.ends_with(expected)
        } else {
            got == expected
        }
    }
}

impl Bench for ConsoleBench {
    fn new() -> Option<Self> {
        Some(Self::default())
    }

    fn device(&mut self, _: &Arc<Memory>) -> Box<dyn VirtioDevice> {
        let console = Console::new("console0", Box::new(self.sink.clone())).unwrap();
        self.input = Some(console.input());
        Box::new(console)
    }

    fn submit(&mut self, guest: &Guest, driver: &mut Driver) {
        self.round += 1;
        for part in 0..6u64 {
            let text = format!("out {} {part}\n", self.round).repeat(1 + part as usize * 100);
            let address = driver.allocate(text.len() as u32);
            guest.memory.write(address, text.as_bytes());
            let half = text.len() as u32 / 2;
            let buffers = [
                (address, half),
                (address + u64::from(half), text.len() as u32 - half),
            ];
            let buffers = buffers.map(|(address, len)| Buffer {
                address,
                len,
                device_writes: false,
            });
            driver.add(guest, TRANSMIT, &buffers);
            self.transmitting.push_back(text.len());
            self.sent_out.extend(text.as_bytes());
        }
        driver.kick(guest, TRANSMIT);
        let text = format!("in {}\n", self.round).repeat(300);
        let pushed = self.input.as_ref().unwrap().push(text.as_bytes());
        assert_eq!(pushed, text.len());
        self.sent_in.extend(text.as_bytes());
        self.post_receive_buffers(guest, driver);
    }

    fn complete(&mut self, guest: &Guest, driver: &mut Driver) {
        while !self.transmitting.is_empty() {
            assert_eq!(driver.wait(guest, TRANSMIT).1, 0);
            self.transmitting.pop_front();
        }
        self.post_receive_buffers(guest, driver);
        while !self.same(&self.received, &self.sent_in) {
            let (head, len) = driver.wait(guest, RECEIVE);
            self.take_received(guest, head, len);
            self.post_receive_buffers(guest, driver);
        }
        let mut out = self.sink.0.lock().unwrap();
        assert!(self.same(&out, &self.sent_out), "the output differs");
        out.clear();
        drop(out);
        self.sent_out.clear();
        self.sent_in.clear();
        self.received.clear();
        self.leftovers = false;
    }

    fn forget(&mut self) {
        self.posted.clear();
        self.transmitting.clear();
        self.leftovers = true;
        for stream in [&mut self.sent_out, &mut self.sent_in, &mut self.received] {
            stream.clear();
        }
    }

    fn queue_was_reset(&mut self, guest: &Guest, driver: &mut Driver, index: u16) {
        while let Some((head, len)) = driver.poll(guest, index) {
            if index == TRANSMIT {
                self.transmitting.pop_front();
            } else {
                self.take_received(guest, head, len);
            }
        }
        if index == TRANSMIT {
            // What was not answered was not written, and never will be.
            let unsent: usize = self.transmitting.drain(..).sum();
            self.sent_out.truncate(self.sent_out.len() - unsent);
        } else {
            self.posted.clear();
        }
    }
}
