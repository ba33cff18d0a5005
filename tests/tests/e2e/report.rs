//! The report: what it says is what its schema says, it adds up, and a client's view of the switch is in it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use ferry_migration::failure::{Cause, Failure, Phase, Side, Whereabouts};
use ferry_migration::policy::VcpuThrottle;
use ferry_migration::report::{Conduct, Group, Probe, ProbeOutage, Report, Wrote};
use ferry_network::namespace::Namespace;
use ferry_tests::crossing::{Receiver, migrate, pair, runs_at, start};
use ferry_tests::host::{Host, skip_without_kvm};
use ferry_tests::schema::{unknown_and_absent, violations};
use serde_json::Value;

fn schema() -> Value {
    serde_json::from_str(include_str!("../../../docs/report.schema.json")).unwrap()
}

fn example() -> Value {
    serde_json::from_str(include_str!("../../../docs/report.example.json")).unwrap()
}

fn read(host: &Host, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(host.file(name)).unwrap()).unwrap()
}

fn nanoseconds(time: &Value) -> u64 {
    time["secs"].as_u64().unwrap() * 1_000_000_000 + time["nanos"].as_u64().unwrap()
}

/// A field that is added to the report and not to the schema, or taken away from only one of them, is found here.
#[test]
fn every_field_of_the_report_is_in_the_schema_and_the_other_way_round() {
    assert_eq!(violations(&schema(), &example()), [""; 0]);
    let mut report: Report = serde_json::from_value(example()).unwrap();
    let again = serde_json::to_value(&report).unwrap();
    assert_eq!(
        again,
        example(),
        "the example is older than a field of the report"
    );
    assert!(
        report.conduct.is_some(),
        "the example is of a crossing that copied nothing"
    );
    // Whatever may be missing is there.
    let ms = Duration::from_millis(1);
    report.outcome.failure = Some(Failure {
        side: Side::Outgoing,
        phase: Phase::CopyLive,
        cause: Cause::Link,
        whereabouts: Whereabouts::Here,
        message: "m".into(),
    });
    report.promise.get_or_insert_default();
    report.impact.write_faults = Some(ms);
    report.impact.write_fault_count = Some(1);
    for vcpu in &mut report.impact.vcpus {
        vcpu.write_fault_count = Some(1);
    }
    report.clock_behind = Some(ms);
    report.checks.compared = Some(true);
    for round in &mut report.rounds {
        round.promise.get_or_insert_default();
        round.bandwidth_bytes_per_sec = Some(1);
        round.throttled_vcpus = vec![VcpuThrottle { vcpu: 1, percent: 5 }];
    }
    report.conduct = Some(Conduct {
        link_bytes_per_sec: Some(1),
        service_bytes_per_sec: Some(1),
        memory: Wrote {
            groups: vec![Group::default()],
            ..Wrote::default()
        },
        disk: Wrote {
            groups: vec![Group::default()],
            ..Wrote::default()
        },
        ..Conduct::default()
    });
    report.probe = Some(Probe {
        outage: Some(ProbeOutage {
            at_most: Some(ms),
            ..ProbeOutage::default()
        }),
        latency_median: Some(ms),
        latency_99: Some(ms),
        latency_max: Some(ms),
        first_failure: Some("f".into()),
        ..Probe::default()
    });
    assert!(!report.rounds.is_empty() && !report.timeline.is_empty() && report.machine.is_some());
    let whole = serde_json::to_value(&report).unwrap();
    assert_eq!(violations(&schema(), &whole), [""; 0]);
    let (unknown, absent) = unknown_and_absent(&schema(), &whole);
    assert_eq!(unknown, [""; 0], "the schema lacks what the report has");
    assert_eq!(absent, [""; 0], "the schema has what the report lacks");
}

/// A report from before the newest fields is still read.
#[test]
fn a_report_of_an_older_version_is_read() {
    let mut old = example();
    for newer in ["fact", "clock_behind", "timeline", "conduct", "probe"] {
        old.as_object_mut().unwrap().remove(newer).unwrap();
    }
    old["downtime"].as_object_mut().unwrap().remove("answer").unwrap();
    for newer in ["write_fault_count", "vcpus"] {
        old["impact"].as_object_mut().unwrap().remove(newer).unwrap();
    }
    for round in old["rounds"].as_array_mut().unwrap() {
        round.as_object_mut().unwrap().remove("throttled_vcpus").unwrap();
    }
    let host = Host::new();
    std::fs::write(host.file("old.json"), old.to_string()).unwrap();
    let shown = host
        .ferry(["report", host.file("old.json").to_str().unwrap()])
        .success()
        .stdout;
    assert!(shown.contains("downtime by part"), "{shown}");
    for (name, text) in [
        ("empty", ""),
        ("list", "[]"),
        ("cut", "{\"session\":[1,"),
        ("noise", "\u{0}\u{1}"),
    ] {
        std::fs::write(host.file(name), text).unwrap();
        let ran = host.ferry(["report", host.file(name).to_str().unwrap(), "--html", "-"]);
        assert_eq!(ran.code, 1, "{name}: {ran:?}");
        assert!(
            ran.stderr.contains("is not the report of a crossing"),
            "{name}: {ran:?}"
        );
    }
}

#[test]
fn real_reports_are_as_the_schema_says_whether_the_machine_moved_or_not() {
    let Some((here, there, mut guest)) = pair("work=allocator memory=32M rate=1000", &["--memory", "128M"])
    else {
        return;
    };
    // Refused.
    let refusing = Receiver::start(&there, &there.file("no.serial"), &["--max-memory", "64M"]);
    let refused = migrate(&here, "m", &refusing.address, &["--report", "refused.json"]);
    assert_eq!(refused.code, 1);
    let report = read(&here, "refused.json");
    assert_eq!(violations(&schema(), &report), [""; 0]);
    assert_eq!(report["outcome"]["whereabouts"], "here");
    drop(refusing);
    // Moved, by the policy that plans anew all the time, over a link that is slower than this host when it is busy.
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let flags = [
        "--report",
        "moved.json",
        "--policy",
        "calm-live",
        "--link",
        "100Mbit",
        "--sla",
        "rate=20/s,size=10kB,deadline=1s",
    ];
    migrate(&here, "m", &receiver.address, &flags).success();
    guest.then(serial);
    guest.beats_on(5);
    assert!(runs_at(&there, "m"));
    let report = read(&here, "moved.json");
    assert_eq!(violations(&schema(), &report), [""; 0]);
    // No reason is written in exponents.
    for round in report["rounds"].as_array().unwrap() {
        let reason = round["reason"].as_str().unwrap();
        assert!(!reason.contains("e-") && !reason.contains("-0."), "{reason}");
    }
    // The guest's clock was measured, or is said not to have been.
    let behind = &report["clock_behind"];
    assert!(
        behind.is_null() || nanoseconds(behind) < 60_000_000_000,
        "{behind}"
    );
    // The first instruction there is before its word was heard here; the parts add up without the answer's way.
    let downtime = &report["downtime"];
    assert!(
        nanoseconds(&downtime["resume_there"]) <= nanoseconds(&downtime["resume"]),
        "{downtime}"
    );
    let timeline = report["timeline"].as_array().unwrap();
    assert!(timeline.len() >= 2, "{timeline:?}");
    assert!(timeline.is_sorted_by_key(|moment| nanoseconds(&moment["at"])));
    assert!(timeline.is_sorted_by_key(|moment| moment["wire_bytes"].as_u64().unwrap()));
    played_again(&here, "moved.json", &report);
    // The page, from the kept report.
    let page = here.ferry(["report", "m", "--html", "-"]).success().stdout;
    assert!(
        page.starts_with("<!doctype html>") && page.matches("<svg").count() >= 4,
        "{page}"
    );
    there.ferry(["kill", "m"]).success();
    guest.sound();
}

/// As the crossing is told.
const LINK_BYTES_PER_SEC: f64 = 100e6 / 8.0;

/// What `ferry simulate` makes of the report of a real crossing: with the same policy about the same bytes in about the same
/// time - the guest is made of a few numbers, and the real host was busy meanwhile, so within a half - and an answer for
/// the other policies.
fn played_again(host: &Host, file: &str, report: &Value) {
    let path = host.file(file);
    let arguments = [
        "simulate",
        "--trace",
        path.to_str().unwrap(),
        "--policy",
        "calm-live,qemu,xen-code",
        "--sla",
        "rate=20/s,size=10kB,deadline=1s",
        "--sharing",
        "reserved",
    ];
    let shown = host.ferry(arguments).success().stdout;
    assert!(shown.contains("m itself crossed with calm-live"), "{shown}");
    let ran = host
        .ferry(arguments.into_iter().chain(["--json"]))
        .success()
        .stdout;
    let outcomes: Value = serde_json::from_str(&ran).unwrap();
    let outcomes = outcomes.as_array().unwrap();
    assert!(
        outcomes.len() == 3 && outcomes.iter().all(|o| o["crossed"] == true),
        "{ran}"
    );
    let within = |said: f64, least: f64, most: f64, what: &str| {
        assert!(
            said > 0.5 * least && said < 1.5 * most,
            "{what}: {said} for {least} to {most}\n{shown}"
        );
    };
    let bytes = report["wire_bytes"].as_f64().unwrap();
    let copying = nanoseconds(&report["total"]) - nanoseconds(&report["prepare"]);
    // What the link takes for them at least: how much a busy host adds to that, no report tells.
    let carried = bytes / LINK_BYTES_PER_SEC;
    let total = outcomes[0]["total_s"].as_f64().unwrap();
    within(total, carried, copying as f64 / 1e9, "total");
    within(outcomes[0]["bytes"].as_f64().unwrap(), bytes, bytes, "bytes");
}

fn fetch(address: &str) -> std::io::Result<usize> {
    let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer.len())
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status();
    assert!(status.unwrap().success(), "ip {words}");
}

/// The guest serves a web page over a bridge; somebody asks for it every two milliseconds while it moves.
#[test]
fn the_report_holds_what_a_client_of_the_guest_saw() {
    if skip_without_kvm() {
        return;
    }
    let Ok(namespace) = Namespace::create() else {
        assert!(
            std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
            "this test must run"
        );
        eprintln!("skipped: network namespaces need root");
        return;
    };
    namespace.run(probed).unwrap();
}

fn probed() {
    ip("link add br0 type bridge");
    ip("addr add 10.9.0.1/24 dev br0");
    ip("link set br0 up");
    let (here, there) = (Host::new(), Host::new());
    let mut guest = start(
        &here,
        "m",
        "work=web ip=10.9.0.2/24 body=1K",
        &["--memory", "128M", "--net", "bridge=br0"],
    );
    here.wait_until("the guest serves its page", || fetch("10.9.0.2:80").is_ok());
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);

    // Nothing answers there: the machine is not moved.
    let wrong = migrate(&here, "m", &receiver.address, &["--probe", "tcp:10.9.0.2:81"]);
    assert_eq!(wrong.code, 1, "{wrong:?}");
    assert!(
        wrong.stderr.contains("was not moved") && runs_at(&here, "m"),
        "{wrong:?}"
    );

    let flags = ["--probe", "http://10.9.0.2/", "--report", "report.json", "--json"];
    let ran = migrate(&here, "m", &receiver.address, &flags).success();
    guest.then(serial);
    guest.beats_on(5);
    assert!(runs_at(&there, "m"), "{}", receiver.said());
    let report = read(&here, "report.json");
    assert_eq!(violations(&schema(), &report), [""; 0]);
    let probe = &report["probe"];
    let count = |name: &str| probe[name].as_u64().unwrap();
    assert_eq!(count("sent"), count("answered") + count("lost"), "{probe}");
    // Three seconds after it alone are hundreds of questions, however busy the host is.
    assert!(count("answered") > 100, "{probe}");
    // Nobody is answered while the guest stands still: the longest silence is at least the downtime, and it is where the
    // downtime was, not before the crossing.
    let (silence, downtime) = (
        nanoseconds(&probe["longest_silence"]),
        nanoseconds(&report["downtime"]["total"]),
    );
    let prepared = nanoseconds(&report["prepare"]);
    assert!(silence * 10 >= downtime * 8, "{silence} {downtime} {probe}");
    assert!(silence < 30_000_000_000, "{probe}");
    assert!(nanoseconds(&probe["latency_median"]) > 0, "{probe}");
    assert!(prepared < nanoseconds(&report["total"]));
    // The last line of the events and the kept report are the same report.
    let last: Value = serde_json::from_str(ran.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["report"], report);
    let kept: Value = serde_json::from_str(&here.ferry(["report", "m", "--json"]).success().stdout).unwrap();
    assert_eq!(kept, report);
    let shown = here.ferry(["report", "m"]).success().stdout;
    assert!(shown.contains("a client of http://10.9.0.2/"), "{shown}");
    there.ferry(["kill", "m"]).success();
    guest.sound();
}
