//! What a console is connected to: the terminal, a file, or sockets with several clients.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as Stream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;

use crate::config::SerialTarget;
use crate::console::{Chunk, Hub, Next};
use crate::control;

/// Ctrl-]: in a terminal, the way out that the guest never sees.
pub const ESCAPE: u8 = 0x1d;
/// Clients of one socket at a time.
const MAX_CLIENTS: usize = 16;
/// How often a client's thread looks whether the client is still there.
const HANGUP_CHECK: Duration = Duration::from_secs(1);
/// What somebody who comes to look sees of the past.
pub const VISITORS_HISTORY_BYTES: usize = 16 << 10;

/// Copies of a hub's output that must be complete before the process may end.
#[derive(Default)]
pub struct Ends {
    finished: Vec<mpsc::Receiver<()>>,
    sockets: Vec<PathBuf>,
}

impl Ends {
    /// Connects a hub as the configuration says; the sentence says what is wrong with the place.
    pub fn connect(
        &mut self,
        runtime: &Runtime,
        hub: &Hub,
        what: &str,
        to: &SerialTarget,
    ) -> Result<(), String> {
        match to {
            SerialTarget::Null => Ok(()),
            SerialTarget::Stdio => {
                self.copy(hub, what, io::stdout()).map_err(|e| e.to_string())?;
                let hub = hub.clone();
                named(format!("{what}-in"), move || read_terminal(&hub)).map_err(|e| e.to_string())
            }
            SerialTarget::File(path) => File::create(path)
                .and_then(|file| self.copy(hub, what, file))
                .map_err(|e| format!("the {what}'s file {} cannot be written: {e}", path.display())),
            SerialTarget::Socket(path) => self
                .socket(runtime, hub, what, path, None)
                .map_err(|e| format!("the {what}'s socket {} cannot be made: {e}", path.display())),
        }
    }

    /// A thread that writes everything to one place.
    pub fn copy(&mut self, hub: &Hub, what: &str, mut to: impl Write + Send + 'static) -> io::Result<()> {
        let (done, finished) = mpsc::channel();
        let reader = hub.reader();
        let what_copied = what.to_owned();
        named(format!("{what}-out"), move || {
            for Chunk { lost, bytes } in reader {
                if lost > 0 {
                    tracing::warn!(
                        "{lost} bytes of the {what_copied}'s output were lost: their reader is too slow"
                    );
                }
                if let Err(error) = to.write_all(&bytes).and_then(|()| to.flush()) {
                    tracing::warn!("the {what_copied}'s output goes nowhere any more: {error}");
                    break;
                }
            }
            drop(done);
        })?;
        self.finished.push(finished);
        Ok(())
    }

    /// A socket for several clients: all see the output, all may type. `history`: how much of the past they see.
    pub fn socket(
        &mut self,
        runtime: &Runtime,
        hub: &Hub,
        what: &str,
        path: &Path,
        history: Option<usize>,
    ) -> io::Result<()> {
        if path.exists() && Stream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
        {
            // Left by a process that is gone.
            std::fs::remove_file(path)?;
        }
        let listener = {
            let _context = runtime.enter();
            control::listen(path)?
        };
        self.sockets.push(path.to_owned());
        runtime.spawn(accept(listener, hub.clone(), what.to_owned(), history));
        Ok(())
    }

    /// After the hubs were closed: waits until the last output is written, but not for ever.
    pub fn finish(&self, limit: Duration) {
        let end = Instant::now() + limit;
        for finished in &self.finished {
            let _ = finished.recv_timeout(end.saturating_duration_since(Instant::now()));
        }
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        for path in &self.sockets {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn named(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).spawn(work).map(drop)
}

/// Standard input goes to the guest. In a terminal the escape key asks this process to end in good order.
fn read_terminal(hub: &Hub) {
    let is_terminal = io::stdin().is_terminal();
    let mut buffer = [0; 4096];
    loop {
        let count = match io::stdin().lock().read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(count) if count > 0 => count,
            _ => return,
        };
        let typed = buffer.get(..count).unwrap_or_default();
        if is_terminal && typed.contains(&ESCAPE) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
            return;
        }
        if !hub.push(typed) {
            return;
        }
    }
}

async fn accept(listener: UnixListener, hub: Hub, what: String, history: Option<usize>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: others need the time more than we do.
            tokio::time::sleep(HANGUP_CHECK).await;
            continue;
        };
        if !stream.peer_cred().is_ok_and(|cred| control::may_ask(cred.uid())) {
            continue;
        }
        let blocking = stream
            .into_std()
            .and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
        let Ok(stream) = blocking else { continue };
        if clients.load(Ordering::Relaxed) >= MAX_CLIENTS {
            let _ = writeln!(
                &stream,
                "ferry: {MAX_CLIENTS} clients are connected already; close one first"
            );
            continue;
        }
        let place = Place::take(&clients);
        if let Err(error) = client(stream, &hub, &what, history, place) {
            tracing::warn!("a client of the {what} was turned away: {error}");
        }
    }
}

/// One of the places for clients, given back when the client is gone.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(clients: &Arc<AtomicUsize>) -> Place {
        clients.fetch_add(1, Ordering::Relaxed);
        Place(clients.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Two threads: what the client types goes to the guest, what the guest writes goes to the client.
fn client(stream: Stream, hub: &Hub, what: &str, history: Option<usize>, place: Place) -> io::Result<()> {
    let mut reader = hub.reader();
    if let Some(bytes) = history {
        reader.skip_to_last(bytes);
    }
    let (mut input, input_hub) = (stream.try_clone()?, hub.clone());
    named(format!("{what}-client-in"), move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = input.read(&mut buffer) {
            if !input_hub.push(buffer.get(..count).unwrap_or_default()) {
                return;
            }
        }
    })?;
    named(format!("{what}-client-out"), move || {
        let _place = place;
        loop {
            match reader.wait(HANGUP_CHECK) {
                Next::Chunk(Chunk { bytes, .. }) if (&stream).write_all(&bytes).is_ok() => {}
                Next::Quiet if !hung_up(&stream) => {}
                _ => break,
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    })
}

fn hung_up(stream: &Stream) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
    poll(&mut polled, Some(&Timespec::default())).is_ok()
        && polled
            .iter()
            .any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_devices::console_io::ConsoleInput;
    use std::sync::Mutex;

    fn runtime() -> Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    }

    #[derive(Default)]
    struct Guest(Mutex<Vec<u8>>);

    impl ConsoleInput for Guest {
        fn push(&self, bytes: &[u8]) -> usize {
            self.0.lock().unwrap().extend(bytes);
            bytes.len()
        }
        fn wait_for_room(&self, _: Duration) -> bool {
            true
        }
    }

    fn read_until(stream: &mut Stream, wanted: &str) -> String {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut got = String::new();
        while !got.contains(wanted) {
            let mut buffer = [0; 100];
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "ended after {got:?}");
            got += std::str::from_utf8(&buffer[..count]).unwrap();
        }
        got
    }

    #[test]
    fn several_clients_see_the_output_and_all_may_type() {
        let (dir, runtime, mut hub, mut ends) = (
            tempfile::tempdir().unwrap(),
            runtime(),
            Hub::default(),
            Ends::default(),
        );
        let guest = Arc::new(Guest::default());
        hub.attach(guest.clone());
        let path = dir.path().join("s");
        ends.connect(&runtime, &hub, "serial", &SerialTarget::Socket(path.clone()))
            .unwrap();
        hub.write_all(b"before\n").unwrap();
        let mut clients = [Stream::connect(&path).unwrap(), Stream::connect(&path).unwrap()];
        for client in &mut clients {
            read_until(client, "before\n");
            client.write_all(b"typed;").unwrap();
        }
        hub.write_all(b"after\n").unwrap();
        clients
            .iter_mut()
            .for_each(|client| drop(read_until(client, "after\n")));
        let begun = Instant::now();
        while guest.0.lock().unwrap().len() < 12 {
            assert!(begun.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(*guest.0.lock().unwrap(), b"typed;typed;");
        hub.close();
        for client in &mut clients {
            assert_eq!(client.read(&mut [0; 10]).unwrap(), 0);
        }
        drop(ends);
        assert!(!path.exists());
    }

    #[test]
    fn clients_that_left_give_their_places_back() {
        let (dir, runtime, hub, mut ends) = (
            tempfile::tempdir().unwrap(),
            runtime(),
            Hub::default(),
            Ends::default(),
        );
        let path = dir.path().join("s");
        ends.socket(&runtime, &hub, "serial", &path, None).unwrap();
        for _ in 0..2 {
            let clients: Vec<_> = (0..MAX_CLIENTS)
                .map(|_| Stream::connect(&path).unwrap())
                .collect();
            read_until(&mut Stream::connect(&path).unwrap(), "close one first");
            drop(clients);
            thread::sleep(HANGUP_CHECK * 2);
        }
    }

    #[test]
    fn a_file_has_everything_when_the_machine_has_ended() {
        let (dir, runtime, mut hub, mut ends) = (
            tempfile::tempdir().unwrap(),
            runtime(),
            Hub::default(),
            Ends::default(),
        );
        let path = dir.path().join("out");
        ends.connect(&runtime, &hub, "serial", &SerialTarget::File(path.clone()))
            .unwrap();
        (0..1000).for_each(|n| writeln!(hub, "line {n}").unwrap());
        hub.close();
        ends.finish(Duration::from_secs(10));
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("line 999\n"));
        let folder = SerialTarget::File(dir.path().to_owned());
        assert!(
            ends.connect(&runtime, &hub, "serial", &folder)
                .unwrap_err()
                .contains("cannot be written")
        );
    }

    #[test]
    fn a_socket_of_a_dead_process_is_taken_over_and_a_living_one_is_not() {
        let (dir, runtime, hub) = (tempfile::tempdir().unwrap(), runtime(), Hub::default());
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (mut first, mut second) = (Ends::default(), Ends::default());
        first.socket(&runtime, &hub, "serial", &path, None).unwrap();
        assert!(second.socket(&runtime, &hub, "serial", &path, None).is_err());
        drop(second);
        Stream::connect(&path).unwrap();
    }
}
