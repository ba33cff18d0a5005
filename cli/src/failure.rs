//! How a command fails: one sentence on standard error and an exit code, 2 for a command that makes no sense and 1 for
//! everything else.

use std::io;
use std::process::ExitCode;

use ferry_vmm::config::ConfigError;
use ferry_vmm::error::MachineError;
use ferry_vmm::name::NameError;

const USAGE: u8 = 2;
const FAILURE: u8 = 1;

/// A combination of arguments that makes no sense.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::error::Error for Usage {}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Usage>()
        || error.is::<ConfigError>()
        || error.is::<NameError>()
        || matches!(error.downcast_ref(), Some(MachineError::Config(_)))
}

pub fn report(error: &anyhow::Error) -> ExitCode {
    let broken_pipe = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    if error.downcast_ref().is_some_and(broken_pipe) {
        // Whoever read our output has seen enough.
        return ExitCode::SUCCESS;
    }
    eprintln!("ferry: {error:#}");
    ExitCode::from(if is_usage(error) { USAGE } else { FAILURE })
}

/// What clap says, in one sentence; help and version as they are.
pub fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
    } else {
        eprintln!(
            "ferry: {}; `ferry help` and `ferry COMMAND --help` explain",
            sentence(&error.to_string())
        );
    }
    ExitCode::from(USAGE)
}

/// The first paragraph of clap's message, its lines joined.
fn sentence(message: &str) -> String {
    let paragraph = message
        .trim_start_matches("error: ")
        .lines()
        .take_while(|line| !line.trim().is_empty());
    paragraph.map(str::trim).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[test]
    fn whatever_clap_complains_about_becomes_one_line() {
        for (arguments, wanted) in [
            (
                &["ferry", "run"][..],
                "the following required arguments were not provided: <NAME>",
            ),
            (&["ferry", "run", "Web"], "is not a name for a machine"),
            (&["ferry", "run", "web", "--memory", "lots"], "is not a size"),
            (
                &["ferry", "run", "web", "--frobnicate"],
                "unexpected argument '--frobnicate'",
            ),
            (&["ferry", "fly"], "unrecognized subcommand 'fly'"),
        ] {
            let error = crate::cli::Cli::try_parse_from(arguments).unwrap_err();
            let text = sentence(&error.to_string());
            assert!(text.contains(wanted) && !text.contains('\n'), "{text:?}");
        }
    }

    #[test]
    fn usage_is_told_from_failure() {
        assert!(is_usage(&Usage("x".into()).into()));
        assert!(is_usage(&MachineError::Config(ConfigError("x".into())).into()));
        assert!(!is_usage(&MachineError::Host("x".into()).into()));
        assert!(!is_usage(&anyhow::anyhow!("x")));
    }
}
