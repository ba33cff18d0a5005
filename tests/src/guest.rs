//! A machine in the foreground and what its guest says. Damage in any line fails the test that reads it.
#![allow(clippy::expect_used, clippy::panic, reason = "a harness fails tests")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::host::{PATIENCE, Ran, finish};

pub struct Guest {
    child: Option<Child>,
    lines: Receiver<Value>,
    seen: Vec<String>,
}

impl Guest {
    pub(crate) fn new(mut child: Child) -> Guest {
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // What is no JSON is kept as text, so that it shows in a failure.
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(value).is_err() {
                    return;
                }
            }
        });
        Guest {
            child: Some(child),
            lines,
            seen: Vec::new(),
        }
    }

    /// The next line of this type.
    #[track_caller]
    pub fn line(&mut self, kind: &str) -> Value {
        self.line_where(kind, |_| true)
    }

    #[track_caller]
    pub fn line_where(&mut self, kind: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            match self
                .lines
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(line) => {
                    self.seen.push(line.to_string());
                    if line["t"] == kind && wanted(&line) {
                        return line;
                    }
                    assert_ne!(line["t"], "damage", "the guest found damage: {line}");
                }
                Err(RecvTimeoutError::Timeout) => self.give_up(kind),
                Err(RecvTimeoutError::Disconnected) => self.give_up(kind),
            }
        }
    }

    #[track_caller]
    fn give_up(&mut self, kind: &str) -> ! {
        let mut child = self.child.take().expect("a child until the end");
        let _ = child.kill();
        let stderr = finish(child, PATIENCE).stderr;
        let tail = self.seen[self.seen.len().saturating_sub(15)..].join("\n");
        panic!("the guest did not say {kind:?}; ferry said {stderr:?}; the guest's last lines:\n{tail}");
    }

    /// The next heartbeat's number.
    #[track_caller]
    pub fn beat(&mut self) -> u64 {
        self.line("beat")["seq"].as_u64().expect("a beat has a number")
    }

    /// Lines that are there already, or come within this time.
    pub fn lines_within(&mut self, time: Duration) -> Vec<Value> {
        let end = Instant::now() + time;
        let mut lines = Vec::new();
        while let Ok(line) = self
            .lines
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            lines.push(line);
        }
        lines
    }

    /// Types on the serial port.
    pub fn type_line(&mut self, text: &str) {
        let stdin = self
            .child
            .as_mut()
            .and_then(|child| child.stdin.as_mut())
            .expect("standard input is a pipe");
        writeln!(stdin, "{text}").expect("ferry reads its standard input");
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a child until the end").id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid() as i32).expect("a process id");
        kill_process(pid, signal).expect("our own child can be signalled");
    }

    /// Waits for the end of the process. `stdout` is empty: its lines were read as they came.
    pub fn end(mut self) -> Ran {
        let child = self.child.take().expect("a child until the end");
        finish(child, PATIENCE)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
