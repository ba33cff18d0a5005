//! Whole crossings over real sockets, with real threads and real time.
#![allow(clippy::unwrap_used)] // a test's own helpers

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Built, FakeIncoming, Stage, Stand, options};
use ferry_migration::clock::HostClock;
use ferry_migration::failure::{Cause, Reason, Whereabouts};
use ferry_migration::handover::{LedgerId, MachineId, SessionId};
use ferry_migration::link::{Lane, Link, LinkError, Peer};
use ferry_migration::machine::{MachineCard, Offer, Unobserved};
use ferry_migration::options::Options;
use ferry_migration::outgoing::{World, cross};
use ferry_migration::receiver::{ReceiveOptions, Received, receive};
use ferry_migration::rehearsal::{Answer, Question, rehearse};
use ferry_migration::report::Report;
use ferry_migration::transport::faulty::{Cut, Faulty, When};
use ferry_migration::transport::{
    Address, Arrival, Listener, PipeLink, PipeListener, SocketLink, Stream, Tls,
};
use ferry_migration::wire::{ENVELOPE_BYTES, Greeting, Message, OLDEST_VERSION, Purpose, VERSION, envelope};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

const STALL: Duration = Duration::from_secs(5);

fn cross_over(
    stage: &mut Stage,
    address: &str,
    options: &Options,
    wrap: impl FnOnce(SocketLink) -> Box<dyn Link>,
) -> (Report, Received) {
    cross_safely(stage, address, options, None, None, wrap)
}

/// Crosses over a listener at `address`; the link may be wrapped.
fn cross_safely(
    stage: &mut Stage,
    address: &str,
    options: &Options,
    server: Option<Tls>,
    client: Option<Tls>,
    wrap: impl FnOnce(SocketLink) -> Box<dyn Link>,
) -> (Report, Received) {
    let listener = Listener::bind(&address.parse::<Address>().unwrap(), server, STALL).unwrap();
    let address = listener.address().unwrap();
    let mut link = wrap(SocketLink::new(options.session, address, client, STALL));
    let (give, arrivals) = crossbeam::channel::unbounded();
    let over = AtomicBool::new(false);
    let (built, witness) = (Arc::clone(&stage.built), Arc::clone(&stage.witness));
    let mut their_ledger = stage.their_ledger.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok(socket) = listener.accept() {
                if over.load(Ordering::Acquire) {
                    return;
                }
                if let Ok(arrival) = listener.greet(socket) {
                    give.send(arrival).unwrap();
                }
            }
        });
        let receiver = scope.spawn(|| {
            let mut machine = FakeIncoming { built, witness };
            let options = ReceiveOptions {
                stall: STALL,
                reconnect_for: STALL,
                ..ReceiveOptions::default()
            };
            let stop = AtomicBool::new(false);
            receive(
                &mut machine,
                &mut their_ledger,
                &HostClock::new(),
                &arrivals,
                &stop,
                &options,
            )
        });
        let world = World {
            machine: &mut stage.outgoing,
            link: &mut *link,
            ledger: &mut stage.our_ledger,
            clock: &HostClock::new(),
            observer: &Unobserved,
            handle: &stage.handle,
        };
        let report = cross(world, options);
        drop(link);
        let received = receiver.join().unwrap();
        over.store(true, Ordering::Release);
        let _ = SocketLink::new(options.session, listener.address().unwrap(), None, STALL).control();
        (report, received)
    })
}

#[test]
fn over_tcp_with_one_lane_and_with_four() {
    for lanes in [1, 4] {
        let mut stage = Stage::new(u64::from(lanes));
        let (report, received) = cross_over(&mut stage, "tcp://127.0.0.1:0", &options(1, lanes), |link| {
            Box::new(link)
        });
        assert_eq!(report.outcome.failure, None, "{report:#?}");
        assert_eq!(report.outcome.whereabouts, Whereabouts::There);
        assert!(received.taken, "{received:?}");
        assert_eq!(stage.outgoing.stand, Stand::Departed);
        stage.assert_equal();
    }
}

#[test]
fn over_a_unix_socket() {
    let room = tempfile::tempdir().unwrap();
    let mut stage = Stage::new(9);
    let address = format!("unix:{}", room.path().join("in").display());
    let (report, received) = cross_over(&mut stage, &address, &options(1, 2), |link| Box::new(link));
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    assert!(received.taken, "{received:?}");
    stage.assert_equal();
}

#[test]
fn a_link_that_breaks_and_comes_back_costs_time_and_nothing_else() {
    for (at, when) in [
        (8, When::After),
        (9, When::Middle),
        (12, When::Before),
        (15, When::Middle),
    ] {
        let mut stage = Stage::new(at);
        let cuts = vec![Cut { at, when }];
        let (report, received) = cross_over(&mut stage, "tcp://127.0.0.1:0", &options(1, 3), |link| {
            Box::new(Faulty::new(link, cuts, true, Arc::new(|| {})))
        });
        assert_eq!(report.outcome.failure, None, "cut at {at}: {report:#?}");
        assert_eq!(report.reconnects, 1, "cut at {at}");
        assert!(received.taken, "{received:?}");
        stage.assert_equal();
    }
}

#[test]
fn a_full_disk_there_is_said_in_words_here_and_the_machine_stays() {
    let mut stage = Stage::new(4);
    stage.built.room.store(300_000, Ordering::Release);
    let (report, received) = cross_over(&mut stage, "tcp://127.0.0.1:0", &options(1, 2), |link| {
        Box::new(link)
    });
    let failure = report.outcome.failure.clone().unwrap();
    assert_eq!(failure.cause, Cause::NoSpace, "{failure}");
    assert!(
        failure.to_string().contains("the disk there is full"),
        "{failure}"
    );
    assert_eq!(report.outcome.whereabouts, Whereabouts::Here);
    assert_eq!(stage.outgoing.stand, Stand::Running);
    assert!(!received.taken);
    assert_eq!(received.reason.unwrap().cause, Cause::NoSpace);
    assert!(stage.outgoing.blocks.iter().all(|block| !block.is_tracking()));
}

/// TLS between hosts that know each other by one authority.
fn tls(room: &std::path::Path) -> (Tls, Tls) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let host = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let dir = room.join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(
            dir.join("cert.pem"),
            params.signed_by(&key, &issuer).unwrap().pem(),
        )
        .unwrap();
        std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
        std::fs::write(dir.join("ca.pem"), &ca).unwrap();
        Tls::from_dir(&dir, Vec::new()).unwrap()
    };
    (host("127.0.0.1"), host("alpha.lan"))
}

#[test]
fn over_tls_with_a_cut_in_the_middle() {
    let room = tempfile::tempdir().unwrap();
    let (server, client) = tls(room.path());
    let mut stage = Stage::new(21);
    let cuts = vec![Cut {
        at: 10,
        when: When::Middle,
    }];
    let (report, received) = cross_safely(
        &mut stage,
        "tcp://127.0.0.1:0",
        &options(1, 3),
        Some(server),
        Some(client),
        |link| Box::new(Faulty::new(link, cuts, true, Arc::new(|| {}))),
    );
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    assert_eq!(report.reconnects, 1);
    assert!(received.taken, "{received:?}");
    stage.assert_equal();
}

#[test]
fn over_one_pipe_as_ssh_gives_it() {
    let mut stage = Stage::new(22);
    let options = options(1, 4);
    let (near, far) = UnixStream::pair().unwrap();
    let listener = PipeListener::new(far.try_clone().unwrap(), far, STALL).unwrap();
    let mut link = PipeLink::new(options.session, near.try_clone().unwrap(), near, STALL).unwrap();
    let (give, arrivals) = crossbeam::channel::unbounded();
    let mut machine = FakeIncoming {
        built: Arc::clone(&stage.built),
        witness: Arc::clone(&stage.witness),
    };
    let mut their_ledger = stage.their_ledger.clone();
    std::thread::spawn(move || {
        while let Ok(arrival) = listener.accept() {
            let _ = give.send(arrival);
        }
    });
    let received = std::thread::spawn(move || {
        let stop = AtomicBool::new(false);
        let options = ReceiveOptions::default();
        receive(
            &mut machine,
            &mut their_ledger,
            &HostClock::new(),
            &arrivals,
            &stop,
            &options,
        )
    });
    let world = World {
        machine: &mut stage.outgoing,
        link: &mut link,
        ledger: &mut stage.our_ledger,
        clock: &HostClock::new(),
        observer: &Unobserved,
        handle: &stage.handle,
    };
    let report = cross(world, &options);
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    assert_eq!(report.lanes, 1);
    assert!(received.join().unwrap().taken);
    stage.assert_equal();
}

/// Asks twice before it connects in earnest: once of a side that would refuse.
struct AskFirst {
    link: SocketLink,
    built: Arc<Built>,
    offer: Option<Offer>,
}

impl AskFirst {
    fn ask(&mut self, offer: &Offer) -> Answer {
        let question = Question {
            session: SessionId([77; 16]),
            ledger: LedgerId([78; 16]),
            epoch: 1,
            offer: offer.clone(),
            lanes: 4,
            stall: STALL,
            measure: true,
            cancelled: &|| false,
        };
        rehearse(&mut self.link, &HostClock::new(), &question)
    }
}

impl Link for AskFirst {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        if let Some(offer) = self.offer.take() {
            *self.built.refuse.lock().unwrap() = Some(Reason::new(Cause::NoMemory, "too big"));
            let answer = self.ask(&offer);
            assert_eq!(
                answer.refused,
                Some(Reason::new(Cause::NoMemory, "too big")),
                "{answer:?}"
            );
            assert!(
                answer.reached && answer.link_bytes_per_sec.unwrap() > 1e6,
                "{answer:?}"
            );
            *self.built.refuse.lock().unwrap() = None;
            let answer = self.ask(&offer);
            assert_eq!((answer.refused.as_ref(), answer.lanes), (None, 4), "{answer:?}");
            assert!(answer.link_bytes_per_sec.unwrap() > 1e6 && answer.round_trip.is_some());
            assert_eq!(
                self.built.prepared.load(Ordering::Acquire),
                0,
                "something was built for a question"
            );
        }
        self.link.control()
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        self.link.lane(session, attempt, index)
    }

    fn most_lanes(&self) -> u16 {
        self.link.most_lanes()
    }
}

/// A question leaves nothing: neither a refusal nor an answer keeps the machine from coming afterwards.
#[test]
fn a_receiver_that_was_asked_waits_on() {
    let mut stage = Stage::new(31);
    let built = Arc::clone(&stage.built);
    let info = stage.outgoing.blocks.iter().map(|block| block.info.clone());
    let offer = Offer {
        card: MachineCard {
            machine: MachineId([4; 16]),
            name: "asked".into(),
            running: true,
            description: b"two vCPUs".to_vec(),
        },
        blocks: info.collect(),
    };
    let (report, received) = cross_over(&mut stage, "tcp://127.0.0.1:0", &options(1, 2), |link| {
        Box::new(AskFirst {
            link,
            built,
            offer: Some(offer),
        })
    });
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    assert!(received.taken, "{received:?}");
    stage.assert_equal();
    assert_eq!(
        (report.fact.total, report.fact.wire_bytes),
        (report.total, report.wire_bytes)
    );
}

/// A connection that says one message and hangs up when it is answered. Just before, somebody else may come.
struct Says {
    message: std::io::Cursor<Vec<u8>>,
    answered: Arc<Mutex<Vec<u8>>>,
    first: Option<Box<dyn FnOnce() + Send>>,
}

impl Says {
    fn hello(session: SessionId, answered: &Arc<Mutex<Vec<u8>>>) -> Says {
        let hello = Message::Hello {
            oldest: OLDEST_VERSION,
            newest: VERSION,
            session,
            attempt: 1,
            ledger: LedgerId([78; 16]),
            purpose: Purpose::Begin,
        }
        .encode();
        Says {
            message: std::io::Cursor::new([&envelope(&hello)[..], &hello].concat()),
            answered: Arc::clone(answered),
            first: None,
        }
    }

    fn arrival(self, session: SessionId) -> Arrival {
        Arrival {
            greeting: Greeting::Control { session, attempt: 1 },
            stream: Box::new(self),
        }
    }
}

impl Read for Says {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.message.read(buffer)
    }
}

impl Write for Says {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.first.take().into_iter().for_each(|first| first());
        self.answered.lock().unwrap().extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Stream for Says {
    fn set_read_limit(&mut self, _: Duration) -> std::io::Result<()> {
        Ok(())
    }

    fn set_write_limit(&mut self, _: Duration) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn who_comes_in_the_instant_in_which_an_asker_hangs_up_is_not_told_that_this_side_is_busy() {
    let stage = Stage::new(33);
    let mut machine = FakeIncoming {
        built: Arc::clone(&stage.built),
        witness: Arc::clone(&stage.witness),
    };
    let mut their_ledger = stage.their_ledger.clone();
    let (give, arrivals) = crossbeam::channel::unbounded();
    let (asked, answered) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<Mutex<Vec<u8>>>::default());
    let (asker, comer) = (SessionId([77; 16]), SessionId([79; 16]));
    let mut asks = Says::hello(asker, &asked);
    let (then, comes) = (give.clone(), Says::hello(comer, &answered));
    asks.first = Some(Box::new(move || {
        then.send(comes.arrival(comer)).unwrap();
        // It waits in the receiver's queue before the asker's end can be read.
        std::thread::sleep(Duration::from_millis(500));
    }));
    give.send(asks.arrival(asker)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stops = Arc::clone(&stop);
    let receiver = std::thread::spawn(move || {
        let options = ReceiveOptions::default();
        receive(
            &mut machine,
            &mut their_ledger,
            &HostClock::new(),
            &arrivals,
            &stops,
            &options,
        )
    });
    let begun = std::time::Instant::now();
    while answered.lock().unwrap().is_empty() && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(5));
    }
    stop.store(true, Ordering::Release);
    assert!(!receiver.join().unwrap().taken);
    for heard in [asked, answered] {
        let bytes = heard.lock().unwrap().clone();
        let message = Message::decode(&bytes[ENVELOPE_BYTES..]).unwrap();
        assert_eq!(message.name(), "Welcome", "{message:?}");
    }
}

/// A receiver at the end of a pipe whose other end only asked, and is gone, does not wait for ever.
#[test]
fn a_pipe_that_only_asked_ends_its_receiver() {
    let stage = Stage::new(32);
    let (near, far) = UnixStream::pair().unwrap();
    let listener = PipeListener::new(far.try_clone().unwrap(), far, STALL).unwrap();
    let (give, arrivals) = crossbeam::channel::unbounded();
    let mut machine = FakeIncoming {
        built: Arc::clone(&stage.built),
        witness: Arc::clone(&stage.witness),
    };
    let mut their_ledger = stage.their_ledger.clone();
    std::thread::spawn(move || {
        while let Ok(arrival) = listener.accept() {
            let _ = give.send(arrival);
        }
    });
    let (done, ended) = crossbeam::channel::bounded(1);
    std::thread::spawn(move || {
        let stop = AtomicBool::new(false);
        let options = ReceiveOptions::default();
        let clock = HostClock::new();
        let received = receive(
            &mut machine,
            &mut their_ledger,
            &clock,
            &arrivals,
            &stop,
            &options,
        );
        let _ = done.send(received);
    });
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let received = ended.recv_timeout(Duration::from_secs(20)).expect("it ends");
    assert!(!received.taken && received.reason.is_some(), "{received:?}");
}

/// Somebody answers and then says nothing.
#[test]
fn a_peer_that_stalls_is_noticed_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp://{}", silent.local_addr().unwrap()).parse().unwrap();
    let mut stage = Stage::new(23);
    let mut options = options(1, 1);
    (options.stall, options.reconnect_for) = (Duration::from_millis(300), Duration::ZERO);
    let began = std::time::Instant::now();
    let world = World {
        machine: &mut stage.outgoing,
        link: &mut SocketLink::new(options.session, address, None, options.stall),
        ledger: &mut stage.our_ledger,
        clock: &HostClock::new(),
        observer: &Unobserved,
        handle: &stage.handle,
    };
    let report = cross(world, &options);
    let failure = report.outcome.failure.unwrap();
    assert_eq!(failure.cause, Cause::Stalled, "{failure}");
    assert_eq!(report.outcome.whereabouts, Whereabouts::Here);
    assert!(stage.witness.runs_here());
    // The farewell takes its time, too.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}
