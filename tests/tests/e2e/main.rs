//! All end-to-end tests, one binary: the real `ferry`, real KVM, the built-in guest's own evidence.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "these are tests"
)]

mod bad_input;
mod balloon;
mod boot;
mod command;
mod console;
mod control;
mod crossing;
mod crossing_cut;
mod crossing_disk;
mod crossing_ended;
mod crossing_guest;
mod crossing_refused;
mod crossing_ring;
mod crossing_soak;
mod crossing_ssh;
mod crossing_throttle;
mod detach;
mod ends;
mod forecast;
mod house;
mod load;
mod names;
mod nested;
mod pause;
mod pulse;
mod report;
