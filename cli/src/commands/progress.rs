//! What a crossing shows while it goes on.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use ferry_migration::policy::VcpuThrottle;
use ferry_migration::report::{Event, Promise};
use ferry_vmm::crossing::request::CrossingLine;

use super::migrate::{bytes, milliseconds, seconds};
use super::standstill::Standstill;

/// Progress: one line that changes on a terminal, lines otherwise, or JSON.
pub(super) struct Screen {
    json: bool,
    terminal: bool,
    drawn: bool,
    last: (Duration, u64),
    rate: f64,
    /// Why the link broke, as it was said last.
    broken: Option<String>,
    standstill: Standstill,
}

impl Screen {
    pub(super) fn new(json: bool) -> Screen {
        let terminal = std::io::stderr().is_terminal() && !json;
        Screen {
            json,
            terminal,
            drawn: false,
            last: (Duration::ZERO, 0),
            rate: 0.0,
            broken: None,
            standstill: Standstill::default(),
        }
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            eprint!("\r\x1b[K");
        }
    }

    fn draw(&mut self, text: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{text}");
            let _ = std::io::stderr().flush();
            self.drawn = true;
        }
    }

    fn print(&mut self, text: &str) {
        self.clear();
        eprintln!("{text}");
    }

    pub(super) fn show(&mut self, line: &CrossingLine) {
        if self.json {
            if let Ok(text) = serde_json::to_string(line) {
                // A reader that has gone away does not stop the crossing.
                let _ = writeln!(std::io::stdout(), "{text}");
            }
            return;
        }
        let CrossingLine::Event(event) = line else { return };
        match event {
            Event::Progress {
                round,
                at,
                sent_bytes,
                remaining_bytes,
                disk_remaining_bytes,
                dirty_bytes_per_sec,
                promise,
            } => {
                let (then, sent) = std::mem::replace(&mut self.last, (*at, *sent_bytes));
                let elapsed = at.saturating_sub(then).as_secs_f64();
                if elapsed > 0.0 {
                    let now = sent_bytes.saturating_sub(sent) as f64 / elapsed;
                    self.rate = if self.rate > 0.0 {
                        0.7 * self.rate + 0.3 * now
                    } else {
                        now
                    };
                }
                let left = match disk_remaining_bytes {
                    0 => bytes(*remaining_bytes),
                    disk => {
                        let memory = remaining_bytes.saturating_sub(*disk);
                        format!("{} of memory and {} of disks", bytes(memory), bytes(*disk))
                    }
                };
                self.draw(&format!(
                    "round {round}: {left} to go at {}/s, {}/s written; {}",
                    bytes(self.rate as u64),
                    bytes(*dirty_bytes_per_sec),
                    expected(*promise, *at)
                ));
            }
            Event::RoundDone(round) => {
                let text = format!(
                    "round {}: {} in {}, {}/s; {} pages and {} clusters changed meanwhile; {}",
                    round.round,
                    bytes(round.wire_bytes),
                    seconds(round.took),
                    bytes(round.rate_bytes_per_sec),
                    round.dirty_pages,
                    round.dirty_clusters,
                    round.reason
                );
                self.print(&text);
                if let Some(text) = self.standstill.after(round) {
                    self.print(&text);
                }
            }
            // Many tries may fail for the same reason.
            Event::Reconnecting { why, .. } if self.broken.as_ref() == Some(why) => {}
            Event::Reconnecting { why, attempt, .. } => {
                self.print(&format!(
                    "the link broke ({why}); connecting again (attempt {attempt})"
                ));
                self.broken = Some(why.clone());
            }
            Event::Reconnected { .. } => {
                self.broken = None;
                self.print("the link is back; the crossing goes on");
            }
            Event::Throttle { percent, vcpus, .. } => self.print(&slowed(*percent, vcpus)),
            _ => {}
        }
    }
}

/// Which CPUs are slowed by how much.
fn slowed(percent: u8, vcpus: &[VcpuThrottle]) -> String {
    if vcpus.is_empty() {
        return format!("the machine's CPUs are slowed by {percent} %");
    }
    let each: Vec<String> = vcpus
        .iter()
        .map(|slowed| format!("CPU {} by {} %", slowed.vcpu, slowed.percent))
        .collect();
    format!("the machine is slowed: {}", each.join(", "))
}

/// What is expected, for the line of progress.
fn expected(promise: Option<Promise>, at: Duration) -> String {
    match promise {
        Some(promise) => format!(
            "done in {} with {} of downtime",
            seconds(promise.total.saturating_sub(at)),
            milliseconds(promise.downtime)
        ),
        None => "no end in sight yet".to_owned(),
    }
}
