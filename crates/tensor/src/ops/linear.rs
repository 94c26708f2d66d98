//! The linear layer over a range of a weight's columns.

use std::ops::Range;
use std::sync::Arc;

use super::{expect_cols, expect_shape};
use crate::tape::{Backward, Product, Sink, Slot};
use crate::{Combine, DType, Group, ParamId, Result, Tape, Tensor, Var};

/// Weight matrices `[N, K]` as a linear layer uses them: one or several of the same width, one below the other (their
/// outputs side by side); whole, or some of their columns; of one rank, or shared by several.
#[derive(Debug, Clone)]
pub struct Weight {
    params: Vec<ParamId>,
    /// One per matrix, or none.
    biases: Vec<ParamId>,
    cols: Option<Range<usize>>,
    share: Option<Share>,
}

/// What ranks that share a matrix have of it, and what that asks of them (Shoeybi et al., 2019).
#[derive(Debug, Clone)]
enum Share {
    /// Some rows each. Outputs are a rank's own; all ranks read the same inputs, whose gradients are summed.
    Outputs(Arc<dyn Group>),
    /// Some columns each. Inputs are a rank's own; outputs are summed, and their gradients the same everywhere.
    Inputs(Arc<dyn Group>),
}

impl Weight {
    /// One whole matrix, no bias.
    pub fn of(param: ParamId) -> Self {
        Self { params: vec![param], biases: Vec::new(), cols: None, share: None }
    }

    /// With a bias `[N]`.
    #[must_use]
    pub fn with_bias(self, bias: Option<ParamId>) -> Self {
        Self { biases: bias.into_iter().collect(), ..self }
    }

    /// Several layers over the same input as one, their outputs side by side. All have a bias or none has.
    pub fn stacked(layers: &[&Self]) -> Self {
        let all = |ids: fn(&Self) -> &[ParamId]| layers.iter().flat_map(|w| ids(w)).copied().collect();
        let cols = layers.first().and_then(|w| w.cols.clone());
        let share = layers.first().and_then(|w| w.share.clone());
        Self { params: all(|w| &w.params), biases: all(|w| &w.biases), cols, share }
    }

    /// Says that the matrices are this rank's rows of matrices that the ranks share; alone nothing changes.
    #[must_use]
    pub fn sharing_outputs(self, ranks: Option<&Arc<dyn Group>>) -> Self {
        Self { share: ranks.cloned().map(Share::Outputs), ..self }
    }

    /// Says that the matrices are this rank's columns of matrices that the ranks share, and that every rank has the
    /// whole bias; alone nothing changes.
    #[must_use]
    pub fn sharing_inputs(self, ranks: Option<&Arc<dyn Group>>) -> Self {
        Self { share: ranks.cloned().map(Share::Inputs), ..self }
    }

    /// Only the columns `cols`: the layer's share of a concatenated input. The bias belongs to one share only.
    #[must_use]
    pub fn columns(&self, cols: Range<usize>) -> Self {
        Self { cols: Some(cols), biases: Vec::new(), ..self.clone() }
    }

    /// The parameters, for [`Params::stack`](crate::Params::stack).
    pub fn params(&self) -> &[ParamId] {
        &self.params
    }
}

impl Tape<'_> {
    /// Whether inputs of this weight are wanted in 8 bits: it is frozen and has 8 bits itself.
    pub(super) fn takes_8_bits(&self, w: &Weight) -> bool {
        !self.is_recording() && w.params.iter().all(|&id| self.params().get(id).value.dtype() == DType::E4m3)
    }
}

struct Linear {
    x: Var,
    w: Stack,
    residual: Option<Slot>,
}

impl Tape<'_> {
    /// `y = x · w[:, cols]ᵀ (+ bias)`.
    ///
    /// # Shapes
    /// x `[R, K]`, w `[N, ≥ K]` with `cols` of length K, y `[R, N]`.
    pub fn linear(&self, x: &Var, w: &Weight) -> Result<Var> {
        self.linear_onto(x, w, None)
    }

    /// `y = residual + x · wᵀ`: the end of a residual branch; residual `[R, N]`.
    pub fn linear_add(&self, x: &Var, w: &Weight, residual: &Var) -> Result<Var> {
        self.linear_onto(x, w, Some(residual))
    }

    fn linear_onto(&self, x: &Var, w: &Weight, residual: Option<&Var>) -> Result<Var> {
        let w = Stack::new(self, w, x.value(), residual)?;
        let y = w.product(x.value(), residual)?;
        let trained = w.trained_product(self);
        let needed =
            trained.is_some() || self.any_needed(&[x]) || residual.is_some_and(|r| self.any_needed(&[r]));
        Ok(self.record_product(y, needed, trained, || {
            Box::new(Linear { x: x.clone(), w, residual: residual.map(Slot::from) })
        }))
    }
}

/// The matrices of a weight with their values.
pub(super) struct Stack {
    w: Weight,
    cols: Range<usize>,
    weights: Vec<Tensor>,
    biases: Vec<Tensor>,
}

impl Stack {
    /// Checked against an input `[R, K]` and a residual `[R, N]`.
    pub(super) fn new(tape: &Tape<'_>, w: &Weight, x: &Tensor, residual: Option<&Var>) -> Result<Self> {
        let values = |ids: &[ParamId]| -> Vec<Tensor> {
            ids.iter().map(|&id| tape.params().get(id).value.clone()).collect()
        };
        let (weights, biases) = (values(&w.params), values(&w.biases));
        let k_all = weights[0].rows_cols().1;
        let cols = w.cols.clone().unwrap_or(0..k_all);
        for weight in &weights {
            if cols.end > k_all || cols.start > cols.end || weight.rows_cols().1 != k_all {
                expect_cols("linear", "weight", weight, cols.end.max(k_all))?;
                expect_cols("linear", "weight", weight, cols.end)?;
            }
        }
        expect_cols("linear", "input", x, cols.len())?;
        for (bias, weight) in biases.iter().zip(&weights) {
            expect_shape("linear", "bias", bias, &[weight.rows_cols().0])?;
        }
        let n = weights.iter().map(|w| w.rows_cols().0).sum();
        if let Some(residual) = residual {
            expect_shape("linear", "residual", residual.value(), &[x.rows_cols().0, n])?;
        }
        Ok(Self { w: w.clone(), cols, weights, biases })
    }

    /// The product, if any of its matrices or biases is trained.
    pub(super) fn trained_product(&self, tape: &Tape<'_>) -> Option<Product> {
        let is_trained = self.w.params.iter().chain(&self.w.biases).any(|&id| tape.is_trained(id));
        is_trained.then(|| self.as_product())
    }

    pub(super) fn product(&self, x: &Tensor, residual: Option<&Var>) -> Result<Tensor> {
        let (w, bias): (Vec<&Tensor>, Vec<&Tensor>) =
            (self.weights.iter().collect(), self.biases.iter().collect());
        let (kernels, residual) = (x.device().kernels(), residual.map(Var::value));
        let Some(Share::Inputs(ranks)) = &self.w.share else {
            return kernels.linear(x, &w, self.cols.clone(), &bias, residual);
        };
        // Every rank has the bias, and it counts once.
        let bias = if ranks.rank() == 0 { bias } else { Vec::new() };
        let mut y = kernels.linear(x, &w, self.cols.clone(), &bias, None)?;
        ranks.all_reduce(&mut y, Combine::Sum)?;
        residual.map_or(Ok(y.clone()), |residual| kernels.add(&y, residual))
    }

    /// The gradient of the input, on top of `into`.
    pub(super) fn dgrad(&self, dy: &Tensor, into: Option<Tensor>) -> Result<Tensor> {
        let (kernels, weights): (_, Vec<&Tensor>) = (dy.device().kernels(), self.weights.iter().collect());
        let Some(Share::Outputs(ranks)) = &self.w.share else {
            return kernels.linear_dgrad(dy, &weights, self.cols.clone(), into);
        };
        let mut dx = kernels.linear_dgrad(dy, &weights, self.cols.clone(), None)?;
        ranks.all_reduce(&mut dx, Combine::Sum)?;
        if let Some(into) = into {
            kernels.add_assign(&mut dx, &into)?;
        }
        Ok(dx)
    }

    /// Matrices and biases.
    pub(super) fn params(&self) -> Vec<ParamId> {
        [&self.w.params[..], &self.w.biases].concat()
    }

    /// What is multiplied by, as the tape keeps count of it.
    pub(super) fn as_product(&self) -> Product {
        Product { params: self.w.params.clone(), cols: (self.cols.start, self.cols.end) }
    }

    /// Adds the gradients of matrices and biases.
    pub(super) fn wgrad(&self, dy: &Tensor, x: &Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add_wgrad(&self.as_product(), dy, x)?;
        sink.params(&self.w.biases, |db| dy.device().kernels().bias_grad(dy, db))
    }
}

impl Backward for Linear {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        self.w.wgrad(&dy, self.x.value(), sink)?;
        sink.add_onto(&self.x, |into| self.w.dgrad(&dy, into))?;
        match self.residual {
            Some(residual) => sink.add(residual, dy),
            None => Ok(()),
        }
    }

    fn params(&self) -> Vec<ParamId> {
        self.w.params()
    }
}
