//! Two hosts and a machine that crosses between them: receivers, crossings, and what the guest said on both sides.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails tests")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::host::{Host, PATIENCE, Ran, finish, skip_without_kvm};

/// `ferry receive ADDRESS --once …`, listening.
pub struct Receiver {
    child: Child,
    /// Where it listens, as it said itself.
    pub address: String,
    said: Arc<Mutex<String>>,
}

impl Receiver {
    /// Waits for one machine at a free port of the loopback, its serial port going to `serial`.
    #[track_caller]
    pub fn start(host: &Host, serial: &Path, more: &[&str]) -> Receiver {
        Receiver::at(host, "tcp://127.0.0.1:0", serial, more)
    }

    #[track_caller]
    pub fn at(host: &Host, address: &str, serial: &Path, more: &[&str]) -> Receiver {
        let mut command = host.command(["receive", address, "--once", "--serial"]);
        command.arg(format!("file={}", serial.display())).args(more);
        let mut child = command.spawn().expect("ferry can be started");
        let said = Arc::<Mutex<String>>::default();
        let stderr: ChildStderr = child.stderr.take().expect("standard error is a pipe");
        let (sender, address) = std::sync::mpsc::channel();
        let keep = said.clone();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("waiting for a machine at ") {
                    let _ = sender.send(address.to_owned());
                }
                let mut said = keep.lock().expect("nobody panics with it");
                said.push_str(&line);
                said.push('\n');
            }
        });
        match address.recv_timeout(PATIENCE) {
            Ok(address) => Receiver { child, address, said },
            Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("the receiver does not listen: {}", said.lock().expect("text"));
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn port(&self) -> u16 {
        let port = self.address.rsplit(':').next().expect("an address with a port");
        port.parse().expect("a port is a number")
    }

    pub fn said(&self) -> String {
        self.said.lock().expect("nobody panics with it").clone()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end: after a failed crossing at once, otherwise when the machine has ended. The exit code and
    /// what it said.
    #[track_caller]
    pub fn end(mut self) -> (i32, String) {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return (status.code().unwrap_or(-1), self.said());
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the receiver does not end: {}",
                self.said()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What one guest said, wherever it was: the files of its serial port in the order in which it was at their hosts.
#[derive(Default)]
pub struct Evidence {
    files: Vec<PathBuf>,
}

impl Evidence {
    pub fn new(first: PathBuf) -> Evidence {
        Evidence { files: vec![first] }
    }

    /// The guest goes on in this file.
    pub fn then(&mut self, file: PathBuf) {
        self.files.push(file);
    }

    /// All whole lines. A line that a crossing cut in two is whole again.
    #[track_caller]
    pub fn lines(&self) -> Vec<Value> {
        let text: Vec<u8> = self
            .files
            .iter()
            .flat_map(|file| std::fs::read(file).unwrap_or_default())
            .collect();
        let text = String::from_utf8_lossy(&text);
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let parse = |line: &str| {
            let value: Value = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{error}: not a line of the guest: {line:?}"));
            assert!(
                !["damage", "exception", "panic"].contains(&value["t"].as_str().unwrap_or_default()),
                "the guest found damage: {line}"
            );
            value
        };
        whole.lines().map(parse).collect()
    }

    /// No damage, and every beat from the first on without a gap, in time that never runs backwards. The last beat.
    #[track_caller]
    pub fn sound(&self) -> u64 {
        let (mut last, mut then) = (0, 0);
        for line in self.lines() {
            if let Some(ns) = line["ns"].as_u64() {
                assert!(ns >= then, "the guest's time ran backwards from {then}: {line}");
                then = ns;
            }
            match line["t"].as_str() {
                Some("beat") => {
                    last += 1;
                    assert_eq!(line["seq"], last, "a beat is missing or came twice: {line}");
                }
                Some("sum") => {
                    assert_eq!(line["damaged"], 0, "{line}");
                    assert_eq!(line["io_errors"].as_u64().unwrap_or(0), 0, "{line}");
                }
                _ => {}
            }
        }
        last
    }

    /// Waits for that many more beats: the guest runs.
    #[track_caller]
    pub fn beats_on(&self, more: u64) -> u64 {
        let wanted = self.sound() + more;
        self.wait("more beats", |evidence| evidence.sound() >= wanted);
        self.sound()
    }

    #[track_caller]
    pub fn wait_for_line(&self, kind: &str) {
        self.wait_for(kind, |line| line["t"] == kind);
    }

    /// Waits for a line for which this holds.
    #[track_caller]
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Value) -> bool) {
        self.wait(what, |evidence| evidence.lines().iter().any(&wanted));
    }

    /// Waits until the guest has checked everything it keeps, from now on, at least once.
    #[track_caller]
    pub fn swept(&self) {
        let sweeps = |evidence: &Evidence| {
            let lines = evidence.lines();
            lines
                .iter()
                .rev()
                .find_map(|line| line["sweeps"].as_u64())
                .unwrap_or(0)
        };
        let before = sweeps(self);
        self.wait("a whole sweep", |evidence| sweeps(evidence) >= before + 2);
        self.sound();
    }

    #[track_caller]
    fn wait(&self, what: &str, holds: impl Fn(&Evidence) -> bool) {
        let begun = Instant::now();
        while !holds(self) {
            if begun.elapsed() > PATIENCE {
                let lines = self.lines();
                let tail = &lines[lines.len().saturating_sub(5)..];
                panic!("the guest did not come to {what}; its last lines: {tail:?}");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Starts a detached machine whose serial port goes to a file, and waits for its first beats.
#[track_caller]
pub fn start(host: &Host, name: &str, cmdline: &str, more: &[&str]) -> Evidence {
    let serial = host.file(&format!("{name}.serial"));
    let mut arguments = vec!["run".to_owned(), name.to_owned(), "--detach".to_owned()];
    arguments.extend(["--serial".to_owned(), format!("file={}", serial.display())]);
    arguments.extend(["--cmdline".to_owned(), format!("{cmdline} heartbeat=20ms")]);
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    host.ferry(arguments).success();
    let evidence = Evidence::new(serial);
    evidence.beats_on(2);
    evidence
}

/// Two hosts, and the machine `m` at the first one, which has made all that it works on. None, with the reason printed, where
/// there is no KVM.
#[track_caller]
pub fn pair(cmdline: &str, more: &[&str]) -> Option<(Host, Host, Evidence)> {
    if skip_without_kvm() {
        return None;
    }
    let (here, there) = (Host::new(), Host::new());
    let guest = start(&here, "m", cmdline, more);
    guest.wait_for_line("ready");
    Some((here, there, guest))
}

/// Begins `ferry migrate` and does not wait.
pub fn begin(host: &Host, name: &str, to: &str, more: &[&str]) -> Child {
    let mut command = host.command(["migrate", name, to]);
    command.args(more).spawn().expect("ferry can be started")
}

/// `ferry migrate` to its end.
#[track_caller]
pub fn migrate(host: &Host, name: &str, to: &str, more: &[&str]) -> Ran {
    finish(begin(host, name, to, more), PATIENCE)
}

/// A signal to a process that a test started itself.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a process id");
    let _ = kill_process(pid, signal);
}

/// What `ferry list` says of the machine: running, paused; none if it is not there.
pub fn state_at(host: &Host, name: &str) -> Option<String> {
    let list = host.ferry(["list", "--all"]).stdout;
    let line = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(name))?;
    ["running", "paused", "dead"]
        .into_iter()
        .find(|state| line.contains(state))
        .map(str::to_owned)
        .or(Some(line.to_owned()))
}

/// Whether the host's list names the machine as running.
pub fn runs_at(host: &Host, name: &str) -> bool {
    let list = host.ferry(["list"]).stdout;
    list.lines()
        .any(|line| line.split_whitespace().next() == Some(name) && line.contains("running"))
}
