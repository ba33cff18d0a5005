//! The ways a machine's run can end.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::acpi::Sleep;
use crate::cpu::{self, out8, out16};
use crate::plan::End;

/// How the tables say the machine is turned off, packed by `remember`.
static SLEEP: [AtomicU64; 2] = [AtomicU64::new(0x604), AtomicU64::new(0)];

/// Where the tables say that power management events are seen; 0: nowhere.
static EVENTS: AtomicU64 = AtomicU64::new(0);

pub fn remember(sleep: Sleep, events: u16) {
    EVENTS.store(events as u64, Ordering::Relaxed);
    let (at, kind, value) = match sleep {
        Sleep::Control { port, kind } => (port as u64, 0, kind),
        Sleep::Port { port, kind } => (port as u64, 1, kind),
        Sleep::Memory { address, kind } => (address, 2, kind),
    };
    SLEEP[0].store(at, Ordering::Relaxed);
    SLEEP[1].store(kind << 8 | value as u64, Ordering::Relaxed);
}

/// Whether somebody pressed the power button: bit 8 of the PM1a status register.
pub fn button_pressed() -> bool {
    match EVENTS.load(Ordering::Relaxed) as u16 {
        0 => false,
        port => cpu::in16(port) & 1 << 8 != 0,
    }
}

/// Ends the run. Returns to nobody: where the machine does not end, it stands still.
pub fn end(how: End) -> ! {
    match how {
        End::PowerOff => power_off(),
        End::Reset => reset(),
        End::TripleFault => cpu::triple_fault(),
        End::InvalidOpcode => cpu::invalid_opcode(),
        End::Emulation => cpu::emulation_failure(),
        End::Debug(code) => out8(0xf4, code),
    }
    cpu::halt()
}

fn power_off() {
    let (at, packed) = (SLEEP[0].load(Ordering::Relaxed), SLEEP[1].load(Ordering::Relaxed));
    let kind = packed as u8;
    match packed >> 8 {
        0 => out16(at as u16, (kind as u16) << 10 | 1 << 13),
        1 => out8(at as u16, kind << 2 | 1 << 5),
        // SAFETY: the sleep control register of hardware-reduced ACPI, in the mapped device window.
        _ => unsafe { (at as *mut u8).write_volatile(kind << 2 | 1 << 5) },
    }
}

/// By the keyboard controller; where there is none, by a triple fault.
fn reset() {
    out8(0x64, 0xfe);
    let end = crate::clock::now(0) + 20_000_000;
    while crate::clock::now(0) < end {
        core::hint::spin_loop();
    }
    cpu::triple_fault()
}
