//! The devices every PC has: serial port, keyboard controller, clock, power management, and a debug-exit port.

pub mod acpi_pm;
mod calendar;
pub mod debug_exit;
pub mod i8042;
pub mod rtc;
pub mod serial;
