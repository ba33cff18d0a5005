//! What the first vCPU does besides work: beats, sums, orders from the serial port, and the end.

use core::sync::atomic::Ordering::Relaxed;

use crate::crew::{self, Granted, Shift};
use crate::devices::Devices;
use crate::info::Info;
use crate::line::Line;
use crate::memory::Memory;
use crate::plan::{End, Plan};
use crate::work::{Next, balloon, blocks, console, database, disk, entropy, gc, io, server, spin};
use crate::{clock, cpu, damage, evidence, gap, power, serial};

const SECOND: u64 = 1_000_000_000;
const LONGEST_ORDER: usize = 512;

pub struct Chief {
    plan: Plan,
    granted: Granted,
    memory: Memory,
    devices: Devices,
    ram_bytes: u64,
    cpus: usize,
    beat: u64,
    next_beat: u64,
    sum: u64,
    next_sum: u64,
    end_at: Option<u64>,
    ready_told: bool,
    damage_told: bool,
    order: [u8; LONGEST_ORDER],
    order_length: usize,
}

impl Chief {
    /// Starts the first plan and says hello.
    pub fn begin(info: &Info, cpus: usize) -> (Chief, Shift) {
        let (plan, wrong) = Plan::read(info.command());
        let ram_bytes = info.ram().iter().map(|(from, to)| to - from).sum();
        let mut memory = Memory::new(info.ram());
        let devices = Devices::find(&mut memory, cpus);
        memory.keep_taken();
        let (shift, granted) = crew::start(&plan, &mut memory, &devices, cpus);
        let now = clock::now(0);
        let mut chief = Chief {
            plan,
            granted,
            memory,
            devices,
            ram_bytes,
            cpus,
            beat: 0,
            next_beat: now,
            sum: 0,
            next_sum: now + SECOND,
            end_at: plan.run_ns.map(|ns| now + ns),
            ready_told: false,
            damage_told: false,
            order: [0; LONGEST_ORDER],
            order_length: 0,
        };
        chief.hello("hello", wrong);
        (chief, shift)
    }

    fn hello(&mut self, kind: &str, wrong: Option<&str>) {
        let (granted, plan, cpus, ram) = (self.granted, self.plan, self.cpus, self.ram_bytes);
        serial::report(|l| {
            l.word("t", kind)
                .number("cpus", cpus as u64)
                .number("memory", ram)
                .word("clock", clock::name());
            l.number("ns", clock::now(0))
                .number("workers", granted.workers as u64);
            if let Some(word) = wrong {
                l.word("wrong", word);
            }
            if plan.works.gc {
                l.ranges("heaps", &granted.heaps[..granted.heap_count]);
            }
            if plan.works.uses_disk() {
                l.number("disk", granted.disk_bytes);
            }
            if plan.works.network() {
                l.flag("network", granted.network);
            }
            if granted.evidence.is_some() {
                l.number("pages", granted.pages().count())
                    .number("seed", plan.seed);
                l.ranges("evidence", granted.pages().ranges());
            }
        });
    }

    /// Does what is due; says when to be called again.
    pub fn attend(&mut self, now: u64, shift: &mut Shift) -> Next {
        if now >= self.next_beat {
            self.beat += 1;
            let (beat, works) = (self.beat, self.plan.works);
            serial::report(|l| {
                l.word("t", "beat").number("seq", beat).number("ns", now);
                if works.disk {
                    l.number("acked", disk::ACKNOWLEDGED.load(Relaxed));
                }
                if works.database {
                    l.number("committed", database::COMMITTED.load(Relaxed));
                }
            });
            let behind = (now - self.next_beat) / self.plan.heartbeat_ns;
            self.next_beat += (behind + 1) * self.plan.heartbeat_ns;
            self.listen(shift);
            if power::button_pressed() {
                self.finish(End::PowerOff, now);
            }
        } else if cpu::serial_interrupted() {
            self.listen(shift);
        }
        if !self.ready_told && self.granted.evidence.is_some_and(|e| e.is_filled()) {
            self.ready_told = true;
            serial::report(|l| {
                l.word("t", "ready").number("ns", now);
            });
        }
        if now >= self.next_sum {
            self.next_sum += ((now - self.next_sum) / SECOND + 1) * SECOND;
            self.report_sum(now);
            self.damage_told = false;
        }
        if !self.damage_told
            && let Some(line) = damage::first()
        {
            serial::report(line);
            self.damage_told = true;
        }
        if self.end_at.is_some_and(|at| now >= at) {
            self.finish(self.plan.end, now);
        }
        let next = self.next_beat.min(self.next_sum);
        Next::At(self.end_at.map_or(next, |at| next.min(at)))
    }

    fn report_sum(&mut self, now: u64) {
        self.sum += 1;
        let (seq, works, evidence) = (self.sum, self.plan.works, self.granted.evidence.is_some());
        let cpus = self.cpus;
        let (gap, worst) = gap::take();
        serial::report(|l: &mut Line| {
            l.word("t", "sum")
                .number("seq", seq)
                .number("ns", now)
                .number("gap_ns", gap)
                .number("worst_gap_ns", worst);
            if evidence {
                l.number("writes", evidence::WRITES.load(Relaxed))
                    .number("checks", evidence::CHECKS.load(Relaxed));
                l.number("sweeps", evidence::SWEEPS.load(Relaxed));
            }
            if works.gc {
                l.number("allocated", gc::ALLOCATED.load(Relaxed))
                    .number("moved", gc::MOVED.load(Relaxed));
                l.number("collections", gc::COLLECTIONS.load(Relaxed))
                    .number("major", gc::MAJOR.load(Relaxed));
                l.number("objects_checked", gc::CHECKED.load(Relaxed));
            }
            if works.disk {
                l.number("acked", disk::ACKNOWLEDGED.load(Relaxed))
                    .number("records_checked", disk::CHECKED.load(Relaxed));
            }
            if works.database {
                l.number("committed", database::COMMITTED.load(Relaxed))
                    .number("rows_checked", database::CHECKED.load(Relaxed));
                l.number("checkpoints", database::CHECKPOINTS.load(Relaxed));
            }
            if works.blocks {
                l.number("block_requests", blocks::DONE.load(Relaxed))
                    .number("block_bytes", blocks::BYTES.load(Relaxed));
            }
            if works.uses_disk() {
                l.number("io_errors", io::IO_ERRORS.load(Relaxed));
            }
            if works.network() {
                l.number("requests", server::REQUESTS.load(Relaxed))
                    .number("body_bytes", server::BODY_BYTES.load(Relaxed));
                l.number("calculations", server::CALCULATIONS.load(Relaxed));
                l.number("announcements", server::ANNOUNCEMENTS.load(Relaxed));
                l.number("frames_in", server::FRAMES_IN.load(Relaxed))
                    .number("frames_out", server::FRAMES_OUT.load(Relaxed));
            }
            if works.entropy {
                l.number("entropy_bytes", entropy::BYTES.load(Relaxed));
            }
            if works.console {
                l.number("console_in", console::IN.load(Relaxed))
                    .number("console_out", console::OUT.load(Relaxed));
            }
            if works.balloon {
                l.number("given", balloon::GIVEN.load(Relaxed))
                    .number("reported", balloon::REPORTED.load(Relaxed));
                l.number("hinted", balloon::HINTED.load(Relaxed))
                    .number("stock_checked", balloon::CHECKED.load(Relaxed));
            }
            if works.spin {
                let by_cpu = || spin::ROUNDS.iter().map(|rounds| rounds.load(Relaxed));
                // A line has room for the first few.
                l.number("spins", by_cpu().sum())
                    .numbers("spins_by_cpu", by_cpu().take(cpus.min(8)));
            }
            l.number("timer", cpu::vector_count(cpu::TIMER_VECTOR))
                .number("damaged", damage::count());
        });
    }

    /// Takes what came in over the serial port, and obeys each whole line.
    fn listen(&mut self, shift: &mut Shift) {
        while let Some(byte) = serial::receive() {
            if byte != b'\n' && byte != b'\r' {
                if self.order_length < LONGEST_ORDER {
                    self.order[self.order_length] = byte;
                    self.order_length += 1;
                }
                continue;
            }
            let (order, length) = (self.order, self.order_length);
            self.order_length = 0;
            if let Ok(text) = core::str::from_utf8(&order[..length]) {
                self.obey(text.trim(), shift);
            }
        }
    }

    fn obey(&mut self, order: &str, shift: &mut Shift) {
        let now = clock::now(0);
        match order {
            "" => {}
            "poweroff" => self.finish(End::PowerOff, now),
            "reset" => self.finish(End::Reset, now),
            "sum" => self.report_sum(now),
            "hello" => self.hello("hello", None),
            "stop" => self.change("work=idle", shift),
            text => match text.strip_prefix("work ") {
                Some(plan) => self.change(plan.trim(), shift),
                None => serial::report(|l| {
                    l.word("t", "unknown").word("order", text);
                    l.word(
                        "hint",
                        "stop, poweroff, reset, sum, hello, or: work work=allocator memory=64M",
                    );
                }),
            },
        }
    }

    /// Replaces the plan; heartbeat and end stay as they are unless told anew.
    fn change(&mut self, text: &str, shift: &mut Shift) {
        let (mut plan, wrong) = Plan::read(text);
        if crate::orders::value(text, "heartbeat").is_none() {
            plan.heartbeat_ns = self.plan.heartbeat_ns;
        }
        if let Some(ns) = plan.run_ns {
            self.end_at = Some(clock::now(0) + ns);
        } else {
            plan.end = self.plan.end;
        }
        shift.workers = &mut [];
        let (next, granted) = crew::start(&plan, &mut self.memory, &self.devices, self.cpus);
        (*shift, self.granted, self.plan, self.ready_told) = (next, granted, plan, false);
        self.hello("work", wrong);
    }

    fn finish(&mut self, how: End, now: u64) -> ! {
        self.report_sum(now);
        if let Some(line) = damage::first() {
            serial::report(line);
        }
        serial::report(|l| {
            l.word("t", "bye").number("ns", now).word("how", how.name());
        });
        power::end(how)
    }
}
