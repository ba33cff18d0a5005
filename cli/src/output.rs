//! Standard output. A reader that has gone away is an error to return, not a panic.

use std::fmt::Arguments;
use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::Result;

pub fn line(text: Arguments<'_>) -> Result<()> {
    writeln!(io::stdout(), "{text}")?;
    Ok(())
}

/// `say!("{name} is paused")?`
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*)) };
}

pub fn json(value: &impl serde::Serialize) -> Result<()> {
    say!("{}", serde_json::to_string_pretty(value)?)
}

/// Columns as wide as their widest cell, the last one open.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// `3 s`, `12 min 5 s`, `2 h 3 min`, `5 d 1 h`.
pub fn uptime(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, ..) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["NAME", "STATE"], ["a-long-name", "running"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "NAME         STATE\na-long-name  running\n");
    }

    #[test]
    fn uptimes_are_read_at_a_glance() {
        for (seconds, text) in [
            (3, "3 s"),
            (725, "12 min 5 s"),
            (7380, "2 h 3 min"),
            (435_600, "5 d 1 h"),
        ] {
            assert_eq!(uptime(Duration::from_secs(seconds)), text);
        }
    }
}
