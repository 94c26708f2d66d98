//! What a model needs around the engine's operations: weights read from checkpoints ([`weights`]) or drawn fresh
//! ([`init`]), and what moves them, the [`optimizer`] and the [`schedule`] of its learning rate.
//!
//! This crate knows tensors, names and files, but no architecture and no training method.

pub mod init;
pub mod rope;
pub mod optimizer;
pub mod schedule;
pub mod weights;
