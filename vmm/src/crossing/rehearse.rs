//! A rehearsal: the machine is watched while it runs, the receiver is asked, and every policy is played through.
//! Nothing is changed on either side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_migration::block::{BlockKind, Name as ContentName, Source, Span};
use ferry_migration::clock::HostClock;
use ferry_migration::estimate::{Estimate, Known, Sampled, WriteCurve, estimate, sample};
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::handover::{Ledger, SessionId, next_epoch};
use ferry_migration::link::Link;
use ferry_migration::machine::{Offer, OutgoingMachine as _};
use ferry_migration::options::{Handle, Options};
use ferry_migration::pages::encode::Compression;
use ferry_migration::policy::{ALL, Limits, Policy};
use ferry_migration::rehearsal::{Answer, Question, rehearse as ask};
use ferry_migration::report::Promise;
use ferry_migration::units::UnitSet;
use serde::{Deserialize, Serialize};

use super::outgoing::Leaving;
use super::request::CrossingRequest;
use crate::error::{MachineError, Result};

/// How long the machine is watched: what was written so long after the watching began, looked at so many times.
const WINDOWS: [Duration; 4] = [
    Duration::from_millis(30),
    Duration::from_millis(100),
    Duration::from_millis(300),
    Duration::from_millis(1000),
];
/// Pages are protected in pieces, so that the machine does not wait for all of them at once.
const PROTECT_UNITS: u32 = 16 << 10;
/// How many pages and clusters of each block are looked into.
const SAMPLE_PAGES: u64 = 2048;
const SAMPLE_CLUSTERS: u64 = 128;
/// In how many places of each block hashing is tried.
const HASHED_PLACES: u64 = 64;
/// What a rehearsal found is taken for true for so long.
const STAYS_TRUE: Duration = Duration::from_secs(600);

/// What the receiver says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "kebab-case")]
pub enum Receiver {
    /// It would take the machine.
    Yes,
    No {
        cause: Cause,
        why: String,
    },
    /// It could not be asked.
    Nothing {
        why: String,
    },
}

/// Blocks of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub total_bytes: u64,
    /// Touched memory, allocated clusters: what has to cross at least once.
    pub used_bytes: u64,
}

/// What was written within a window, each page and cluster counted once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    pub window: Duration,
    pub pages: u64,
    pub clusters: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkSeen {
    pub bytes_per_sec: u64,
    /// Otherwise the user said so.
    pub measured: bool,
    pub round_trip: Option<Duration>,
}

/// What would happen with one policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    pub policy: Policy,
    /// It is the one that was asked for.
    pub chosen: bool,
    #[serde(flatten)]
    pub estimate: Estimate,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rehearsal {
    pub name: String,
    pub destination: String,
    pub receiver: Receiver,
    pub memory: Size,
    pub disks: Size,
    /// Which part of what is used was found empty, in a sample.
    pub empty_part: f64,
    /// Wire bytes expected for a byte of the rest.
    pub wire_ratio: f64,
    pub writes: Vec<Written>,
    /// None: the receiver could not be reached, and nobody said what the link carries; then there are no forecasts.
    pub link: Option<LinkSeen>,
    pub forecasts: Vec<Forecast>,
}

/// What a rehearsal knows, kept for the crossing that follows it.
pub(super) struct Foreseen {
    at: Instant,
    destination: String,
    shared_storage: bool,
    verify: bool,
    known: Known,
}

impl Foreseen {
    pub(super) fn new(request: &CrossingRequest, known: Known) -> Foreseen {
        Foreseen {
            at: Instant::now(),
            destination: destination(request),
            shared_storage: request.shared_storage,
            verify: request.verify,
            known,
        }
    }

    /// What is promised to a crossing, if it is the one that was rehearsed.
    pub(super) fn promise(&self, request: &CrossingRequest) -> Option<Promise> {
        let same = self.destination == destination(request)
            && (self.shared_storage, self.verify) == (request.shared_storage, request.verify);
        (same && self.at.elapsed() < STAYS_TRUE)
            .then(|| estimate(&self.known, &request.limits).promise())
            .flatten()
    }
}

/// As the user named it: a pipe is another one each time.
fn destination(request: &CrossingRequest) -> String {
    request
        .named
        .clone()
        .unwrap_or_else(|| request.destination.clone())
}

/// The machine's dirty log is on as long as this lives.
struct Watching(Vec<Arc<dyn Source>>);

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.iter().for_each(|source| source.stop_tracking());
    }
}

fn failed(error: impl std::fmt::Display) -> MachineError {
    MachineError::Host(error.to_string())
}

fn go_on(handle: &Handle) -> Result<()> {
    if handle.is_cancelled() {
        return Err(MachineError::Host("the rehearsal was cancelled".to_owned()));
    }
    Ok(())
}

/// What was seen of the machine.
struct Seen {
    sets: Vec<UnitSet>,
    writes: Vec<Written>,
}

/// Protects everything once and looks, after each window, at what was written since.
fn watch(sources: &[Arc<dyn Source>], running: bool, handle: &Handle) -> Result<Seen> {
    let watching = Watching(sources.to_vec());
    let mut sets = Vec::new();
    for source in sources {
        source.start_tracking().map_err(failed)?;
        sets.push(source.first_pass().map_err(failed)?);
    }
    let mut writes = Vec::new();
    if !running {
        return Ok(Seen { sets, writes });
    }
    for (source, set) in sources.iter().zip(&sets) {
        for span in set.spans(source.info().id, PROTECT_UNITS) {
            source.take(&[span]).map_err(failed)?;
        }
    }
    let began = Instant::now();
    for window in WINDOWS {
        while began.elapsed() < window {
            go_on(handle)?;
            std::thread::sleep((window - began.elapsed().min(window)).min(Duration::from_millis(50)));
        }
        let (mut pages, mut clusters, mut bytes) = (0, 0, 0);
        // Looking takes its time, too: the window is as long as it was.
        let window = began.elapsed();
        for source in sources {
            let info = source.info();
            let mut changed = UnitSet::empty(info.units());
            source.survey(&mut changed).map_err(failed)?;
            let count = changed.count();
            bytes += count * u64::from(info.unit_bytes());
            match info.kind {
                BlockKind::Memory => pages += count,
                BlockKind::Disk => clusters += count,
            }
        }
        writes.push(Written {
            window,
            pages,
            clusters,
            bytes,
        });
    }
    drop(watching);
    Ok(Seen { sets, writes })
}

fn size(sources: &[Arc<dyn Source>], sets: &[UnitSet], kind: BlockKind) -> Size {
    let mut size = Size::default();
    for (source, set) in sources.iter().zip(sets) {
        let info = source.info();
        if info.kind == kind {
            size.total_bytes += info.bytes;
            size.used_bytes += (set.count() * u64::from(info.unit_bytes())).min(info.bytes);
        }
    }
    size
}

/// How long it takes to read and hash everything, measured on a little of it.
pub(super) fn hashing(sources: &[Arc<dyn Source>]) -> Duration {
    let mut content = vec![0; 64 << 10];
    let (mut whole, mut looked) = (0, 0);
    let start = Instant::now();
    for source in sources {
        let info = source.info();
        whole += info.bytes;
        let count = (content.len() as u32 / info.unit_bytes()).max(1);
        let every = (info.units() / HASHED_PLACES).max(u64::from(count));
        for first in (0..info.units()).step_by(every as usize) {
            let count = u64::from(count).min(info.units() - first) as u32;
            let span = Span {
                block: info.id,
                first,
                count,
            };
            let room = content.get_mut(..info.span_bytes(span)).unwrap_or_default();
            if source.read(span, room).is_ok() {
                std::hint::black_box(ContentName::of(room));
                looked += room.len();
            }
        }
    }
    start.elapsed().mul_f64(whole as f64 / (looked as f64).max(1.0))
}

pub(super) fn rehearse(
    mut leaving: Leaving,
    request: &CrossingRequest,
    session: SessionId,
    mut link: Box<dyn Link>,
    ledger: &dyn Ledger,
    handle: &Handle,
) -> Result<(Rehearsal, Option<Known>)> {
    let card = leaving.card().map_err(failed)?;
    let epoch = next_epoch(&ledger.records(card.machine).map_err(failed)?).map_err(failed)?;
    let sources = leaving.sources().map_err(failed)?;
    let service = leaving.service();
    let seen = watch(&sources, card.running, handle)?;
    let clock = HostClock::new();
    let mut sampled = Sampled::default();
    for (source, set) in sources.iter().zip(&seen.sets) {
        let most = match source.info().kind {
            BlockKind::Memory => SAMPLE_PAGES,
            BlockKind::Disk => SAMPLE_CLUSTERS,
        };
        sampled.add(&sample(source.as_ref(), set, most, &clock).map_err(failed)?);
        go_on(handle)?;
    }
    let stated = request.limits.link_bytes_per_sec;
    let lanes = request.lanes.clamp(1, link.most_lanes().max(1));
    let answer = ask(
        link.as_mut(),
        &clock,
        &Question {
            session,
            ledger: ledger.id(),
            epoch,
            offer: Offer {
                card: card.clone(),
                blocks: sources.iter().map(|source| source.info()).collect(),
            },
            lanes,
            stall: request.stall,
            measure: stated.is_none(),
            cancelled: &|| handle.is_cancelled(),
        },
    );
    go_on(handle)?;
    drop(link);
    let measured = answer.link_bytes_per_sec.map(|rate| rate as u64);
    let link = stated.or(measured).map(|bytes_per_sec| LinkSeen {
        bytes_per_sec,
        measured: stated.is_none(),
        round_trip: answer.round_trip,
    });
    let memory = size(&sources, &seen.sets, BlockKind::Memory);
    let disks = size(&sources, &seen.sets, BlockKind::Disk);
    let may_compress = request.compression != Compression::Off;
    let lanes = f64::from(lanes);
    let share = link
        .as_ref()
        .map_or(f64::INFINITY, |link| link.bytes_per_sec as f64 / lanes);
    let (wire_ratio, worker_bytes_per_sec) = sampled.on_the_wire(share, may_compress);
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let used = memory.used_bytes + disks.used_bytes;
    let verify = if request.verify {
        hashing(&sources)
    } else {
        Duration::ZERO
    };
    let curve = seen.writes.iter().map(|written| (written.window, written.bytes));
    let known = link.as_ref().map(|link| {
        let rate = link.bytes_per_sec as f64;
        Known {
            total_bytes: used,
            empty_bytes: (used as f64 * sampled.empty_part()) as u64,
            wire_ratio,
            writes: WriteCurve::new(curve.collect()),
            link_bytes_per_sec: [0.8 * rate, rate, if link.measured { 1.1 * rate } else { rate }],
            copy_bytes_per_sec: worker_bytes_per_sec * lanes.min(cores),
            round_trip: answer.round_trip.unwrap_or_default(),
            prepare: answer.round_trip.unwrap_or_default() * 3,
            switch_fixed: Options::new(session).switch_fixed,
            verify,
            service,
        }
    });
    let rehearsal = Rehearsal {
        name: card.name,
        destination: destination(request),
        receiver: receiver(answer),
        memory,
        disks,
        empty_part: sampled.empty_part(),
        wire_ratio,
        writes: seen.writes,
        link,
        forecasts: known
            .as_ref()
            .map(|known| forecasts(known, &request.limits))
            .unwrap_or_default(),
    };
    Ok((rehearsal, known))
}

fn receiver(answer: Answer) -> Receiver {
    match answer.refused {
        None => Receiver::Yes,
        Some(Reason { cause, message }) if answer.reached => Receiver::No { cause, why: message },
        // It was there and did not let us in.
        Some(Reason { cause, message })
            if matches!(cause, Cause::NotAllowed | Cause::Busy | Cause::Version) =>
        {
            Receiver::No { cause, why: message }
        }
        Some(Reason { cause: _, message }) => Receiver::Nothing { why: message },
    }
}

/// Every policy that needs no number of its own, and the one that was asked for.
fn forecasts(known: &Known, limits: &Limits) -> Vec<Forecast> {
    let mut policies: Vec<Policy> = ALL
        .iter()
        .map(|about| about.policy)
        .filter(|policy| !matches!(policy, Policy::Fixed { .. }) && policy.name() != limits.policy.name())
        .collect();
    policies.insert(0, limits.policy);
    let forecast = |policy| Forecast {
        policy,
        chosen: policy == limits.policy,
        estimate: estimate(
            known,
            &Limits {
                policy,
                ..limits.clone()
            },
        ),
    };
    policies.into_iter().map(forecast).collect()
}
