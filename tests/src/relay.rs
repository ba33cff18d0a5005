//! A link between two hosts that knows the messages on it: it cuts, holds or stalls at the very one that a test names, or
//! changes it on its way.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails tests")]

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use ferry_migration::wire::{ENVELOPE_BYTES, Greeting, Message, envelope, open_envelope};

use crate::host::PATIENCE;

/// What happens at the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It does not arrive, and every connection breaks.
    CutBefore,
    /// It arrives, and then every connection breaks.
    CutAfter,
    /// It waits until the test lets it go on; everything else passes.
    Hold,
    /// It and everything else waits until the test lets it go on.
    Stall,
}

/// The `nth` message of that name, counted from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    pub message: String,
    pub nth: usize,
}

impl Point {
    pub fn first(message: &str) -> Point {
        Point {
            message: message.to_owned(),
            nth: 0,
        }
    }
}

type Edit = Box<dyn Fn(&mut Message) + Send + Sync>;

#[derive(Default)]
struct State {
    plan: Option<(Point, Act)>,
    seen: HashMap<String, usize>,
    /// Every message in the order in which it came here.
    log: Vec<Point>,
    reached: bool,
    waiting: bool,
    stalled: bool,
    /// Later connections find nobody.
    for_good: bool,
    cut: bool,
    ended: bool,
    edit: Option<Arc<Edit>>,
    bytes_per_sec: Option<u64>,
    open: Vec<TcpStream>,
}

pub struct Relay {
    pub address: String,
    link: Arc<Link>,
}

struct Link {
    to: u16,
    state: Mutex<State>,
    changed: Condvar,
}

impl Relay {
    /// Passes everything on to that port.
    pub fn new(to: u16) -> Relay {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = format!("tcp://{}", listener.local_addr().expect("an address"));
        let link = Arc::new(Link {
            to,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let of_thread = link.clone();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if of_thread.lock().ended {
                    return;
                }
                let link = of_thread.clone();
                thread::spawn(move || link.join(near));
            }
        });
        Relay { address, link }
    }

    /// Does that at this message; a cut with `for_good` is never mended.
    pub fn at(to: u16, point: Point, act: Act, for_good: bool) -> Relay {
        let relay = Relay::new(to);
        {
            let mut state = relay.link.lock();
            (state.plan, state.for_good) = (Some((point, act)), for_good);
        }
        relay
    }

    /// Every message passes through `edit`.
    pub fn edit(to: u16, edit: impl Fn(&mut Message) + Send + Sync + 'static) -> Relay {
        let relay = Relay::new(to);
        relay.link.lock().edit = Some(Arc::new(Box::new(edit)));
        relay
    }

    /// A link that carries no more than this.
    pub fn slow(to: u16, bytes_per_sec: u64) -> Relay {
        let relay = Relay::new(to);
        relay.link.lock().bytes_per_sec = Some(bytes_per_sec);
        relay
    }

    /// Waits until the message has come that the test named.
    #[track_caller]
    pub fn wait_reached(&self) {
        let begun = Instant::now();
        while !self.reached() {
            assert!(
                begun.elapsed() < PATIENCE,
                "the message did not come: {:?}",
                self.messages()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn reached(&self) -> bool {
        self.link.lock().reached
    }

    /// What is held or stalled goes on.
    pub fn go_on(&self) {
        let mut state = self.link.lock();
        (state.waiting, state.stalled) = (false, false);
        self.link.changed.notify_all();
    }

    /// What has crossed so far.
    pub fn messages(&self) -> Vec<Point> {
        self.link.lock().log.clone()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.go_on();
        let mut state = self.link.lock();
        state.ended = true;
        close(&mut state);
        drop(state);
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(self.address.trim_start_matches("tcp://"));
    }
}

fn close(state: &mut State) {
    for stream in state.open.drain(..) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn join(self: Arc<Self>, mut near: TcpStream) {
        if self.lock().for_good && self.lock().cut {
            return;
        }
        let mut greeting = [0; Greeting::BYTES];
        let Ok(mut far) = TcpStream::connect(("127.0.0.1", self.to)) else {
            return;
        };
        for stream in [&near, &far] {
            let _ = stream.set_nodelay(true);
            self.lock().open.push(stream.try_clone().expect("a descriptor"));
        }
        if near.read_exact(&mut greeting).is_err() || far.write_all(&greeting).is_err() {
            let _ = far.shutdown(Shutdown::Both);
            return;
        }
        let is_control = matches!(Greeting::decode(&greeting), Ok(Greeting::Control { .. }));
        for (from, to) in [(&near, &far), (&far, &near)] {
            let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else {
                return;
            };
            let link = self.clone();
            thread::spawn(move || {
                let _ = match is_control {
                    true => link.carry_messages(&mut from, &mut to),
                    false => link.carry_bytes(&mut from, &mut to),
                };
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    }

    fn carry_bytes(&self, from: &mut TcpStream, to: &mut TcpStream) -> std::io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let got = from.read(&mut buffer)?;
            if got == 0 {
                return Ok(());
            }
            self.while_stalled();
            if let Some(rate) = self.lock().bytes_per_sec {
                thread::sleep(Duration::from_secs_f64(got as f64 / rate as f64));
            }
            to.write_all(buffer.get(..got).unwrap_or_default())?;
        }
    }

    fn while_stalled(&self) {
        let mut state = self.lock();
        while state.stalled && !state.ended {
            state = self.changed.wait(state).expect("nobody panics with it");
        }
    }

    fn carry_messages(&self, from: &mut TcpStream, to: &mut TcpStream) -> std::io::Result<()> {
        loop {
            let mut head = [0; ENVELOPE_BYTES];
            from.read_exact(&mut head)?;
            let (length, _) = open_envelope(head).map_err(std::io::Error::other)?;
            let mut bytes = vec![0; length];
            from.read_exact(&mut bytes)?;
            let mut message = Message::decode(&bytes).map_err(std::io::Error::other)?;
            self.while_stalled();
            let edit = self.lock().edit.clone();
            if let Some(edit) = edit {
                edit(&mut message);
                bytes = message.encode();
            }
            let cut_after = self.reach(&message)?;
            to.write_all(&[&envelope(&bytes)[..], &bytes].concat())?;
            if cut_after {
                // What was sent is read before the end is seen.
                thread::sleep(Duration::from_millis(20));
                self.cut();
            }
        }
    }

    fn cut(&self) {
        let mut state = self.lock();
        state.cut = true;
        close(&mut state);
    }

    /// Takes note of a message and does what was planned for it. True: it is the last one.
    fn reach(&self, message: &Message) -> std::io::Result<bool> {
        if let Message::Working { .. } = message {
            return Ok(false);
        }
        let mut state = self.lock();
        let name = message.name().to_owned();
        let count = state.seen.entry(name.clone()).or_default();
        let here = Point {
            message: name,
            nth: *count,
        };
        *count += 1;
        state.log.push(here.clone());
        let Some((_, act)) = state.plan.clone().filter(|(point, _)| *point == here) else {
            return Ok(false);
        };
        state.reached = true;
        match act {
            Act::CutBefore => {
                state.cut = true;
                close(&mut state);
                Err(std::io::Error::other("cut"))
            }
            Act::CutAfter => Ok(true),
            Act::Hold | Act::Stall => {
                state.waiting = true;
                state.stalled = act == Act::Stall;
                while state.waiting && !state.ended {
                    state = self.changed.wait(state).expect("nobody panics with it");
                }
                Ok(false)
            }
        }
    }
}
