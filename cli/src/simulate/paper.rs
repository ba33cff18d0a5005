//! `--paper`: what the papers print, beside what is calculated and simulated here.

use anyhow::{Context, Result};
use ferry_migration::estimate::lmdt;
use ferry_migration::sim::paper::{MBIT, Reproduction, reproduce};

use super::{SimulateArgs, html, paper_cost};
use crate::plot::{END, Line, chart, escape, head};
use crate::{output, say};

pub(super) fn calm(args: &SimulateArgs) -> Result<()> {
    let all = reproduce(args.seed);
    if let Some(path) = &args.html {
        std::fs::write(path, page(&all))
            .with_context(|| format!("the page {} cannot be written", path.display()))?;
    }
    if args.json {
        return output::json(&all);
    }
    let service = paper_cost();
    say!(
        "CALM: a Mbit/s of 2^20 bits, {} requests/s of {:.0} bytes within {:?}, 2,161 pages of device memory,\n\
         every page written with probability 0.053 per second on average; seed {}\n",
        service.requests_per_sec,
        service.response_bytes,
        service.deadline,
        args.seed
    )?;
    say!("Calculated, from that one probability")?;
    let mut rows = vec![["", "paper", "here"].map(str::to_string).to_vec()];
    for line in &all.calculated {
        rows.push(vec![
            line.what.to_string(),
            format!("{} {}", line.paper, line.unit),
            format!("{:.3} {}", line.ours, line.unit),
        ]);
    }
    say!("{}", output::table(&rows))?;
    say!("Table 2, simulated on the reference trace (the paper's own traces are not public)")?;
    let head = [
        "RAM",
        "link",
        "policy",
        "cost paper",
        "here",
        "total paper",
        "here",
        "down paper",
        "here",
        "",
    ];
    let mut rows = vec![head.map(str::to_string).to_vec()];
    for row in &all.table {
        let o = &row.simulated;
        rows.push(vec![
            format!("{} MB", row.memory_mib),
            format!("{}", row.link_mbit),
            row.policy.to_string(),
            format!("{:.2}", row.paper_cost),
            format!("{:.4}", o.cost),
            format!("{:.2}", row.paper_total_s),
            format!("{:.2}", o.total_s),
            format!("{:.4}", row.paper_downtime_s),
            format!("{:.4}", o.downtime_s),
            row.verdict.to_string(),
        ]);
    }
    say!("{}", output::table(&rows))?;
    say!("Figure 4: cost of fixed bandwidths, 512 MB over 512 Mbit/s, stop at 256 pages")?;
    let head = ["Mbit/s", "calculated", "uniform trace", "reference trace"];
    let mut rows = vec![head.map(str::to_string).to_vec()];
    let cost = |c: Option<f64>| c.map_or("never ends".to_string(), |c| format!("{c:.5}"));
    for sweep in &all.figure4 {
        rows.push(vec![
            format!("{}", sweep.mbit),
            cost(Some(sweep.calculated_cost).filter(|c| c.is_finite())),
            cost(sweep.uniform_cost),
            cost(sweep.reference_cost),
        ]);
    }
    say!("{}", output::table(&rows))?;
    say!(
        "The calculated best is {:.1} Mbit/s (paper: 228 calculated, 227 simulated). The simulated 227 needs the original trace:\n\
         a uniform one ends from 226 or 227 on, a skewed one already far below.\n",
        all.figure4_best_mbit
    )?;
    say!("Figure 5: bandwidth over time in Mbit/s, 512 MB, reference trace")?;
    say!("{}", figure5(&all))
}

/// The bandwidth every five seconds.
fn figure5(all: &Reproduction) -> String {
    let mut rows = vec![vec!["s".to_string()]];
    for (link, o) in &all.figure5 {
        if let Some(head) = rows.first_mut() {
            head.push(format!("{} @{link}", o.policy));
        }
    }
    let end = all.figure5.iter().map(|(_, o)| o.total_s).fold(0.0, f64::max);
    for at in (0..).map(|i| f64::from(i) * 5.0).take_while(|at| *at <= end) {
        let mut row = vec![format!("{at}")];
        for (_, o) in &all.figure5 {
            let point = o.timeline.iter().find(|p| p.secs >= at);
            row.push(point.map_or(String::new(), |p| {
                format!("{:.0}", p.bandwidth_bytes_per_sec / MBIT)
            }));
        }
        rows.push(row);
    }
    output::table(&rows)
}

fn page(all: &Reproduction) -> String {
    let mut page = head("CALM: Table 2 and Figures 4 and 5");
    page += "<h2>Table 2</h2><table><tr><th>RAM<th>link<th>policy<th>cost, paper<th>here<th>total, paper<th>here<th>downtime, paper<th>here<th></tr>\n";
    for row in &all.table {
        let o = &row.simulated;
        page += &format!(
            "<tr><td>{} MB<td>{}<td>{}<td>{:.2}<td>{:.4}<td>{:.2}<td>{:.2}<td>{:.4}<td>{:.4}<td>{}</tr>\n",
            row.memory_mib,
            row.link_mbit,
            row.policy,
            row.paper_cost,
            o.cost,
            row.paper_total_s,
            o.total_s,
            row.paper_downtime_s,
            o.downtime_s,
            escape(row.verdict)
        );
    }
    page += "</table>\n";
    let points = |pick: &dyn Fn(&ferry_migration::sim::paper::Sweep) -> Option<f64>| {
        let point = |s: &ferry_migration::sim::paper::Sweep| {
            Some((s.mbit, pick(s).filter(|c| c.is_finite() && *c < 1.0)?))
        };
        all.figure4.iter().filter_map(point).collect::<Vec<_>>()
    };
    let lines = [
        Line::new("calculated", points(&|s| Some(s.calculated_cost))),
        Line::new("uniform trace", points(&|s| s.uniform_cost)),
        Line::new("reference trace", points(&|s| s.reference_cost)),
    ];
    page += &chart("Figure 4: cost over the fixed bandwidth", "Mbit/s", &lines);
    let names: Vec<String> = all
        .figure5
        .iter()
        .map(|(link, o)| format!("{} over {link} Mbit/s", o.policy))
        .collect();
    let lines: Vec<_> = names
        .iter()
        .zip(&all.figure5)
        .map(|(name, (_, o))| (name.as_str(), o.timeline.as_slice()))
        .collect();
    page += "<h2>Figure 5</h2>\n";
    page += &html::plots(&lines);
    page + END
}

pub(super) fn lmdt(args: &SimulateArgs) -> Result<()> {
    let table = lmdt::TABLE;
    if args.json {
        return output::json(&table);
    }
    say!(
        "LMDT: data moved = CMDT + {} MB * exp(AF * (used memory - canonical memory))\n",
        lmdt::FACTOR_MB
    )?;
    let head = [
        "application",
        "CMDT",
        "AF (1/MB)",
        "exp doubles every",
        "AM 100: paper's formula",
        "here",
    ];
    let mut rows = vec![head.map(str::to_string).to_vec()];
    for app in table {
        rows.push(vec![
            app.name.to_string(),
            format!("{} MB", app.idle_mb),
            app.growth_per_mb.map_or("-".into(), |g| format!("{g:.5}")),
            app.growth_per_mb
                .map_or("-".into(), |g| format!("{:.1} MB", std::f64::consts::LN_2 / g)),
            format!("{:.1} MB", app.printed_at_100_mb),
            format!("{:.1} MB", app.moved_mb(100.0)),
        ]);
    }
    say!("{}", output::table(&rows))?;
    say!("SPECjvm2008, 1 to 8 processes of 15.5 MB")?;
    let mut rows = vec![["processes", "paper", "here"].map(str::to_string).to_vec()];
    for (count, printed) in lmdt::SPECJVM_MB.iter().enumerate() {
        let processes = count + 1;
        let here = table
            .iter()
            .find(|a| a.name == "SPECjvm2008")
            .map(|a| a.moved_mb(15.5 * processes as f64));
        rows.push(vec![
            processes.to_string(),
            format!("{printed} MB"),
            here.map_or(String::new(), |mb| format!("{mb:.0} MB")),
        ]);
    }
    say!("{}", output::table(&rows))?;
    say!(
        "An exponential fits a narrow range at one bandwidth and one stop rule. What a crossing really moves grows as\n\
         used memory + written memory * r / (1 - r), r being the dirtying rate over the bandwidth; `ferry migrate --dry-run`\n\
         calculates that."
    )
}
