//! Pulses on real KVM, in a process of their own and one at a time: they count the process's open files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test is where these belong
#![allow(dead_code)] // the harness has more than these tests use

#[path = "../kvm/harness.rs"]
mod harness;
mod pulses;
