//! The linear layer over a range of a weight's columns.

use std::ops::Range;

use super::{expect_cols, expect_shape};
use crate::tape::{Backward, Sink};
use crate::{ParamId, Result, Tape, Tensor, Var};

/// A weight matrix `[N, K]` as a linear layer uses it: whole, or some of its columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    param: ParamId,
    bias: Option<ParamId>,
    cols: Option<Range<usize>>,
}

impl Weight {
    /// The whole matrix, no bias.
    pub fn of(param: ParamId) -> Self {
        Self { param, bias: None, cols: None }
    }

    /// With a bias `[N]`.
    #[must_use]
    pub fn with_bias(self, bias: Option<ParamId>) -> Self {
        Self { bias, ..self }
    }

    /// Only the columns `cols`: the layer's share of a concatenated input. The bias belongs to one share only.
    #[must_use]
    pub fn columns(&self, cols: Range<usize>) -> Self {
        Self { cols: Some(cols), bias: None, ..*self }
    }

    /// The parameter.
    pub fn param(&self) -> ParamId {
        self.param
    }
}

struct Linear {
    x: Var,
    w: Weight,
    cols: Range<usize>,
    weight: Tensor,
}

impl Tape<'_> {
    /// `y = x · w[:, cols]ᵀ (+ bias)`.
    ///
    /// # Shapes
    /// x `[R, K]`, w `[N, ≥ K]` with `cols` of length K, y `[R, N]`.
    pub fn linear(&self, x: &Var, w: Weight) -> Result<Var> {
        let weight = self.params().get(w.param).value.clone();
        let (n, k_all) = weight.rows_cols();
        let cols = w.cols.clone().unwrap_or(0..k_all);
        if cols.end > k_all || cols.start > cols.end {
            expect_cols("linear", "weight", &weight, cols.end)?;
        }
        expect_cols("linear", "input", x.value(), cols.len())?;
        let bias = w.bias.map(|b| self.params().get(b).value.clone());
        if let Some(b) = &bias {
            expect_shape("linear", "bias", b, &[n])?;
        }
        let y = x.value().device().kernels().linear(x.value(), &weight, cols.clone(), bias.as_ref());
        let needed =
            self.any_needed(&[x]) || self.is_trained(w.param) || w.bias.is_some_and(|b| self.is_trained(b));
        Ok(self.record(y, needed, || Box::new(Linear { x: x.clone(), w, cols, weight })))
    }
}

impl Backward for Linear {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let kernels = dy.device().kernels();
        if let Some(dw) = sink.param(self.w.param) {
            kernels.linear_wgrad(&dy, self.x.value(), dw, self.cols.clone());
        }
        if let Some(db) = self.w.bias.and_then(|b| sink.param(b)) {
            kernels.bias_grad(&dy, db);
        }
        if self.x.is_needed() {
            sink.add(&self.x, kernels.linear_dgrad(&dy, &self.weight, self.cols));
        }
        Ok(())
    }
}
