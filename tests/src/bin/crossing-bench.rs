//! Moves the same guest by Ferry and by QEMU, alternating, and prints medians and ratios.
//!
//! usage: crossing-bench --ferry FILE|none [--rounds N] [--only NAME] [--json FILE]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use ferry_tests::bench::{Outcome, Scenario, ferry, qemu};

const MIB: u64 = 1 << 20;

fn scenarios() -> Vec<Scenario> {
    let base = Scenario {
        name: "working set 64 MiB at 4,000 pages/s, 512 MiB in use",
        memory_mib: 1024,
        cpus: 1,
        work: "work=allocator memory=512M wws=12 rate=4000 order=seq random=50 heartbeat=10ms",
        warm_up: Duration::from_secs(3),
        link_bytes_per_sec: None,
        downtime: Duration::from_millis(300),
        patience: Duration::from_secs(60),
        slowing: false,
    };
    let never = "work=allocator memory=512M wws=60 rate=max order=seq random=50 heartbeat=10ms";
    vec![
        base.clone(),
        Scenario {
            name: "compressible content",
            work: "work=allocator memory=512M wws=12 rate=4000 order=seq random=0 heartbeat=10ms",
            ..base.clone()
        },
        Scenario {
            name: "random content",
            work: "work=allocator memory=512M wws=12 rate=4000 order=seq random=100 heartbeat=10ms",
            ..base.clone()
        },
        Scenario {
            name: "idle machine of 8 GiB",
            memory_mib: 8192,
            work: "work=idle heartbeat=10ms",
            ..base.clone()
        },
        Scenario {
            name: "writes faster than the link, 1 Gbit/s",
            work: never,
            slowing: true,
            link_bytes_per_sec: Some(125_000_000),
            ..base.clone()
        },
        Scenario {
            name: "link of 1 Gbit/s",
            link_bytes_per_sec: Some(125_000_000),
            ..base.clone()
        },
        Scenario {
            name: "link of 100 Mbit/s",
            link_bytes_per_sec: Some(12_500_000),
            patience: Duration::from_secs(120),
            ..base
        },
    ]
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (mut binary, mut rounds, mut only, mut json) = (None, 3usize, None, None);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--touch" => {
                return ferry_tests::bench::touch_memory(value.parse().context("--touch takes MiB")?);
            }
            "--ferry" => binary = Some(PathBuf::from(value)),
            "--rounds" => rounds = value.parse().context("--rounds takes a number")?,
            "--only" => only = Some(value),
            "--json" => json = Some(PathBuf::from(value)),
            _ => bail!("unknown word {word}"),
        }
    }
    let binary =
        binary.context("usage: crossing-bench --ferry FILE|none [--rounds N] [--only NAME] [--json FILE]")?;
    let dir = tempfile::tempdir()?;
    let guest = dir.path().join("guest.elf");
    std::fs::write(&guest, ferry_images::BUILTIN_GUEST)?;
    let plain = ferry::Flavour { name: "", words: &[] };
    let slowing = ferry::Flavour {
        name: "-slowing",
        words: &["--throttle", "99"],
    };
    let mut all = Vec::new();
    for scenario in scenarios().into_iter().filter(|scenario| {
        only.as_ref()
            .is_none_or(|only| scenario.name.contains(only.as_str()))
    }) {
        println!(
            "\n{} ({} MiB, {} vCPU, {})",
            scenario.name, scenario.memory_mib, scenario.cpus, scenario.work
        );
        let mut outcomes: Vec<Outcome> = Vec::new();
        for _ in 0..rounds {
            if binary.as_os_str() != "none" {
                outcomes.push(ferry::cross(&binary, dir.path(), &scenario, &plain)?);
                if scenario.slowing {
                    outcomes.push(ferry::cross(&binary, dir.path(), &scenario, &slowing)?);
                }
            }
            if scenario.slowing {
                outcomes.push(qemu::cross(
                    dir.path(),
                    &guest,
                    &scenario,
                    qemu::Flavour::AutoConverge,
                )?);
            }
            outcomes.push(qemu::cross(
                dir.path(),
                &guest,
                &scenario,
                qemu::Flavour::Default,
            )?);
            outcomes.push(qemu::cross(
                dir.path(),
                &guest,
                &scenario,
                qemu::Flavour::Multifd,
            )?);
        }
        print_table(&outcomes);
        all.push(
            serde_json::json!({ "scenario": scenario.name, "work": scenario.work, "outcomes": outcomes }),
        );
    }
    if let Some(path) = json {
        std::fs::write(&path, serde_json::to_vec_pretty(&all)?)?;
    }
    Ok(())
}

fn print_table(outcomes: &[Outcome]) {
    println!(
        "| {:13} | {:>9} | {:>8} | {:>10} | {:>9} | {:>9} | {:>8} | {:>9} |",
        "contestant", "total ms", "gap ms", "gap before", "own down", "MiB sent", "progress", "completed"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut names: Vec<&str> = outcomes
        .iter()
        .map(|outcome| outcome.contestant.as_str())
        .collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let mine: Vec<&Outcome> = outcomes
            .iter()
            .filter(|outcome| outcome.contestant == name)
            .collect();
        let median = |pick: &dyn Fn(&Outcome) -> f64| {
            let mut values: Vec<f64> = mine.iter().map(|outcome| pick(outcome)).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let damaged = mine.iter().any(|outcome| outcome.damaged);
        println!(
            "| {:13} | {:>9.0} | {:>8.0} | {:>10.0} | {:>9.0} | {:>9.0} | {:>8.2} | {:>5} of {} {}|",
            name,
            median(&|outcome| outcome.total_ms),
            median(&|outcome| outcome.gap_ms),
            median(&|outcome| outcome.gap_before_ms),
            median(&|outcome| outcome.own_downtime_ms),
            median(&|outcome| outcome.bytes as f64 / MIB as f64),
            median(&|outcome| outcome.progress),
            mine.iter().filter(|outcome| outcome.completed).count(),
            mine.len(),
            if damaged { "DAMAGED " } else { "" }
        );
    }
}
