//! The tree of commands. A new command is a file in `commands`, a line in `Command` and a line in `run`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use ferry_vmm::rundir::{Base, RunDirError};

use crate::commands::{
    balloon, completions, console, info, keys, kill, list, logs, man, migrate, pause, pulse, receive, report,
    resolve, resume, run, stop,
};
use crate::logging;

/// Ferry runs virtual machines and carries them, running, from one host to another.
///
/// Every machine is one process with a control socket; the other commands talk to it.
#[derive(Debug, Parser)]
#[command(
    name = "ferry",
    version,
    after_help = "Begin with the guest that Ferry brings along:\n  \
                  ferry run hello\n  \
                  ferry run hello --detach; ferry list; ferry console hello\n  \
                  ferry stop hello\n\n\
                  Exit codes: 0 success, 1 failure, 2 a command that makes no sense."
)]
pub struct Cli {
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// Where machines keep sockets and logs [default: /run/ferry for root, $XDG_RUNTIME_DIR/ferry for others]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "FERRY_RUNTIME_DIR",
        help_heading = "Everywhere"
    )]
    pub runtime_dir: Option<PathBuf>,
    /// Log to standard error: error, warn, info, debug, trace, or a filter such as ferry_vmm=debug
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "FERRY_LOG",
        help_heading = "Everywhere"
    )]
    pub log: Option<String>,
    /// Log in JSON, one object per line
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub log_json: bool,
}

impl Globals {
    pub fn base(&self) -> Result<Base, RunDirError> {
        Base::find(self.runtime_dir.as_deref())
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Run(Box<run::RunArgs>),
    List(list::ListArgs),
    Info(info::InfoArgs),
    Console(console::ConsoleArgs),
    Pause(pause::PauseArgs),
    Resume(resume::ResumeArgs),
    Stop(stop::StopArgs),
    Kill(kill::KillArgs),
    Logs(logs::LogsArgs),
    Pulse(pulse::PulseArgs),
    Balloon(balloon::BalloonArgs),
    Migrate(Box<migrate::MigrateArgs>),
    Receive(Box<receive::ReceiveArgs>),
    Resolve(resolve::ResolveArgs),
    Report(report::ReportArgs),
    Load(crate::load::LoadArgs),
    Keys(keys::KeysArgs),
    Simulate(Box<crate::simulate::SimulateArgs>),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

impl Cli {
    pub fn run(&self) -> Result<ExitCode> {
        let globals = &self.globals;
        if !matches!(self.command, Command::Run(_) | Command::Receive(_)) {
            logging::init(globals, None, true)?;
        }
        match &self.command {
            // Commands that decide their exit code themselves.
            Command::Run(args) => return run::run(args, globals),
            Command::Migrate(args) => return migrate::run(args, globals),
            Command::Receive(args) => return receive::run(args, globals),
            Command::List(args) => list::run(args, globals),
            Command::Load(args) => crate::load::run(args),
            Command::Resolve(args) => resolve::run(args, globals),
            Command::Report(args) => report::run(args, globals),
            Command::Info(args) => info::run(args, globals),
            Command::Console(args) => console::run(args, globals),
            Command::Pause(args) => pause::run(args, globals),
            Command::Resume(args) => resume::run(args, globals),
            Command::Stop(args) => stop::run(args, globals),
            Command::Kill(args) => kill::run(args, globals),
            Command::Logs(args) => logs::run(args, globals),
            Command::Pulse(args) => pulse::run(args, globals),
            Command::Balloon(args) => balloon::run(args, globals),
            Command::Keys(args) => keys::run(args),
            Command::Simulate(args) => crate::simulate::run(args),
            Command::Completions(args) => completions::run(args),
            Command::Man(args) => man::run(args),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_hold_together_and_every_command_explains_itself() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            assert!(
                sub.get_about().is_some(),
                "{} says nothing about itself",
                sub.get_name()
            );
            for argument in sub.get_arguments() {
                let told = argument.get_help().is_some() || argument.is_hide_set();
                assert!(
                    told,
                    "{} {} says nothing about itself",
                    sub.get_name(),
                    argument.get_id()
                );
            }
        }
    }
}
