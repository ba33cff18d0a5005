//! Every way in which a machine can end has its exit code and its sentence, and leaves what it should.

use ferry_tests::host::{Host, skip_without_kvm};
use rustix::process::Signal;

/// What the guest does, the exit code, what `ferry run` says, and whether logs stay behind.
const ENDS: [(&str, i32, &str, bool); 5] = [
    ("run=100ms", 0, "powered off", false),
    ("fault=reset after=100ms", 0, "asked for a reset", false),
    ("run=100ms exit=debug:20", 41, "", false),
    ("fault=triple after=100ms", 1, "triple fault", true),
    ("fault=ud2 after=100ms", 0, "powered off", false),
];

#[test]
fn each_end_has_its_code_and_its_sentence() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    for (orders, code, said, stays) in ENDS {
        let mut guest = host.run("e", ["--cmdline", orders]);
        guest.line("hello");
        let end = guest.end();
        assert_eq!(end.code, code, "{orders}: {end:?}");
        assert!(
            end.stderr.contains(said) && end.stderr.lines().count() <= 40,
            "{orders}: {end:?}"
        );
        assert_eq!(
            !host.remains().is_empty(),
            stays,
            "{orders}: {:?}",
            host.remains()
        );
        assert_eq!(host.ferry(["list"]).success().stdout.lines().count(), 1);
    }
}

#[test]
fn the_last_words_of_a_guest_are_never_lost() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    for _ in 0..10 {
        let mut guest = host.run("e", ["--cmdline", "run=50ms heartbeat=5ms"]);
        guest.line("bye");
        assert_eq!(guest.end().code, 0);
    }
}

#[test]
fn a_reader_that_is_late_still_gets_the_last_words() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut command = host.command(["run", "e", "--cmdline", "heartbeat=1ms"]);
    let (reader, writer) = std::io::pipe().unwrap();
    // So small that most of the output still waits in ferry when the guest is at its end.
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut child = command.stdout(writer).spawn().unwrap();
    drop(command);
    host.wait_until("it runs", || {
        host.entry("e").is_some_and(|entry| entry.serial_log().exists())
    });
    let log = host.entry("e").unwrap().serial_log();
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    host.wait_until("the guest has said more than the pipe takes", || {
        said().len() > 16384
    });
    host.type_line("e", "poweroff");
    host.wait_until("the guest says goodbye", || said().contains(r#""t":"bye""#));
    let text = std::io::read_to_string(reader).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(text.len() > 16384, "{text}");
    assert!(
        text.starts_with(r#"{"t":"hello""#) && text.trim_end().ends_with(r#""how":"poweroff"}"#),
        "{text}"
    );
}

#[test]
fn a_failed_machine_leaves_its_logs_until_it_is_removed_or_its_name_is_used_again() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let fail = || {
        let mut guest = host.run("e", ["--cmdline", "fault=triple after=50ms"]);
        guest.line("hello");
        guest.end()
    };
    assert!(fail().stderr.contains("the machine e failed"));
    assert!(host.ferry(["list"]).success().stdout.contains("no machine runs"));
    assert!(
        host.ferry(["list", "--all"])
            .success()
            .stdout
            .contains("triple fault")
    );
    assert!(
        host.ferry(["logs", "e"])
            .success()
            .stdout
            .contains("triple fault")
    );
    assert!(
        host.ferry(["logs", "e", "--serial"])
            .success()
            .stdout
            .contains("hello")
    );
    let info = host.ferry(["info", "e"]);
    assert!(
        info.code == 1 && info.stderr.contains("does not run any more"),
        "{info:?}"
    );
    // The name is free.
    fail();
    assert!(
        host.ferry(["kill", "e"])
            .success()
            .stdout
            .contains("dead already")
    );
    assert!(host.remains().is_empty());
}

#[test]
fn a_killed_process_leaves_no_machine_in_the_list() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("e", [""; 0]);
    guest.beat();
    guest.signal(Signal::KILL);
    guest.end();
    assert_eq!(
        host.ferry(["list"]).success().stdout,
        "no machine runs here; `ferry run NAME` starts one\n"
    );
    assert!(
        host.ferry(["list", "--all"])
            .success()
            .stdout
            .contains("died without a word")
    );
    for command in ["info", "pause", "resume", "stop", "pulse", "console"] {
        let ran = host.ferry([command, "e"]);
        assert!(
            ran.code == 1 && ran.stderr.contains("died without a word"),
            "{command}: {ran:?}"
        );
    }
    // What it left, its sockets too, does not stand in the way.
    let mut guest = host.run("e", [""; 0]);
    guest.beat();
    assert!(host.ferry(["list"]).success().stdout.contains("running"));
    host.ferry(["kill", "e"]).success();
    assert!(host.remains().is_empty());
}

#[test]
fn signals_end_a_machine_in_good_order() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut guest = host.run("e", [""; 0]);
        guest.beat();
        guest.signal(signal);
        let end = guest.end();
        assert!(end.code == 0 && end.stderr.contains("as requested"), "{end:?}");
        assert!(host.remains().is_empty());
    }
}

#[test]
fn stop_presses_the_power_button_and_waits_for_the_guest() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("e", [""; 0]);
    guest.beat();
    assert_eq!(host.ferry(["stop", "e"]).success().stdout, "e has stopped\n");
    let bye = guest.line("bye");
    assert_eq!(bye["how"], "poweroff");
    assert!(guest.end().stderr.contains("powered off"));
    assert!(host.remains().is_empty());
}

#[test]
fn stop_says_what_to_do_when_the_guest_does_not_listen() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    // A kernel that only halts hears nothing.
    let kernel = host.file("deaf");
    std::fs::write(&kernel, crate::bad_input::elf(|_| {})).unwrap();
    let guest = host.run("e", ["--kernel".as_ref(), kernel.as_os_str()]);
    host.wait_until("it runs", || host.ferry(["list"]).stdout.contains("running"));
    let stop = host.ferry(["stop", "e", "--timeout", "300ms"]);
    assert_eq!(stop.code, 1);
    assert!(
        stop.stderr.contains("still runs") && stop.stderr.contains("ferry kill e"),
        "{stop:?}"
    );
    host.ferry(["kill", "e"]).success();
    assert_eq!(guest.end().code, 0);
}

#[test]
fn kill_ends_a_process_that_does_not_answer() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("e", [""; 0]);
    guest.beat();
    // Stopped, it holds its lock and accepts connections, but says nothing.
    guest.signal(Signal::STOP);
    let list = host.ferry(["list"]).success().stdout;
    assert!(list.contains("does not answer"), "{list}");
    host.ferry(["kill", "e"]).success();
    guest.end();
    assert!(host.remains().is_empty());
}
