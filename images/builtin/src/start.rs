//! Where every vCPU enters ring 3: the first one reads the orders and starts the others; then all work.

use crate::acpi::Acpi;
use crate::cpu::{self, Cpu};
use crate::info::Info;
use crate::{clock, orders, serial};

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
    cpu::route_io_interrupt(4, cpu::SERIAL_VECTOR);
    let asked = orders::value(info.command(), "cpus")
        .and_then(|n| n.parse().ok())
        .unwrap_or(1u32);
    let mine = me.apic_id;
    let cpus = match acpi.apic_ids() {
        [] => cpu::start_peers((0..asked).filter(|&id| id != mine)),
        ids => cpu::start_peers(ids.iter().copied().filter(|&id| id != mine)),
    };
    let memory: u64 = info.ram().iter().map(|(from, to)| to - from).sum();
    serial::report(|l| {
        l.word("t", "hello")
            .number("cpus", cpus as u64)
            .number("memory", memory)
            .word("clock", clock::name())
            .number("ns", clock::now(0));
    });
    let period = orders::value(info.command(), "heartbeat")
        .and_then(orders::duration_ns)
        .unwrap_or(100_000_000);
    let mut next = clock::now(0);
    let mut seq = 0;
    loop {
        me.look();
        let now = clock::now(0);
        if now >= next {
            next += period;
            seq += 1;
            serial::report(|l| {
                l.word("t", "beat").number("seq", seq).number("ns", now);
            });
            continue;
        }
        me.sleep(next - now);
    }
}

fn peer(index: usize) -> ! {
    let mut me = Cpu::arrive(index);
    loop {
        me.look();
        me.sleep(100_000_000);
    }
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
    cpu::halt()
}
