//! Ferry's built-in guest. `boot.s` brings every vCPU to `ring3`; from there all is Rust, running natively.
#![no_std]
#![no_main]

mod acpi;
mod clock;
mod cpu;
mod info;
mod line;
mod orders;
mod runtime;
mod serial;
mod start;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));
