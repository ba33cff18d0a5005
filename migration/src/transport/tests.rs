//! Real sockets, real TLS, a real pipe: what is sent arrives, strangers do not get in, silence is noticed.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

use super::*;
use crate::failure::Cause;
use crate::handover::SessionId;
use crate::link::{Link, LinkErrorKind, Peer};
use crate::wire::{Greeting, Message};

const SESSION: SessionId = SessionId([7; 16]);
const STALL: Duration = Duration::from_secs(2);

/// Sends a message each way over control and some bytes over a lane.
fn converse(link: &mut dyn Link, accept: impl Fn() -> Arrival + Send + Sync) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let control = accept();
            assert!(matches!(
                control.greeting,
                Greeting::Control {
                    session: SESSION,
                    attempt: 0
                }
            ));
            let mut peer = StreamPeer::new(control.stream, STALL).unwrap();
            assert_eq!(peer.receive(STALL).unwrap().unwrap(), b"hello");
            peer.send(&[9; 100_000]).unwrap();
            let mut lane = accept();
            assert_eq!(
                lane.greeting,
                Greeting::Lane {
                    session: SESSION,
                    attempt: 0,
                    index: 0
                }
            );
            lane.stream.set_read_limit(STALL).unwrap();
            let mut data = vec![0; 3 << 20];
            lane.stream.read_exact(&mut data).unwrap();
            assert!(data.iter().all(|byte| *byte == 5));
            peer.send(b"got it").unwrap();
        });
        let mut peer = link.control().unwrap();
        assert_eq!(
            peer.receive(Duration::ZERO).unwrap(),
            None,
            "nothing was said yet"
        );
        peer.send(b"hello").unwrap();
        assert_eq!(peer.receive(STALL).unwrap().unwrap(), vec![9; 100_000]);
        let mut lane = link.lane(SESSION, 0, 0).unwrap();
        lane.send(&vec![5; 3 << 20]).unwrap();
        lane.flush().unwrap();
        assert_eq!(peer.receive(STALL).unwrap().unwrap(), b"got it");
    });
}

fn over_sockets(address: &str, server: Option<Tls>, client: Option<Tls>) {
    let listener = Listener::bind(&address.parse().unwrap(), server, STALL).unwrap();
    let mut link = SocketLink::new(SESSION, listener.address().unwrap(), client, STALL);
    converse(&mut link, || listener.greet(listener.accept().unwrap()).unwrap());
}

#[test]
fn tcp_carries_a_conversation() {
    over_sockets("tcp://127.0.0.1:0", None, None);
}

#[test]
fn a_unix_socket_carries_a_conversation_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    over_sockets(&format!("unix:{}", dir.path().join("in").display()), None, None);
    assert!(!dir.path().join("in").exists());
}

#[test]
fn one_pipe_carries_control_and_a_lane() {
    let (near, far) = UnixStream::pair().unwrap();
    let listener = PipeListener::new(far.try_clone().unwrap(), far, STALL).unwrap();
    let mut link = PipeLink::new(SESSION, near.try_clone().unwrap(), near, STALL).unwrap();
    converse(&mut link, || listener.accept().unwrap());
}

fn host_keys(dir: &Path, name: &str, issuer: &Issuer<'_, KeyPair>, ca: &str) -> std::path::PathBuf {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(
        dir.join("cert.pem"),
        params.signed_by(&key, issuer).unwrap().pem(),
    )
    .unwrap();
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    std::fs::write(dir.join("ca.pem"), ca).unwrap();
    dir
}

/// Keys of 127.0.0.1 and of a peer "alpha.lan", under an authority of their own.
fn keys(dir: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    (
        host_keys(dir, "127.0.0.1", &issuer, &ca),
        host_keys(dir, "alpha.lan", &issuer, &ca),
    )
}

#[test]
fn tls_lets_in_whom_the_receiver_names_and_no_other() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, client) = keys(ours.path());
    let (_, stranger) = keys(theirs.path());
    let allow = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let tls = |dir: &Path, names: &[&str]| Some(Tls::from_dir(dir, allow(names)).unwrap());

    over_sockets(
        "tcp://127.0.0.1:0",
        tls(&server, &["alpha.lan"]),
        tls(&client, &[]),
    );
    over_sockets("tcp://127.0.0.1:0", tls(&server, &[]), tls(&client, &[]));

    for (names, client) in [
        (&["beta.lan"][..], Some(&client)),
        (&[][..], Some(&stranger)),
        (&[][..], None),
    ] {
        let listener =
            Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap(), tls(&server, names), STALL).unwrap();
        let mut link = SocketLink::new(
            SESSION,
            listener.address().unwrap(),
            client.and_then(|dir| tls(dir, &[])),
            STALL,
        );
        std::thread::scope(|scope| {
            let refused = scope.spawn(|| listener.greet(listener.accept().unwrap()).err().expect("let in"));
            // The client may believe itself connected until it hears otherwise. One that is known and not allowed hears
            // just that, a stranger nothing.
            if let Ok(mut peer) = link.control() {
                let _ = peer.send(b"let me in");
                let heard = peer.receive(STALL).ok().flatten();
                let heard = heard.map(|message| Message::decode(&message).unwrap());
                match heard {
                    Some(Message::Refused { reason, .. }) if !names.is_empty() => {
                        assert_eq!(reason.cause, Cause::NotAllowed);
                    }
                    heard => assert!(names.is_empty() && heard.is_none(), "{heard:?}"),
                }
            }
            let error = refused.join().unwrap();
            if !names.is_empty() {
                assert_eq!(error.kind, LinkErrorKind::Refused, "{error}");
            }
        });
    }
}

#[test]
fn silence_is_noticed_and_named() {
    let listener = Listener::bind(
        &"tcp://127.0.0.1:0".parse().unwrap(),
        None,
        Duration::from_millis(100),
    )
    .unwrap();
    let Address::Tcp { host, port } = listener.address().unwrap() else {
        panic!()
    };
    let _silent = std::net::TcpStream::connect((host.as_str(), port)).unwrap();
    let began = Instant::now();
    let error = listener.greet(listener.accept().unwrap()).err().unwrap();
    assert_eq!(error.kind, LinkErrorKind::Stalled, "{error}");
    assert!(began.elapsed() < STALL);

    // A message that begins and does not end is a stall too; one whose length lies is malformed.
    for (after, kind) in [
        (crate::wire::envelope(b"hello"), LinkErrorKind::Stalled),
        ([255; 8], LinkErrorKind::Malformed),
    ] {
        let mut mute = std::net::TcpStream::connect((host.as_str(), port)).unwrap();
        mute.write_all(
            &Greeting::Control {
                session: SESSION,
                attempt: 0,
            }
            .encode(),
        )
        .unwrap();
        let arrival = listener.greet(listener.accept().unwrap()).unwrap();
        let mut peer = StreamPeer::new(arrival.stream, Duration::from_millis(100)).unwrap();
        mute.write_all(&after).unwrap();
        assert_eq!(peer.receive(STALL).unwrap_err().kind, kind);
    }
}

#[test]
fn nobody_there_is_one_clear_sentence() {
    let mut link = SocketLink::new(SESSION, "tcp://127.0.0.1:1".parse().unwrap(), None, STALL);
    let error = link.control().err().unwrap();
    assert!(
        error.message.contains("nobody answers at tcp://127.0.0.1:1"),
        "{error}"
    );
    let mut link = SocketLink::new(SESSION, Address::Unix("/nowhere/at/all".into()), None, STALL);
    assert!(
        link.control()
            .err()
            .unwrap()
            .message
            .contains("unix:/nowhere/at/all")
    );
}
