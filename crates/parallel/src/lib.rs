//! Many ranks: which rank is where in the mesh ([`Mesh`]), how tensors are cut over ranks ([`Shards`]), and how ranks
//! reach each other: as threads ([`threads`]), with a GPU each by NCCL
//! ([`nccl`], after a [`rendezvous`]), and as processes by MPI (the feature `mpi`).
//!
//! What can be asked of a group of ranks is [`specforge_tensor::Group`]; here are the implementations.

mod host;
pub mod launch;
mod mesh;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nccl;
pub mod rendezvous;
mod say;
mod shard;
pub mod threads;
mod watch;

pub use mesh::{Mesh, MeshShape, Place};
pub use say::{receive_numbers, send_numbers, tell, tell_numbers};
pub use shard::{Level, Shards, leaving, sum};
pub use watch::{Alarm, Watch};
