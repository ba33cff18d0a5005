//! The migration engine. No KVM, no devices, no unsafe, no clock of its own.
//!
//! A crossing is driven from two sides: [`outgoing`] has the machine, [`incoming`] gets it. Everything they
//! need from the world comes through traits: blocks of data ([`block::Source`], [`block::Sink`]), the machine
//! itself ([`machine::OutgoingMachine`], [`machine::IncomingMachine`]), the link ([`link::Link`]), time
//! ([`clock::Clock`]) and a small durable memory ([`handover::Ledger`]).

pub mod block;
pub mod clock;
mod codec;
pub mod cost;
pub mod failure;
pub mod handover;
pub mod ledger;
pub mod link;
pub mod machine;
pub mod policy;
pub mod report;
pub mod transport;
pub mod units;
pub mod wire;
