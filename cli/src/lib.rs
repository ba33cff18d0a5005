//! The command line: ferry run, list, info, migrate and the rest.

pub mod ssh;
