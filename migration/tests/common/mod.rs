//! Two hosts and a guest in memory: everything a crossing needs, with witnesses for what must never happen.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)] // each test binary uses its part

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migration::block::{BlockId, BlockInfo, BlockKind, DataError, Name, Sink, Source, Span};
use ferry_migration::clock::Clock;
use ferry_migration::failure::{Cause, Reason, Side};
use ferry_migration::handover::{Ledger, LedgerId, MachineId, Record, RunPermit, SessionId};
use ferry_migration::incoming::Terms;
use ferry_migration::machine::{IncomingMachine, MachineCard, Offer, OutgoingMachine, Unobserved};
use ferry_migration::options::{Handle, Options};
use ferry_migration::outgoing::{World, cross};
use ferry_migration::report::Report;
use ferry_migration::transport::loopback::{Host, Loopback};
use ferry_migration::units::UnitSet;

/// A small generator of numbers that look random and repeat by seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.roll() >> 16) % end.max(1)
    }
}

/// Time that passes only when somebody waits or looks.
#[derive(Default)]
pub struct StepClock {
    nanos: AtomicU64,
}

impl Clock for StepClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.nanos.fetch_add(1_000, Ordering::AcqRel))
    }

    fn sleep(&self, time: Duration) {
        self.nanos.fetch_add(time.as_nanos() as u64, Ordering::AcqRel);
    }
}

/// One block of a guest: its bytes, and the notes of a careful dirty tracker.
pub struct FakeBlock {
    pub info: BlockInfo,
    pub data: Mutex<Vec<u8>>,
    noted: Mutex<UnitSet>,
    tracking: AtomicBool,
    /// Where the guest itself writes while the engine works; `None`: it does not.
    writer: Mutex<Option<Dice>>,
    /// Of a hundred reads, how many see the guest write in between.
    writes_per_cent: AtomicU64,
    /// Reads fail from now on (a broken disk).
    pub broken: AtomicBool,
}

impl FakeBlock {
    pub fn new(id: u16, kind: BlockKind, units: u64) -> Arc<Self> {
        let mut info = BlockInfo {
            id: BlockId(id),
            kind,
            name: format!("{kind:?} {id}"),
            bytes: 0,
        };
        info.bytes = units * u64::from(info.unit_bytes());
        if kind == BlockKind::Disk {
            // The last cluster of a disk is short.
            info.bytes -= 512 * 3;
        }
        Arc::new(FakeBlock {
            data: Mutex::new(vec![0; info.bytes as usize]),
            noted: Mutex::new(UnitSet::empty(units)),
            tracking: AtomicBool::new(false),
            writer: Mutex::new(None),
            writes_per_cent: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            info,
        })
    }

    /// Fills the block with what real memory is made of: holes, patterns, text, noise.
    pub fn fill(&self, dice: &mut Dice) {
        for unit in 0..self.info.units() {
            self.write_unit(unit, dice);
        }
        self.noted.lock().unwrap().clear();
    }

    pub fn write_unit(&self, unit: u64, dice: &mut Dice) {
        let span = Span {
            block: self.info.id,
            first: unit,
            count: 1,
        };
        let (at, length) = (self.info.offset(unit) as usize, self.info.span_bytes(span));
        let mut data = self.data.lock().unwrap();
        let page = &mut data[at..at + length];
        match dice.below(8) {
            0 | 1 => page.fill(0),
            2 => page.fill(dice.roll() as u8),
            3 => page
                .chunks_mut(2)
                .enumerate()
                .for_each(|(i, c)| c[0] = (i / 7) as u8),
            // Just a word here and there.
            4 | 5 => {
                for _ in 0..1 + dice.below(4) {
                    let place = dice.below(length as u64 / 8) as usize * 8;
                    page[place..place + 8].copy_from_slice(&dice.roll().to_le_bytes());
                }
            }
            // Written with what it holds.
            6 => {}
            _ => page
                .chunks_mut(8)
                .for_each(|c| c.copy_from_slice(&dice.roll().to_le_bytes()[..c.len()])),
        }
        if self.tracking.load(Ordering::Acquire) {
            self.noted.lock().unwrap().insert(unit);
        }
    }

    pub fn guest_writes(&self, dice: Option<Dice>, per_cent: u64) {
        *self.writer.lock().unwrap() = dice;
        self.writes_per_cent.store(per_cent, Ordering::Release);
    }

    fn guest_may_write(&self) {
        let mut writer = self.writer.lock().unwrap();
        if let Some(dice) = writer.as_mut()
            && dice.below(100) < self.writes_per_cent.load(Ordering::Acquire)
        {
            let unit = dice.below(self.info.units());
            self.write_unit(unit, dice);
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::Acquire)
    }

    pub fn noted(&self) -> UnitSet {
        self.noted.lock().unwrap().clone()
    }

    fn range(&self, span: Span) -> std::ops::Range<usize> {
        let at = self.info.offset(span.first) as usize;
        at..at + self.info.span_bytes(span)
    }
}

impl Source for FakeBlock {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn start_tracking(&self) -> Result<(), DataError> {
        self.tracking.store(true, Ordering::Release);
        Ok(())
    }

    fn stop_tracking(&self) {
        self.tracking.store(false, Ordering::Release);
    }

    fn first_pass(&self) -> Result<UnitSet, DataError> {
        let mut set = UnitSet::full(self.info.units());
        if self.info.kind == BlockKind::Disk {
            let data = self.data.lock().unwrap();
            for unit in 0..self.info.units() {
                let span = Span {
                    block: self.info.id,
                    first: unit,
                    count: 1,
                };
                if data[self.range(span)].iter().all(|b| *b == 0) {
                    set.remove(unit);
                }
            }
        }
        Ok(set)
    }

    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
        changed.union(&self.noted.lock().unwrap());
        Ok(())
    }

    fn take(&self, spans: &[Span]) -> Result<(), DataError> {
        {
            let mut noted = self.noted.lock().unwrap();
            spans
                .iter()
                .for_each(|span| noted.remove_run(span.first, u64::from(span.count)));
        }
        self.guest_may_write();
        Ok(())
    }

    fn put_back(&self, spans: &[Span]) {
        let mut noted = self.noted.lock().unwrap();
        spans
            .iter()
            .for_each(|span| noted.insert_run(span.first, u64::from(span.count)));
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(DataError::new("the medium is broken"));
        }
        self.guest_may_write();
        out.copy_from_slice(&self.data.lock().unwrap()[self.range(span)]);
        self.guest_may_write();
        Ok(())
    }
}

/// A block at the incoming side.
pub struct FakeSink {
    pub info: BlockInfo,
    data: Mutex<Vec<u8>>,
    /// Content from an earlier time, by name.
    library: BTreeMap<[u8; 32], Vec<u8>>,
    pub room_left: AtomicU64,
    pub in_place: bool,
    pub taken_from_library: AtomicU64,
}

impl FakeSink {
    pub fn new(info: BlockInfo) -> Self {
        let data = Mutex::new(vec![0; info.bytes as usize]);
        let in_place = info.kind == BlockKind::Memory;
        let room_left = AtomicU64::new(u64::MAX);
        let (library, taken_from_library) = (BTreeMap::new(), AtomicU64::new(0));
        FakeSink {
            info,
            data,
            library,
            room_left,
            in_place,
            taken_from_library,
        }
    }

    pub fn with_library(mut self, content: &[u8]) -> Self {
        for unit in content.chunks(self.info.unit_bytes() as usize) {
            self.library.insert(Name::of(unit).0, unit.to_vec());
        }
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    fn range(&self, span: Span) -> std::ops::Range<usize> {
        let at = self.info.offset(span.first) as usize;
        at..at + self.info.span_bytes(span)
    }
}

impl Sink for FakeSink {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        if self.room_left.load(Ordering::Acquire) < data.len() as u64 {
            return Err(DataError::no_space("the disk there is full"));
        }
        self.room_left.fetch_sub(data.len() as u64, Ordering::AcqRel);
        self.data.lock().unwrap()[self.range(span)].copy_from_slice(data);
        Ok(())
    }

    fn place_zeroes(&self, span: Span) -> Result<(), DataError> {
        self.data.lock().unwrap()[self.range(span)].fill(0);
        Ok(())
    }

    fn fill_in_place(&self, span: Span, fill: &mut dyn FnMut(&mut [u8])) -> Result<bool, DataError> {
        if self.in_place {
            fill(&mut self.data.lock().unwrap()[self.range(span)]);
        }
        Ok(self.in_place)
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        out.copy_from_slice(&self.data.lock().unwrap()[self.range(span)]);
        Ok(())
    }

    fn has_library(&self) -> bool {
        !self.library.is_empty()
    }

    fn place_known(&self, unit: u64, name: &Name) -> Result<bool, DataError> {
        let Some(content) = self.library.get(&name.0) else {
            return Ok(false);
        };
        let span = Span {
            block: self.info.id,
            first: unit,
            count: 1,
        };
        self.taken_from_library.fetch_add(1, Ordering::AcqRel);
        self.place(span, content).map(|()| true)
    }
}

/// Who runs. The one thing that must never be true is checked whenever it could become true.
#[derive(Default)]
pub struct Witness {
    pub here: AtomicBool,
    pub there: AtomicBool,
    /// The outgoing process is dead: nothing it does counts any more.
    pub outgoing_dead: AtomicBool,
}

impl Witness {
    pub fn check(&self) {
        let both = self.here.load(Ordering::Acquire) && self.there.load(Ordering::Acquire);
        assert!(!both, "the machine runs on both sides");
    }

    pub fn runs_here(&self) -> bool {
        self.here.load(Ordering::Acquire)
    }

    pub fn runs_there(&self) -> bool {
        self.there.load(Ordering::Acquire)
    }
}

/// A ledger whose records outlive the process.
#[derive(Clone)]
pub struct MemoryLedger {
    pub id: LedgerId,
    pub records: Arc<Mutex<BTreeMap<(SessionId, bool), Record>>>,
    /// A dead process writes nothing.
    pub dead: Arc<Witness>,
    mortal: bool,
    pub fails: Arc<AtomicBool>,
}

impl MemoryLedger {
    pub fn new(id: u8, witness: &Arc<Witness>, mortal: bool) -> Self {
        MemoryLedger {
            id: LedgerId([id; 16]),
            records: Arc::default(),
            dead: Arc::clone(witness),
            mortal,
            fails: Arc::default(),
        }
    }
}

impl Ledger for MemoryLedger {
    fn id(&self) -> LedgerId {
        self.id
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        if self.mortal && self.dead.outgoing_dead.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Ledger, "the process is dead"));
        }
        if self.fails.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Ledger, "the ledger's disk is broken"));
        }
        self.records
            .lock()
            .unwrap()
            .insert((record.session, record.side == Side::Incoming), record.clone());
        Ok(())
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        if self.fails.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Ledger, "the ledger's disk is broken"));
        }
        Ok(self
            .records
            .lock()
            .unwrap()
            .get(&(session, side == Side::Incoming))
            .cloned())
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        Ok(self
            .records
            .lock()
            .unwrap()
            .values()
            .filter(|r| r.machine == machine)
            .cloned()
            .collect())
    }
}

/// How the machine stands at the outgoing side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    Running,
    Paused,
    Departed,
    Stranded,
}

pub struct FakeOutgoing {
    pub blocks: Vec<Arc<FakeBlock>>,
    pub witness: Arc<Witness>,
    pub stand: Stand,
    pub throttled: u8,
    pub released: bool,
    pub state: Vec<u8>,
    /// Fails `check` from the n-th time on.
    pub unfit_after: u64,
    pub checks: u64,
    pub log: Vec<&'static str>,
}

impl FakeOutgoing {
    fn dead(&self) -> bool {
        self.witness.outgoing_dead.load(Ordering::Acquire)
    }
}

pub const MACHINE: MachineId = MachineId([0x4d; 16]);

impl OutgoingMachine for FakeOutgoing {
    fn card(&mut self) -> Result<MachineCard, Reason> {
        Ok(MachineCard {
            machine: MACHINE,
            name: "web".into(),
            running: true,
            description: b"two vCPUs".to_vec(),
        })
    }

    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason> {
        Ok(self
            .blocks
            .iter()
            .map(|block| Arc::clone(block) as Arc<dyn Source>)
            .collect())
    }

    fn check(&mut self) -> Result<(), Reason> {
        self.checks += 1;
        if self.checks > self.unfit_after {
            return Err(Reason::new(Cause::Machine, "the guest powered off"));
        }
        Ok(())
    }

    fn throttle(&mut self, throttle: &ferry_migration::policy::Throttle) -> Result<(), Reason> {
        self.throttled = throttle.percent;
        Ok(())
    }

    fn slow_writes(&mut self, _: BlockId, _: Option<u64>) -> Result<(), Reason> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Reason> {
        self.log.push("pause");
        if !self.dead() {
            self.stand = Stand::Paused;
        }
        self.witness.here.store(false, Ordering::Release);
        self.blocks.iter().for_each(|block| block.guest_writes(None, 0));
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Reason> {
        self.log.push("save");
        // Saving devices writes to the guest, too.
        let mut dice = Dice::new(self.checks);
        self.blocks[0].write_unit(1, &mut dice);
        Ok(self.state.clone())
    }

    fn release(&mut self) -> Result<(), Reason> {
        self.log.push("release");
        self.released = true;
        Ok(())
    }

    fn resume(&mut self, _: &RunPermit) -> Result<(), Reason> {
        self.log.push("resume");
        if self.dead() {
            return Ok(());
        }
        self.released = false;
        self.stand = Stand::Running;
        self.witness.here.store(true, Ordering::Release);
        self.witness.check();
        Ok(())
    }

    fn departed(&mut self) {
        self.log.push("departed");
        if !self.dead() {
            self.stand = Stand::Departed;
        }
    }

    fn stranded(&mut self) {
        self.log.push("stranded");
        if !self.dead() {
            self.stand = Stand::Stranded;
        }
    }
}

/// What a host has built.
#[derive(Default)]
pub struct Built {
    pub sinks: Mutex<Vec<Arc<FakeSink>>>,
    pub state: Mutex<Vec<u8>>,
    pub aborted: AtomicU64,
    pub prepared: AtomicU64,
    pub refuse: Mutex<Option<Reason>>,
    pub start_fails: AtomicBool,
    /// Content from an earlier time, for each block.
    pub libraries: Mutex<BTreeMap<u16, Vec<u8>>>,
    pub room: AtomicU64,
    /// A ledger whose disk breaks while the state is loaded.
    pub ledger_breaks: Mutex<Option<Arc<AtomicBool>>>,
}

pub struct FakeIncoming {
    pub built: Arc<Built>,
    pub witness: Arc<Witness>,
}

impl IncomingMachine for FakeIncoming {
    fn admit(&mut self, offer: &Offer) -> Result<(), Reason> {
        assert_eq!(offer.card.description, b"two vCPUs");
        self.built.refuse.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        self.built.prepared.fetch_add(1, Ordering::AcqRel);
        let libraries = self.built.libraries.lock().unwrap();
        let sinks: Vec<_> = offer
            .blocks
            .iter()
            .map(|info| {
                let sink = FakeSink::new(info.clone());
                let sink = match libraries.get(&info.id.0) {
                    Some(content) => sink.with_library(content),
                    None => sink,
                };
                match self.built.room.load(Ordering::Acquire) {
                    0 => {}
                    room => sink.room_left.store(room, Ordering::Release),
                }
                Arc::new(sink)
            })
            .collect();
        *self.built.sinks.lock().unwrap() = sinks.clone();
        Ok(sinks.into_iter().map(|sink| sink as Arc<dyn Sink>).collect())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Reason> {
        *self.built.state.lock().unwrap() = state.to_vec();
        if let Some(fails) = &*self.built.ledger_breaks.lock().unwrap() {
            fails.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), Reason> {
        if self.built.start_fails.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Machine, "the vCPU would not start"));
        }
        self.witness.there.store(true, Ordering::Release);
        self.witness.check();
        Ok(())
    }

    fn abort(&mut self) {
        self.built.aborted.fetch_add(1, Ordering::AcqRel);
    }
}

/// Both hosts.
pub struct Stage {
    pub witness: Arc<Witness>,
    pub outgoing: FakeOutgoing,
    pub our_ledger: MemoryLedger,
    pub their_ledger: MemoryLedger,
    pub built: Arc<Built>,
    pub clock: Arc<StepClock>,
    pub handle: Handle,
    pub host: Arc<Mutex<Host>>,
}

impl Stage {
    pub fn new(seed: u64) -> Self {
        Self::with_blocks(
            seed,
            vec![
                FakeBlock::new(0, BlockKind::Memory, 700),
                FakeBlock::new(1, BlockKind::Memory, 40),
                FakeBlock::new(7, BlockKind::Disk, 21),
            ],
        )
    }

    pub fn with_blocks(seed: u64, blocks: Vec<Arc<FakeBlock>>) -> Self {
        let witness: Arc<Witness> = Arc::default();
        witness.here.store(true, Ordering::Release);
        let mut dice = Dice::new(seed);
        blocks.iter().for_each(|block| block.fill(&mut dice));
        let state = (0..70_000).map(|_| dice.roll() as u8).collect();
        let outgoing = FakeOutgoing {
            blocks,
            witness: Arc::clone(&witness),
            stand: Stand::Running,
            throttled: 0,
            released: false,
            state,
            unfit_after: u64::MAX,
            checks: 0,
            log: Vec::new(),
        };
        let our_ledger = MemoryLedger::new(1, &witness, true);
        let their_ledger = MemoryLedger::new(2, &witness, false);
        let built: Arc<Built> = Arc::default();
        let clock: Arc<StepClock> = Arc::default();
        let host = Arc::new(Mutex::new(new_host(&built, &witness, &their_ledger, &clock)));
        let mut stage = Stage {
            witness,
            outgoing,
            our_ledger,
            their_ledger,
            built,
            clock,
            handle: Handle::new(),
            host,
        };
        stage.guest_works(seed, 6);
        stage
    }

    /// The guest writes while the engine copies.
    pub fn guest_works(&mut self, seed: u64, per_cent: u64) {
        for (at, block) in self.outgoing.blocks.iter().enumerate() {
            block.guest_writes(Some(Dice::new(seed + 77 * at as u64)), per_cent);
        }
    }

    /// The incoming process is killed and started again: only its ledger is left.
    pub fn restart_host(&self) {
        self.witness.there.store(false, Ordering::Release);
        *self.host.lock().unwrap() = new_host(&self.built, &self.witness, &self.their_ledger, &self.clock);
    }

    /// The other host agrees to these terms.
    pub fn set_terms(&self, terms: Terms) {
        let machine = FakeIncoming {
            built: Arc::clone(&self.built),
            witness: Arc::clone(&self.witness),
        };
        let (ledger, clock) = (
            Box::new(self.their_ledger.clone()),
            Arc::clone(&self.clock) as Arc<dyn Clock>,
        );
        *self.host.lock().unwrap() = Host::new(Box::new(machine), ledger, clock, terms);
    }

    pub fn loopback(&self, lanes: u16) -> Loopback {
        Loopback::new(Arc::clone(&self.host), lanes)
    }

    pub fn cross(&mut self, link: &mut dyn ferry_migration::link::Link, options: &Options) -> Report {
        let world = World {
            machine: &mut self.outgoing,
            link,
            ledger: &mut self.our_ledger,
            clock: &*self.clock,
            observer: &Unobserved,
            handle: &self.handle,
        };
        let report = cross(world, options);
        self.witness.check();
        report
    }

    /// Memory and disks of both sides are the same, and so is the state.
    pub fn assert_equal(&self) {
        let sinks = self.built.sinks.lock().unwrap();
        for block in &self.outgoing.blocks {
            let sink = sinks
                .iter()
                .find(|sink| sink.info.id == block.info.id)
                .expect("a sink for each block");
            let (ours, theirs) = (block.bytes(), sink.bytes());
            let unit = block.info.unit_bytes() as usize;
            let differ: Vec<usize> = (0..block.info.units() as usize)
                .filter(|u| {
                    let range = u * unit..((u + 1) * unit).min(ours.len());
                    ours[range.clone()] != theirs[range]
                })
                .collect();
            assert!(
                differ.is_empty(),
                "units {differ:?} of {} differ",
                block.info.name
            );
        }
        assert_eq!(*self.built.state.lock().unwrap(), self.outgoing.state);
    }
}

pub fn new_host(
    built: &Arc<Built>,
    witness: &Arc<Witness>,
    ledger: &MemoryLedger,
    clock: &Arc<StepClock>,
) -> Host {
    let machine = FakeIncoming {
        built: Arc::clone(built),
        witness: Arc::clone(witness),
    };
    Host::new(
        Box::new(machine),
        Box::new(ledger.clone()),
        Arc::clone(clock) as Arc<dyn Clock>,
        Terms::default(),
    )
}

pub fn options(session: u8, lanes: u16) -> Options {
    let mut options = Options::new(SessionId([session; 16]));
    options.lanes = lanes;
    options.limits.policy = "qemu".parse().unwrap();
    options
}
