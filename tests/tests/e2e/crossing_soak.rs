//! One machine under all loads at once crosses back and forth, again and again: no evidence is damaged, and the processes
//! that run it do not grow; a client is served all the time, and no interface is left behind.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_tests::crossing::{Receiver, begin, migrate, runs_at, start};
use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use ferry_tests::relay::{Act, Point, Relay};

/// FERRY_CROSSINGS asks for more.
fn crossings() -> usize {
    std::env::var("FERRY_CROSSINGS")
        .ok()
        .map_or(4, |text| text.parse().expect("FERRY_CROSSINGS is a number"))
}

/// FERRY_DIRTY_RING has both sides track writes by rings of so many entries.
fn tracking() -> Option<String> {
    let entries = std::env::var("FERRY_DIRTY_RING").ok()?;
    Some(format!("--dirty-ring={entries}"))
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A bridge that both hosts have, with an address for the client.
struct Bridge {
    name: String,
    /// Where the guest is to be found.
    guest: Ipv4Addr,
}

impl Bridge {
    fn make() -> Option<Bridge> {
        let name = format!("fy{}", std::process::id());
        // Four addresses of its own: the same test in another process is no neighbour.
        let four = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + std::process::id() % (1 << 15) * 4;
        let (client, guest) = (Ipv4Addr::from(four + 1), Ipv4Addr::from(four + 2));
        let ip = |words: &[&str]| {
            let ran = Command::new("ip").args(words).output();
            ran.is_ok_and(|ran| ran.status.success())
        };
        let bridge = ip(&["link", "add", &name, "type", "bridge"]).then_some(Bridge { name, guest })?;
        let made = ip(&["addr", "add", &format!("{client}/30"), "dev", &bridge.name])
            && ip(&["link", "set", &bridge.name, "up"]);
        made.then_some(bridge)
    }

    /// How many interfaces of machines are in it.
    fn interfaces(&self) -> usize {
        let folder = std::fs::read_dir(format!("/sys/class/net/{}/brif", self.name));
        folder.map_or(0, Iterator::count)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.name]).output();
    }
}

/// Asks for a page again and again.
struct Client {
    answered: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn ask(guest: Ipv4Addr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&(guest, 80).into(), Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: m\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer.starts_with(b"HTTP/1.") && answer.len() > 4096)
}

impl Client {
    fn start(guest: Ipv4Addr) -> Client {
        let (answered, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (count, end) = (answered.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                if ask(guest).unwrap_or(false) {
                    count.fetch_add(1, Ordering::SeqCst);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Client {
            answered,
            stop,
            thread: Some(thread),
        }
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[test]
fn a_machine_under_all_loads_crosses_back_and_forth_and_nothing_grows() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    for host in [&here, &there] {
        std::fs::create_dir(host.file("images")).unwrap();
    }
    let image = here.file("images/disk.img");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let disk = format!("path={}", image.display());
    let bridge = Bridge::make();
    let mut work = "allocator+gc+disk+database".to_owned();
    let mut words = vec!["--memory", "128M", "--cpus", "2", "--disk", &disk];
    let net = bridge.as_ref().map(|bridge| format!("bridge={}", bridge.name));
    match (&bridge, &net) {
        (Some(bridge), Some(net)) => {
            work += &format!("+web ip={}/30 body=8K", bridge.guest);
            words.extend(["--net", net]);
        }
        _ => {
            let must = std::env::var_os("FERRY_TESTS_MUST_RUN").is_some();
            assert!(
                !must,
                "the soak must include web here: making a bridge needs root and `ip`"
            );
            eprintln!("without web: making a bridge needs root and `ip`");
        }
    }
    let tracking = tracking();
    words.extend(tracking.as_deref());
    let orders = format!("work={work} memory=8M heap=4M rate=1000 journal=4M rows=2048");
    let mut guest = start(&here, "m", &orders, &words);
    let client = bridge.as_ref().map(|bridge| Client::start(bridge.guest));
    for line in ["ready", "database"] {
        guest.wait_for_line(line);
    }
    let served = || {
        let before = client.as_ref().map_or(0, Client::answered);
        here.wait_until("the client is served", || {
            client
                .as_ref()
                .is_none_or(|client| client.answered() > before + 2)
        });
        // One machine, one interface.
        here.wait_until("no interface is left behind", || {
            bridge.as_ref().is_none_or(|bridge| bridge.interfaces() == 1)
        });
    };
    served();
    // One that fails when everything is built there.
    let receiver = Receiver::start(&there, &there.file("fails"), &["--dir", "images"]);
    let relay = Relay::at(receiver.port(), Point::first("Loaded"), Act::Hold, false);
    let crossing = begin(&here, "m", &relay.address, &[]);
    relay.wait_reached();
    here.ferry(["migrate", "--cancel", "m"]).success();
    relay.go_on();
    assert_eq!(finish(crossing, PATIENCE).code, 1);
    assert_eq!(receiver.end().0, 1);
    served();
    let (mut from, mut to) = (&here, &there);
    let mut seen: Vec<(u64, usize, usize)> = Vec::new();
    for number in 0..crossings() {
        let serial = to.file(&format!("serial{number}"));
        let dir = to.file("images");
        let mut receive = vec!["--dir", dir.to_str().unwrap()];
        receive.extend(tracking.as_deref());
        let receiver = Receiver::start(to, &serial, &receive);
        migrate(from, "m", &receiver.address, &["--verify"]).success();
        guest.then(serial);
        guest.beats_on(5);
        assert!(runs_at(to, "m"), "{}", receiver.said());
        from.wait_until("its process is gone", || from.entry("m").is_none());
        std::fs::remove_file(from.file("images/disk.img")).unwrap();
        assert!(from.remains().is_empty(), "{:?}", from.remains());
        served();
        let count = |what: &str| {
            let folder = std::fs::read_dir(format!("/proc/{}/{what}", receiver.pid()));
            folder.unwrap().count()
        };
        seen.push((resident_kib(receiver.pid()), count("fd"), count("task")));
        std::mem::forget(receiver);
        (from, to) = (to, from);
    }
    guest.swept();
    eprintln!("resident KiB, descriptors and threads after each crossing: {seen:?}");
    // Every crossing makes a new process: what it inherited with the machine must not pile up.
    let (first, last) = (seen[0], seen[seen.len() - 1]);
    assert!(last.0 <= first.0 + first.0 / 4 + 16_384, "memory grows: {seen:?}");
    assert!(last.1 <= first.1 + 2, "descriptors grow: {seen:?}");
    assert!(last.2 <= first.2 + 2, "threads grow: {seen:?}");
    from.ferry(["kill", "m"]).success();
    guest.sound();
    assert!(bridge.as_ref().is_none_or(|bridge| bridge.interfaces() == 0));
    let image = from.file("images/disk.img");
    for what in ["journal", "database"] {
        from.ferry(["load", what, image.to_str().unwrap()]).success();
    }
}
