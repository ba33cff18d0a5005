//! What cannot cross is refused before any harm: the machine stays and runs, the first line that fails says why, nothing is
//! left behind there, and the next try works.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use ferry_migration::failure::{Cause, Phase, Reason};
use ferry_migration::wire::{ENVELOPE_BYTES, Greeting, Message, envelope, open_envelope};
use ferry_tests::crossing::{Evidence, Receiver, migrate, pair, runs_at, start};
use ferry_tests::host::{Host, Ran, skip_without_kvm};
use ferry_tests::relay::Relay;
use serde_json::{Value, json};

/// It failed at once with this reason, the machine runs on, and nothing else was said before.
#[track_caller]
fn says_why(here: &Host, guest: &Evidence, ran: &Ran, why: &str) {
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
    let mut lines = ran.stderr.lines();
    let first = lines.next().unwrap_or_default();
    assert!(
        first.starts_with("ferry: ") && first.contains(why) && first.contains("the machine is here"),
        "{why}: {ran:?}"
    );
    assert_eq!(lines.next(), None, "{ran:?}");
    guest.beats_on(2);
    assert!(runs_at(here, "m"));
}

/// The crossing is refused for this reason, and the receiver ends and leaves nothing.
#[track_caller]
fn refused(here: &Host, there: &Host, guest: &Evidence, receive: &[&str], migrate_with: &[&str], why: &str) {
    let before = there.remains();
    let receiver = Receiver::start(there, &there.file("refused.serial"), receive);
    let ran = migrate(here, "m", &receiver.address, migrate_with);
    says_why(here, guest, &ran, why);
    let (code, said) = receiver.end();
    assert_eq!(code, 1, "{said}");
    assert_eq!(there.remains(), before);
}

#[test]
fn what_the_receiver_does_not_take_stays_and_runs_and_the_next_try_works() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let image = here.file("disk.img");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let disk = format!("path={}", image.display());
    let mut guest = start(
        &here,
        "m",
        "work=allocator memory=4M rate=200",
        &["--memory", "64M", "--cpus", "2", "--disk", &disk],
    );
    let nobody = migrate(&here, "m", "tcp://127.0.0.1:1", &[]);
    says_why(&here, &guest, &nobody, "nobody answers at tcp://127.0.0.1:1");
    let outside = here.ferry(["receive", "tcp://0.0.0.0:0"]);
    assert_eq!(outside.code, 2, "{outside:?}");

    let dir = there.file("images");
    std::fs::create_dir(&dir).unwrap();
    let images = || std::fs::read_dir(&dir).unwrap().count();
    let try_it = |receive: &[&str], why: &str| {
        let receive = [&["--dir", dir.to_str().unwrap()], receive].concat();
        refused(&here, &there, &guest, &receive, &[], why);
    };
    try_it(&["--max-memory", "32M"], "memory");
    try_it(&["--max-disk", "8M"], "disk");
    try_it(&["--max-cpus", "1"], "CPU");
    assert_eq!(images(), 0);
    std::fs::write(dir.join("disk.img"), "precious").unwrap();
    try_it(&[], "disk.img exists already");
    assert_eq!(std::fs::read(dir.join("disk.img")).unwrap(), b"precious");
    std::fs::remove_file(dir.join("disk.img")).unwrap();
    assert_eq!(images(), 0);
    let other = start(&there, "m", "work=idle", &["--memory", "32M"]);
    try_it(&[], "m runs there already");
    other.beats_on(2);
    there.ferry(["kill", "m"]).success();
    refused(
        &here,
        &here,
        &guest,
        &["--name", "n"],
        &[],
        "same runtime directory",
    );
    assert_eq!(images(), 0);

    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &["--dir", dir.to_str().unwrap()]);
    migrate(&here, "m", &receiver.address, &[]).success();
    guest.then(serial);
    guest.swept();
}

#[test]
fn a_machine_that_is_larger_than_the_memory_there_is_refused_by_its_numbers() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> u64 {
        let line = meminfo.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    // What the guest does not touch is not taken from the host, so this one runs. Others may free some memory meanwhile.
    let size = format!("{}M", (kib("MemAvailable:") + kib("MemTotal:")) / 2048);
    if kib("MemAvailable:") + (2 << 20) > kib("MemTotal:") {
        eprintln!("skipped: nearly all memory of this host is free, a machine cannot be larger than that");
        return;
    }
    let guest = start(
        &here,
        "m",
        "work=allocator memory=4M rate=100",
        &["--memory", &size],
    );
    refused(&here, &there, &guest, &[], &[], "are free there");
}

type Edit = fn(&mut Message);

/// Makes the guest rely on CPU features that no host has.
fn ask_too_much(message: &mut Message) {
    let Message::Offer { offer, .. } = message else {
        return;
    };
    let mut description: Value = rmp_serde::from_slice(&offer.card.description).unwrap();
    for leaf in description["guest"]["cpuid"].as_array_mut().unwrap() {
        if leaf["leaf"] == 7 {
            leaf["ebx"] = json!(u32::MAX);
        }
    }
    offer.card.description = rmp_serde::to_vec_named(&description).unwrap();
}

#[test]
fn a_host_that_lacks_a_cpu_feature_or_speaks_another_version_says_so() {
    let Some((here, there, mut guest)) = pair("work=allocator memory=2M rate=100", &["--memory", "64M"])
    else {
        return;
    };
    let cases: [(Edit, &str); 2] = [
        (ask_too_much, "the machine cannot run there: "),
        (
            |message| {
                if let Message::Hello { oldest, newest, .. } = message {
                    (*oldest, *newest) = (900, 901);
                }
            },
            "protocol versions",
        ),
    ];
    for (edit, why) in cases {
        let receiver = Receiver::start(&there, &there.file("refused.serial"), &[]);
        let relay = Relay::edit(receiver.port(), edit);
        let ran = migrate(&here, "m", &relay.address, &[]);
        says_why(&here, &guest, &ran, why);
        assert_eq!(receiver.end().0, 1);
        assert!(there.remains().is_empty());
    }
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    migrate(&here, "m", &receiver.address, &[]).success();
    guest.then(serial);
    guest.swept();
}

/// What a guest uses that is newer than its description goes by its own name there, and only if it is used: an older ferry
/// refuses it by that name, and takes all others.
#[test]
fn what_an_older_ferry_does_not_know_is_named_before_anything_is_copied() {
    const NEWER: &str = "virtio_ring_reset";
    let Some((here, there, mut guest)) = pair(
        "work=allocator+entropy memory=2M rate=100",
        &["--memory", "64M", "--rng"],
    ) else {
        return;
    };
    let plain = start(
        &here,
        "plain",
        "work=allocator memory=2M rate=100",
        &["--memory", "64M"],
    );
    // This ferry stands for the older one, and tomorrow's feature for today's.
    let seen = Arc::<Mutex<Vec<Option<Value>>>>::default();
    let keep = seen.clone();
    let tomorrow = move |message: &mut Message| {
        let Message::Offer { offer, .. } = message else {
            return;
        };
        let mut description: Value = rmp_serde::from_slice(&offer.card.description).unwrap();
        let used = description.as_object_mut().unwrap().remove(NEWER);
        if let Some(used) = &used {
            description["virtio_of_tomorrow"] = used.clone();
        }
        keep.lock().unwrap().push(used);
        offer.card.description = rmp_serde::to_vec_named(&description).unwrap();
    };
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::edit(receiver.port(), tomorrow);
    let ran = migrate(&here, "m", &relay.address, &[]);
    says_why(&here, &guest, &ran, "`virtio_of_tomorrow`");
    assert!(
        ran.stderr.contains("use the same version of ferry on both hosts"),
        "{ran:?}"
    );
    assert!(!relay.messages().iter().any(|point| point.message == "RoundEnd"));
    assert_eq!(receiver.end().0, 1);
    let receiver = Receiver::start(&there, &there.file("plain.serial"), &[]);
    let relay = Relay::edit(receiver.port(), {
        let keep = seen.clone();
        move |message| {
            if let Message::Offer { offer, .. } = message {
                let description: Value = rmp_serde::from_slice(&offer.card.description).unwrap();
                keep.lock().unwrap().push(description.get(NEWER).cloned());
            }
        }
    });
    migrate(&here, "plain", &relay.address, &[]).success();
    drop((receiver, plain));
    assert_eq!(*seen.lock().unwrap(), [Some(json!(true)), None]);
    let receiver = Receiver::start(&there, &serial, &[]);
    migrate(&here, "m", &receiver.address, &["--verify"]).success();
    guest.then(serial);
    guest.swept();
}

/// A receiver that says one thing to whoever greets, and hangs up.
fn answers(with: Vec<u8>) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = format!("tcp://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut greeting = [0; Greeting::BYTES];
        stream.read_exact(&mut greeting).unwrap();
        let mut head = [0; ENVELOPE_BYTES];
        stream.read_exact(&mut head).unwrap();
        let (length, _) = open_envelope(head).unwrap();
        stream.read_exact(&mut vec![0; length]).unwrap();
        stream.write_all(&with).unwrap();
    });
    address
}

#[test]
fn a_peer_that_is_no_receiver_of_ours_is_not_tried_again() {
    if skip_without_kvm() {
        return;
    }
    let here = Host::new();
    let guest = start(
        &here,
        "m",
        "work=allocator memory=2M rate=100",
        &["--memory", "64M"],
    );
    let reason = Reason::new(Cause::Version, "this side speaks the protocol versions 7 to 9");
    let refusal = Message::Refused {
        phase: Phase::Negotiate,
        reason,
    }
    .encode();
    for (answer, why) in [
        ([&envelope(&refusal)[..], &refusal].concat(), "versions 7 to 9"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "m"),
    ] {
        let ran = migrate(&here, "m", &answers(answer), &[]);
        says_why(&here, &guest, &ran, why);
    }
}

/// What a user gets wrong is said before anybody waits and before anything is begun, and a pipe that broke is not tried again.
#[test]
fn odd_orders_are_refused_before_anything_begins() {
    let there = Host::new();
    for (words, why) in [
        (["--dir", "missing"], "missing is not a folder"),
        (["--base", "missing"], "no image missing for --base"),
    ] {
        for once in [&["--once"][..], &[]] {
            let order = [&["receive", "tcp://127.0.0.1:0"][..], &words, once].concat();
            let refused = there.ferry(order);
            assert!(
                refused.code == 2 && refused.stderr.contains(why) && !refused.stderr.contains("waiting"),
                "{refused:?}"
            );
        }
    }
    let Some((here, there, guest)) = pair("work=allocator memory=2M rate=100", &["--memory", "64M"]) else {
        return;
    };
    let receiver = Receiver::start(&there, &there.file("there.serial"), &[]);
    let nowhere = migrate(
        &here,
        "m",
        &receiver.address,
        &["--report", "missing/report.json"],
    );
    assert!(
        nowhere.code == 1
            && nowhere
                .stderr
                .contains("cannot be written to missing/report.json"),
        "{nowhere:?}"
    );
    guest.beats_on(2);
    assert!(runs_at(&here, "m") && there.remains().is_empty());
    let no_ssh = migrate(&here, "m", "ssh://beta.lan", &["--ssh", "/bin/false"]);
    // Which end notices first is chance; one line says it, and no other try does.
    says_why(&here, &guest, &no_ssh, "check the link");
}

#[test]
fn a_receiver_whose_pipe_ends_ends_with_it() {
    let there = Host::new();
    // Nobody said anything through it, so there is nothing to report either.
    there.ferry(["receive", "--stdio"]).success();
    assert!(there.remains().is_empty());
}

#[test]
fn strangers_and_peers_without_tls_are_turned_away_in_both_directions() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    for authority in ["ours", "strange"] {
        here.ferry(["keys", "--dir", authority, "127.0.0.1", "alpha.lan"])
            .success();
    }
    let mut guest = start(
        &here,
        "m",
        "work=allocator memory=2M rate=100",
        &["--memory", "64M"],
    );
    let key = |authority: &str, host: &str| here.file(authority).join(host).to_str().unwrap().to_owned();
    let (ours, strange) = (key("ours", "alpha.lan"), key("strange", "alpha.lan"));
    let server = key("ours", "127.0.0.1");
    let cases: [(&[&str], &[&str], &str); 4] = [
        // Whose authority the receiver does not know.
        (&["--tls", &server], &["--tls", &strange], "TLS with 127.0.0.1"),
        (
            &["--tls", &server, "--allow", "beta.lan"],
            &["--tls", &ours],
            "not one of those that may send machines there",
        ),
        (&["--tls", &server], &[], "the other side speaks TLS"),
        (&[], &["--tls", &ours], "TLS with 127.0.0.1"),
    ];
    for (receive, migrate_with, why) in cases {
        let receiver = Receiver::start(&there, &there.file("refused.serial"), receive);
        let ran = migrate(&here, "m", &receiver.address, migrate_with);
        says_why(&here, &guest, &ran, why);
        assert!(there.remains().is_empty());
        // A stranger does not keep it from waiting for others.
        drop(receiver);
    }
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &["--tls", &server, "--allow", "alpha.lan"]);
    migrate(&here, "m", &receiver.address, &["--tls", &ours]).success();
    guest.then(serial);
    guest.swept();
}
