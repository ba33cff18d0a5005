//! One page with everything in it: the table, and plots of bandwidth, dirty pages and cost over time.

use std::fmt::Write as _;

use ferry_migration::sim::pages::{Outcome, Point};

const COLOURS: [&str; 10] = [
    "#1b6ca8", "#c0392b", "#27884a", "#8e44ad", "#b9770e", "#16a085", "#7f8c8d", "#2c3e50", "#d35480",
    "#5d6d1e",
];
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 36.0;

pub(super) fn page(title: &str, outcomes: &[Outcome]) -> String {
    let lines: Vec<(&str, &[Point])> = outcomes
        .iter()
        .map(|o| (o.policy.as_str(), o.timeline.as_slice()))
        .collect();
    let mut html = head(title);
    html += "<table><tr><th>policy<th>cost (s)<th>total (s)<th>downtime (s)<th>MiB sent<th>rounds<th>stopped because</tr>\n";
    for (at, o) in outcomes.iter().enumerate() {
        let _ = writeln!(
            html,
            "<tr><td style=\"color:{}\">{}<td>{:.4}<td>{:.2}<td>{:.4}<td>{:.1}<td>{}<td>{}</tr>",
            colour(at),
            escape(&o.policy),
            o.cost,
            o.total_s,
            o.downtime_s,
            o.bytes as f64 / 1_048_576.0,
            o.rounds,
            escape(&o.stop_reason)
        );
    }
    html += "</table>\n";
    html += &plots(&lines);
    html += "</body></html>\n";
    html
}

/// The three plots of some runs.
pub(super) fn plots(lines: &[(&str, &[Point])]) -> String {
    let mut html = plot("Bandwidth of the crossing (Mbit/s)", lines, |p| {
        p.bandwidth_bytes_per_sec * 8.0 / 1e6
    });
    html += &plot("Dirty pages (thousands)", lines, |p| {
        p.dirty_bytes as f64 / 4096.0 / 1000.0
    });
    html += &plot("Cost so far (seconds of outage)", lines, |p| p.cost);
    html
}

pub(super) fn head(title: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title><style>\
         body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:900px;color:#222}}\
         table{{border-collapse:collapse;margin:1em 0}}td,th{{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}}\
         th{{border-bottom:1px solid #999}}svg{{display:block;margin:1em 0}}text{{font:12px system-ui,sans-serif;fill:#444}}\
         </style></head><body><h1>{0}</h1>\n",
        escape(title)
    )
}

fn colour(at: usize) -> &'static str {
    COLOURS.get(at % COLOURS.len()).copied().unwrap_or("#000")
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A round number at or above `most`.
fn round_up(most: f64) -> f64 {
    if most <= 0.0 || !most.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf(most.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|m| *m >= most)
        .unwrap_or(most)
}

pub(super) fn plot(title: &str, lines: &[(&str, &[Point])], value: impl Fn(&Point) -> f64) -> String {
    let most = |f: &dyn Fn(&Point) -> f64| {
        round_up(
            lines
                .iter()
                .flat_map(|(_, points)| points.iter().map(f))
                .fold(0.0, f64::max),
        )
    };
    let (right, top) = (most(&|p| p.secs), most(&|p| value(p)));
    let x = |secs: f64| LEFT + (WIDTH - LEFT - 10.0) * secs / right;
    let y = |v: f64| HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10.0) * v / top;
    let height = HEIGHT + 18.0 * lines.len().div_ceil(4) as f64;
    let mut svg = format!(
        "<h2>{}</h2>\n<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n",
        escape(title)
    );
    for step in 0..=5 {
        let part = f64::from(step) / 5.0;
        let (gx, gy) = (x(right * part), y(top * part));
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{gy:.1}\" y2=\"{gy:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <text x=\"{gx:.1}\" y=\"{}\" text-anchor=\"middle\">{} s</text>",
            WIDTH - 10.0,
            LEFT - 6.0,
            gy + 4.0,
            number(top * part),
            HEIGHT - BOTTOM + 16.0,
            number(right * part)
        );
    }
    for (at, (name, points)) in lines.iter().enumerate() {
        let path: Vec<String> = points
            .iter()
            .map(|p| format!("{:.1},{:.1}", x(p.secs), y(value(p))))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\" points=\"{}\"/>",
            colour(at),
            path.join(" ")
        );
        let (lx, ly) = (
            LEFT + 195.0 * (at % 4) as f64,
            HEIGHT + 18.0 * (at / 4) as f64 + 4.0,
        );
        let _ = writeln!(
            svg,
            "<rect x=\"{lx}\" y=\"{}\" width=\"12\" height=\"4\" fill=\"{}\"/><text x=\"{}\" y=\"{ly}\">{}</text>",
            ly - 6.0,
            colour(at),
            lx + 18.0,
            escape(name)
        );
    }
    svg + "</svg>\n"
}

fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}
