//! A guest that serves a web page through a real TAP device, in a network namespace of its own.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use ferry_network::namespace::Namespace;
use ferry_vmm::config::{MachineConfig, NetConfig};
use ferry_vmm::lifecycle::StopReason;

use crate::harness::{Guest, PATIENCE, config, skip};

pub(crate) fn fetch() -> std::io::Result<usize> {
    // TCP asks a second time after a second.
    let mut stream = TcpStream::connect_timeout(&"10.9.0.2:80".parse().unwrap(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer.len())
}

/// Runs `work` with a guest of this configuration whose TAP has the address 10.9.0.1, in a network namespace of its own.
pub(crate) fn on_a_network(mut config: MachineConfig, work: impl FnOnce(&mut Guest) + Send) {
    let Ok(namespace) = Namespace::create() else {
        assert!(
            std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
            "this test must run"
        );
        eprintln!("skipped: network namespaces need root");
        return;
    };
    namespace
        .run(|| {
            config.nets.push("tap=guest0".parse::<NetConfig>().unwrap());
            let mut guest = Guest::start(&config);
            let address = std::process::Command::new("ip")
                .args(["addr", "add", "10.9.0.1/24", "dev", "guest0"])
                .status();
            assert!(address.unwrap().success());
            work(&mut guest);
        })
        .unwrap();
}

#[test]
fn a_page_is_served_through_a_tap_before_and_after_a_pause() {
    if skip() {
        return;
    }
    let config = config(1, "work=web ip=10.9.0.2/24 body=100K heartbeat=50ms");
    on_a_network(config, |guest| {
        guest.beat();
        let began = Instant::now();
        let bytes = loop {
            match fetch() {
                Ok(bytes) => break bytes,
                Err(error) if began.elapsed() > PATIENCE => panic!("no page came: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        assert!(bytes > 100 << 10, "{bytes} bytes came");
        for _ in 0..5 {
            guest.machine.pause().unwrap();
            guest.machine.resume().unwrap();
            assert_eq!(fetch().unwrap(), bytes);
        }
        let stats = guest.machine.nets().remove(0).stats();
        eprintln!("{stats:?}");
        guest.machine.stop(StopReason::Requested).unwrap();
    });
}
