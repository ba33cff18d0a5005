//! What every test here needs: a machine with the built-in guest, and its serial output as lines.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use ferry_vmm::config::MachineConfig;
use ferry_vmm::lifecycle::State;
use ferry_vmm::machine::{Machine, Wiring};
use ferry_vmm::size::ByteSize;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// True when the test cannot run here and may say so.
pub(crate) fn skip() -> bool {
    match ferry_vmm::kvm::open() {
        Ok(_) => false,
        Err(error) => {
            assert!(
                std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
                "this test must run: {error}"
            );
            eprintln!("skipped: {error}");
            true
        }
    }
}

pub(crate) struct Guest {
    pub(crate) machine: Machine,
    lines: Receiver<String>,
    seen: Vec<String>,
}

pub(crate) fn config(cpus: u32, cmdline: &str) -> MachineConfig {
    MachineConfig {
        cpus,
        memory: ByteSize(128 << 20),
        cmdline: cmdline.into(),
        ..MachineConfig::default()
    }
}

impl Guest {
    pub(crate) fn start(config: &MachineConfig) -> Guest {
        let guest = Guest::create(config);
        guest.machine.start().unwrap();
        guest
    }

    pub(crate) fn create(config: &MachineConfig) -> Guest {
        let wiring = Wiring::default();
        let machine = Machine::create(config, &wiring).unwrap();
        Guest::over(machine, &wiring)
    }

    /// A machine whose serial output nobody has read yet.
    pub(crate) fn over(machine: Machine, wiring: &Wiring) -> Guest {
        let (sender, lines) = channel();
        let reader = wiring.serial.reader();
        std::thread::spawn(move || {
            let mut rest = Vec::new();
            for chunk in reader {
                assert_eq!(chunk.lost, 0, "the reader was too slow");
                rest.extend(chunk.bytes);
                while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
                }
            }
        });
        Guest {
            machine,
            lines,
            seen: Vec::new(),
        }
    }

    /// The next line of the guest for which `wanted` holds. Damage is never overlooked.
    pub(crate) fn line(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self
                .lines
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if wanted(&line) {
                        return line;
                    }
                    assert!(
                        !line.contains(r#""t":"damage""#),
                        "the guest found damage: {line}"
                    );
                }
                Err(RecvTimeoutError::Timeout) => self.give_up("the guest did not say what was waited for"),
                Err(RecvTimeoutError::Disconnected) => self.give_up("the console was closed"),
            }
        }
    }

    #[allow(dead_code)] // only the pulses count them
    /// Heartbeats seen so far, after the first.
    pub(crate) fn beats(&self) -> u64 {
        self.seen
            .iter()
            .filter(|line| line.contains(r#""t":"beat""#))
            .count() as u64
            - 1
    }

    #[allow(dead_code)] // only the tests of pausing ask
    /// Nothing comes for many heartbeats, after what was on its way from before.
    pub(crate) fn is_silent(&mut self) {
        for _ in 0..100 {
            if let Err(RecvTimeoutError::Timeout) = self.lines.recv_timeout(Duration::from_millis(300)) {
                return;
            }
        }
        self.give_up("the guest does not stop speaking");
    }

    #[allow(dead_code)] // only the pulses fall behind
    /// Reads the lines that are there already.
    pub(crate) fn catch_up(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            assert!(
                !line.contains(r#""t":"damage""#),
                "the guest found damage: {line}"
            );
            self.seen.push(line);
        }
    }

    fn give_up(&self, why: &str) -> ! {
        let tail = self
            .seen
            .iter()
            .rev()
            .take(20)
            .rev()
            .cloned()
            .collect::<Vec<_>>()
            .join("\n");
        panic!(
            "{why}; the machine is {}; last lines:\n{tail}",
            self.machine.state()
        );
    }

    pub(crate) fn beat(&mut self) -> u64 {
        let line = self.line(|line| line.contains(r#""t":"beat""#));
        number(&line, "seq")
    }

    pub(crate) fn end(&self) -> State {
        self.machine
            .wait(State::is_final, PATIENCE)
            .unwrap_or_else(|| self.give_up("the machine did not end"))
    }
}

/// Until it holds, however busy the host is.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "it does not come to pass: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A number in a flat JSON line.
pub(crate) fn number(line: &str, key: &str) -> u64 {
    let at = line
        .find(&format!("\"{key}\":"))
        .unwrap_or_else(|| panic!("no {key} in {line}"));
    let text = &line[at + key.len() + 3..];
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    digits
        .parse()
        .unwrap_or_else(|_| panic!("{key} is no number in {line}"))
}
