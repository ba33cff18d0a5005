//! The lines a guest prints, each with the moment it was seen outside.

use std::io::{BufRead as _, BufReader, Read};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Collects lines from any number of serial ports.
#[derive(Clone, Default)]
pub struct Timeline {
    lines: Arc<Mutex<Vec<(Instant, Value)>>>,
}

impl Timeline {
    /// Reads a serial port to its end, on a thread of its own.
    pub fn follow(&self, port: impl Read + Send + 'static) {
        let lines = Arc::clone(&self.lines);
        std::thread::spawn(move || {
            for line in BufReader::new(port).split(b'\n') {
                let Ok(line) = line else { break };
                let seen = Instant::now();
                if let Ok(value) = serde_json::from_slice::<Value>(&line) {
                    lines
                        .lock()
                        .unwrap_or_else(|poison| poison.into_inner())
                        .push((seen, value));
                }
            }
        });
    }

    fn of(&self, kind: &str) -> Vec<(Instant, Value)> {
        let lines = self.lines.lock().unwrap_or_else(|poison| poison.into_inner());
        let mut found: Vec<_> = lines
            .iter()
            .filter(|(_, line)| line["t"] == kind)
            .cloned()
            .collect();
        found.sort_by_key(|(seen, _)| *seen);
        found
    }

    pub fn beats(&self) -> usize {
        self.of("beat").len()
    }

    /// Waits for `count` heartbeats in all; false when they do not come in time.
    pub fn wait_beats(&self, count: usize, patience: Duration) -> bool {
        let started = Instant::now();
        while self.beats() < count {
            if started.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// The largest gap between neighbouring heartbeats of which one lies in the window.
    pub fn largest_gap(&self, from: Instant, to: Instant) -> Duration {
        let beats = self.of("beat");
        beats
            .windows(2)
            .filter(|pair| pair[1].0 >= from && pair[0].0 <= to)
            .map(|pair| pair[1].0 - pair[0].0)
            .max()
            .unwrap_or(to - from)
    }

    /// Pages written per second over the window, from the last summary before it to the first one after it, by the
    /// guest's own counters and the outside clock.
    pub fn write_rate(&self, from: Instant, to: Instant) -> Option<f64> {
        let sums: Vec<_> = self
            .of("sum")
            .into_iter()
            .filter_map(|(seen, line)| Some((seen, pages_written(&line)?)))
            .collect();
        let first = sums.iter().rev().find(|(seen, _)| *seen <= from)?;
        let last = sums.iter().find(|(seen, _)| *seen >= to)?;
        let seconds = (last.0 - first.0).as_secs_f64();
        (seconds > 0.5).then(|| (last.1 - first.1) / seconds)
    }

    pub fn damaged(&self) -> bool {
        !self.of("damage").is_empty()
    }
}

/// The cumulative count of pages written in a summary line, wherever the workload puts it.
fn pages_written(line: &Value) -> Option<f64> {
    match line {
        Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            if name == "writes" {
                value.as_f64()
            } else {
                pages_written(value)
            }
        }),
        _ => None,
    }
}
