//! The crate, tested from outside.
