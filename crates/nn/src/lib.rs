//! Layers, named parameters, RoPE, optimizer and schedules.

pub mod init;
pub mod weights;
