//! A host of its own for each test: a runtime directory in which machines run by the real `ferry`. Whatever a test
//! started ends with it, and nothing waits for ever.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails tests")]

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use ferry_vmm::control::client::Client;
use ferry_vmm::rundir::{Base, Entry};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest::Guest;

/// Longer than anything takes on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// True, with the reason printed, where there is no KVM. Where tests must run, that is a failure.
pub fn skip_without_kvm() -> bool {
    let Err(error) = ferry_vmm::kvm::open() else {
        return false;
    };
    assert!(
        std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
        "this test must run here, but {error}"
    );
    eprintln!("skipped: {error}");
    true
}

/// The `ferry` that was built with these tests, from the sources as they are.
pub fn ferry_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("FERRY_BINARY") {
            return path.into();
        }
        let me = std::env::current_exe().expect("a test has a path");
        let profile = me.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
        let target = profile.parent().expect("a profile lies in the target folder");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo
            .args([
                "build",
                "--quiet",
                "--package",
                "ferry",
                "--bin",
                "ferry",
                "--target-dir",
            ])
            .arg(target);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        let status = cargo
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "could not build ferry"
        );
        profile.join("ferry")
    })
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    #[track_caller]
    pub fn success(self) -> Ran {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }
}

/// Waits for a child's end and takes what it wrote. A child that does not end is killed, and the test fails; so it does when
/// something that the child started holds its output after the end.
#[track_caller]
pub fn finish(child: Child, limit: Duration) -> Ran {
    finish_named("the command", child, limit)
}

#[track_caller]
fn finish_named(what: &str, mut child: Child, limit: Duration) -> Ran {
    let (mut stdout, mut stderr) = (Pipe::read(child.stdout.take()), Pipe::read(child.stderr.take()));
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break status;
        }
        if begun.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "{what} did not end within {limit:?}; it said {:?} {:?}",
                stdout.so_far(),
                stderr.so_far()
            );
        }
        thread::sleep(Duration::from_millis(2));
    };
    let until = begun + limit.max(CLOSING);
    if !(stdout.closes(until) && stderr.closes(until)) {
        panic!(
            "{what} has ended ({status}), but something that it started still holds its output; it said {:?} {:?}",
            stdout.so_far(),
            stderr.so_far()
        );
    }
    Ran {
        code: status.code().unwrap_or(-1),
        stdout: stdout.so_far(),
        stderr: stderr.so_far(),
    }
}

/// How long the pipes of a child that has ended may stay open at least.
const CLOSING: Duration = Duration::from_secs(5);

/// What comes out of a pipe, read by a thread of its own.
struct Pipe {
    bytes: Arc<Mutex<Vec<u8>>>,
    closed: Receiver<()>,
}

impl Pipe {
    fn read(pipe: Option<impl std::io::Read + Send + 'static>) -> Pipe {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let (open, closed) = channel::<()>();
        let keep = bytes.clone();
        thread::spawn(move || {
            let _open = open;
            let mut piece = [0; 4096];
            if let Some(mut pipe) = pipe {
                while let Ok(count @ 1..) = pipe.read(&mut piece) {
                    keep.lock()
                        .expect("nobody panics with it")
                        .extend_from_slice(&piece[..count]);
                }
            }
        });
        Pipe { bytes, closed }
    }

    /// Waits for its end; false if it is still open then.
    fn closes(&mut self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        self.closed.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("nobody panics with it")).into_owned()
    }
}

pub struct Host {
    dir: tempfile::TempDir,
    base: Base,
}

impl Default for Host {
    fn default() -> Host {
        Host::new()
    }
}

impl Host {
    pub fn new() -> Host {
        // Short: the paths of sockets are limited.
        let dir = tempfile::Builder::new()
            .prefix("fy")
            .tempdir_in("/tmp")
            .expect("a temporary folder");
        let base = Base::find(Some(&dir.path().join("run"))).expect("an absolute path");
        Host { dir, base }
    }

    /// For files of the test, outside the runtime directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The command, not yet started, with this host's runtime directory.
    pub fn command(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = Command::new(ferry_binary());
        command.args(arguments).current_dir(self.dir.path());
        command
            .env("FERRY_RUNTIME_DIR", self.base.path())
            .env_remove("FERRY_LOG");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end.
    #[track_caller]
    pub fn ferry(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
        let mut command = self.command(arguments);
        let child = command.spawn().expect("ferry can be started");
        finish_named(&format!("{command:?}"), child, PATIENCE)
    }

    /// `ferry run NAME …` in the foreground, its serial port on pipes.
    pub fn run(&self, name: &str, more: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Guest {
        let mut command = self.command(["run", name]);
        command.args(more).stdin(Stdio::piped());
        Guest::new(command.spawn().expect("ferry can be started"))
    }

    /// What the runtime directory knows of a machine.
    pub fn entry(&self, name: &str) -> Option<Entry> {
        self.base
            .entry(&name.parse().expect("a good name"))
            .expect("a readable runtime directory")
    }

    pub fn client(&self, name: &str) -> Client {
        Client::of(&self.entry(name).expect("a machine")).expect("a client")
    }

    /// Types on the machine's serial port, from beside whoever has it.
    pub fn type_line(&self, name: &str, text: &str) {
        let socket = self.entry(name).expect("a machine").console_socket();
        let mut console = UnixStream::connect(socket).expect("a listener");
        writeln!(console, "{text}").expect("the console takes it");
    }

    /// A connection to the control socket, for requests that no good client makes.
    pub fn raw_control(&self, name: &str) -> UnixStream {
        let stream =
            UnixStream::connect(self.entry(name).expect("a machine").control_socket()).expect("a listener");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        stream
    }

    /// Sends bytes to the control socket and returns all that comes back.
    pub fn raw_request(&self, name: &str, request: &[u8]) -> String {
        let mut stream = self.raw_control(name);
        // It may be refused before it is read to its end.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Files and folders that machines left behind. What is meant to survive them is not among them.
    pub fn remains(&self) -> Vec<PathBuf> {
        let Ok(folder) = std::fs::read_dir(self.base.path()) else {
            return Vec::new();
        };
        let paths = folder.flatten().map(|item| item.path());
        paths.filter(|path| *path != self.base.state_dir()).collect()
    }

    /// Waits until a condition holds, and fails with its description when it does not come to hold.
    #[track_caller]
    pub fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(
                begun.elapsed() < PATIENCE,
                "did not happen within {PATIENCE:?}: {what}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for entry in self.base.entries().unwrap_or_default() {
            if let Some(pid) = entry.pid.and_then(|pid| Pid::from_raw(pid as i32)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that a command left behind, with the command's output in its hands, must not keep a test waiting for ever.
    #[test]
    fn who_leaves_something_behind_that_holds_its_output_is_found_out_in_time() {
        let mut leaves = Command::new("sh");
        leaves.args(["-c", "sleep 600 & echo $!"]);
        leaves.stdout(Stdio::piped()).stderr(Stdio::null());
        let child = leaves.spawn().expect("a shell");
        let begun = Instant::now();
        let failed = std::panic::catch_unwind(move || finish(child, CLOSING)).unwrap_err();
        assert!(begun.elapsed() < PATIENCE);
        let said = failed.downcast_ref::<String>().expect("a sentence");
        assert!(said.contains("still holds its output"), "{said}");
        let left: i32 = said
            .split('"')
            .find_map(|part| part.strip_suffix("\\n")?.parse().ok())
            .expect("the number that it said");
        let _ = kill_process(Pid::from_raw(left).expect("a process"), Signal::KILL);
    }
}
