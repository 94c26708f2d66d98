//! Ranks that share the work on one batch.

use std::sync::Arc;

use specforge_tensor::Group;

/// The ranks that work on one batch together; by default one alone.
#[derive(Debug, Clone, Default)]
pub struct Ranks {
    /// Those that share the matrices of a layer, and see the same rows (tensor parallel).
    pub tensor: Option<Arc<dyn Group>>,
    /// Those that share the rows of a batch (sequence parallel). Each is given the whole batch and computes its own rows:
    /// losses, weights and gradients are sums over these ranks, as over those that train on other batches.
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
    /// The ranks that share matrices, if there are others.
    pub(crate) fn tensor(&self) -> Option<&Arc<dyn Group>> {
        self.tensor.as_ref().filter(|ranks| ranks.size() > 1)
    }

    /// The ranks that share rows, if there are others.
    pub(crate) fn sequence(&self) -> Option<&Sequence> {
        self.sequence.as_ref().filter(|sequence| sequence.ranks.size() > 1)
    }
}
