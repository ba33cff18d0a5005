//! The 16550 at COM1: lines out under one lock, bytes in.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::{in8, out_bytes, out8};
use crate::line::Line;

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const FIFO: usize = 16;

static BUSY: AtomicBool = AtomicBool::new(false);

pub fn start() {
    out8(DATA + 1, 0);
    out8(DATA + 3, 0x80);
    out8(DATA, 1); // 115200 baud
    out8(DATA + 1, 0);
    out8(DATA + 3, 0x03); // 8 bits, no parity
    out8(DATA + 2, 0x07); // FIFOs on and empty
    out8(DATA + 4, 0x0b); // ready, interrupts let out
    out8(DATA + 1, 0x01); // interrupt when a byte has come in
}

/// Composes a line and sends it whole.
pub fn report(compose: impl FnOnce(&mut Line)) {
    let mut line = Line::new();
    compose(&mut line);
    send(line.finish());
}

fn send(bytes: &[u8]) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    for burst in bytes.chunks(FIFO) {
        while in8(LINE_STATUS) & 0x20 == 0 {
            core::hint::spin_loop();
        }
        out_bytes(DATA, burst);
    }
    BUSY.store(false, Ordering::Release);
}

pub fn receive() -> Option<u8> {
    (in8(LINE_STATUS) & 1 != 0).then(|| in8(DATA))
}
