//! How fast a machine crosses over loopback TCP between two processes, beside a plain read and write loop over
//! the same kind of sockets into the same kind of memory, in the same run.
//!
//! `cargo bench -p ferry-migration --bench crossing -- [--mib 4096] [--runs 5] [--json FILE]`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a measurement that fails should stop

use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ferry_migration::block::{BlockId, BlockInfo, BlockKind, DataError, Sink, Source, Span};
use ferry_migration::clock::HostClock;
use ferry_migration::failure::Reason;
use ferry_migration::handover::{LedgerId, MachineId, RunPermit, SessionId};
use ferry_migration::ledger::FileLedger;
use ferry_migration::machine::{IncomingMachine, MachineCard, Offer, OutgoingMachine, Unobserved};
use ferry_migration::options::{Handle, Options};
use ferry_migration::outgoing::{World, cross};
use ferry_migration::pages::encode::Compression;
use ferry_migration::receiver::{ReceiveOptions, receive};
use ferry_migration::report::Report;
use ferry_migration::transport::{Listener, SocketLink};
use ferry_migration::units::UnitSet;

const WINDOW: usize = 1 << 20;
const STALL: Duration = Duration::from_secs(20);

fn info(bytes: u64) -> BlockInfo {
    BlockInfo {
        id: BlockId(0),
        kind: BlockKind::Memory,
        name: "memory".into(),
        bytes,
    }
}

/// Memory nobody writes to.
struct Still(&'static [u8]);

impl Still {
    fn range(span: Span) -> std::ops::Range<usize> {
        let at = span.first as usize * 4096;
        at..at + span.count as usize * 4096
    }
}

impl Source for Still {
    fn info(&self) -> BlockInfo {
        info(self.0.len() as u64)
    }
    fn start_tracking(&self) -> Result<(), DataError> {
        Ok(())
    }
    fn stop_tracking(&self) {}
    fn first_pass(&self) -> Result<UnitSet, DataError> {
        Ok(UnitSet::full(self.info().units()))
    }
    fn survey(&self, _: &mut UnitSet) -> Result<(), DataError> {
        Ok(())
    }
    fn take(&self, _: &[Span]) -> Result<(), DataError> {
        Ok(())
    }
    fn put_back(&self, _: &[Span]) {}
    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        out.copy_from_slice(&self.0[Self::range(span)]);
        Ok(())
    }
    fn find_zeroes(&self, span: Span, zero: &mut [bool]) -> Result<(), DataError> {
        for (zero, page) in zero.iter_mut().zip(self.0[Self::range(span)].chunks_exact(4096)) {
            *zero = is_zero(page);
        }
        Ok(())
    }
}

/// As a monitor would look at guest memory in place.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(256).all(|stride| {
        stride
            .chunks_exact(8)
            .fold(0, |acc, w| acc | u64::from_ne_bytes(w.try_into().unwrap()))
            == 0
    })
}

/// Memory that data is placed into, populated before anything is measured.
struct Room {
    bytes: u64,
    windows: Vec<Mutex<&'static mut [u8]>>,
}

fn populated(bytes: usize) -> &'static mut [u8] {
    let memory = vec![0u8; bytes].leak();
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 0);
    memory
}

impl Room {
    fn new(bytes: usize) -> Self {
        let windows = populated(bytes).chunks_mut(WINDOW).map(Mutex::new).collect();
        Room {
            bytes: bytes as u64,
            windows,
        }
    }

    fn with(&self, span: Span, act: impl FnOnce(&mut [u8])) {
        let at = span.first as usize * 4096;
        let mut window = self.windows[at / WINDOW].lock().unwrap();
        act(&mut window[at % WINDOW..at % WINDOW + span.count as usize * 4096]);
    }
}

impl Sink for Room {
    fn info(&self) -> BlockInfo {
        info(self.bytes)
    }
    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        self.with(span, |room| room.copy_from_slice(data));
        Ok(())
    }
    fn place_zeroes(&self, _: Span) -> Result<(), DataError> {
        // Fresh memory is zero, and this guest writes nothing.
        Ok(())
    }
    fn fill_in_place(&self, span: Span, fill: &mut dyn FnMut(&mut [u8])) -> Result<bool, DataError> {
        self.with(span, fill);
        Ok(true)
    }
    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        self.with(span, |room| out.copy_from_slice(room));
        Ok(())
    }
}

struct Here(&'static [u8]);

impl OutgoingMachine for Here {
    fn card(&mut self) -> Result<MachineCard, Reason> {
        let (machine, name) = (MachineId([1; 16]), "bench".to_owned());
        Ok(MachineCard {
            machine,
            name,
            running: true,
            description: Vec::new(),
        })
    }
    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason> {
        Ok(vec![Arc::new(Still(self.0))])
    }
    fn check(&mut self) -> Result<(), Reason> {
        Ok(())
    }
    fn throttle(&mut self, _: &ferry_migration::policy::Throttle) -> Result<(), Reason> {
        Ok(())
    }
    fn slow_writes(&mut self, _: BlockId, _: Option<u64>) -> Result<(), Reason> {
        Ok(())
    }
    fn pause(&mut self) -> Result<(), Reason> {
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<u8>, Reason> {
        Ok(vec![0; 20_000])
    }
    fn release(&mut self) -> Result<(), Reason> {
        Ok(())
    }
    fn resume(&mut self, _: &RunPermit) -> Result<(), Reason> {
        Ok(())
    }
    fn departed(&mut self) {}
    fn stranded(&mut self) {}
}

struct There(Arc<Room>);

impl IncomingMachine for There {
    fn admit(&mut self, _: &Offer) -> Result<(), Reason> {
        Ok(())
    }
    fn prepare(&mut self, _: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        Ok(vec![Arc::clone(&self.0) as Arc<dyn Sink>])
    }
    fn restore(&mut self, _: &[u8]) -> Result<(), Reason> {
        Ok(())
    }
    fn flush(&mut self) -> Result<(), Reason> {
        Ok(())
    }
    fn resume(&mut self, _: RunPermit) -> Result<(), Reason> {
        Ok(())
    }
    fn abort(&mut self) {}
}

/// Peak memory of this process in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// The other process: receives what it is told to, and says where.
fn other_side(kind: &str, bytes: usize) {
    match kind {
        "plain" => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let memory = populated(bytes);
            println!("{}", listener.local_addr().unwrap().port());
            let (mut stream, _) = listener.accept().unwrap();
            tune(&stream);
            for window in memory.chunks_mut(WINDOW) {
                stream.read_exact(window).unwrap();
            }
            stream.write_all(b"!").unwrap();
        }
        "ferry" => {
            let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap(), None, STALL).unwrap();
            let mut machine = There(Arc::new(Room::new(bytes)));
            let port = listener
                .address()
                .unwrap()
                .to_string()
                .rsplit(':')
                .next()
                .unwrap()
                .to_owned();
            let room = tempfile::tempdir().unwrap();
            let mut ledger = FileLedger::open(room.path(), LedgerId([2; 16])).unwrap();
            println!("{port}");
            let (give, arrivals) = crossbeam::channel::unbounded();
            std::thread::spawn(move || {
                while let Ok(socket) = listener.accept() {
                    let _ = give.send(listener.greet(socket).unwrap());
                }
            });
            let stop = AtomicBool::new(false);
            let options = ReceiveOptions::default();
            let received = receive(
                &mut machine,
                &mut ledger,
                &HostClock::new(),
                &arrivals,
                &stop,
                &options,
            );
            assert!(received.taken, "{received:?}");
            println!("{}", peak().saturating_sub(bytes as u64));
        }
        other => panic!("{other}"),
    }
}

fn tune(stream: &TcpStream) {
    stream.set_nodelay(true).unwrap();
    let socket = socket2::SockRef::from(stream);
    let _ = socket.set_send_buffer_size(4 << 20);
    let _ = socket.set_recv_buffer_size(4 << 20);
}

struct Other {
    child: Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
    port: u16,
}

fn start_other(kind: &str, bytes: usize) -> Other {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--other-side", kind, &bytes.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let port = lines.next().unwrap().unwrap().parse().unwrap();
    Other { child, lines, port }
}

fn plain(memory: &'static [u8]) -> f64 {
    let mut other = start_other("plain", memory.len());
    let mut stream = TcpStream::connect(("127.0.0.1", other.port)).unwrap();
    tune(&stream);
    let start = Instant::now();
    for window in memory.chunks(WINDOW) {
        stream.write_all(window).unwrap();
    }
    stream.read_exact(&mut [0]).unwrap();
    let took = start.elapsed();
    other.child.wait().unwrap();
    memory.len() as f64 / took.as_secs_f64()
}

struct Crossed {
    report: Report,
    /// From the first byte of data to the machine running there.
    rate: f64,
    peak_there: u64,
}

fn ferry(memory: &'static [u8], lanes: u16, session: u8) -> Crossed {
    let mut other = start_other("ferry", memory.len());
    let mut options = Options::new(SessionId([session; 16]));
    options.lanes = lanes;
    options.compression = Compression::Auto;
    // Everything is copied live: the switch is then a round with nothing dirty.
    options.limits.policy = "qemu".parse().unwrap();
    options.limits.downtime = Duration::ZERO;
    let address = format!("tcp://127.0.0.1:{}", other.port).parse().unwrap();
    let room = tempfile::tempdir().unwrap();
    let mut ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
    let report = cross(
        World {
            machine: &mut Here(memory),
            link: &mut SocketLink::new(options.session, address, None, STALL),
            ledger: &mut ledger,
            clock: &HostClock::new(),
            observer: &Unobserved,
            handle: &Handle::new(),
        },
        &options,
    );
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    let peak_there = other.lines.next().unwrap().unwrap().parse().unwrap();
    other.child.wait().unwrap();
    let took = report.total - report.prepare;
    Crossed {
        rate: memory.len() as f64 / took.as_secs_f64(),
        report,
        peak_there,
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn argument(name: &str, default: usize) -> usize {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1).map_or(default, |text| text.parse().unwrap())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--other-side") {
        return other_side(&arguments[at + 1], arguments[at + 2].parse().unwrap());
    }
    let bytes = argument("--mib", 4096) << 20;
    let runs = argument("--runs", 5);
    let gib = bytes as f64 / (1u64 << 30) as f64;

    // Noise: neither zero nor compressible.
    let memory = populated(bytes);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for word in memory.chunks_exact_mut(8) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        word.copy_from_slice(&seed.to_le_bytes());
    }
    let memory: &'static [u8] = memory;

    let (mut plains, mut ones, mut twos) = (Vec::new(), Vec::new(), Vec::new());
    let (mut idle_round, mut there) = (Vec::new(), 0u64);
    for run in 0..runs {
        plains.push(plain(memory));
        for (lanes, rates) in [(1, &mut ones), (2, &mut twos)] {
            let crossed = ferry(memory, lanes, 1 + run as u8);
            rates.push(crossed.rate);
            let parts = crossed.report.downtime;
            let round = parts.last_survey + parts.last_clusters + parts.last_pages;
            idle_round.push(round.as_secs_f64() * 1e3 * 4.0 / gib);
            there = there.max(crossed.peak_there);
        }
    }
    let here = peak().saturating_sub(bytes as u64);
    let (plain, one, two) = (median(plains), median(ones), median(twos));
    let zeroes: &'static [u8] = populated(bytes);
    let scans = (0..runs)
        .map(|run| ferry(zeroes, 2, 100 + run as u8).rate)
        .collect();
    let scan = median(scans);

    let mib = |rate: f64| rate / (1 << 20) as f64;
    println!("{gib} GiB of noise, {runs} runs, medians");
    println!("plain loop of 1 MiB buffers      {:8.0} MiB/s", mib(plain));
    println!(
        "crossing, 1 lane                 {:8.0} MiB/s  {:5.1} % of plain",
        mib(one),
        100.0 * one / plain
    );
    println!(
        "crossing, 2 lanes                {:8.0} MiB/s  {:5.1} % of plain",
        mib(two),
        100.0 * two / plain
    );
    println!("zero pages scanned               {:8.0} MiB/s", mib(scan));
    println!(
        "round with nothing dirty         {:8.3} ms per 4 GiB",
        median(idle_round.clone())
    );
    println!(
        "memory beyond the guest, here    {:8.1} MiB",
        here as f64 / (1 << 20) as f64
    );
    println!(
        "memory beyond the guest, there   {:8.1} MiB",
        there as f64 / (1 << 20) as f64
    );
    if let Some(at) = arguments.iter().position(|argument| argument == "--json") {
        let text = serde_json::json!({
            "bytes": bytes, "runs": runs, "plain_bytes_per_sec": plain,
            "one_lane_bytes_per_sec": one, "two_lanes_bytes_per_sec": two, "zero_bytes_per_sec": scan,
            "idle_round_ms_per_4gib": median(idle_round), "beyond_here_bytes": here,
            "beyond_there_bytes": there,
        });
        std::fs::write(&arguments[at + 1], text.to_string()).unwrap();
    }
}
