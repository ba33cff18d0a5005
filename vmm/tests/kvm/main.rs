//! The machine on real KVM. Without KVM these tests skip and say so, or fail where FERRY_TESTS_MUST_RUN=1.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test is where these belong

mod boot;
mod dirty;
mod disks;
mod ends;
mod harness;
mod input;
mod memory;
mod net;
mod ring;
mod vcpu_state;
mod writers;
