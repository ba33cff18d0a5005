//! The serial port as a person meets it: typing, looking, a real terminal, and the way out.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

#[test]
fn what_is_typed_reaches_the_guest_from_standard_input_and_from_the_console() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("c", ["--cmdline", "heartbeat=20ms"]);
    guest.line("hello");
    guest.type_line("hello there");
    assert_eq!(guest.line("unknown")["order"], "hello there");
    let mut console = host.command(["console", "c"]);
    let mut console = console.stdin(Stdio::piped()).spawn().unwrap();
    console
        .stdin
        .take()
        .unwrap()
        .write_all(b"from the console\n")
        .unwrap();
    assert_eq!(guest.line("unknown")["order"], "from the console");
    guest.type_line("poweroff");
    let seen = finish(console, PATIENCE).success().stdout;
    assert!(
        seen.contains("from the console") && seen.contains(r#""how":"poweroff""#),
        "{seen}"
    );
    guest.line("bye");
    assert_eq!(guest.end().code, 0);
}

#[test]
fn a_long_order_typed_at_once_arrives_whole() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("c", ["--cmdline", "heartbeat=20ms"]);
    guest.line("hello");
    let long: String = (0..400).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    guest.type_line(&long);
    assert_eq!(guest.line("unknown")["order"], long.as_str());
}

#[test]
fn clients_that_come_and_go_do_not_disturb_the_guest_or_each_other() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("c", ["--cmdline", "heartbeat=5ms"]);
    let first = guest.beat();
    let socket = host.entry("c").unwrap().console_socket();
    // One that never reads, many that leave at once, one that looks.
    let deaf = UnixStream::connect(&socket).unwrap();
    for _ in 0..5 {
        drop(UnixStream::connect(&socket).unwrap());
    }
    let mut looker = UnixStream::connect(&socket).unwrap();
    looker.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut seen: Vec<u8> = Vec::new();
    while seen.iter().filter(|byte| **byte == b'\n').count() < 50 {
        let mut buffer = [0; 1000];
        let count = looker.read(&mut buffer).unwrap();
        assert!(count > 0);
        seen.extend(&buffer[..count]);
    }
    for beat in first + 1..first + 100 {
        assert_eq!(guest.beat(), beat);
    }
    drop(deaf);
}

/// A terminal: our side, and the side a program sits at.
fn terminal() -> (OwnedFd, OwnedFd) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    (ours, theirs)
}

/// Reads from the terminal until `wanted` has come.
fn expect(terminal: &mut File, wanted: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        let mut buffer = [0; 1000];
        let count = terminal.read(&mut buffer).unwrap_or(0);
        assert!(count > 0, "the terminal closed after {seen:?}");
        seen += &String::from_utf8_lossy(&buffer[..count]);
    }
    seen
}

fn at_terminal(mut command: Command, theirs: &OwnedFd) -> Child {
    let end = || Stdio::from(theirs.try_clone().unwrap());
    command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap()
}

#[test]
fn a_terminal_is_raw_while_the_guest_has_it_and_as_before_afterwards() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let (ours, theirs) = terminal();
    let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
    let modes = || tcgetattr(&theirs).unwrap().local_modes & cooked;
    assert_eq!(modes(), cooked);
    let mut ours = File::from(ours);
    let run = at_terminal(host.command(["run", "c"]), &theirs);
    expect(&mut ours, "Ctrl-] ends it");
    assert_eq!(modes(), LocalModes::empty());
    // Ctrl-C is the guest's now.
    ours.write_all(b"\x03sum\r").unwrap();
    expect(&mut ours, r#""t":"sum""#);

    let (console_ours, console_theirs) = terminal();
    let mut console_ours = File::from(console_ours);
    let console = at_terminal(host.command(["console", "c"]), &console_theirs);
    expect(&mut console_ours, "Ctrl-] leaves");
    expect(&mut console_ours, "beat");
    console_ours.write_all(b"over the console\r\x1d").unwrap();
    expect(&mut console_ours, "disconnected from c");
    assert_eq!(finish(console, PATIENCE).code, 0);
    assert_eq!(tcgetattr(&console_theirs).unwrap().local_modes & cooked, cooked);

    // The machine goes on without its visitor.
    expect(&mut ours, "over the console");
    expect(&mut ours, "beat");
    ours.write_all(b"\x1d").unwrap();
    expect(&mut ours, "as requested");
    assert_eq!(finish(run, PATIENCE).code, 0);
    assert_eq!(modes(), cooked);
    assert!(host.remains().is_empty());
}

#[test]
fn a_reader_that_stops_reading_does_not_stop_the_guest() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    // Its standard output is a pipe that nobody reads.
    let mut command = host.command(["run", "c", "--cmdline", "heartbeat=1ms"]);
    let child = command.spawn().unwrap();
    host.wait_until("the control socket answers", || {
        host.ferry(["info", "c"]).code == 0
    });
    std::thread::sleep(Duration::from_secs(2));
    let serial = |host: &Host| {
        host.ferry(["logs", "c", "--serial"])
            .success()
            .stdout
            .matches("beat")
            .count()
    };
    let before = serial(&host);
    std::thread::sleep(Duration::from_millis(500));
    assert!(serial(&host) > before, "the guest stands still");
    host.ferry(["kill", "c"]).success();
    finish(child, PATIENCE);
}
