//! `ferry man`: manual pages, from the same definitions as the help.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::say;

/// Print the manual page, or write all of them into a folder
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry man | man -l -\n  ferry man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// A folder for ferry.1 and one page for each command
    pub dir: Option<PathBuf>,
}

pub fn run(args: &ManArgs) -> Result<()> {
    let Some(dir) = &args.dir else {
        let mut text = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut text)?;
        std::io::stdout().write_all(&text)?;
        return Ok(());
    };
    std::fs::create_dir_all(dir).with_context(|| format!("could not make the folder {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("could not write manual pages into {}", dir.display()))?;
    say!("manual pages are in {}", dir.display())
}
