//! Sends requests when they are due, whether or not earlier ones were answered, and keeps the record.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ferry_network::probe::HttpUrl;
use tokio::runtime::Runtime;

use super::arrivals::Arrivals;
use super::calc::CalcClient;
use super::http::HttpClient;
use super::record::{Answer, Failure, Outcome, Record, Summary};

/// What is asked.
#[derive(Debug, Clone)]
pub enum Service {
    Http {
        url: HttpUrl,
        keep_alive: bool,
        /// Every answer must be the same as the first.
        same: bool,
    },
    CalcUdp(SocketAddr),
    CalcTcp {
        address: SocketAddr,
        connections: usize,
    },
}

/// A load, whole.
#[derive(Debug, Clone)]
pub struct Plan {
    pub service: Service,
    pub rate_per_sec: f64,
    /// None: until [`Load::finish`].
    pub duration: Option<Duration>,
    pub deadline: Option<Duration>,
    /// After this a request has failed.
    pub timeout: Duration,
    pub seed: u64,
}

/// More requests that wait than this tell nothing new and would eat the client's memory.
const MAX_OPEN: usize = 20_000;
/// How long the sender sleeps at most before it looks whether it should stop.
const NAP: Duration = Duration::from_millis(20);

enum Client {
    Http(HttpClient),
    Calc(CalcClient),
}

impl Client {
    async fn ask(&self) -> Result<Answer, Failure> {
        match self {
            Client::Http(client) => client.ask().await,
            Client::Calc(client) => client.ask().await,
        }
    }
}

struct Shared {
    client: Client,
    timeout: Duration,
    began: Instant,
    stop: AtomicBool,
    open: AtomicUsize,
    /// Nanoseconds.
    ended: AtomicU64,
    late: AtomicU64,
    record: Mutex<Record>,
}

/// A load that is running, in the network namespace of the thread that started it.
pub struct Load {
    shared: Arc<Shared>,
    target: String,
    rate_per_sec: f64,
    seed: u64,
    sender: Option<JoinHandle<()>>,
    runtime: Option<Runtime>,
}

impl Service {
    pub fn target(&self) -> String {
        match self {
            Service::Http { url, .. } => url.to_string(),
            Service::CalcUdp(address) => format!("udp:{address}"),
            Service::CalcTcp { address, .. } => format!("tcp:{address}"),
        }
    }

    fn client(self, seed: u64) -> Client {
        match self {
            Service::Http {
                url,
                keep_alive,
                same,
            } => Client::Http(HttpClient::new(url, keep_alive, same)),
            Service::CalcUdp(address) => Client::Calc(CalcClient::udp(address, seed)),
            Service::CalcTcp { address, connections } => {
                Client::Calc(CalcClient::tcp(address, seed, connections))
            }
        }
    }
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, scheduled: Duration, result: Result<Answer, Failure>) {
        // Inside the lock, so that the record sees the requests in the order in which they finished.
        let mut record = self.record();
        record.add(&Outcome {
            scheduled,
            finished: self.began.elapsed(),
            result,
        });
    }
}

impl Load {
    pub fn start(plan: Plan) -> Result<Load> {
        let Plan {
            service,
            rate_per_sec,
            duration,
            deadline,
            timeout,
            seed,
        } = plan;
        anyhow::ensure!(
            rate_per_sec.is_finite() && rate_per_sec > 0.0,
            "a load needs a rate above zero, {rate_per_sec} requests a second were asked for"
        );
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("load")
            .enable_all()
            .build()
            .context("the load cannot start its threads")?;
        let target = service.target();
        let shared = Arc::new(Shared {
            client: service.client(seed),
            timeout,
            began: Instant::now(),
            stop: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            ended: AtomicU64::new(0),
            late: AtomicU64::new(0),
            record: Mutex::new(Record::new(deadline)),
        });
        let handle = runtime.handle().clone();
        let arrivals = Arrivals::new(rate_per_sec, seed);
        let sender = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("load-arrivals".into())
                .spawn(move || send_all(&shared, arrivals, duration, &handle))
                .context("the load cannot start its threads")?
        };
        Ok(Load {
            shared,
            target,
            rate_per_sec,
            seed,
            sender: Some(sender),
            runtime: Some(runtime),
        })
    }

    /// Requests answered so far; a test can wait for the first.
    pub fn answered(&self) -> u64 {
        self.shared.record().answered()
    }

    /// The last request has been sent.
    pub fn is_over(&self) -> bool {
        self.sender.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// How it stands.
    pub fn so_far(&self) -> Summary {
        let now = match self.shared.ended.load(Ordering::Relaxed) {
            0 => self.shared.began.elapsed(),
            ended => Duration::from_nanos(ended),
        };
        let late = Duration::from_nanos(self.shared.late.load(Ordering::Relaxed));
        self.shared
            .record()
            .summary(&self.target, self.rate_per_sec, self.seed, now, late)
    }

    /// Sends nothing more, waits for what is under way (at most the time limit of a request), and sums up.
    pub fn finish(mut self) -> Summary {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        let patience = Instant::now() + self.shared.timeout + Duration::from_secs(1);
        while self.shared.open.load(Ordering::Acquire) > 0 && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.so_far()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A thread of its own: the timers of an async runtime are good to a millisecond, and that would be measured.
fn send_all(
    shared: &Arc<Shared>,
    arrivals: Arrivals,
    duration: Option<Duration>,
    handle: &tokio::runtime::Handle,
) {
    let end = duration.unwrap_or(Duration::MAX);
    for due in arrivals.take_while(|due| *due < end) {
        if !sleep_until(shared, due) {
            break;
        }
        let late = shared.began.elapsed().saturating_sub(due);
        shared.late.fetch_max(late.as_nanos() as u64, Ordering::Relaxed);
        if shared.open.fetch_add(1, Ordering::AcqRel) >= MAX_OPEN {
            shared.open.fetch_sub(1, Ordering::AcqRel);
            shared.done(due, Err(Failure::Shed));
            continue;
        }
        let shared = Arc::clone(shared);
        handle.spawn(async move {
            let asked = tokio::time::timeout(shared.timeout, shared.client.ask()).await;
            shared.done(due, asked.unwrap_or(Err(Failure::TimedOut)));
            shared.open.fetch_sub(1, Ordering::AcqRel);
        });
    }
    // The end of a load with a duration, even if its last request came before it.
    if let Some(duration) = duration {
        sleep_until(shared, duration);
    }
    let ended = shared.began.elapsed().min(end);
    shared.ended.store(ended.as_nanos() as u64, Ordering::Relaxed);
}

/// False: it should stop.
fn sleep_until(shared: &Shared, due: Duration) -> bool {
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return false;
        }
        let left = due.saturating_sub(shared.began.elapsed());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(NAP));
    }
}
