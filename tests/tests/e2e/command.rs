//! The command itself: help, completions, manual pages, and readers that go away.

use std::process::Stdio;

use ferry_tests::host::{Host, PATIENCE, finish};

const COMMANDS: [&str; 10] = [
    "run", "list", "info", "console", "pause", "resume", "stop", "kill", "logs", "pulse",
];

#[test]
fn help_completions_and_manual_pages_know_every_command() {
    let host = Host::new();
    let help = host.ferry(["--help"]).success().stdout;
    let bash = host.ferry(["completions", "bash"]).success().stdout;
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(
            host.ferry(["completions", shell])
                .success()
                .stdout
                .contains("pulse"),
            "{shell}"
        );
    }
    host.ferry(["man", "pages"]).success();
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
        assert!(
            bash.contains(&format!("ferry__{command}"))
                || bash.contains(&format!("ferry__subcmd__{command}"))
        );
        let page = std::fs::read_to_string(host.file("pages").join(format!("ferry-{command}.1"))).unwrap();
        let help = host.ferry([command, "--help"]).success().stdout;
        assert!(
            help.contains("Example") && page.contains("Example"),
            "{command} shows no example"
        );
    }
    assert!(host.ferry(["man"]).success().stdout.contains(".TH ferry 1"));
    assert!(host.ferry(["--version"]).success().stdout.starts_with("ferry 0."));
    assert_eq!(host.ferry([""; 0]).code, 2);
    assert!(host.remains().is_empty());
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let host = Host::new();
    for arguments in [&["list"][..], &["completions", "bash"], &["man"]] {
        let mut command = host.command(arguments);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = finish(command.stdout(Stdio::from(writer)).spawn().unwrap(), PATIENCE);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
    }
}
