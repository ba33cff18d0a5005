//! Turns a plan into workers, spreads them over the vCPUs, and changes the plan while the machine runs.

use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use crate::cpu::{self, MAX_CPUS};
use crate::devices::{DISK_CPU, Devices};
use crate::evidence::Evidence;
use crate::memory::{Memory, PAGE, Pages};
use crate::pick::{Order, Picker};
use crate::plan::Plan;
use crate::table::{ROW_WORDS, ROWS_PER_BLOCK, UPDATES_PER_BLOCK, Update};
use crate::virtio::block::{BLOCK, Shared};
use crate::work::allocator::{Sweeper, Writer};
use crate::work::balloon::Keeper;
use crate::work::blocks::{Ask, Blocks};
use crate::work::console::Console;
use crate::work::database::{Database, LOG_BLOCKS, ROWS_PER_CHUNK, Rows};
use crate::work::disk::Journal;
use crate::work::entropy::Entropy;
use crate::work::gc::{Collector, Root};
use crate::work::server::{Server, Services};
use crate::work::spin::Spinner;
use crate::work::{Pace, Worker};

const MAX_WORKERS: usize = 32;
const MIB: u64 = 1 << 20;

/// Odd while the plan changes and all vCPUs but the first wait.
static EPOCH: AtomicU64 = AtomicU64::new(1);
static PARKED: AtomicUsize = AtomicUsize::new(0);
static LISTS: [(AtomicPtr<Worker>, AtomicUsize); MAX_CPUS] =
    [const { (AtomicPtr::new(core::ptr::null_mut()), AtomicUsize::new(0)) }; MAX_CPUS];

/// The workers of one vCPU in one epoch.
pub struct Shift {
    pub epoch: u64,
    pub workers: &'static mut [Worker],
}

/// A peer waits until there is a plan, then takes its workers.
pub fn join(index: usize) -> Shift {
    PARKED.fetch_add(1, Ordering::SeqCst);
    loop {
        let epoch = EPOCH.load(Ordering::Acquire);
        if epoch.is_multiple_of(2) {
            return take(index, epoch);
        }
        core::hint::spin_loop();
    }
}

pub fn is_over(shift: &Shift) -> bool {
    EPOCH.load(Ordering::Relaxed) != shift.epoch
}

fn take(index: usize, epoch: u64) -> Shift {
    let (list, used) = &LISTS[index];
    let (list, used) = (list.load(Ordering::Acquire), used.load(Ordering::Acquire));
    // SAFETY: `start` wrote `used` workers for this vCPU alone, before it made the epoch even.
    let workers = if list.is_null() {
        &mut [][..]
    } else {
        unsafe { core::slice::from_raw_parts_mut(list, used) }
    };
    Shift { epoch, workers }
}

/// What a plan got: for the reports.
#[derive(Clone, Copy)]
pub struct Granted {
    pub evidence: Option<&'static Evidence>,
    /// The heaps of the first few vCPUs.
    pub heaps: [(u64, u64); 8],
    pub heap_count: usize,
    pub workers: usize,
    pub disk_bytes: u64,
    pub network: bool,
}

/// Ends the shift of all vCPUs, shares out memory and workers anew, and begins the next one. Only the first
/// vCPU calls it, and its own last shift is over.
pub fn start(plan: &Plan, memory: &mut Memory, devices: &Devices, cpus: usize) -> (Shift, Granted) {
    if EPOCH.load(Ordering::SeqCst).is_multiple_of(2) {
        PARKED.store(0, Ordering::SeqCst);
        EPOCH.fetch_add(1, Ordering::SeqCst);
        cpu::wake_peers();
    }
    while PARKED.load(Ordering::SeqCst) < cpus - 1 {
        core::hint::spin_loop();
    }
    // SAFETY: all shifts are over.
    if let Some(balloon) = unsafe { devices.balloon() } {
        balloon.settle();
    }
    memory.give_back_all();
    if let Some(disk) = devices.disk {
        disk.forget();
    }
    let granted = Hiring::new(memory, cpus).hire(plan, devices);
    let epoch = EPOCH.fetch_add(1, Ordering::SeqCst) + 1;
    (take(0, epoch), granted)
}

struct Hiring<'a> {
    memory: &'a mut Memory,
    cpus: usize,
    lists: [Option<&'static mut [MaybeUninit<Worker>]>; MAX_CPUS],
    used: [usize; MAX_CPUS],
}

impl<'a> Hiring<'a> {
    fn new(memory: &'a mut Memory, cpus: usize) -> Self {
        let mut lists = [const { None }; MAX_CPUS];
        for list in lists.iter_mut().take(cpus) {
            // SAFETY: all shifts are over, so nothing taken before is in use; anything is a MaybeUninit.
            *list = unsafe { memory.take_zeroed(MAX_WORKERS) };
        }
        Hiring {
            memory,
            cpus,
            lists,
            used: [0; MAX_CPUS],
        }
    }

    fn hire(mut self, plan: &Plan, devices: &Devices) -> Granted {
        let mut granted = Granted {
            evidence: None,
            heaps: [(0, 0); 8],
            heap_count: 0,
            workers: 0,
            disk_bytes: 0,
            network: false,
        };
        if let (true, Some(disk)) = (plan.works.uses_disk(), devices.disk) {
            granted.disk_bytes = disk.with(|d| d.blocks) * BLOCK;
            self.hire_disk_workers(plan, disk);
        }
        if plan.works.network() {
            granted.network = self.hire_server(plan, devices).is_some();
        }
        self.hire_small(plan, devices);
        if plan.works.balloon {
            self.hire_keeper(plan, devices);
        }
        if plan.works.gc {
            self.hire_collectors(plan, &mut granted);
        }
        if plan.works.spin {
            for index in 0..self.cpus {
                self.place(
                    index,
                    Worker::Spinner(Spinner {
                        seed: plan.seed ^ (index as u64) << 32,
                        round: 0,
                        cpu: index,
                    }),
                );
            }
        }
        if plan.works.allocator {
            granted.evidence = self.hire_allocator(plan);
        }
        for (index, (list, used)) in LISTS.iter().enumerate() {
            let first = self.lists[index]
                .as_mut()
                .map_or(core::ptr::null_mut(), |l| l.as_mut_ptr().cast::<Worker>());
            list.store(first, Ordering::Release);
            used.store(self.used[index], Ordering::Release);
            granted.workers += self.used[index];
        }
        granted
    }

    fn place(&mut self, index: usize, worker: Worker) {
        let index = index % self.cpus;
        let used = self.used[index];
        if let Some(place) = self.lists[index].as_mut().and_then(|list| list.get_mut(used)) {
            place.write(worker);
            self.used[index] += 1;
        }
    }

    /// Entropy and console.
    fn hire_small(&mut self, plan: &Plan, devices: &Devices) {
        let at = devices.net_cpu;
        // SAFETY: all shifts are over, and the next has one worker for each device.
        let (entropy, console) = unsafe { (devices.entropy(), devices.console()) };
        let pace = || Pace::of(plan.pieces, 1);
        if let (true, Some(lane)) = (plan.works.entropy, entropy) {
            self.place(at, Worker::Entropy(Entropy { lane, pace: pace() }));
        }
        if let (true, Some(lines)) = (plan.works.console, console) {
            let (pace, number) = (pace(), 0);
            self.place(at, Worker::Console(Console { lines, pace, number }));
        }
    }

    fn hire_keeper(&mut self, plan: &Plan, devices: &Devices) -> Option<()> {
        // SAFETY: as above.
        let balloon = unsafe { devices.balloon()? };
        let total_bytes = self.memory.free_bytes();
        let wanted = plan.stock.min(total_bytes / 2) / PAGE;
        // SAFETY: as in `new`; plain numbers.
        let contents = unsafe { self.memory.take_zeroed::<u32>(wanted as usize)? };
        let stock = self.memory.take_pages(wanted);
        let pace = Pace::of(plan.churn, 1);
        let keeper = Keeper::new(balloon, stock, contents, total_bytes, pace);
        self.place(devices.net_cpu, Worker::Balloon(keeper));
        Some(())
    }

    /// One heap per vCPU.
    fn hire_collectors(&mut self, plan: &Plan, granted: &mut Granted) {
        let free = self.memory.free_bytes();
        let all = plan.heap.unwrap_or((64 * MIB).min(free / 4)).min(free * 3 / 4);
        let words = (all / self.cpus as u64 / 8) as usize;
        for index in 0..self.cpus {
            // SAFETY: as in `new`; words and roots are plain numbers.
            let (heap, roots) = unsafe {
                (
                    self.memory.take_words::<1>(words),
                    self.memory.take_zeroed::<Root>(Collector::roots_for(words)),
                )
            };
            if let (Some(heap), Some(roots)) = (heap, roots) {
                let heap = heap.as_flattened_mut();
                if let Some(place) = granted.heaps.get_mut(index) {
                    let from = heap.as_ptr() as u64;
                    *place = (from, from + 8 * heap.len() as u64);
                    granted.heap_count = index + 1;
                }
                self.place(
                    index,
                    Worker::Collector(Collector::new(
                        heap,
                        roots,
                        Pace::of(plan.allocations, self.cpus as u64),
                        plan.seed ^ (index as u64) << 40,
                    )),
                );
            }
        }
    }

    fn hire_allocator(&mut self, plan: &Plan) -> Option<&'static Evidence> {
        let free = self.memory.free_bytes();
        // Each page needs 8 bytes of table beside it, and the evidence itself a page.
        let most = free.saturating_sub(free / 512 + 16 * PAGE);
        let wanted = plan.memory.unwrap_or(free / 2).min(most) / PAGE;
        // SAFETY: as in `new`; a zero is an AtomicU64, and anything is a MaybeUninit.
        let (expected, place) = unsafe {
            (
                self.memory.take_zeroed::<AtomicU64>(wanted as usize)?,
                self.memory.take_zeroed::<MaybeUninit<Evidence>>(1)?,
            )
        };
        let pages = self.memory.take_pages(wanted);
        if pages.count() == 0 {
            return None;
        }
        let evidence: &'static Evidence =
            place[0].write(Evidence::new(pages, expected, plan.seed, plan.random_percent));
        for index in 0..self.cpus {
            let pace = Pace::of(plan.check, self.cpus as u64);
            self.place(index, Worker::Sweeper(Sweeper { evidence, pace }));
        }
        if plan.classes[0].is_some() {
            self.hire_classes(plan, evidence)
        } else {
            self.hire_writers(plan, evidence)
        }
        Some(evidence)
    }

    /// The working set, in as many parts as there are writers.
    fn hire_writers(&mut self, plan: &Plan, evidence: &'static Evidence) {
        let writers = if plan.writers == 0 {
            self.cpus
        } else {
            plan.writers
        } as u64;
        let set = (evidence.pages.count() * plan.wws_percent / 100).max(1);
        let each = (set / writers).max(1);
        for writer in 0..writers.min(set) {
            let pace = Pace::of(plan.rate, writers).map(|pace| pace.catching_up(plan.catch_up_ns));
            let picker = Picker::new(plan.order, each, plan.seed ^ writer);
            let writer_of = Writer {
                evidence,
                first: writer * each,
                picker,
                pace,
                whole: plan.whole_pages,
            };
            self.place(writer as usize, Worker::Writer(writer_of));
        }
    }

    /// The journal has the disk from its start, the database its second half; raw requests go anywhere.
    fn hire_disk_workers(&mut self, plan: &Plan, disk: &'static Shared) {
        if plan.works.blocks {
            let ask = Ask {
                write: plan.writes,
                order: plan.order,
                bytes: plan.request,
                depth: plan.depth,
            };
            if let Some(blocks) = Blocks::new(disk, ask, plan.seed) {
                self.place(DISK_CPU, Worker::Blocks(blocks));
            }
        }
        let blocks = disk.with(|d| d.blocks);
        let half = blocks / 2;
        let room = if plan.works.database { half } else { blocks }.saturating_sub(1);
        let capacity = (plan.journal.unwrap_or(64 * MIB) / BLOCK).min(room);
        if plan.works.disk && capacity > 0 {
            let pace = Pace::of(plan.records, 1);
            let journal = Journal::new(disk, capacity, plan.seed, plan.journal_new, plan.group, pace);
            self.place(DISK_CPU, Worker::Journal(journal));
        }
        let most = half.saturating_sub(1 + LOG_BLOCKS) * ROWS_PER_BLOCK as u64;
        let rows = plan.rows.min(most);
        if plan.works.database && rows > 0 {
            self.hire_database(plan, disk, half, rows);
        }
    }

    fn hire_database(&mut self, plan: &Plan, disk: &'static Shared, base: u64, rows: u64) -> Option<()> {
        let count = rows as usize;
        // SAFETY: as in `new`; zero is a row, a number and false.
        let (all, versions, changed, group) = unsafe {
            (
                self.memory.take_words::<ROW_WORDS>(count)?,
                self.memory.take_zeroed::<u32>(count)?,
                self.memory.take_zeroed::<bool>(count.div_ceil(ROWS_PER_CHUNK))?,
                self.memory.take_zeroed::<Update>(UPDATES_PER_BLOCK)?,
            )
        };
        let table = Rows {
            rows: all,
            versions,
            changed,
            group,
        };
        let hot = (rows * plan.update_percent / 100).max(1);
        let (pace, check) = (Pace::of(plan.updates, 1), Pace::of(plan.check, 1));
        self.place(
            DISK_CPU,
            Worker::Database(Database::new(disk, base, table, plan.seed, hot, pace, check)),
        );
        Some(())
    }

    fn hire_server(&mut self, plan: &Plan, devices: &Devices) -> Option<()> {
        let (address, prefix) = plan.address?;
        // SAFETY: all shifts are over, and this is the only server of the next.
        let net = unsafe { devices.net()? };
        let services = Services {
            address,
            prefix,
            gateway: plan.gateway,
            web: plan.works.web,
            calc: plan.works.calc,
            connections: plan.connections,
            body_bytes: plan.body,
        };
        let server = Server::new(net, services, self.memory, crate::clock::now(0))?;
        self.place(devices.net_cpu, Worker::Server(server));
        Some(())
    }

    /// One writer per class of pages, each page of a class equally likely at any time.
    fn hire_classes(&mut self, plan: &Plan, evidence: &'static Evidence) {
        let mut first = 0;
        for (i, class) in plan.classes.iter().flatten().enumerate() {
            let left = evidence.pages.count() - first;
            let pages = class.pages.unwrap_or(left).min(left);
            if pages == 0 {
                continue;
            }
            let pace = Some(Pace::new(class.rate_micro.saturating_mul(pages)));
            let picker = Picker::new(Order::Random, pages, plan.seed ^ (i as u64) << 8);
            self.place(
                i,
                Worker::Writer(Writer {
                    evidence,
                    first,
                    picker,
                    pace,
                    whole: plan.whole_pages,
                }),
            );
            first += pages;
        }
    }
}

impl Granted {
    pub fn pages(&self) -> &Pages {
        const NONE: &Pages = &Pages::NONE;
        self.evidence.map_or(NONE, |e| &e.pages)
    }
}
