//! What is said before a crossing: true enough to go by, and saying it changes nothing.

use ferry_tests::crossing::{Receiver, migrate, pair, runs_at, start};
use ferry_tests::host::{Host, ferry_binary, skip_without_kvm};
use serde_json::Value;

fn seconds(time: &Value) -> f64 {
    time["secs"].as_f64().unwrap() + time["nanos"].as_f64().unwrap() / 1e9
}

fn dry_run(host: &Host, to: &str, more: &[&str]) -> (i32, Value, String) {
    let mut arguments = vec!["--dry-run", "--json"];
    arguments.extend(more);
    let ran = migrate(host, "m", to, &arguments);
    let value = serde_json::from_str(&ran.stdout).unwrap_or(Value::Null);
    (ran.code, value, ran.stderr)
}

#[test]
fn a_dry_run_tells_what_would_happen_and_a_crossing_after_it_is_whole() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let images = there.file("images");
    std::fs::create_dir(&images).unwrap();
    let image = here.file("disk.img");
    std::fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    let disk = format!("path={}", image.display());
    let mut guest = start(
        &here,
        "m",
        "work=allocator+gc+disk memory=16M heap=8M rate=2000 journal=4M",
        &["--memory", "128M", "--cpus", "2", "--disk", &disk],
    );
    guest.wait_for_line("ready");
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &["--dir", images.to_str().unwrap()]);

    let (code, said, stderr) = dry_run(
        &here,
        &receiver.address,
        &["--sla", "rate=20/s,size=10kB,deadline=1s"],
    );
    assert_eq!(code, 0, "{said} {stderr}");
    assert_eq!(said["receiver"]["says"], "yes", "{said}");
    let used = said["memory"]["used_bytes"].as_u64().unwrap();
    assert!((8 << 20..=128 << 20).contains(&used), "{said}");
    let writes: Vec<u64> = said["writes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|written| written["bytes"].as_u64().unwrap())
        .collect();
    // The guest writes all the time, and a longer window never shows less.
    assert!(writes.len() >= 3 && writes.is_sorted(), "{said}");
    assert!(*writes.last().unwrap() > 100 * 4096, "{said}");
    assert!(
        said["link"]["bytes_per_sec"].as_u64().unwrap() > 1 << 20,
        "{said}"
    );
    assert_eq!(said["link"]["measured"], true, "{said}");
    let forecasts = said["forecasts"].as_array().unwrap();
    assert!(forecasts.len() >= 9, "{said}");
    assert_eq!(
        (&forecasts[0]["policy"], &forecasts[0]["chosen"]),
        (&"calm-live".into(), &true.into())
    );
    let qemu = forecasts
        .iter()
        .find(|forecast| forecast["policy"] == "qemu")
        .unwrap();
    assert_eq!(qemu["crosses"], true, "{said}");
    let (wire, total) = (&qemu["wire_bytes"]["expected"], &qemu["total_secs"]["expected"]);
    assert!(
        wire.as_f64().unwrap() > 1e6 && total.as_f64().unwrap() > 0.0,
        "{said}"
    );
    assert!(qemu["cost"]["expected"].as_f64().unwrap() >= 0.0, "{said}");

    // Nothing has changed: the guest runs here, nothing is there, and the receiver waits.
    guest.beats_on(5);
    assert!(runs_at(&here, "m"));
    assert!(there.entry("m").is_none());
    assert_eq!(std::fs::read_dir(&images).unwrap().count(), 0);
    // For people, too, and without a word of JSON.
    let shown = migrate(&here, "m", &receiver.address, &["--dry-run", "--verify"])
        .success()
        .stdout;
    assert!(
        shown.contains("would take m") && shown.contains("max *"),
        "{shown}"
    );

    // The crossing that follows is complete, and has a promise from before it began.
    let flags = ["--verify", "--report", "report.json"];
    migrate(&here, "m", &receiver.address, &flags).success();
    guest.then(serial);
    guest.beats_on(10);
    assert!(runs_at(&there, "m"), "{}", receiver.said());
    guest.swept();
    let report: Value = serde_json::from_slice(&std::fs::read(here.file("report.json")).unwrap()).unwrap();
    assert_eq!(report["checks"]["compared"], true);
    let (promise, fact) = (&report["promise"], &report["fact"]);
    assert_eq!(seconds(&promise["at"]), 0.0, "{promise}");
    assert!(
        seconds(&promise["total"]) > 0.0 && seconds(&promise["downtime"]) > 0.0,
        "{promise}"
    );
    assert!(promise["wire_bytes"].as_u64().unwrap() > 0, "{promise}");
    assert_eq!(
        (&fact["total"], &fact["downtime"], &fact["wire_bytes"]),
        (
            &report["total"],
            &report["downtime"]["total"],
            &report["wire_bytes"]
        )
    );
    // A machine that is gone cannot be rehearsed.
    here.wait_until("its process is gone", || here.entry("m").is_none());
    assert_eq!(dry_run(&here, &receiver.address, &[]).0, 1);
    there.ferry(["kill", "m"]).success();
    guest.sound();
}

#[test]
fn a_receiver_that_would_refuse_says_why_and_waits_on() {
    let Some((here, there, mut guest)) = pair("work=allocator memory=8M rate=500", &["--memory", "128M"])
    else {
        return;
    };
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &["--max-memory", "64M"]);
    for _ in 0..2 {
        let (code, said, stderr) = dry_run(&here, &receiver.address, &[]);
        assert_eq!(code, 1, "{said}");
        assert_eq!(
            (&said["receiver"]["says"], &said["receiver"]["cause"]),
            (&"no".into(), &"not-allowed".into())
        );
        assert!(
            stderr.contains("would not cross") && stderr.contains("64M"),
            "{stderr}"
        );
        // What the link carries is told all the same.
        assert!(!said["forecasts"].as_array().unwrap().is_empty(), "{said}");
    }
    drop(receiver);
    // Nobody there: with a stated link it can still be said what a crossing would take, without one it cannot.
    let nobody = "tcp://127.0.0.1:1";
    let (code, said, stderr) = dry_run(&here, nobody, &[]);
    assert_eq!((code, &said["link"]), (1, &Value::Null), "{said}");
    assert!(stderr.contains("--link"), "{stderr}");
    let (code, said, _) = dry_run(&here, nobody, &["--link", "100Mbit"]);
    assert_eq!(
        (code, &said["receiver"]["says"]),
        (0, &"nothing".into()),
        "{said}"
    );
    assert_eq!(said["link"]["bytes_per_sec"], 12_500_000);
    // Some 10 MiB at least over 12.5 MB/s: not a moment, and not an hour.
    let total = said["forecasts"][0]["total_secs"]["expected"].as_f64().unwrap();
    assert!((0.1..300.0).contains(&total), "{said}");
    guest.beats_on(5);
    assert!(runs_at(&here, "m"));
    here.ferry(["kill", "m"]).success();
    guest.then(serial);
    guest.sound();
}

/// Over ssh the receiver is started for the question, and is gone after it.
#[test]
fn a_dry_run_over_ssh_leaves_no_receiver_behind() {
    let Some((here, there, guest)) = pair("work=allocator memory=8M rate=500", &["--memory", "128M"]) else {
        return;
    };
    // What stands in for ssh notes which process the receiver is.
    let (ssh, pid) = (here.file("ssh"), here.file("pid"));
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\nexec sh -c \"echo \\$\\$ > {}; exec $last\"\n",
        pid.display()
    );
    std::fs::write(&ssh, script).unwrap();
    std::fs::set_permissions(&ssh, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let ferry = format!(
        "{} --runtime-dir {}",
        ferry_binary().display(),
        there.file("run").display()
    );
    let over_ssh = ["--ssh", ssh.to_str().unwrap(), "--remote-ferry", &ferry];
    let (code, said, stderr) = dry_run(&here, "ssh://there", &over_ssh);
    assert_eq!(
        (code, &said["receiver"]["says"]),
        (0, &"yes".into()),
        "{said} {stderr}"
    );
    assert_eq!(stderr, "", "nothing but the answer is said");
    let receiver = std::fs::read_to_string(&pid).unwrap();
    let gone = || !std::path::Path::new(&format!("/proc/{}", receiver.trim())).exists();
    here.wait_until("the receiver is gone", gone);
    guest.beats_on(5);
    here.ferry(["kill", "m"]).success();
    guest.sound();
}
