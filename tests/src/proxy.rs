//! A link between two hosts that breaks when a test says so: after a number of bytes, for a while or for good.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails tests")]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

pub struct Proxy {
    pub address: String,
    link: Arc<LinkState>,
}

struct LinkState {
    to: u16,
    /// The link breaks when so many bytes have crossed in both directions together.
    cut_after: u64,
    crossed: AtomicU64,
    was_cut: AtomicBool,
    /// Later connections find nobody.
    for_good: bool,
    ended: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub fn cut_after(to: u16, bytes: u64, for_good: bool) -> Proxy {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = format!("tcp://{}", listener.local_addr().expect("an address"));
        let link = Arc::new(LinkState {
            to,
            cut_after: bytes,
            crossed: AtomicU64::new(0),
            was_cut: AtomicBool::new(false),
            for_good,
            ended: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let of_thread = link.clone();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if of_thread.ended.load(Ordering::SeqCst) {
                    return;
                }
                of_thread.join(near);
            }
        });
        Proxy { address, link }
    }

    pub fn was_cut(&self) -> bool {
        self.link.was_cut.load(Ordering::SeqCst)
    }

    /// How much has crossed so far.
    pub fn crossed(&self) -> u64 {
        self.link.crossed.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.link.ended.store(true, Ordering::SeqCst);
        self.link.close();
        // Wakes the listener, which then ends.
        let _ = TcpStream::connect(self.address.trim_start_matches("tcp://"));
    }
}

impl LinkState {
    fn close(&self) {
        for stream in self.open.lock().expect("nobody panics with it").drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn join(self: &Arc<Self>, near: TcpStream) {
        if self.for_good && self.was_cut.load(Ordering::SeqCst) {
            return;
        }
        let Ok(far) = TcpStream::connect(("127.0.0.1", self.to)) else {
            return;
        };
        for (from, to) in [(&near, &far), (&far, &near)] {
            let _ = from.set_nodelay(true);
            let (from, to) = (from.try_clone(), to.try_clone());
            let (Ok(from), Ok(to)) = (from, to) else { return };
            let link = self.clone();
            thread::spawn(move || link.carry(from, to));
        }
        self.open
            .lock()
            .expect("nobody panics with it")
            .extend([near, far]);
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            let before = self.crossed.fetch_add(got as u64, Ordering::SeqCst);
            let left = self.cut_after.saturating_sub(before);
            let cuts = left < got as u64 && !self.was_cut.swap(true, Ordering::SeqCst);
            let passes = if cuts { left as usize } else { got };
            if to.write_all(&buffer[..passes]).is_err() {
                break;
            }
            if cuts {
                self.close();
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
