//! The results as a table for people.

use ferry_migration::policy::reason::size;
use ferry_migration::sim::pages::Outcome;
use ferry_migration::sim::replay::Fact;

use crate::output;

/// One row per policy, and below why each stopped.
pub(super) fn outcomes(outcomes: &[Outcome]) -> String {
    let head = [
        "policy",
        "cost",
        "total",
        "downtime",
        "sent",
        "rounds",
        "cost + price of time",
    ];
    let mut rows = vec![head.map(str::to_string).to_vec()];
    for o in outcomes {
        let crossed = |text: String| if o.crossed { text } else { "-".to_string() };
        rows.push(vec![
            o.policy.clone(),
            format!("{:.4} s", o.cost),
            format!("{:.2} s", o.total_s),
            crossed(format!("{:.4} s", o.downtime_s)),
            sent(o),
            o.rounds.to_string(),
            crossed(format!("{:.4} s", o.cost_with_time)),
        ]);
    }
    let mut text = output::table(&rows);
    text.push('\n');
    for o in outcomes {
        let what = if o.crossed { "switched" } else { "gave up" };
        text += &format!("{} {what}: {}\n", o.policy, o.stop_reason);
    }
    text.trim_end().to_string()
}

/// All bytes, and how many of them for disks.
fn sent(o: &Outcome) -> String {
    let all = size(o.bytes as f64);
    match o.disk_bytes {
        0 => all,
        disk => format!("{all} ({} disk)", size(disk as f64)),
    }
}

/// The crossing that is played again.
pub(super) fn fact(fact: &Fact) -> String {
    let name: String = fact
        .name
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    let policy = fact
        .policy
        .map_or("a policy that its report does not name".to_owned(), |policy| {
            policy.to_string()
        });
    let what = if fact.crossed { "crossed" } else { "did not cross" };
    format!(
        "{name} itself {what} with {policy}: total {:.2} s without preparing, downtime {:.4} s, {} sent, {} rounds",
        fact.total_s,
        fact.downtime_s,
        size(fact.bytes as f64),
        fact.rounds
    )
}
