//! Ranks that share the work on one batch.

use std::sync::Arc;

use specforge_tensor::{Combine, Group, Param, Tensor};

use crate::Result;

/// The ranks that work on one batch together; by default one alone.
#[derive(Debug, Clone, Default)]
pub struct Ranks {
    /// Those that share the matrices of a layer, and see the same rows (tensor parallel).
    pub tensor: Option<Arc<dyn Group>>,
    /// Those that share the rows of a batch (sequence parallel). Each is given the whole batch and computes its own rows:
    /// figures and gradients are sums over these ranks, as over those that train on other batches; the weight that
    /// gradients are divided by is the batch's on each.
    pub sequence: Option<Sequence>,
}

/// Ranks that share rows.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// The ranks.
    pub ranks: Arc<dyn Group>,
    /// How attention reaches the rows of the others.
    pub exchange: Exchange,
}

/// How attention reaches the rows of other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// Heads for rows, all to all (Ulysses; Jacobs et al., 2023). Ranks divide the key-value heads.
    Heads,
    /// Key blocks pass around (Liu et al., 2023): any number of ranks.
    Ring,
}

impl Ranks {
    /// A parameter's gradient of a step's batches, from what this rank has of it once it is final: the sum over the ranks
    /// of the sequence, and over those that have the same piece of a matrix. All ranks call this for every trainable
    /// parameter, in the same order, before gradients are summed over ranks that train on other batches; a gradient that
    /// nothing added to is zeros.
    pub fn add_up(&self, param: &Param, own: Option<Tensor>) -> specforge_tensor::Result<Tensor> {
        let mut sum = own.map_or_else(|| Tensor::zeros(param.value.device(), param.value.shape()), Ok)?;
        if let Some(Sequence { ranks, .. }) = self.sequence() {
            ranks.all_reduce(&mut sum, Combine::Sum)?;
        }
        match (param.split, self.tensor()) {
            (Some(split), Some(ranks)) => split.add_copies(sum, ranks),
            _ => Ok(sum),
        }
    }

    /// The whole of a parameter, or of a tensor shaped like it, as checkpoints have it. All ranks that share matrices
    /// call this.
    pub fn whole(&self, param: &Param, value: &Tensor) -> Result<Tensor> {
        match (param.split, self.tensor()) {
            (Some(split), Some(ranks)) => Ok(split.whole(value, ranks)?),
            _ => Ok(value.clone()),
        }
    }

    /// The share of this rank's squares in those of a whole gradient: added up over the ranks that share matrices, all of
    /// them make the norm.
    pub fn share_of_squares(&self, param: &Param) -> f64 {
        let size = self.tensor().map_or(1, |ranks| ranks.size());
        param.split.map_or(1.0 / size as f64, |split| split.share_of_squares(size))
    }

    /// The ranks that share matrices, if there are others.
    pub(crate) fn tensor(&self) -> Option<&Arc<dyn Group>> {
        self.tensor.as_ref().filter(|ranks| ranks.size() > 1)
    }

    /// The ranks that share rows, if there are others.
    pub(crate) fn sequence(&self) -> Option<&Sequence> {
        self.sequence.as_ref().filter(|sequence| sequence.ranks.size() > 1)
    }
}
