//! Tests of groups and meshes as the crates above use them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod collectives;
mod mesh;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod ops;
mod rendezvous;
mod shard;
mod threads;
