//! The device seam: everything the engine asks of a device, one method per coarse operation.
//!
//! The operations in `ops` check shapes once and call these; an implementation may trust what it is given.
//! Gradients (`d…`) are float32. Methods that take `&mut Tensor` add to it. No result may depend on the
//! number of threads or on timing: the same inputs give the same bits.

mod delta;
mod mixture;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

pub use delta::{DeltaInputs, DeltaShape};
pub use mixture::{Activation, Groups, Router, Routes, Routing, Scoring};

use crate::{Across, DType, Group, Later, Result, Tensor};

/// Head layout and scale of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads` (grouped-query attention).
    pub n_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on the scores, usually `head_dim^-0.5`.
    pub scale: f32,
}

/// Which base keys each query row sees: the key rows `lo[r]..hi[r]`. Documents, causality and sliding windows
/// are all expressed by these bounds. For a backward both never decrease.
#[derive(Debug, Clone)]
pub struct Spans {
    /// First key row per query, `u32 [R]`.
    pub lo: Tensor,
    /// One past the last key row per query, `u32 [R]`.
    pub hi: Tensor,
}

/// Some columns of a matrix, from `first` on; how many, the operation knows.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// The matrix.
    pub of: &'a Tensor,
    /// The first column.
    pub first: usize,
}

/// One further key per query row, in the same softmax as the base keys: the keys that test-time training adds
/// (row r of a later step sees its own rows of the steps before), or a tree node's ancestors.
#[derive(Debug, Clone, Copy)]
pub struct Extra<'a> {
    /// Keys, `[E, n_kv_heads * head_dim]`.
    pub key: Columns<'a>,
    /// Values, like the keys.
    pub value: Columns<'a>,
    /// The row of `key` per query, `u32 [R]`, `u32::MAX` for none; absent: row r.
    pub index: Option<&'a Tensor>,
}

/// Everything one attention reads.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInputs<'a> {
    /// Heads and scale.
    pub shape: AttentionShape,
    /// Queries, `[R, n_heads * head_dim]`; keys and values, `[T, n_kv_heads * head_dim]`.
    pub qkv: [Columns<'a>; 3],
    /// The base keys that each query sees.
    pub spans: &'a Spans,
    /// One further key per query and entry.
    pub extras: &'a [Extra<'a>],
    /// A logit per query head that takes part in the softmax and has no value, float32 `[n_heads]` (attention sinks).
    pub sinks: Option<&'a Tensor>,
    /// Scores s become `cap · tanh(s / cap)`; only the forward has it.
    pub cap: Option<f32>,
}

/// How heads are rotated: the first `n_heads` of a row, each its first `2 * half` elements, pairing j with j + half.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Heads of a row that are rotated; the others stay.
    pub n_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Cosines, `[P, half]`.
    pub cos: &'a Tensor,
    /// Sines, like the cosines.
    pub sin: &'a Tensor,
    /// The table row of each row, `u32 [R]`.
    pub positions: &'a Tensor,
}

/// Rows of a table that are added to the rows of something else.
#[derive(Debug, Clone, Copy)]
pub struct AddedRows<'a> {
    /// The table.
    pub table: Columns<'a>,
    /// The table's row for each row, `u32 [R]`, `u32::MAX` for none.
    pub index: &'a Tensor,
}

/// The target's distributions over the draft vocabulary.
#[derive(Debug, Clone, Copy)]
pub enum TeacherRows<'a> {
    /// Logits are `hidden [Rt, Ht] x head [Vd, Ht]ᵀ`, computed a chunk at a time.
    Hidden {
        /// The target's last hidden states after its final norm.
        hidden: &'a Tensor,
        /// The rows of the target's head that the draft vocabulary keeps.
        head: &'a Tensor,
    },
    /// Logits over the draft vocabulary, `[Rt, Vd]`.
    Logits(&'a Tensor),
}

/// The arguments of the fused head and soft-target loss: R draft rows against Rt teacher rows.
#[derive(Debug, Clone, Copy)]
pub struct SoftTargets<'a> {
    /// The teacher.
    pub teacher: TeacherRows<'a>,
    /// Log-sum-exp of the teacher's logits over the whole target vocabulary, `[Rt]`.
    pub logsumexp: &'a Tensor,
    /// The teacher row of each draft row, `u32 [R]`, ascending.
    pub teacher_row: &'a Tensor,
    /// Weight of the cross-entropy of each row, `[R]`.
    pub ce_weight: &'a Tensor,
    /// Weight of the acceptance term of each row, `[R]`: the objective gets `weight * acceptance`, or
    /// `weight * ln(acceptance)` if `log_acceptance`.
    pub acceptance_weight: &'a Tensor,
    /// Which acceptance term.
    pub log_acceptance: bool,
    /// Whether the gradient for the draft rows is wanted.
    pub wants_dx: bool,
    /// Ranks that share both heads: each has as many of their rows as the others, in their order.
    pub ranks: Option<&'a Arc<dyn Group>>,
}

/// What the loss gives for its R rows.
#[derive(Debug)]
pub struct RowLoss {
    /// What it says of each row.
    pub figures: Later<RowFigures>,
    /// Gradient of the objective with respect to the draft rows, if asked for.
    pub dx: Option<Tensor>,
}

/// What the loss says of each row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowFigures {
    /// Cross-entropy of the draft against the teacher renormalised over the draft vocabulary.
    pub cross_entropy: Vec<f32>,
    /// `sum_v min(teacher_v, draft_v)`, the teacher normalised over the whole vocabulary: the probability that a
    /// sampled token is accepted.
    pub acceptance: Vec<f32>,
    /// The draft's best token (draft vocabulary).
    pub argmax: Vec<u32>,
}

/// Best token and log-sum-exp of each row over a whole vocabulary.
#[derive(Debug, Clone)]
pub struct VocabStats {
    /// The best token's logit, `f32 [R]`.
    pub top: Tensor,
    /// `u32 [R]`.
    pub argmax: Tensor,
    /// `f32 [R]`.
    pub logsumexp: Tensor,
}

/// The settings of one AdamW step (Loshchilov and Hutter, 2019, decoupled decay as PyTorch has it).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// What gradients, which are sums, are divided by; this rank's part of it.
    pub weight: f64,
    /// Gradients of a larger global norm are scaled down to it; 0: never.
    pub max_norm: f64,
}

/// One parameter that takes an AdamW step.
#[derive(Debug)]
pub struct AdamTensor<'a> {
    /// The parameter.
    pub param: &'a mut Tensor,
    /// What its storage rounds away; see [`Kernels::remainder`].
    pub remainder: Option<&'a mut Tensor>,
    /// First moment.
    pub exp_avg: &'a mut Tensor,
    /// Second moment.
    pub exp_avg_sq: &'a mut Tensor,
    /// Its gradient, float32.
    pub grad: &'a Tensor,
    /// The number of its step, from 1.
    pub step: u64,
    /// How much of its gradient's squares counts, see [`Across::share`].
    pub share: f64,
}

/// The operations of one device. `R` counts rows; `cols` is a range of weight columns.
///
/// Weights come as a stack: several matrices of the same width, one below the other, as one product.
pub trait Kernels: Debug + Sync {
    /// `y = x · w[:, cols]ᵀ (+ bias) (+ residual)`; x `[R, K]`, w `[N, *]` in all, y `[R, N]`; one bias per matrix of
    /// the stack, or none.
    fn linear(
        &self,
        x: &Tensor,
        w: &[&Tensor],
        cols: Range<usize>,
        bias: &[&Tensor],
        residual: Option<&Tensor>,
    ) -> Result<Tensor>;
    /// `dx = dy · w[:, cols] (+ into)`.
    fn linear_dgrad(
        &self,
        dy: &Tensor,
        w: &[&Tensor],
        cols: Range<usize>,
        into: Option<Tensor>,
    ) -> Result<Tensor>;
    /// `dw[:, cols] += dyᵀ · x`; for fresh gradients `dw = dyᵀ · x`, whatever is there.
    fn linear_wgrad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        dw: &mut [Tensor],
        cols: Range<usize>,
        fresh: bool,
    ) -> Result<()>;
    /// Rows that products of [`Kernels::linear_wgrad`] with fewer should gather to, where they can; 0: they need not.
    fn wgrad_rows(&self) -> usize {
        0
    }
    /// `db += sum over rows of dy`.
    fn bias_grad(&self, dy: &Tensor, db: &mut [Tensor]) -> Result<()>;
    /// `y = x / rms(x) * w` per row, and `1 / rms(x)`.
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<(Tensor, Tensor)>;
    /// Gradient of [`Kernels::rms_norm`], on top of `into`; adds to `dw` if given.
    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        rstd: &Tensor,
        dw: Option<&mut Tensor>,
        into: Option<Tensor>,
    ) -> Result<Tensor>;
    /// `rotate(x + added)`.
    fn rope(&self, x: &Tensor, rotation: &Rotation<'_>, added: Option<AddedRows<'_>>) -> Result<Tensor>;
    /// Gradient of [`Kernels::rope`] for x. Where rows were added, the same goes to the rows `index` of the first
    /// gradient given, from its column `first` on.
    fn rope_backward(
        &self,
        dy: &Tensor,
        rotation: &Rotation<'_>,
        added: Option<(&mut Tensor, usize, &Tensor)>,
    ) -> Result<Tensor>;
    /// Attention of R query rows over base keys and extras; the output and its log-sum-exp `[R, n_heads]`.
    fn attention(&self, inputs: &AttentionInputs<'_>) -> Result<(Tensor, Tensor)>;
    /// Gradients of [`Kernels::attention`] for q, k, v and each extra's (key, value), given the output, its
    /// log-sum-exp and its gradient.
    fn attention_backward(
        &self,
        inputs: &AttentionInputs<'_>,
        out: [&Tensor; 3],
    ) -> Result<([Tensor; 3], Vec<[Tensor; 2]>)>;
    /// One attention of two over different keys of the same queries: outputs `[R, n_heads * head_dim]` and log-sum-exps
    /// `[R, n_heads]`, merged by the latter.
    fn merge_attention(&self, a: &(Tensor, Tensor), b: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)>;
    /// `silu(gate) * up` of a packed `[R, 2 I]`: gate, then up.
    fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor>;
    /// Gradient of [`Kernels::swiglu`], packed like its input, and once more what it computed; in the memory of `into`
    /// where that is given.
    fn swiglu_backward(
        &self,
        dy: &Tensor,
        gate_up: &Tensor,
        into: [Option<Tensor>; 2],
    ) -> Result<(Tensor, Tensor)>;
    /// [`Kernels::rms_norm`] over whole rows, for weights of 8 bits: rounded to rows of 8 bits with a scale each, in one
    /// pass. `None` where there is no such pass.
    fn rms_norm_rounded(&self, _x: &Tensor, _w: &Tensor, _eps: f32) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// [`Kernels::swiglu`] in the same form.
    fn swiglu_rounded(&self, _gate_up: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// `gelu(gate) * up` of a packed `[R, 2 I]`: gate, then up; GELU by its tanh approximation.
    fn geglu(&self, gate_up: &Tensor) -> Result<Tensor>;
    /// `(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha g)` with `g = min(gate, limit)`, of a packed `[R, 2 I]`.
    fn swiglu_clamped(&self, gate_up: &Tensor, alpha: f32, limit: f32) -> Result<Tensor>;
    /// A function of every element.
    fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor>;
    /// The experts of each row of x `[R, H]`, and their weights. A device waits once, for the numbers of the experts.
    fn route(&self, x: &Tensor, router: &Router<'_>) -> Result<Routes>;
    /// `y = x · w[e]ᵀ (+ bias[e])` of rows sorted by e: those of e end before row `ends[e]`; x `[M, K]`, w `[E, N, K]`,
    /// bias `[E, N]`, y `[M, N]`.
    fn linear_grouped(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, ends: &Tensor) -> Result<Tensor>;
    /// `y[r] = base[r] + Σ_k weights[r, k] x[index[r, k]]` of `u32 [R * K]` and as many weights, summed in the order of k.
    fn weighted_rows(
        &self,
        x: &Tensor,
        index: &Tensor,
        weights: &Tensor,
        base: Option<&Tensor>,
        k: usize,
    ) -> Result<Tensor>;
    /// The gated delta rule, `[R, value_heads * value_dim]`; reads and keeps states `[n, state]`, float32.
    fn delta_rule(&self, inputs: &DeltaInputs<'_>, states: &mut Tensor) -> Result<Tensor>;
    /// `a * b` of R rows and `width` columns each.
    fn product(&self, a: Columns<'_>, b: Columns<'_>, width: usize) -> Result<Tensor>;
    /// `y[r, c] = Σ_k w[c, k] x[index[k, r], c]` of w `[H, K]` (in any shape of H rows) and `u32 [K * R]`; `u32::MAX`
    /// names a row of zeros.
    fn short_conv(&self, x: &Tensor, index: &Tensor, w: &Tensor) -> Result<Tensor>;
    /// `factor * x`.
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor>;
    /// `cap * tanh(x / cap)`.
    fn soft_cap(&self, x: &Tensor, cap: f32) -> Result<Tensor>;
    /// `a + b`.
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;
    /// `dst += src`.
    fn add_assign(&self, dst: &mut Tensor, src: &Tensor) -> Result<()>;
    /// The rows of `x` that `index` names; `u32::MAX` gives zeros.
    fn gather_rows(&self, x: &Tensor, index: &Tensor) -> Result<Tensor>;
    /// `dst[index[r]] += src[r]`; `u32::MAX` is passed over.
    fn scatter_add_rows(&self, dst: &mut Tensor, index: &Tensor, src: &Tensor) -> Result<()>;
    /// `dst[to[i]] = src[from[i]]`; a row of dst is named once at most.
    fn copy_rows(&self, dst: &mut Tensor, to: &Tensor, src: &Tensor, from: &Tensor) -> Result<()>;
    /// A copy of some columns.
    fn columns(&self, x: &Tensor, cols: Range<usize>) -> Result<Tensor>;
    /// `dst[:, cols] += src`.
    fn add_columns(&self, dst: &mut Tensor, cols: Range<usize>, src: &Tensor) -> Result<()>;
    /// Best token and log-sum-exp of `hidden · headᵀ`, a chunk at a time.
    fn vocab_stats(&self, hidden: &Tensor, head: &Tensor) -> Result<VocabStats>;
    /// The same of given logits `[R, V]`.
    fn logit_stats(&self, logits: &Tensor) -> Result<VocabStats>;
    /// The fused head and soft-target loss of draft rows `x [R, H]`, head `[Vd, H]`. The objective's gradient for x
    /// is returned if wanted, that for the head is added to `dhead` if given, or written there if it is fresh.
    fn soft_target_loss(
        &self,
        x: &Tensor,
        head: &Tensor,
        targets: &SoftTargets<'_>,
        dhead: Option<(&mut Tensor, bool)>,
    ) -> Result<RowLoss>;
    /// What the storage of a parameter loses of its float32 value: nothing where it is float32. Together with the
    /// parameter it makes the master weight exactly.
    fn remainder(&self, param: &Tensor) -> Result<Option<Tensor>>;
    /// The master weight: the float32 value of a parameter and its remainder.
    fn master(&self, param: &Tensor, remainder: &Tensor) -> Result<Tensor>;
    /// Parameter (of the storage type of `like`) and remainder of a master weight.
    fn split_master(&self, master: &Tensor, like: DType) -> Result<[Tensor; 2]>;
    /// One AdamW step of all these parameters. Returns the norm of the gradients after division by the weight and
    /// before clipping; if it is not finite, nothing was changed. Squares and weight are added up over the ranks given.
    fn adamw(
        &self,
        tensors: &mut [AdamTensor<'_>],
        step: &AdamStep,
        across: &Across<'_>,
    ) -> Result<Later<f64>>;
    /// Whether every element is a finite number.
    fn all_finite(&self, x: &Tensor) -> Result<Later<bool>>;
}
