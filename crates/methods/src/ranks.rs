//! Ranks that share the work on one batch.

use std::sync::Arc;

use specforge_tensor::{Grads, Group, Param, ParamId, Params, Tensor};

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
    /// All keys and values come to every rank (as in Llama 3's training; Grattafiori et al., 2024), once for all steps: any
    /// number of ranks.
    Gather,
}

/// How many ranks share the work on one batch, and how.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Those that share the matrices of a layer.
    pub tensor: usize,
    /// Those that share the rows of a batch.
    pub sequence: usize,
    /// How attention reaches the rows of the others.
    pub exchange: Exchange,
}

impl Ranks {
    /// How many they are.
    pub fn counts(&self) -> Counts {
        let (sequence, exchange) =
            self.sequence.as_ref().map_or((1, Exchange::Ring), |s| (s.ranks.size(), s.exchange));
        Counts { tensor: self.tensor.as_ref().map_or(1, |ranks| ranks.size()), sequence, exchange }
    }

    /// Settles gradients that several of the ranks that share matrices have: those of the same piece of a matrix add up,
    /// and of what all have whole, everyone takes the first one's. All ranks call this last, once gradients are summed over
    /// all others: every such sum is made by ranks of its own and may be rounded in its own way, and what ranks have in
    /// common stays the same only if every bit of its gradient does. `params` may be flat parts of the pieces.
    pub fn agree(&self, params: &Params, grads: &mut Grads) -> Result<()> {
        let Some(ranks) = self.tensor() else { return Ok(()) };
        for (id, param) in params.iter().filter(|(_, param)| param.trainable) {
            let mut own = taken(grads, id, param)?;
            match param.split {
                Some(split) => own = split.add_copies(own, ranks)?,
                None => ranks.broadcast(&mut own, 0)?,
            }
            grads.set(id, own);
        }
        Ok(())
    }

    /// The whole of a parameter, or of a tensor shaped like it, as checkpoints have it. All ranks that share matrices
    /// call this.
    pub fn whole(&self, param: &Param, value: &Tensor) -> Result<Tensor> {
        match (param.split, self.tensor()) {
            (Some(split), Some(ranks)) => Ok(split.whole(value, ranks)?),
            _ => Ok(value.clone()),
        }
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

/// The gradient of a parameter; zeros where there is none.
fn taken(grads: &mut Grads, id: ParamId, param: &Param) -> Result<Tensor> {
    let zeros = || Tensor::zeros(param.value.device(), param.value.shape());
    Ok(grads.take(id).map_or_else(zeros, Ok)?)
}
