//! The migration engine. No KVM, no devices, no unsafe, no clock of its own.
//!
//! A crossing is driven from two sides: [`outgoing`] has the machine, [`incoming`] gets it. Everything they
//! need from the world comes through traits: blocks of data ([`block::Source`], [`block::Sink`]), the machine
//! itself ([`machine::OutgoingMachine`], [`machine::IncomingMachine`]), the link ([`link::Link`]), time
//! ([`clock::Clock`]) and a small durable memory ([`handover::Ledger`]).

pub mod arrivals;
pub mod block;
mod carrier;
pub mod clock;
mod codec;
mod copying;
pub mod cost;
pub mod custody;
pub mod estimate;
pub mod failure;
pub mod handover;
pub mod incoming;
pub mod ledger;
pub mod link;
pub mod machine;
pub mod options;
pub mod outgoing;
pub mod pacing;
pub mod pages;
pub mod policy;
pub mod receiver;
pub mod rehearsal;
pub mod report;
pub mod resolve;
mod sets;
pub mod sim;
mod talk;
pub mod transport;
pub mod units;
pub mod wire;
