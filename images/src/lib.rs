//! The guests Ferry brings along: the built-in guest, compiled from source and embedded.
