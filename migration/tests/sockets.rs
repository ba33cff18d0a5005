//! Whole crossings over real sockets, with real threads and real time.
#![allow(clippy::unwrap_used)] // a test's own helpers

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{FakeIncoming, Stage, Stand, options};
use ferry_migration::clock::HostClock;
use ferry_migration::failure::{Cause, Whereabouts};
use ferry_migration::link::Link;
use ferry_migration::machine::Unobserved;
use ferry_migration::options::Options;
use ferry_migration::outgoing::{World, cross};
use ferry_migration::receiver::{ReceiveOptions, Received, receive};
use ferry_migration::report::Report;
use ferry_migration::transport::faulty::{Cut, Faulty, When};
use ferry_migration::transport::{Address, Listener, SocketLink};

const STALL: Duration = Duration::from_secs(5);

/// Crosses over a listener at `address`; the link may be wrapped.
fn cross_over(
    stage: &mut Stage,
    address: &str,
    options: &Options,
    wrap: impl FnOnce(SocketLink) -> Box<dyn Link>,
) -> (Report, Received) {
    let listener = Listener::bind(&address.parse::<Address>().unwrap(), None, STALL).unwrap();
    let mut link = wrap(SocketLink::new(
        options.session,
        listener.address().unwrap(),
        None,
        STALL,
    ));
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
