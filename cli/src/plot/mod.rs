//! Pages with plots that are one file each: inline SVG, no script, nothing from elsewhere.

mod bars;
mod chart;

pub(crate) use bars::{Bar, waterfall};
pub(crate) use chart::{Line, chart};

const COLOURS: [&str; 10] = [
    "#1b6ca8", "#c0392b", "#27884a", "#8e44ad", "#b9770e", "#16a085", "#7f8c8d", "#2c3e50", "#d35480",
    "#5d6d1e",
];
const WIDTH: f64 = 860.0;

/// The beginning of a page, up to its first heading; `END` ends it.
pub(crate) fn head(title: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title><style>\
         body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:900px;color:#222}}\
         table{{border-collapse:collapse;margin:1em 0}}td,th{{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}}\
         th{{border-bottom:1px solid #999}}svg{{display:block;margin:1em 0}}text{{font:12px system-ui,sans-serif;fill:#444}}\
         </style></head><body><h1>{0}</h1>\n",
        escape(title)
    )
}

pub(crate) const END: &str = "</body></html>\n";

pub(crate) fn colour(at: usize) -> &'static str {
    COLOURS.get(at % COLOURS.len()).copied().unwrap_or("#000")
}

/// Text from anywhere, as text in a page and in its attributes. Control characters are shown as what they are: nothing
/// that a page needs.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A table; every cell is text.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |cells: &mut dyn Iterator<Item = String>, tag: &str| {
        cells
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(&cell)))
            .collect::<String>()
    };
    let mut html = format!(
        "<table><tr>{}</tr>\n",
        cells(&mut head.iter().map(|cell| (*cell).to_owned()), "th")
    );
    for row in rows {
        html += &format!("<tr>{}</tr>\n", cells(&mut row.iter().cloned(), "td"));
    }
    html + "</table>\n"
}

fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_peer_stays_text() {
        let nasty = "</title><script>alert('x')</script>\u{1b}[31m&\"";
        let page = head(nasty)
            + &table(&[nasty], &[vec![nasty.to_owned()]])
            + &chart(nasty, "s", &[Line::new(nasty, vec![(0.0, 1.0), (1.0, 2.0)])])
            + &waterfall(
                nasty,
                "ms",
                &[Bar {
                    name: nasty.into(),
                    length: 1.0,
                }],
            );
        assert!(
            !page.contains("<script") && !page.contains('\u{1b}') && !page.contains("alert('"),
            "{page}"
        );
        assert_eq!(page.matches("&lt;script&gt;").count(), 8, "{page}");
    }

    #[test]
    fn plots_of_nothing_and_of_numbers_that_are_none_are_still_plots() {
        for points in [
            vec![],
            vec![(f64::NAN, f64::INFINITY)],
            vec![(0.0, f64::NAN), (f64::INFINITY, 1.0), (1e300, 1e300)],
        ] {
            let svg = chart("t", "s", &[Line::new("l", points)]);
            assert!(
                svg.contains("</svg>") && !svg.contains("NaN") && !svg.contains("inf"),
                "{svg}"
            );
        }
        let bar = |length| Bar {
            name: "b".into(),
            length,
        };
        let svg = waterfall(
            "t",
            "ms",
            &[bar(f64::NAN), bar(f64::INFINITY), bar(-1.0), bar(0.0)],
        );
        assert!(
            svg.contains("</svg>") && !svg.contains("NaN") && !svg.contains("inf"),
            "{svg}"
        );
        assert!(waterfall("t", "ms", &[]).contains("</svg>"));
    }
}
