//! Where every vCPU enters ring 3: the first one reads the orders and starts the others; then all work.

use crate::acpi::Acpi;
use crate::chief::Chief;
use crate::cpu::{self, Cpu};
use crate::info::Info;
use crate::plan::End;
use crate::work::Next;
use crate::{clock, crew, gap, orders, power, serial};

#[unsafe(no_mangle)]
extern "C" fn ring3(index: usize) -> ! {
    if index == 0 { first() } else { peer(index) }
}

fn first() -> ! {
    cpu::prepare();
    let mut me = Cpu::arrive(0);
    cpu::silence_old_controllers();
    serial::start();
    let info = Info::read();
    let acpi = Acpi::read(info.rsdp);
    power::remember(acpi.sleep, acpi.events);
    crate::pci::begin(acpi.ecam);
    cpu::route_io_interrupt(4, cpu::SERIAL_VECTOR);
    let asked = orders::value(info.command(), "cpus")
        .and_then(|n| n.parse().ok())
        .unwrap_or(1u32);
    let mine = me.apic_id;
    let cpus = match acpi.apic_ids() {
        [] => cpu::start_peers((0..asked).filter(|&id| id != mine)),
        ids => cpu::start_peers(ids.iter().copied().filter(|&id| id != mine)),
    };
    let (mut chief, mut shift) = Chief::begin(&info, cpus);
    let mut due = clock::now(0);
    loop {
        me.look();
        let now = clock::now(0);
        gap::passed(due, now);
        let mut next = chief.attend(now, &mut shift);
        for worker in shift.workers.iter_mut() {
            next = sooner(next, worker.step(now));
        }
        due = rest(&mut me, next, now);
    }
}

fn peer(index: usize) -> ! {
    let mut me = Cpu::arrive(index);
    loop {
        let shift = crew::join(index);
        let mut due = clock::now(index);
        while !crew::is_over(&shift) {
            me.look();
            let now = clock::now(index);
            gap::passed(due, now);
            let mut next = Next::At(now + 1_000_000_000);
            for worker in shift.workers.iter_mut() {
                next = sooner(next, worker.step(now));
            }
            if crew::is_over(&shift) {
                break;
            }
            due = rest(&mut me, next, now);
        }
    }
}

fn sooner(a: Next, b: Next) -> Next {
    match (a, b) {
        (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
        _ => Next::Now,
    }
}

/// Sleeps if there is nothing to do; gives the time at which this vCPU expects to be back.
fn rest(me: &mut Cpu, next: Next, now: u64) -> u64 {
    let Next::At(at) = next else { return now };
    let before = clock::now(me.index);
    if at <= before {
        return before;
    }
    me.sleep(at - before);
    at
}

/// The facts of an exception, as `boot.s` left them.
#[repr(C)]
struct Fault {
    vector: u64,
    error: u64,
    rip: u64,
    cr2: u64,
    rax: u64,
    cs: u64,
}

unsafe extern "C" {
    static fault: Fault;
}

#[unsafe(no_mangle)]
extern "C" fn on_exception() -> ! {
    // SAFETY: written by ring 0 just before it came here.
    let f = unsafe { &fault };
    serial::report(|l| {
        l.word("t", "exception")
            .number("vector", f.vector)
            .number("error", f.error)
            .hex("rip", f.rip)
            .hex("cr2", f.cr2)
            .number("cs", f.cs);
    });
    power::end(End::PowerOff)
}
