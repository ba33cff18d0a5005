//! `ferry completions`: for shells, from the same definitions as the help.

use std::io::Write as _;

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::Cli;

/// Print the completions for a shell
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferry completions bash > /etc/bash_completion.d/ferry\n  \
                        ferry completions zsh > ~/.zfunc/_ferry\n  \
                        ferry completions fish > ~/.config/fish/completions/ferry.fish"
)]
pub struct CompletionsArgs {
    /// Which shell
    pub shell: Shell,
}

pub fn run(args: &CompletionsArgs) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ferry", &mut text);
    std::io::stdout().write_all(&text)?;
    Ok(())
}
