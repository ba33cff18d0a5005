//! What the guest's CPUs can do: CPUID filtered by a template, and the description that a crossing compares.

pub mod cpuid;
pub mod description;
pub mod features;
pub mod template;
