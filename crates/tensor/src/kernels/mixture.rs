//! Mixtures of experts (Shazeer et al., 2017): which experts a row goes to, and rows sorted by expert.

use crate::{Device, Tensor};

/// How a router's logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// The groups of neighbouring experts that a row may pick from (DeepSeek-AI, 2024).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Groups; divides the number of experts.
    pub n: usize,
    /// Groups that a row picks from.
    pub kept: usize,
    /// A group counts as the sum of so many of its best experts.
    pub best: usize,
}

/// The rule by which a row picks its experts. Of equal experts, and of equal groups, the first is picked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// How logits become scores.
    pub scoring: Scoring,
    /// Experts of a row.
    pub top_k: usize,
    /// Absent: all experts may be picked.
    pub groups: Option<Groups>,
    /// Whether the weights of a row sum to 1 before they are scaled.
    pub normalised: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// The router of a mixture: `logits = x · weightᵀ + bias` in float32, and the rule.
#[derive(Debug, Clone, Copy)]
pub struct Router<'a> {
    /// `[E, H]`.
    pub weight: &'a Tensor,
    /// `[E]`.
    pub bias: Option<&'a Tensor>,
    /// `[E]`, float32: added to the scores for picking, not to the weights (Wang et al., 2024).
    pub correction: Option<&'a Tensor>,
    /// The rule.
    pub rule: Routing,
}

/// Where R rows go: each to K of E experts. The R·K pairs are sorted by expert, then by row; a place in that order is a
/// slot.
#[derive(Debug, Clone)]
pub struct Routes {
    /// One past the last slot of each expert, `u32 [E]`.
    pub ends: Tensor,
    /// The pair `r · K + k` of each slot, `u32 [R·K]`.
    pub pairs: Tensor,
    /// The row of each slot, `u32 [R·K]`.
    pub rows: Tensor,
    /// The slot of each pair, `u32 [R·K]`.
    pub slots: Tensor,
    /// The weight of each pair, float32 `[R·K, 1]`.
    pub weights: Tensor,
}

impl Routes {
    /// Sorts the experts of all pairs, `[R·K]` numbers below `n_experts`.
    pub(crate) fn sorted(n_experts: usize, k: usize, experts: &[u32], weights: Tensor) -> Self {
        let mut next = vec![0u32; n_experts];
        experts.iter().for_each(|&e| next[e as usize] += 1);
        let mut first = 0;
        for count in &mut next {
            (*count, first) = (first, first + *count);
        }
        let (mut pairs, mut slots) = (vec![0; experts.len()], vec![0; experts.len()]);
        for (pair, &e) in experts.iter().enumerate() {
            let slot = next[e as usize];
            (pairs[slot as usize], slots[pair]) = (pair as u32, slot);
            next[e as usize] += 1;
        }
        let rows = pairs.iter().map(|pair| pair / k as u32).collect();
        let [ends, pairs, rows, slots] =
            [next, pairs, rows, slots].map(|index| Tensor::from_u32(Device::Cpu, index));
        Self { ends, pairs, rows, slots, weights }
    }
}

/// A function of each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `x · sigmoid(x)`.
    Silu,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_sorted_by_expert_then_by_row() {
        let weights = Tensor::from_f32(Device::Cpu, vec![0.0; 6], &[6, 1]).expect("weights");
        let routes = Routes::sorted(4, 2, &[3, 0, 0, 3, 2, 0], weights);
        assert_eq!(routes.ends.to_u32(), [3, 3, 4, 6]);
        assert_eq!(routes.pairs.to_u32(), [1, 2, 5, 4, 0, 3]);
        assert_eq!(routes.rows.to_u32(), [0, 1, 2, 2, 0, 1]);
        assert_eq!(routes.slots.to_u32(), [4, 0, 1, 5, 3, 2]);
    }
}
