//! One file per command: its arguments, its help, and `run`.

pub mod balloon;
pub mod completions;

pub mod console;
mod dry_run;
mod gone;
pub mod info;
pub mod keys;
pub mod kill;
pub mod list;
pub mod logs;
pub mod man;
pub mod migrate;
pub mod pause;
mod probing;
mod progress;
pub mod pulse;
pub mod receive;
pub mod report;
pub mod resolve;
pub mod resume;
pub mod run;
mod run_detached;
mod standstill;
pub mod stop;
