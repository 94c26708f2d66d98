//! Many ranks: which rank is where in the mesh ([`Mesh`]), and how they reach each other ([`threads`]).
//!
//! What can be asked of a group of ranks is [`specforge_tensor::Group`]; here are the implementations.

mod host;
mod mesh;
pub mod threads;

pub use mesh::{Mesh, MeshShape, Place};
