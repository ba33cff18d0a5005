//! CPU only: arithmetic that keeps general, x87 and SSE registers full of known values, and looks whether
//! they came out right.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use super::Next;
use crate::content::mix;
use crate::cpu::MAX_CPUS;
use crate::damage::{self, Damage};

/// By vCPU.
pub static ROUNDS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
const TURNS: u64 = 50_000;

pub struct Spinner {
    pub seed: u64,
    pub round: u64,
    pub cpu: usize,
}

impl Spinner {
    pub fn step(&mut self, now: u64) -> Next {
        self.round += 1;
        let start = mix(self.seed ^ self.round);
        let (integer, vector, float) = turn(start);
        let want_integer = start.wrapping_add(TURNS.wrapping_mul(STEP));
        let want_vector = (0..16).fold([0, 0], |sum: [u64; 2], i| {
            let lane = start.wrapping_add(i).wrapping_add(TURNS);
            [sum[0] ^ lane, sum[1] ^ lane]
        });
        let checks = [
            (0, want_integer, integer),
            (1, want_vector[0], vector[0]),
            (2, want_vector[1], vector[1]),
            (3, TURNS as f64 as u64, float as u64),
        ];
        for (item, want, got) in checks {
            if want != got {
                damage::found(Damage {
                    kind: "registers",
                    item,
                    gpa: 0,
                    want,
                    got,
                    at_ns: now,
                });
            }
        }
        if let Some(rounds) = ROUNDS.get(self.cpu) {
            rounds.fetch_add(1, Ordering::Relaxed);
        }
        Next::Now
    }
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SSE reads its operands from aligned memory only.
#[repr(align(16))]
struct Lanes([[u64; 2]; 17]);

/// TURNS additions in one general register, sixteen SSE registers and one x87 register.
fn turn(start: u64) -> (u64, [u64; 2], f64) {
    let mut lanes = Lanes([[0; 2]; 17]);
    for (i, lane) in lanes.0.iter_mut().take(16).enumerate() {
        *lane = [start.wrapping_add(i as u64); 2];
    }
    lanes.0[16] = [1, 1];
    let mut integer = start;
    let mut float = 0f64;
    // SAFETY: reads and writes `lanes` and `float` only; every register it uses is declared.
    unsafe {
        asm!(
            "movdqu xmm0, [{l}]", "movdqu xmm1, [{l} + 16]", "movdqu xmm2, [{l} + 32]", "movdqu xmm3, [{l} + 48]",
            "movdqu xmm4, [{l} + 64]", "movdqu xmm5, [{l} + 80]", "movdqu xmm6, [{l} + 96]", "movdqu xmm7, [{l} + 112]",
            "movdqu xmm8, [{l} + 128]", "movdqu xmm9, [{l} + 144]", "movdqu xmm10, [{l} + 160]", "movdqu xmm11, [{l} + 176]",
            "movdqu xmm12, [{l} + 192]", "movdqu xmm13, [{l} + 208]", "movdqu xmm14, [{l} + 224]", "movdqu xmm15, [{l} + 240]",
            "fld1", "fldz",
            "2:",
            "paddq xmm0, [{l} + 256]", "paddq xmm1, [{l} + 256]", "paddq xmm2, [{l} + 256]", "paddq xmm3, [{l} + 256]",
            "paddq xmm4, [{l} + 256]", "paddq xmm5, [{l} + 256]", "paddq xmm6, [{l} + 256]", "paddq xmm7, [{l} + 256]",
            "paddq xmm8, [{l} + 256]", "paddq xmm9, [{l} + 256]", "paddq xmm10, [{l} + 256]", "paddq xmm11, [{l} + 256]",
            "paddq xmm12, [{l} + 256]", "paddq xmm13, [{l} + 256]", "paddq xmm14, [{l} + 256]", "paddq xmm15, [{l} + 256]",
            "fadd st(0), st(1)",
            "add {i}, {step}",
            "dec {n}",
            "jnz 2b",
            "fstp qword ptr [{f}]", "fstp st(0)",
            "pxor xmm0, xmm1", "pxor xmm2, xmm3", "pxor xmm4, xmm5", "pxor xmm6, xmm7",
            "pxor xmm8, xmm9", "pxor xmm10, xmm11", "pxor xmm12, xmm13", "pxor xmm14, xmm15",
            "pxor xmm0, xmm2", "pxor xmm4, xmm6", "pxor xmm8, xmm10", "pxor xmm12, xmm14",
            "pxor xmm0, xmm4", "pxor xmm8, xmm12", "pxor xmm0, xmm8",
            "movdqu [{l}], xmm0",
            l = in(reg) lanes.0.as_mut_ptr(), f = in(reg) &raw mut float, i = inout(reg) integer, step = in(reg) STEP,
            n = inout(reg) TURNS => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            options(nostack)
        );
    }
    (integer, lanes.0[0], float)
}
