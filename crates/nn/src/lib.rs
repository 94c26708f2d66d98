//! What a model needs around the engine's operations: weights read from checkpoints ([`weights`]) or drawn fresh
//! ([`init`]), the tables of its position embedding ([`rope`]), and what trains it, the [`optimizer`] and the
//! [`schedule`] of its learning rate.
//!
//! This crate knows tensors, names and files, but no architecture and no training method.

pub mod init;
pub mod optimizer;
pub mod rope;
pub mod schedule;
pub mod weights;
