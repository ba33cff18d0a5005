//! Parts of a whole, one behind the other.

use std::fmt::Write as _;

use super::{WIDTH, colour, escape, number};

const ROW: f64 = 22.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 110.0;

/// A part, as long as it is.
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) length: f64,
}

/// Each bar begins where the one before ended; the last row is all of them together.
pub(crate) fn waterfall(title: &str, unit: &str, bars: &[Bar]) -> String {
    let length = |bar: &Bar| {
        if bar.length.is_finite() {
            bar.length.max(0.0)
        } else {
            0.0
        }
    };
    let total: f64 = bars.iter().map(length).sum();
    let scale = (WIDTH - LEFT - RIGHT) / if total > 0.0 { total } else { 1.0 };
    let height = ROW * (bars.len() + 1) as f64 + 6.0;
    let mut svg = format!(
        "<h2>{}</h2>\n<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n",
        escape(title)
    );
    let mut row = |at: usize, name: &str, from: f64, length: f64, fill: &str| {
        let y = ROW * at as f64;
        let (x, width) = (LEFT + from * scale, (length * scale).max(0.5));
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{x:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" fill=\"{fill}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{} {}</text>",
            LEFT - 8.0,
            y + 15.0,
            escape(name),
            y + 3.0,
            ROW - 6.0,
            x + width + 6.0,
            y + 15.0,
            number(length),
            escape(unit)
        );
    };
    let mut from = 0.0;
    for (at, bar) in bars.iter().enumerate() {
        row(at, &bar.name, from, length(bar), colour(at));
        from += length(bar);
    }
    row(bars.len(), "total", 0.0, total, "#444");
    svg + "</svg>\n"
}
