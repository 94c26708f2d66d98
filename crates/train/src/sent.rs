//! How much leaves a rank for others.

use serde::Serialize;
use specforge_parallel::leaving;
use specforge_tensor::{DType, Params};

/// What left this rank for others so far, in bytes, where collectives are rings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// Gradients.
    pub gradients: u64,
    /// Of them, those that left while the backward had more gradients to compute.
    pub overlapped: u64,
    /// Gradients between ranks that share matrices, after all other sums: of what all have whole, and of pieces that
    /// several have.
    pub agreed: u64,
    /// Updated weights, which leave before the next step's forward and are waited for where it reads them.
    pub weights: u64,
}

impl Sent {
    /// Of one of so many steps.
    #[must_use]
    pub fn per_step(self, steps: u64) -> Self {
        let Self { gradients, overlapped, agreed, weights } = self;
        let [gradients, overlapped, agreed, weights] =
            [gradients, overlapped, agreed, weights].map(|bytes| bytes / steps.max(1));
        Self { gradients, overlapped, agreed, weights }
    }
}

/// What leaves each of so many ranks that share matrices when they settle these parameters' gradients: a whole one comes
/// from one of them, by a ring through all, and pieces that several have are gathered.
pub(crate) fn agreed_bytes(params: &Params, ranks: usize) -> u64 {
    let of = |len: usize, pieces: Option<usize>| match pieces {
        None => leaving((len * DType::F32.size()) as u64, ranks),
        Some(pieces) if pieces < ranks => leaving((ranks * len * DType::F32.size()) as u64, ranks),
        Some(_) => 0,
    };
    let trained = params.iter().filter(|(_, param)| param.trainable);
    trained.map(|(_, param)| of(param.value.len(), param.split.map(|split| split.pieces))).sum()
}
