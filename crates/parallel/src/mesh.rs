//! Which rank is where: replicas x shards x sequence x tensor, and the groups along each of these.

use std::sync::Arc;

use specforge_tensor::{Device, Error, Group, Result};

/// How many ranks there are along each dimension of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// Copies of the whole optimizer state.
    pub replicas: usize,
    /// Rows are dealt to replicas x shards; one copy of the state is spread over shards x sequence.
    pub shards: usize,
    /// Ranks that share the tokens of a document.
    pub sequence: usize,
    /// Ranks that share the matrices of a layer.
    pub tensor: usize,
}

/// Where one rank is in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Along [`MeshShape::replicas`].
    pub replica: usize,
    /// Along [`MeshShape::shards`].
    pub shard: usize,
    /// Along [`MeshShape::sequence`].
    pub sequence: usize,
    /// Along [`MeshShape::tensor`].
    pub tensor: usize,
}

impl MeshShape {
    /// Nothing but ranks that rows are dealt to.
    pub fn data(ranks: usize) -> Self {
        Self { replicas: 1, shards: ranks, sequence: 1, tensor: 1 }
    }

    /// Ranks altogether.
    pub fn ranks(&self) -> usize {
        self.replicas * self.shards * self.sequence * self.tensor
    }

    /// The place of a rank. Neighbouring ranks, which are most often on one machine, share what talks most: tensor
    /// first, then sequence, shards and replicas.
    pub fn place(&self, rank: usize) -> Place {
        let (above, tensor) = (rank / self.tensor, rank % self.tensor);
        let (above, sequence) = (above / self.sequence, above % self.sequence);
        Place { replica: above / self.shards, shard: above % self.shards, sequence, tensor }
    }
}

/// One rank's groups.
#[derive(Debug, Clone)]
pub struct Mesh {
    /// The shape of all.
    pub shape: MeshShape,
    /// Where this rank is.
    pub place: Place,
    /// Where this rank computes.
    pub device: Device,
    /// Everyone.
    pub world: Arc<dyn Group>,
    /// Those that train on other rows: replicas x shards. Losses and weights are summed over it.
    pub data: Arc<dyn Group>,
    /// Those whose gradients are of the same piece of every matrix: replicas x shards x sequence.
    pub gradients: Arc<dyn Group>,
    /// Those that hold the other parts of this copy of the state: shards x sequence.
    pub parts: Arc<dyn Group>,
    /// Those that hold the same part of other copies.
    pub replicas: Arc<dyn Group>,
    /// Those that have the other tokens of the same documents.
    pub sequence: Arc<dyn Group>,
    /// Those that have the other parts of the same matrices.
    pub tensor: Arc<dyn Group>,
}

impl Mesh {
    /// Forms the groups; all ranks of `world` call this with the same shape.
    pub fn new(world: Arc<dyn Group>, shape: MeshShape, device: Device) -> Result<Self> {
        let (rank, size) = (world.rank(), world.size());
        if shape.ranks() != size {
            let why = format!("the mesh {shape:?} has {} ranks, but there are {size}", shape.ranks());
            return Err(Error::Group { op: "mesh", rank, size, why });
        }
        let place = shape.place(rank);
        let Place { replica, shard, sequence, tensor } = place;
        let MeshShape { shards: n_shards, sequence: n_sequence, tensor: n_tensor, .. } = shape;
        let row = replica * n_shards + shard;
        Ok(Self {
            shape,
            place,
            device,
            data: world.split(sequence * n_tensor + tensor)?,
            gradients: world.split(tensor)?,
            parts: world.split(replica * n_tensor + tensor)?,
            replicas: world.split((shard * n_sequence + sequence) * n_tensor + tensor)?,
            sequence: world.split(row * n_tensor + tensor)?,
            tensor: world.split(row * n_sequence + sequence)?,
            world,
        })
    }

    /// Whether this rank speaks for all: it prints, logs and exports.
    pub fn is_first(&self) -> bool {
        self.world.rank() == 0
    }
}
