//! Who may run the machine: the permit, the two-sided protocol that moves it, and what both sides keep of it.
//!
//! # The discipline of the hand over
//!
//! At most one side may run the machine, ever, whatever is lost, cut, doubled or killed. Two rules hold it:
//!
//! 1. **A side writes down what it is about to bind itself to before it acts.** The outgoing side writes
//!    `GivenAway` before the go-ahead leaves; from then on it does not run the machine, not even after a
//!    restart, until it has proof. The incoming side writes `Taken` before the first instruction, and
//!    `Declined` before it tells anybody that it never will.
//! 2. **Only the incoming side's word is proof, and its word never changes.** `Taken` and `Declined` exclude
//!    each other. An incoming side that knows nothing of a session (it was restarted, its memory of the
//!    machine is gone) declines it in writing before it says so, so that a go-ahead that was delayed in the
//!    network finds it closed. The one change it may make is from `Taken` to `Declined` when starting the
//!    machine failed before a single instruction ran and nobody was told yet.
//!
//! Writing to a disk takes milliseconds, a hundred of them where the disk is busy, and in the switch the machine runs
//! nowhere. So the outgoing side writes `GivenAway` *before* it pauses the machine (it is `Armed`: still entitled, and free
//! to step back, which it writes down too). The incoming side writes `Waiting` when it is built, with the number of the
//! host's boot. When the go-ahead comes it only *notes* `Taken`: what is noted survives the process, and reaches the disk
//! after the first instruction, before anybody is told. What does a restart find?
//!
//! - *The process died, the host did not:* `Taken` is there if it was noted. `Waiting` of this boot means that it was not:
//!   the machine never ran, and it is declined.
//! - *The host died:* `Waiting` of an earlier boot. The note may be lost, so nobody can know (`Unsure`). Nothing runs
//!   there any more, and no word is given: the outgoing side stays in doubt, and a person decides.
//!
//! Several processes of one host share its ledger. One that answers for a crossing from the ledger alone writes its
//! answer first, and the ledger takes no version from a process that has not seen the newest: a go-ahead that reaches
//! the process that still waited finds the crossing closed, or the answer finds it taken.
//!
//! So the incoming side knows, unless its host died in between, and the outgoing side is in doubt exactly while it has
//! given away and not heard. Sending the go-ahead again is harmless: it takes, or it hears the answer again. If the other side
//! cannot be reached the outgoing side stays stopped and says so; `resolve` asks again later. "No record" from
//! a ledger with another identity proves nothing (the disk was replaced): then a person decides.
//!
//! The transitions below are pure functions. The engine runs them, and a model in `tests/handover_model.rs`
//! walks every interleaving of loss, doubling, crash and restart over the same functions.

use serde::{Deserialize, Serialize};

use crate::failure::{Cause, Reason, Side};

/// One crossing. Random; given by the caller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The machine over all its crossings: random, made when the machine is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MachineId(pub [u8; 16]);

impl std::fmt::Display for MachineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for MachineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// One ledger's identity, so that "no record of it" from another or a new ledger is not taken for evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LedgerId(pub [u8; 16]);

/// One run of a host, from its start to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BootId(pub [u8; 16]);

/// The right to run one machine. Cannot be copied or made outside this module: the outgoing side holds it
/// until the go-ahead consumes it, the incoming side gets it from an accepted go-ahead.
#[derive(Debug, PartialEq, Eq)]
pub struct RunPermit {
    session: SessionId,
}

impl RunPermit {
    pub fn session(&self) -> SessionId {
        self.session
    }
}

/// How one side stands to a crossing, as it survives a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Outgoing: the go-ahead may be out. Not allowed to run until the other side proves it never will.
    GivenAway,
    /// Outgoing: the other side confirmed that it has the machine.
    Gone,
    /// Outgoing: the other side proved that it never will run the machine.
    Kept,
    /// Incoming: the machine is built. Declined, unless the go-ahead was noted since.
    Waiting,
    /// Incoming: took the go-ahead. The machine is this side's.
    Taken,
    /// Incoming: will never run the machine of this session, whatever arrives later.
    Declined,
}

/// What a side keeps of one crossing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub session: SessionId,
    pub machine: MachineId,
    /// Counts the hand overs of this machine: an offer of an old copy is refused.
    pub epoch: u64,
    pub side: Side,
    pub standing: Standing,
    /// The ledger of the other side, whose word counts as evidence.
    pub peer: Option<LedgerId>,
    /// Incoming: the other side is known to know that the machine was taken, and will never ask.
    #[serde(default)]
    pub heard: bool,
    /// Incoming: the boot of the host in which it was built.
    #[serde(default)]
    pub boot: Option<BootId>,
}

impl Record {
    /// How it stands to a process that reads it in this boot of its host.
    pub fn standing_in(&self, boot: Option<BootId>) -> Standing {
        match self.standing {
            // What was noted since would be here; without a boot's number nothing is only noted.
            Standing::Waiting if self.boot.is_none() || self.boot == boot => Standing::Declined,
            standing => standing,
        }
    }
}

/// The durable memory of a side. `write` returns only when the record will survive a crash of the host.
pub trait Ledger: Send {
    fn id(&self) -> LedgerId;
    fn write(&mut self, record: &Record) -> Result<(), Reason>;
    /// Which boot of the host this is, if that can be told; only then may anything be noted.
    fn boot(&self) -> Option<BootId> {
        None
    }
    /// As `write`, but the record survives the host only after `settle`.
    fn note(&mut self, record: &Record) -> Result<(), Reason> {
        self.write(record)
    }
    /// Returns when what was noted will survive a crash of the host.
    fn settle(&mut self, _session: SessionId, _side: Side) -> Result<(), Reason> {
        Ok(())
    }
    /// A host can be both sides of one crossing: each side has a record of its own.
    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason>;
    /// All records of a machine, in no order.
    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason>;
}

/// The outgoing side of the hand over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Giver {
    /// The right to run is here.
    Holding,
    /// The right to run is here, but the book already says that it may be gone.
    Armed,
    /// The go-ahead may be out: in doubt.
    GivenAway,
    /// The other side has it, confirmed.
    Gone,
}

/// What the giver can hear or decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GiverEvent {
    /// The switch is about to begin.
    Arm,
    /// Everything is across and compared: give it away.
    GoAhead,
    /// It stays here after all.
    StepBack,
    /// The link is back while in doubt.
    LinkBack,
    /// The other side's word. `same_ledger`: it comes from the ledger that the crossing began with.
    Heard { taken: bool, same_ledger: bool },
}

/// What the giver must do, in this order. A step begins only when the one before is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GiverStep {
    Write(Standing),
    SendGo,
    /// The permit is here again.
    Run,
}

pub fn giver(state: Giver, event: GiverEvent) -> (Giver, &'static [GiverStep]) {
    use GiverStep::{Run, SendGo, Write};
    match (state, event) {
        (Giver::Holding, GiverEvent::Arm) => (Giver::Armed, &[Write(Standing::GivenAway)]),
        (Giver::Armed, GiverEvent::GoAhead) => (Giver::GivenAway, &[SendGo]),
        (Giver::Armed, GiverEvent::StepBack) => (Giver::Holding, &[Write(Standing::Kept)]),
        (Giver::GivenAway, GiverEvent::LinkBack) => (Giver::GivenAway, &[SendGo]),
        (Giver::GivenAway, GiverEvent::Heard { taken: true, .. }) => (Giver::Gone, &[Write(Standing::Gone)]),
        (
            Giver::GivenAway,
            GiverEvent::Heard {
                taken: false,
                same_ledger: true,
            },
        ) => (Giver::Holding, &[Write(Standing::Kept), Run]),
        // Not proof, or nothing to decide.
        (state, _) => (state, &[]),
    }
}

/// What a restarted outgoing side knows from its ledger.
pub fn giver_after_restart(record: Option<Standing>) -> Giver {
    match record {
        Some(Standing::GivenAway) => Giver::GivenAway,
        Some(Standing::Gone) => Giver::Gone,
        _ => Giver::Holding,
    }
}

/// The incoming side of the hand over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Taker {
    /// The machine is loaded and waits for the go-ahead.
    Waiting,
    /// `Taken` is noted, the machine is being started, nobody was told.
    Taking,
    Taken,
    Declined,
    /// The host died while this side waited: it may have run, and it never will again.
    Unsure,
    /// No machine and no record (a restart, or never heard of it).
    Blank,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TakerEvent {
    Go,
    /// Somebody wants to know for certain (`resolve`).
    Ask,
    /// The other side was silent for too long, or cancelled.
    GiveUp,
    Started,
    /// Starting failed before the first instruction.
    StartFailed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TakerStep {
    Write(Standing),
    /// Written, but on the disk only after `Settle`.
    Note(Standing),
    Settle,
    /// Starts the machine; ends in `Started` or `StartFailed`.
    Run,
    /// The machine's memory is dropped.
    Discard,
    /// Tells the other side.
    Answer {
        taken: bool,
    },
}

pub fn taker(state: Taker, event: TakerEvent) -> (Taker, &'static [TakerStep]) {
    use TakerStep::{Answer, Discard, Note, Run, Settle, Write};
    match (state, event) {
        (Taker::Waiting, TakerEvent::Go) => (Taker::Taking, &[Note(Standing::Taken), Run]),
        (Taker::Taking, TakerEvent::Started) => (Taker::Taken, &[Settle, Answer { taken: true }]),
        (Taker::Taking, TakerEvent::StartFailed) => (
            Taker::Declined,
            &[Discard, Write(Standing::Declined), Answer { taken: false }],
        ),
        // Being started: the answer comes when it is known.
        (Taker::Taking, _) => (Taker::Taking, &[]),
        (Taker::Waiting, TakerEvent::Ask) => (
            Taker::Declined,
            &[Discard, Write(Standing::Declined), Answer { taken: false }],
        ),
        (Taker::Waiting, TakerEvent::GiveUp) => (Taker::Declined, &[Discard, Write(Standing::Declined)]),
        (Taker::Blank, TakerEvent::Go | TakerEvent::Ask) => (
            Taker::Declined,
            &[Write(Standing::Declined), Answer { taken: false }],
        ),
        (Taker::Taken, TakerEvent::Go | TakerEvent::Ask) => (Taker::Taken, &[Settle, Answer { taken: true }]),
        (Taker::Declined, TakerEvent::Go | TakerEvent::Ask) => (Taker::Declined, &[Answer { taken: false }]),
        (state, _) => (state, &[]),
    }
}

/// What a restarted incoming side knows from its ledger, as it reads in this boot ([`Record::standing_in`]).
pub fn taker_after_restart(record: Option<Standing>) -> Taker {
    match record {
        Some(Standing::Taken) => Taker::Taken,
        Some(Standing::Declined) => Taker::Declined,
        Some(Standing::Waiting) => Taker::Unsure,
        _ => Taker::Blank,
    }
}

/// The last record of a machine that binds: what was declined or kept says nothing about where the machine is.
fn binding(records: &[Record]) -> Option<&Record> {
    records
        .iter()
        .filter(|record| {
            !matches!(
                record.standing,
                Standing::Kept | Standing::Waiting | Standing::Declined
            )
        })
        // A machine that crossed within this host is both gone and taken here: it is here.
        .max_by_key(|record| (record.epoch, record.standing == Standing::Taken))
}

/// May this side begin a crossing of the machine, and with which epoch?
pub fn next_epoch(records: &[Record]) -> Result<u64, Reason> {
    match binding(records).map(|last| (last.side, last.standing)) {
        Some((Side::Outgoing, Standing::GivenAway)) => Err(Reason::new(
            Cause::Busy,
            "an earlier crossing of this machine was handed over and never confirmed: settle it with `ferry resolve`",
        )),
        Some((Side::Outgoing, Standing::Gone)) => Err(Reason::new(
            Cause::Busy,
            "this machine was handed over to another host, what is here is an old copy",
        )),
        _ => Ok(records
            .iter()
            .map(|record| record.epoch)
            .max()
            .unwrap_or(0)
            .saturating_add(1)),
    }
}

/// May this side take a machine that is offered with `epoch`? If so: which of this side's doubts the offer settles.
/// [`settle_returned`] writes that down, before anything is built.
///
/// # A machine that comes back to a host in doubt
///
/// This host gave the machine away and never heard what became of it. Then some host offers it: the one that it went to, or
/// another that has it from there. Must a person settle the doubt first? No: the offer is the word that was waited for.
///
/// - To offer a machine a side needs the right to run it. From the go-ahead on the right is here or there, and this side uses
///   it no more: whoever has it now has it because the other side took it. It does not matter how many it passed through.
/// - *The epoch is higher than that of the hand over.* So the offer was made after the go-ahead. Epochs only grow along the way
///   that the right takes, because every side counts on from all that its ledger knows, and a ledger keeps the last word on a
///   machine for ever. An offer from before, that comes late, has a lower epoch; so has an old copy, and its ledger says
///   `Gone` (see `next_epoch`).
///
/// The danger is the other copy: the one that stands still here, in doubt, and that an answer `Declined`, or a user, could
/// still set going beside the one that comes. So the doubt becomes `Gone` in the ledger before the machine is built here,
/// and the ledger takes nothing from a process that has not seen that. `tests/journeys_model.rs` walks every order of this.
pub fn check_epoch(records: &[Record], epoch: u64) -> Result<Vec<Record>, Reason> {
    match binding(records) {
        Some(last) if last.epoch >= epoch => Err(Reason::new(
            Cause::NotAllowed,
            format!(
                "the offered copy of the machine is old (hand over {epoch}), this host knows of hand over {}",
                last.epoch
            ),
        )),
        _ => {
            let doubts = records
                .iter()
                .filter(|record| record.standing == Standing::GivenAway);
            Ok(doubts.cloned().collect())
        }
    }
}

/// Writes down what an offer settled.
pub fn settle_returned(ledger: &mut dyn Ledger, doubts: Vec<Record>) -> Result<(), Reason> {
    for mut doubt in doubts {
        let known = ledger.read(doubt.session, Side::Outgoing)?;
        if known.as_ref() != Some(&doubt) {
            let message = format!("crossing {} was settled meanwhile; try again", doubt.session);
            return Err(Reason::new(Cause::Ledger, message));
        }
        doubt.standing = Standing::Gone;
        ledger.write(&doubt)?;
    }
    Ok(())
}

/// Whether a record may still be asked for, among all that its ledger has. The others go after a while.
///
/// Needed is a doubt; a `Taken` that the other side may not have heard of and a `Waiting` of an earlier boot, because
/// without them the answer would be `Declined`; and the last word on each machine, which refuses old copies of it. Not
/// needed are `Kept` and `Declined`: they say what would be said without them, and their epochs, which nobody took, may be
/// used again.
///
/// A `Taken` may stay unheard for ever, when the link broke behind the answer. That the machine has left again, or ended, is no
/// reason to forget it: the side that gave it may still be in doubt, and would run its old copy. It is needed no more when the
/// two sides had to do with each other about this machine again.
pub fn is_needed(record: &Record, all: &[Record]) -> bool {
    let is_final = |record: &Record| match record.standing {
        Standing::Gone => true,
        Standing::Taken => record.heard || is_known_there(record, all),
        Standing::GivenAway | Standing::Kept | Standing::Waiting | Standing::Declined => false,
    };
    match record.standing {
        Standing::Kept | Standing::Declined => false,
        _ if !is_final(record) => true,
        _ => !all
            .iter()
            .any(|later| later.machine == record.machine && later.epoch > record.epoch && is_final(later)),
    }
}

/// Whether what came later shows that the side that gave the machine does not ask for this `Taken` any more: it sent the
/// machine here again, and nobody sends what he is in doubt about; or it agreed to take it from here, and wrote down before
/// that that it had been gone (see [`check_epoch`]). An offer alone, which left a `Declined`, shows nothing: its epoch may be used
/// again.
fn is_known_there(taken: &Record, all: &[Record]) -> bool {
    all.iter().any(|later| {
        let binds = matches!(
            later.standing,
            Standing::Taken | Standing::GivenAway | Standing::Gone
        );
        let same_sides = later.machine == taken.machine && taken.peer.is_some() && later.peer == taken.peer;
        binds && same_sides && later.epoch > taken.epoch
    })
}

/// What the giver learned.
#[derive(Debug)]
pub enum Verdict {
    Gone,
    /// The other side will never run it: the permit is back.
    Back(RunPermit),
    /// The answer proves nothing.
    InDoubt(String),
}

/// The outgoing side's book of one hand over: runs `giver` against the ledger and keeps the permit honest.
pub struct Departure {
    state: Giver,
    record: Record,
}

impl Departure {
    /// Opens the book; the permit to run is the caller's until `go_ahead` consumes it.
    pub fn begin(
        ledger: &dyn Ledger,
        session: SessionId,
        machine: MachineId,
    ) -> Result<(Self, RunPermit), Reason> {
        let epoch = next_epoch(&ledger.records(machine)?)?;
        let record = Record {
            session,
            machine,
            epoch,
            side: Side::Outgoing,
            standing: Standing::Kept,
            peer: None,
            heard: false,
            boot: None,
        };
        Ok((
            Departure {
                state: Giver::Holding,
                record,
            },
            RunPermit { session },
        ))
    }

    /// Opens the book of a crossing that ended in doubt.
    pub fn reopen(record: &Record) -> Result<Self, Reason> {
        let state = giver_after_restart(Some(record.standing));
        if record.side != Side::Outgoing || state != Giver::GivenAway {
            return Err(Reason::new(
                Cause::Ledger,
                format!(
                    "crossing {} is not in doubt here: it is {:?}",
                    record.session, record.standing
                ),
            ));
        }
        Ok(Departure {
            state,
            record: record.clone(),
        })
    }

    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    pub fn state(&self) -> Giver {
        self.state
    }

    /// Whose word will count.
    pub fn peer_is(&mut self, ledger: LedgerId) {
        self.record.peer = Some(ledger);
    }

    /// Writes that the machine may be gone, before the switch begins. The permit stays good.
    pub fn arm(&mut self, ledger: &mut dyn Ledger) -> Result<(), Reason> {
        self.step(ledger, GiverEvent::Arm)
    }

    /// The machine stays here after all, and the book says so again.
    pub fn step_back(&mut self, ledger: &mut dyn Ledger) -> Result<(), Reason> {
        self.step(ledger, GiverEvent::StepBack)
    }

    /// Gives the right to run away: when this returns `Ok` the go-ahead may be sent, and only then. A side that is
    /// not armed gets its permit back.
    pub fn go_ahead(&mut self, permit: RunPermit) -> Result<(), (RunPermit, Reason)> {
        let (next, _) = giver(self.state, GiverEvent::GoAhead);
        if next != Giver::GivenAway || self.state != Giver::Armed {
            let reason = Reason::new(
                Cause::Ledger,
                "the hand over was not written down before the go-ahead",
            );
            return Err((permit, reason));
        }
        self.state = next;
        Ok(())
    }

    fn step(&mut self, ledger: &mut dyn Ledger, event: GiverEvent) -> Result<(), Reason> {
        let (next, steps) = giver(self.state, event);
        self.write(ledger, steps)?;
        self.state = next;
        Ok(())
    }

    /// The other side's word.
    pub fn heard(&mut self, ledger: &mut dyn Ledger, from: LedgerId, taken: bool) -> Result<Verdict, Reason> {
        let same_ledger = self.record.peer == Some(from);
        let (next, steps) = giver(self.state, GiverEvent::Heard { taken, same_ledger });
        self.write(ledger, steps)?;
        let was = std::mem::replace(&mut self.state, next);
        match (was, next) {
            (_, Giver::Gone) => Ok(Verdict::Gone),
            (Giver::GivenAway, Giver::Holding) => Ok(Verdict::Back(RunPermit {
                session: self.record.session,
            })),
            _ => Ok(Verdict::InDoubt(
                "the other host answers from another ledger than before, so its not knowing proves nothing"
                    .into(),
            )),
        }
    }

    fn write(&mut self, ledger: &mut dyn Ledger, steps: &[GiverStep]) -> Result<(), Reason> {
        for step in steps {
            if let GiverStep::Write(standing) = step {
                self.record.standing = *standing;
                ledger.write(&self.record)?;
            }
        }
        Ok(())
    }
}

/// The incoming side's book of one hand over: runs `taker` against the ledger and makes the permit.
pub struct Arrival {
    state: Taker,
    record: Record,
}

impl Arrival {
    /// A machine that was built here, and waits.
    pub fn begin(
        ledger: &mut dyn Ledger,
        session: SessionId,
        machine: MachineId,
        epoch: u64,
        peer: LedgerId,
    ) -> Result<Self, Reason> {
        let record = Record {
            session,
            machine,
            epoch,
            side: Side::Incoming,
            standing: Standing::Waiting,
            peer: Some(peer),
            heard: false,
            boot: ledger.boot(),
        };
        ledger.write(&record)?;
        Ok(Arrival {
            state: Taker::Waiting,
            record,
        })
    }

    pub fn state(&self) -> Taker {
        self.state
    }

    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// The ledger of the side that gives.
    pub fn peer(&self) -> LedgerId {
        self.record.peer.unwrap_or(LedgerId([0; 16]))
    }

    /// The go-ahead arrived: notes that the machine is taken, and makes the permit to start it.
    pub fn take(&mut self, ledger: &mut dyn Ledger) -> Result<RunPermit, Reason> {
        let (next, steps) = taker(self.state, TakerEvent::Go);
        if next != Taker::Taking || self.state != Taker::Waiting {
            return Err(Reason::new(
                Cause::Protocol,
                "the go-ahead came to a side that does not wait for it",
            ));
        }
        self.write(ledger, steps)?;
        self.state = next;
        Ok(RunPermit {
            session: self.record.session,
        })
    }

    /// The machine runs; when this returns `Ok` the other side may hear it.
    pub fn started(&mut self, ledger: &mut dyn Ledger) -> Result<(), Reason> {
        let (next, steps) = taker(self.state, TakerEvent::Started);
        self.state = next;
        self.write(ledger, steps)
    }

    /// The other side said that it knows.
    pub fn heard(&mut self, ledger: &mut dyn Ledger) -> Result<(), Reason> {
        if self.state == Taker::Taken && !self.record.heard {
            self.record.heard = true;
            ledger.write(&self.record)?;
        }
        Ok(())
    }

    /// It could not be started and never ran an instruction.
    pub fn start_failed(&mut self, ledger: &mut dyn Ledger) -> Result<(), Reason> {
        self.close(ledger, TakerEvent::StartFailed)
    }

    /// Will never take it.
    pub fn give_up(&mut self, ledger: &mut dyn Ledger) -> Result<(), Reason> {
        self.close(ledger, TakerEvent::GiveUp)
    }

    fn close(&mut self, ledger: &mut dyn Ledger, event: TakerEvent) -> Result<(), Reason> {
        let (next, steps) = taker(self.state, event);
        self.write(ledger, steps)?;
        self.state = next;
        Ok(())
    }

    fn write(&mut self, ledger: &mut dyn Ledger, steps: &[TakerStep]) -> Result<(), Reason> {
        for step in steps {
            match step {
                TakerStep::Write(standing) => {
                    self.record.standing = *standing;
                    ledger.write(&self.record)?;
                }
                TakerStep::Note(standing) => {
                    self.record.standing = *standing;
                    match self.record.boot {
                        Some(_) => ledger.note(&self.record)?,
                        None => ledger.write(&self.record)?,
                    }
                }
                TakerStep::Settle => ledger.settle(self.record.session, self.record.side)?,
                TakerStep::Run | TakerStep::Discard | TakerStep::Answer { .. } => {}
            }
        }
        Ok(())
    }
}

/// Answers for a session from the ledger alone, when no machine of it is being built here: what was taken was
/// taken, and everything else is declined, in writing, before the answer; unless the host died while it waited.
pub fn answer_from_ledger(ledger: &mut dyn Ledger, session: SessionId) -> Result<Standing, Reason> {
    let known = ledger.read(session, Side::Incoming)?;
    let boot = ledger.boot();
    match taker_after_restart(known.as_ref().map(|record| record.standing_in(boot))) {
        Taker::Taken => {
            ledger.settle(session, Side::Incoming)?;
            return Ok(Standing::Taken);
        }
        Taker::Unsure => {
            return Err(Reason::new(
                Cause::Ledger,
                "that host was restarted while it waited for the machine's go-ahead, so nobody can know whether the machine \
                 began to run there; it does not run there now",
            ));
        }
        _ => {}
    }
    // Written also where it says so already, so that another process of this host that still waits for the go-ahead finds,
    // when it comes, that the crossing was settled meanwhile.
    let record = known.unwrap_or(Record {
        session,
        machine: MachineId([0; 16]),
        epoch: 0,
        side: Side::Incoming,
        standing: Standing::Declined,
        peer: None,
        heard: false,
        boot: None,
    });
    ledger.write(&Record {
        standing: Standing::Declined,
        ..record
    })?;
    Ok(Standing::Declined)
}
