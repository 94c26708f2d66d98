//! The gated delta rule (Yang et al., 2025), the recurrence of linear attention in Qwen3-Next and Qwen3.5.

use super::Columns;
use crate::Tensor;

/// Heads of a gated delta rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaShape {
    /// Query and key heads; divides `value_heads`, neighbours of which share one.
    pub key_heads: usize,
    /// Value heads, each with a state of its own.
    pub value_heads: usize,
    /// Width of queries and keys.
    pub key_dim: usize,
    /// Width of values.
    pub value_dim: usize,
}

impl DeltaShape {
    /// Columns of queries, keys and values side by side.
    pub fn width(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }

    /// Elements of the states of all heads.
    pub fn state(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }
}

/// What a gated delta rule over R rows reads. A row continues the state of the row before it unless `from` names
/// another; numbers in `from` and `to` are rows of the table of states.
#[derive(Debug, Clone, Copy)]
pub struct DeltaInputs<'a> {
    /// Heads.
    pub shape: DeltaShape,
    /// Queries, keys, values side by side, `[R, width]`; queries and keys are normed here.
    pub qkv: &'a Tensor,
    /// `b` of each value head, `[R, value_heads]`: the rule writes with `sigmoid(b)`.
    pub b: Columns<'a>,
    /// `a` of each value head, like `b`: states fade by `exp(-exp(a_log) softplus(a + dt_bias))`.
    pub a: Columns<'a>,
    /// Float32 `[value_heads]`.
    pub a_log: &'a Tensor,
    /// Float32 `[value_heads]`.
    pub dt_bias: &'a Tensor,
    /// Where the state before a row is taken from, `u32 [R]`; `u32::MAX`: from the row before it.
    pub from: &'a Tensor,
    /// Where the state after a row is kept, `u32 [R]`; `u32::MAX`: nowhere. Nothing is kept in state 0.
    pub to: &'a Tensor,
}
