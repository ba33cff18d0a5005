//! The command line: ferry run, list, info, migrate and the rest. One file per command in `commands`; `cli` lists them.

// Doc comments of arguments are help texts; their brackets are syntax of commands, not links.
#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::bare_urls,
    rustdoc::invalid_html_tags
)]

pub mod cli;
pub mod commands;
pub mod duration;
pub mod failure;
pub mod load;
pub mod logging;
pub mod output;
mod plot;
mod report_page;
pub mod simulate;
pub mod ssh;
pub mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;

/// Everything the binary does: 0 for success, 1 for failure, 2 for a command that makes no sense.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = match cli::Cli::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(error) => return failure::usage(&error),
    };
    parsed.run().unwrap_or_else(|error| failure::report(&error))
}
