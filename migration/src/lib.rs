//! The migration engine. No KVM, no devices, no unsafe, no clock of its own.
