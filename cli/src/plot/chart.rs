//! Lines over a common axis.

use std::fmt::Write as _;

use super::{WIDTH, colour, escape, number, round_up};

const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 36.0;

/// A line by its points, ascending along x.
pub(crate) struct Line<'a> {
    name: &'a str,
    points: Vec<(f64, f64)>,
    dashed: bool,
}

impl<'a> Line<'a> {
    /// Points that are no numbers are left out.
    pub(crate) fn new(name: &'a str, mut points: Vec<(f64, f64)>) -> Line<'a> {
        points.retain(|(x, y)| x.is_finite() && y.is_finite());
        Line {
            name,
            points,
            dashed: false,
        }
    }

    /// For what is not measured but given.
    pub(crate) fn dashed(self) -> Line<'a> {
        Line { dashed: true, ..self }
    }
}

/// `unit` is written at the numbers of the x axis.
pub(crate) fn chart(title: &str, unit: &str, lines: &[Line<'_>]) -> String {
    let most = |pick: &dyn Fn(&(f64, f64)) -> f64| {
        round_up(
            lines
                .iter()
                .flat_map(|line| line.points.iter().map(pick))
                .fold(0.0, f64::max),
        )
    };
    let (right, top) = (most(&|p| p.0), most(&|p| p.1));
    let x = |at: f64| LEFT + (WIDTH - LEFT - 10.0) * at / right;
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
             <text x=\"{gx:.1}\" y=\"{}\" text-anchor=\"middle\">{} {}</text>",
            WIDTH - 10.0,
            LEFT - 6.0,
            gy + 4.0,
            number(top * part),
            HEIGHT - BOTTOM + 16.0,
            number(right * part),
            escape(unit)
        );
    }
    for (at, line) in lines.iter().enumerate() {
        let path: Vec<String> = line
            .points
            .iter()
            .map(|(px, py)| format!("{:.1},{:.1}", x(*px), y(*py)))
            .collect();
        let dash = if line.dashed {
            " stroke-dasharray=\"6 4\""
        } else {
            ""
        };
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\"{dash} points=\"{}\"/>",
            colour(at),
            path.join(" ")
        );
        // One point is no line.
        if let [only] = path.as_slice()
            && let Some((cx, cy)) = only.split_once(',')
        {
            let _ = writeln!(
                svg,
                "<circle cx=\"{cx}\" cy=\"{cy}\" r=\"3\" fill=\"{}\"/>",
                colour(at)
            );
        }
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
            escape(line.name)
        );
    }
    svg + "</svg>\n"
}
