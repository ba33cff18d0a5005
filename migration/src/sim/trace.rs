//! What a simulated guest writes: classes of pages with a rate each, changing over time, or a recorded log.

use serde::{Deserialize, Serialize};

/// Pages that are written equally often, at random.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Which part of the memory; the parts are scaled to add up to 1.
    pub part: f64,
    /// Writes per second to each of its pages.
    pub rate: f64,
}

/// For a while, the rates are multiplied; one factor for all classes or one each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stretch {
    pub secs: f64,
    pub factors: Vec<f64>,
}

/// A window of a recorded dirty log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    pub secs: f64,
    /// Runs of pages written in it: (first, count).
    pub written: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Writing {
    /// Classes, and how their rates change: the stretches repeat for ever; none: they do not change.
    Classes {
        classes: Vec<Class>,
        stretches: Vec<Stretch>,
    },
    /// Windows that repeat for ever.
    Recorded { windows: Vec<Window> },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    pub name: String,
    pub writing: Writing,
    /// Device memory that such a guest has besides its RAM, in pages (a virtual display, ROMs).
    #[serde(default)]
    pub device_pages: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TraceError(pub String);

/// Pages of the guest that the reference trace is counted for: 512 MiB and 2,161 pages of device memory.
pub const REFERENCE_PAGES: u64 = 133_233;

/// The names that [`Trace::named`] knows.
pub const NAMES: &[(&str, &str)] = &[
    (
        "ref",
        "the reference trace: 1.4 % hot at 3.3 writes/s, 7 % warm, the rest cold",
    ),
    (
        "fig3",
        "1 % of the pages very hot at 4.95 writes/s, the rest at 0.005/s",
    ),
    (
        "uniform",
        "every page with probability 0.053 per second; uniform:RATE sets the writes per second",
    ),
    ("idle", "hardly any writing"),
    (
        "zipf",
        "a few pages take most of the writing; zipf:TOTAL sets all writes per second",
    ),
    ("phases", "20 s of heavy writing, 20 s of light writing"),
    (
        "bursts",
        "the reference trace with a burst of 0.5 s over a quarter of memory every 10 s",
    ),
    (
        "gc",
        "a quarter of memory written at once every 15 s, quiet in between",
    ),
    (
        "above",
        "a tenth of memory written faster than links carry: 2 writes/s to each of its pages",
    ),
];

impl Trace {
    fn classes(name: &str, classes: &[(f64, f64)], stretches: Vec<Stretch>) -> Trace {
        Trace {
            name: name.into(),
            writing: Writing::Classes {
                classes: classes
                    .iter()
                    .map(|(part, rate)| Class {
                        part: *part,
                        rate: *rate,
                    })
                    .collect(),
                stretches,
            },
            device_pages: 0,
        }
    }

    /// Every page at one rate.
    pub fn uniform(rate: f64) -> Trace {
        Trace::classes("uniform", &[(1.0, rate)], Vec::new())
    }

    /// The reference trace.
    pub fn reference() -> Trace {
        Trace {
            device_pages: 2161,
            ..Trace::classes("ref", &Self::REFERENCE, Vec::new())
        }
    }

    const REFERENCE: [(f64, f64); 3] = [(1908.0, 3.291), (9511.0, 0.02075), (121_814.0, 0.006384)];

    /// A trace by name, optionally with its number: `uniform:0.01`.
    pub fn named(text: &str) -> Result<Trace, TraceError> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => {
                let value = number.parse::<f64>().ok().filter(|v| v.is_finite() && *v >= 0.0);
                let value = value.ok_or_else(|| {
                    TraceError(format!(
                        "\"{number}\" in the trace \"{text}\" is not a rate of writes"
                    ))
                })?;
                (name, Some(value))
            }
            None => (text, None),
        };
        let every = |secs: f64, factors: &[f64]| Stretch {
            secs,
            factors: factors.to_vec(),
        };
        let trace = match (name, number) {
            ("ref", None) => Trace::reference(),
            ("fig3", None) => Trace {
                device_pages: 2161,
                ..Trace::classes("fig3", &[(1332.0, 4.95), (131_901.0, 0.005)], Vec::new())
            },
            ("uniform", rate) => Trace {
                device_pages: 2161,
                ..Trace::uniform(rate.unwrap_or(0.054_456_185_796_058_855))
            },
            ("idle", None) => Trace::classes("idle", &[(0.001, 0.2), (0.999, 0.000_01)], Vec::new()),
            ("zipf", total) => Trace::zipf(total.unwrap_or(8000.0)),
            ("phases", None) => Trace::classes(
                "phases",
                &[(0.3, 0.2), (0.7, 0.01)],
                vec![every(20.0, &[1.0, 1.0]), every(20.0, &[0.02, 0.2])],
            ),
            ("bursts", None) => {
                let [hot, warm, cold] = Self::REFERENCE;
                let (quarter, rest) = ((cold.0 * 0.27, cold.1), (cold.0 * 0.73, cold.1));
                Trace::classes(
                    "bursts",
                    &[hot, warm, quarter, rest],
                    vec![every(9.5, &[1.0]), every(0.5, &[1.0, 1.0, 400.0, 1.0])],
                )
            }
            ("gc", None) => Trace::classes(
                "gc",
                &[(0.25, 1.0), (0.01, 2.0), (0.74, 0.001)],
                vec![every(14.0, &[0.001, 1.0, 1.0]), every(1.0, &[4.0, 1.0, 1.0])],
            ),
            ("above", None) => Trace::classes("above", &[(0.1, 2.0), (0.9, 0.001)], Vec::new()),
            _ => {
                let names: Vec<_> = NAMES.iter().map(|n| n.0).collect();
                return Err(TraceError(format!(
                    "there is no trace \"{text}\"; there are {}, or a file",
                    names.join(", ")
                )));
            }
        };
        Ok(trace)
    }

    /// Ranks in 40 steps: the page of rank r is written in proportion to 1/r, `total` writes per second for a
    /// guest of the reference's size.
    fn zipf(total: f64) -> Trace {
        let steps = 40;
        let pages = REFERENCE_PAGES as f64;
        let edge = |i: u32| pages.powf(f64::from(i) / f64::from(steps));
        let whole = pages.ln();
        let classes: Vec<(f64, f64)> = (0..steps)
            .map(|i| {
                let count = edge(i + 1) - edge(i);
                let share = (edge(i + 1).ln() - edge(i).ln()) / whole;
                (count, total * share / count)
            })
            .collect();
        Trace::classes("zipf", &classes, Vec::new())
    }

    /// A trace from its JSON.
    pub fn from_json(text: &str) -> Result<Trace, TraceError> {
        let trace: Trace = serde_json::from_str(text)
            .map_err(|e| TraceError(format!("the trace is not in the format of a trace: {e}")))?;
        trace.check()?;
        Ok(trace)
    }

    fn check(&self) -> Result<(), TraceError> {
        let sound = |x: f64| x.is_finite() && x >= 0.0;
        let good = match &self.writing {
            Writing::Classes { classes, stretches } => {
                classes.iter().map(|c| c.part).sum::<f64>() > 0.0
                    && classes.iter().all(|c| sound(c.part) && sound(c.rate))
                    && stretches
                        .iter()
                        .all(|s| s.secs > 0.0 && s.secs.is_finite() && s.factors.iter().all(|f| sound(*f)))
            }
            Writing::Recorded { windows } => {
                windows.iter().map(|w| w.secs).sum::<f64>() > 0.0 && windows.iter().all(|w| sound(w.secs))
            }
        };
        if good {
            Ok(())
        } else {
            Err(TraceError(format!(
                "the trace \"{}\" has a part, rate, factor or time that is negative, or nothing at all",
                self.name
            )))
        }
    }
}
