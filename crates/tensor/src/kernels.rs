//! The device seam: everything the engine asks of a device, one method per coarse operation.
//!
//! The operations in `ops` check shapes once and call these; an implementation may trust what it is given.
//! Gradients (`d…`) are float32. Methods that take `&mut Tensor` add to it. No result may depend on the
//! number of threads or on timing: the same inputs give the same bits.

use std::fmt::Debug;
use std::ops::Range;

use crate::Tensor;

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
/// are all expressed by these bounds; both are non-decreasing within a document.
#[derive(Debug, Clone)]
pub struct Spans {
    /// First key row per query, `u32 [R]`.
    pub lo: Tensor,
    /// One past the last key row per query, `u32 [R]`.
    pub hi: Tensor,
}

/// One further key per query row, in the same softmax as the base keys: the keys that test-time training adds
/// (row r of a later step sees its own rows of the steps before), or a tree node's ancestors.
#[derive(Debug, Clone, Copy)]
pub struct Extra<'a> {
    /// Keys, `[E, n_kv_heads * head_dim]`.
    pub key: &'a Tensor,
    /// Values, like the keys.
    pub value: &'a Tensor,
    /// The row of `key` per query, `u32 [R]`, `u32::MAX` for none; absent: row r.
    pub index: Option<&'a Tensor>,
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
}

/// What the loss says of each of its R rows.
#[derive(Debug)]
pub struct RowLoss {
    /// Cross-entropy of the draft against the teacher renormalised over the draft vocabulary.
    pub cross_entropy: Tensor,
    /// `sum_v min(teacher_v, draft_v)`, the teacher normalised over the whole vocabulary: the probability that a
    /// sampled token is accepted.
    pub acceptance: Tensor,
    /// The draft's best token (draft vocabulary), `u32`.
    pub argmax: Tensor,
    /// Gradient of the objective with respect to the draft rows, if asked for.
    pub dx: Option<Tensor>,
}

/// Best token and log-sum-exp of each row over a whole vocabulary.
#[derive(Debug, Clone)]
pub struct VocabStats {
    /// `u32 [R]`.
    pub argmax: Tensor,
    /// `f32 [R]`.
    pub logsumexp: Tensor,
}

/// One AdamW step (Loshchilov and Hutter, 2019, decoupled decay as PyTorch has it).
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
    /// The step's number, from 1.
    pub step: u64,
    /// Factor on the gradient: averaging and clipping.
    pub grad_scale: f64,
}

/// The operations of one device. `R` counts rows; `cols` is a range of weight columns.
pub trait Kernels: Debug + Sync {
    /// `y = x · w[:, cols]ᵀ (+ bias)`; x `[R, K]`, w `[N, *]`, y `[R, N]`.
    fn linear(&self, x: &Tensor, w: &Tensor, cols: Range<usize>, bias: Option<&Tensor>) -> Tensor;
    /// `dx = dy · w[:, cols]`.
    fn linear_dgrad(&self, dy: &Tensor, w: &Tensor, cols: Range<usize>) -> Tensor;
    /// `dw[:, cols] += dyᵀ · x`.
    fn linear_wgrad(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor, cols: Range<usize>);
    /// `db += sum over rows of dy`.
    fn bias_grad(&self, dy: &Tensor, db: &mut Tensor);
    /// `y = x / rms(x) * w` per row, and `1 / rms(x)`.
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> (Tensor, Tensor);
    /// Gradient of [`Kernels::rms_norm`]; adds to `dw` if given.
    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        rstd: &Tensor,
        dw: Option<&mut Tensor>,
    ) -> Tensor;
    /// Rotates the first `2 * half` elements of every head, pairing j with j + half; cos and sin are
    /// `[P, half]` tables, a row's position picks the row. `inverse` rotates back.
    fn rope(
        &self,
        x: &Tensor,
        head_dim: usize,
        tables: (&Tensor, &Tensor),
        positions: &Tensor,
        inverse: bool,
    ) -> Tensor;
    /// Attention of R query rows over base keys and extras; the output and its log-sum-exp `[R, n_heads]`.
    fn attention(
        &self,
        shape: AttentionShape,
        qkv: [&Tensor; 3],
        spans: &Spans,
        extras: &[Extra<'_>],
    ) -> (Tensor, Tensor);
    /// Gradients of [`Kernels::attention`] for q, k, v and each extra's (key, value), given the output, its
    /// log-sum-exp and its gradient.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: [&Tensor; 3],
        spans: &Spans,
        extras: &[Extra<'_>],
        out: [&Tensor; 3],
    ) -> ([Tensor; 3], Vec<[Tensor; 2]>);
    /// `silu(gate) * up`.
    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor;
    /// Gradients of [`Kernels::swiglu`] for gate and up.
    fn swiglu_backward(&self, dy: &Tensor, gate: &Tensor, up: &Tensor) -> [Tensor; 2];
    /// `a + b`.
    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor;
    /// `dst += src`.
    fn add_assign(&self, dst: &mut Tensor, src: &Tensor);
    /// The rows of `x` that `index` names, widened to float32; `u32::MAX` gives zeros.
    fn gather_rows(&self, x: &Tensor, index: &Tensor) -> Tensor;
    /// `dst[index[r]] += src[r]`; `u32::MAX` is passed over.
    fn scatter_add_rows(&self, dst: &mut Tensor, index: &Tensor, src: &Tensor);
    /// A copy of some columns, widened to float32.
    fn columns(&self, x: &Tensor, cols: Range<usize>) -> Tensor;
    /// `dst[:, cols] += src`.
    fn add_columns(&self, dst: &mut Tensor, cols: Range<usize>, src: &Tensor);
    /// Best token and log-sum-exp of `hidden · headᵀ`, a chunk at a time.
    fn vocab_stats(&self, hidden: &Tensor, head: &Tensor) -> VocabStats;
    /// The same of given logits `[R, V]`.
    fn logit_stats(&self, logits: &Tensor) -> VocabStats;
    /// The fused head and soft-target loss of draft rows `x [R, H]`, head `[Vd, H]`. The objective's gradient for x
    /// is returned if wanted, that for the head is added to `dhead` if given.
    fn soft_target_loss(
        &self,
        x: &Tensor,
        head: &Tensor,
        targets: &SoftTargets<'_>,
        dhead: Option<&mut Tensor>,
    ) -> RowLoss;
    /// Updates `param` (through `master` where the storage is not float32) and the moments.
    fn adam_step(
        &self,
        param: &mut Tensor,
        master: Option<&mut Tensor>,
        moments: [&mut Tensor; 2],
        grad: &Tensor,
        step: AdamStep,
    );
    /// The sum of squares of all elements.
    fn sum_squares(&self, x: &Tensor) -> f64;
}
