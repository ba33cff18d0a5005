//! The control socket as documented, and what it does with those who do not keep to it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use serde_json::{Value, json};

fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into()
}

/// Status and body of an answer.
fn parts(answer: &str) -> (u16, Value) {
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| panic!("{answer:?}"));
    let body = answer
        .split_once("\r\n\r\n")
        .map(|(_, body)| body)
        .unwrap_or_default();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

#[test]
fn every_request_of_the_documentation_is_answered() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("web", ["--cmdline", "heartbeat=20ms"]);
    guest.beat();
    let ask =
        |method: &str, path: &str, body: &str| parts(&host.raw_request("web", &request(method, path, body)));
    let (status, info) = ask("GET", "/v1/machine", "");
    assert_eq!(
        (status, &info["name"], &info["state"]["state"]),
        (200, &json!("web"), &json!("running"))
    );
    assert_eq!(info["pid"], guest.pid());
    assert!(info["uptime_seconds"].as_f64() > Some(0.0));
    for (want, state) in [("paused", "paused"), ("running", "running")] {
        let (status, info) = ask("PUT", "/v1/machine/state", &json!({"want": want}).to_string());
        assert_eq!((status, &info["state"]["state"]), (200, &json!(state)));
    }
    let (status, report) = ask("POST", "/v1/pulse", r#"{"count":2}"#);
    assert_eq!((status, &report["pulses"]), (200, &json!(2)), "{report}");
    assert_eq!(ask("POST", "/v1/pulse", "").1["pulses"], 1);
    let (status, info) = ask("PUT", "/v1/machine/state", r#"{"want":"killed"}"#);
    assert_eq!((status, &info["state"]["state"]), (200, &json!("stopped")));
    assert_eq!(guest.end().code, 0);
}

#[test]
fn malformed_requests_get_one_sentence_and_change_nothing() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("web", ["--cmdline", "heartbeat=20ms"]);
    guest.beat();
    let long = "x".repeat(70_000);
    let state = "/v1/machine/state";
    for (method, path, body, status, said) in [
        ("PUT", state, "", 400, "not understood"),
        ("PUT", state, "paused", 400, "not understood"),
        ("PUT", state, "{\"want\":\"paused\"", 400, "not understood"),
        ("PUT", state, r#"{"want":"gone"}"#, 400, "unknown variant `gone`"),
        (
            "PUT",
            state,
            r#"{"want":"paused","force":true}"#,
            400,
            "unknown field `force`",
        ),
        (
            "PUT",
            state,
            r#"{"want":"paused","want":"paused"}"#,
            400,
            "duplicate field",
        ),
        ("PUT", state, r#"["paused"]"#, 400, "not understood"),
        ("PUT", state, "\u{0}\u{1}\u{2}", 400, "not understood"),
        (
            "PUT",
            state,
            &format!("{{\"want\":\"{long}\"}}"),
            413,
            "at most 65536 bytes",
        ),
        ("POST", "/v1/pulse", r#"{"count":0}"#, 400, "between 1 and"),
        ("POST", "/v1/pulse", r#"{"count":99999999}"#, 400, "between 1 and"),
        ("POST", "/v1/pulse", r#"{"count":-1}"#, 400, "not understood"),
        (
            "POST",
            "/v1/pulse",
            r#"{"number":1}"#,
            400,
            "unknown field `number`",
        ),
        ("DELETE", "/v1/machine", "", 405, "does not take DELETE"),
        ("GET", state, "", 405, "does not take GET"),
        ("GET", "/", "", 404, "there is no GET /"),
        ("GET", "/v2/machine", "", 404, "/v2/machine"),
        ("GET", "/v1/machine/../../etc/passwd", "", 404, "there is no"),
    ] {
        let answer = host.raw_request("web", &request(method, path, body));
        let (got, body) = parts(&answer);
        assert_eq!(got, status, "{method} {path}: {answer}");
        let sentence = body["error"].as_str().unwrap_or_else(|| panic!("{answer}"));
        assert!(
            sentence.contains(said) && !sentence.contains('\n') && sentence.len() < 400,
            "{sentence:?}"
        );
    }
    assert_eq!(
        host.client("web").info().unwrap().machine.state.to_string(),
        "running"
    );
    let beat = guest.beat();
    assert_eq!(guest.beat(), beat + 1);
}

#[test]
fn what_is_no_http_ends_the_connection_and_nothing_else() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("web", ["--cmdline", "heartbeat=20ms"]);
    guest.beat();
    let huge_header = [b"GET /v1/machine HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 2 << 20]].concat();
    let many_headers = format!("GET /v1/machine HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(5000));
    let lying_length =
        b"PUT /v1/machine/state HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}".to_vec();
    for garbage in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01".to_vec(),
        vec![0; 10_000],
        huge_header,
        many_headers.into(),
    ] {
        let mut noisy = host.raw_control("web");
        let _ = noisy.write_all(&garbage);
        let _ = noisy.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = std::io::Read::read_to_end(&mut noisy, &mut answer);
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    assert_eq!(parts(&host.raw_request("web", &lying_length)).0, 413);
    // Many connections that say nothing.
    let idle: Vec<_> = (0..200).map(|_| host.raw_control("web")).collect();
    assert!(host.client("web").info().is_ok());
    drop(idle);
    let beat = guest.beat();
    assert_eq!(guest.beat(), beat + 1);
}

#[test]
fn events_tell_every_state_until_the_end() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("web", [""; 0]);
    guest.beat();
    let mut stream = host.raw_control("web");
    stream.write_all(&request("GET", "/v1/events", "")).unwrap();
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let mut next = || {
        lines
            .find(|line| line.starts_with('{'))
            .map(|line| serde_json::from_str::<Value>(&line).unwrap())
    };
    let first = next().unwrap();
    assert_eq!(
        (&first["event"], &first["state"]),
        (&json!("state"), &json!("running"))
    );
    assert!(first["at"].as_f64() > Some(1.7e9));
    for (command, state) in [("pause", "paused"), ("resume", "running"), ("kill", "stopped")] {
        host.ferry([command, "web"]).success();
        assert_eq!(next().unwrap()["state"], state);
    }
    assert!(next().is_none(), "the stream ends with the machine");
}

#[test]
fn other_users_are_refused_even_when_the_socket_is_open_to_them() {
    if skip_without_kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        assert!(
            std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
            "this test needs root"
        );
        eprintln!("skipped: only root can be somebody else");
        return;
    }
    let host = Host::new();
    let mut guest = host.run("web", [""; 0]);
    guest.beat();
    let (entry, nobody) = (host.entry("web").unwrap(), 65534);
    let ask = || {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--max-time", "20", "--unix-socket"])
            .arg(entry.control_socket());
        command.arg("http://ferry/v1/machine").uid(nobody).gid(nobody);
        finish(
            command
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
            PATIENCE,
        )
    };
    // The folder alone keeps them out,
    assert_ne!(ask().code, 0);
    // and if somebody opens everything up, the process itself does.
    for path in [
        host.base().path().parent().unwrap(),
        host.base().path(),
        &entry.dir,
    ] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    for socket in [entry.control_socket(), entry.console_socket()] {
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let answer = ask().success().stdout;
    assert!(answer.contains("belongs to another user"), "{answer}");
    let mut console = Command::new("curl");
    console
        .args(["--silent", "--max-time", "5", "--http0.9", "--unix-socket"])
        .arg(entry.console_socket());
    console
        .arg("http://ferry/")
        .uid(nobody)
        .gid(nobody)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let console = finish(console.spawn().unwrap(), PATIENCE);
    assert!(!console.stdout.contains("beat"), "{console:?}");
    assert_eq!(host.client("web").info().unwrap().name.as_str(), "web");
}
