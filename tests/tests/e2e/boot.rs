//! A machine starts and its guest works, with what it was given.

use std::fs;
use std::time::Duration;

use ferry_tests::host::{Host, skip_without_kvm};
use serde_json::json;

#[test]
fn heartbeats_come_from_1_2_and_4_cpus() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    for cpus in [1, 2, 4] {
        let name = format!("boot{cpus}");
        let mut guest = host.run(
            &name,
            [
                "--cpus",
                &cpus.to_string(),
                "--cmdline",
                "work=spin heartbeat=20ms",
            ],
        );
        assert_eq!(guest.line("hello")["cpus"], cpus);
        for beat in 1..=10 {
            assert_eq!(guest.beat(), beat, "no heartbeat is lost, none comes twice");
        }
        let info = host.client(&name).info().unwrap();
        assert_eq!(
            (info.name.as_str(), info.machine.config.cpus),
            (name.as_str(), cpus)
        );
        assert_eq!(info.pid, guest.pid());
        assert_eq!(
            host.ferry(["kill", &name]).success().stdout,
            format!("{name} is ended\n")
        );
        assert_eq!(guest.end().code, 0);
    }
    assert!(host.remains().is_empty(), "{:?}", host.remains());
}

#[test]
fn the_guest_has_the_memory_and_the_orders_it_was_given() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run(
        "m",
        [
            "--memory",
            "4G",
            "--cmdline",
            "work=allocator memory=32M rate=max colour=red",
        ],
    );
    let hello = guest.line("hello");
    // Below and above the device window, less what the monitor and the tables take.
    let memory = hello["memory"].as_u64().unwrap();
    assert!((4u64 << 30) - memory < 2 << 20, "{hello}");
    assert_eq!(hello["pages"], (32 << 20) / 4096);
    assert_eq!(hello["wrong"], "colour=red");
    guest.line("ready");
    let sum = guest.line_where("sum", |sum| sum["sweeps"].as_u64() > Some(0));
    assert_eq!(sum["damaged"], 0);
}

#[test]
fn a_configuration_file_makes_the_same_machine_and_info_shows_it() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let file = host.file("m.json");
    fs::write(
        &file,
        json!({"cpus": 2, "memory": "128M", "cmdline": "heartbeat=20ms"}).to_string(),
    )
    .unwrap();
    let mut guest = host.run("first", ["--config".as_ref(), file.as_os_str()]);
    assert_eq!(guest.line("hello")["cpus"], 2);
    let info = host.ferry(["info", "first", "--json"]).success().stdout;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(
        (&info["state"]["state"], &info["config"]["memory"]),
        (&json!("running"), &json!(128 << 20))
    );
    // What info shows can be given to run again.
    fs::write(&file, info["config"].to_string()).unwrap();
    let mut again = host.run("second", ["--config".as_ref(), file.as_os_str()]);
    assert_eq!(again.line("hello")["cpus"], 2);
    let list = host.ferry(["list"]).success().stdout;
    assert_eq!(list.lines().count(), 3, "{list}");
    assert!(
        list.contains("first") && list.contains("second") && list.contains("running"),
        "{list}"
    );
}

#[test]
fn the_serial_port_goes_to_a_file_or_a_socket() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let (file, socket) = (host.file("out"), host.file("s"));
    let mut to_file = host.run(
        "f",
        ["--serial", "file=out", "--cmdline", "run=300ms heartbeat=20ms"],
    );
    assert!(to_file.lines_within(Duration::from_millis(1)).is_empty());
    assert_eq!(to_file.end().code, 0);
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        text.starts_with(r#"{"t":"hello""#) && text.trim_end().ends_with(r#""how":"poweroff"}"#),
        "{text}"
    );
    let to_socket = host.run("s", ["--serial", "socket=s", "--cmdline", "heartbeat=20ms"]);
    host.wait_until("the socket is there", || socket.exists());
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(&mut stream, &mut byte).unwrap();
    assert_eq!(&byte, b"{");
    host.ferry(["kill", "s"]).success();
    drop(to_socket);
    host.wait_until("the socket is gone", || !socket.exists());
}
