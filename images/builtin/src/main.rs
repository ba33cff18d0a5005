//! Ferry's built-in guest. `boot.s` brings every vCPU to `ring3`; from there all is Rust, running natively.
#![no_std]
#![no_main]

mod acpi;
mod chief;
mod clock;
mod content;
mod cpu;
mod crew;
mod damage;
mod devices;
mod evidence;
mod gap;
mod goldbach;
mod http;
mod info;
mod journal;
mod line;
mod memory;
mod orders;
mod pci;
mod pick;
mod plan;
mod power;
mod runtime;
mod serial;
mod start;
mod table;
mod virtio;
mod work;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));
