//! The machine on KVM, and the one place that wires devices and migration to it.
