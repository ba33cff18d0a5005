//! One page with everything in it: the table, and plots of bandwidth, dirty pages and cost over time.

use std::fmt::Write as _;

use ferry_migration::sim::pages::{Outcome, Point};

use crate::plot::{END, Line, chart, colour, escape, head};

pub(super) fn page(title: &str, outcomes: &[Outcome]) -> String {
    let lines: Vec<(&str, &[Point])> = outcomes
        .iter()
        .map(|o| (o.policy.as_str(), o.timeline.as_slice()))
        .collect();
    let mut html = head(title);
    html += "<table><tr><th>policy<th>cost (s)<th>total (s)<th>downtime (s)<th>MiB sent<th>of it disk<th>rounds<th>stopped because</tr>\n";
    for (at, o) in outcomes.iter().enumerate() {
        let _ = writeln!(
            html,
            "<tr><td style=\"color:{}\">{}<td>{:.4}<td>{:.2}<td>{:.4}<td>{:.1}<td>{:.1}<td>{}<td>{}</tr>",
            colour(at),
            escape(&o.policy),
            o.cost,
            o.total_s,
            o.downtime_s,
            o.bytes as f64 / 1_048_576.0,
            o.disk_bytes as f64 / 1_048_576.0,
            o.rounds,
            escape(&o.stop_reason)
        );
    }
    html += "</table>\n";
    html += &plots(&lines);
    html + END
}

/// The three plots of some runs.
pub(super) fn plots(runs: &[(&str, &[Point])]) -> String {
    let plot = |title: &str, value: &dyn Fn(&Point) -> f64| {
        let lines: Vec<Line<'_>> = runs
            .iter()
            .map(|(name, points)| Line::new(name, points.iter().map(|p| (p.secs, value(p))).collect()))
            .collect();
        chart(title, "s", &lines)
    };
    plot("Bandwidth of the crossing (Mbit/s)", &|p| {
        p.bandwidth_bytes_per_sec * 8.0 / 1e6
    }) + &plot("Dirty pages (thousands)", &|p| {
        p.dirty_bytes as f64 / 4096.0 / 1000.0
    }) + &plot("Cost so far (seconds of outage)", &|p| p.cost)
}
