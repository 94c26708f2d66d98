//! The fused head and soft-target loss, and the objectives it can take.

use std::ops::Range;
use std::sync::Arc;

use super::{expect_cols, expect_rows, expect_shape};
use crate::kernels::{RowFigures, RowLoss, SoftTargets, TeacherRows, VocabStats};
use crate::{DType, Error, Group, Later, ParamId, Result, Tape, Tensor, Var};

/// What is minimised over each group of rows (each test-time-training step).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// Cross-entropy against the target's distribution: the KL divergence up to a constant.
    Kl,
    /// `-mean(ln acceptance)`, the acceptance of a row being `sum_v min(target_v, draft_v)`.
    LkAlpha,
    /// `w · KL + (1 - w) · (1 - mean acceptance)` with `w = kl_scale · exp(-kl_decay · mean acceptance)`, held
    /// constant in the gradient.
    LkLambda {
        /// Factor of w.
        kl_scale: f64,
        /// How fast w falls as the acceptance rises.
        kl_decay: f64,
    },
}

/// The teacher's logits over the draft vocabulary.
pub type Teacher<'a> = TeacherRows<'a>;

/// Which draft rows carry loss, against which teacher rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossRows {
    /// The teacher row of each draft row, ascending: rows that share a teacher row are computed together.
    pub teacher_row: Vec<u32>,
    /// The group (test-time-training step) of each draft row.
    pub group: Vec<u32>,
    /// The weight of each row's cross-entropy in its group's sum.
    pub weight: Vec<f32>,
    /// What the groups' sums are divided by in the end; scales the acceptance terms, which are means.
    pub total_weight: f64,
}

/// The inputs of the fused loss.
#[derive(Debug)]
pub struct SoftTargetLoss<'a> {
    /// Draft rows after the final norm, `[R, H]`.
    pub x: &'a Var,
    /// The draft's head, `[Vd, H]`.
    pub head: ParamId,
    /// The target's logits over the draft vocabulary.
    pub teacher: Teacher<'a>,
    /// Their log-sum-exp over the whole target vocabulary, `[Rt]`.
    pub logsumexp: &'a Tensor,
    /// The rows.
    pub rows: &'a LossRows,
    /// What is minimised.
    pub objective: Objective,
    /// The weight of each group in the objective.
    pub group_weight: &'a [f64],
}

/// What the loss computed.
#[derive(Debug, Clone, PartialEq)]
pub struct LossFigures {
    /// Each group's figures.
    pub groups: Vec<GroupLoss>,
    /// The draft's best token of each row (draft vocabulary).
    pub argmax: Vec<u32>,
}

/// One group's figures.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GroupLoss {
    /// The group's objective times `total_weight`, before its `group_weight`.
    pub loss: f64,
    /// Sum of acceptance over the rows.
    pub acceptance: f64,
    /// The number of rows.
    pub count: f64,
}

fn group_losses(
    rows: &RowFigures,
    loss_rows: &LossRows,
    objective: Objective,
    n_groups: usize,
) -> Vec<GroupLoss> {
    let mut groups = vec![GroupLoss::default(); n_groups];
    let mut kl = vec![0.0; n_groups];
    let mut log_acceptance = vec![0.0; n_groups];
    let (ce, acceptance) = (&rows.cross_entropy, &rows.acceptance);
    for (r, &g) in loss_rows.group.iter().enumerate() {
        let g = g as usize;
        kl[g] += f64::from(loss_rows.weight[r]) * f64::from(ce[r]);
        groups[g].acceptance += f64::from(acceptance[r]);
        groups[g].count += 1.0;
        if acceptance[r] > 0.0 {
            log_acceptance[g] += f64::from(acceptance[r]).ln();
        }
    }
    for (g, group) in groups.iter_mut().enumerate() {
        let n = group.count.max(1.0);
        group.loss = match objective {
            Objective::Kl => kl[g],
            Objective::LkAlpha => -loss_rows.total_weight * log_acceptance[g] / n,
            Objective::LkLambda { kl_scale, kl_decay } => {
                let mean = group.acceptance / n;
                let w = kl_scale * (-kl_decay * mean).exp();
                w * kl[g] + loss_rows.total_weight * (1.0 - w) * (1.0 - mean)
            }
        };
    }
    groups
}

/// Each row's weights of the cross-entropy and of the acceptance term.
fn row_weights(a: &SoftTargetLoss<'_>, groups: &[GroupLoss]) -> [Vec<f32>; 2] {
    let weights = a.rows.group.iter().zip(&a.rows.weight).map(|(&g, &weight)| {
        let (group_weight, group) = (a.group_weight[g as usize], groups[g as usize]);
        let per_row = group_weight * a.rows.total_weight / group.count.max(1.0);
        match a.objective {
            Objective::Kl => (group_weight * f64::from(weight), 0.0),
            Objective::LkAlpha => (0.0, -per_row),
            Objective::LkLambda { kl_scale, kl_decay } => {
                let w = kl_scale * (-kl_decay * group.acceptance / group.count.max(1.0)).exp();
                (group_weight * w * f64::from(weight), -per_row * (1.0 - w))
            }
        }
    });
    let (ce, acceptance) = weights.map(|(c, a)| (c as f32, a as f32)).unzip();
    [ce, acceptance]
}

fn check(a: &SoftTargetLoss<'_>, head: &Tensor) -> Result<()> {
    const OP: &str = "soft_target_loss";
    expect_cols(OP, "draft rows", a.x.value(), head.rows_cols().1)?;
    let n_rows = a.x.rows_cols().0;
    let (n_teacher, vocab) = match a.teacher {
        TeacherRows::Hidden { hidden, head } => {
            expect_cols(OP, "teacher hidden states", hidden, head.rows_cols().1)?;
            (hidden.rows_cols().0, head.rows_cols().0)
        }
        TeacherRows::Logits(logits) => logits.rows_cols(),
    };
    if vocab == 0 || vocab != head.rows_cols().0 {
        return Err(Error::shape(OP, "draft head", format!("[{vocab}, H] like the teacher's"), head.shape()));
    }
    expect_shape(OP, "logsumexp", a.logsumexp, &[n_teacher])?;
    let lengths = [a.rows.teacher_row.len(), a.rows.group.len(), a.rows.weight.len()];
    if lengths != [n_rows; 3] || !a.rows.teacher_row.is_sorted() {
        return Err(Error::shape(
            OP,
            "loss rows",
            format!("[{n_rows}; 3], ascending teacher rows"),
            &lengths,
        ));
    }
    let device = a.x.value().device();
    let index = Tensor::from_u32(device, a.rows.teacher_row.clone());
    expect_rows(OP, "the teacher", &index, n_teacher, false)?;
    let groups = Tensor::from_u32(device, a.rows.group.clone());
    expect_rows(OP, "the group weights", &groups, a.group_weight.len(), false)
}

/// Ranges of draft rows, at most `limit` long where a single teacher row allows it, never splitting the rows of a
/// teacher row.
pub(crate) fn teacher_chunks(teacher_row: &[u32], limit: usize) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    while start < teacher_row.len() {
        let same = teacher_row[start..].iter().take_while(|&&t| t == teacher_row[start]).count();
        match chunks.last_mut() {
            Some(last) if last.len() + same <= limit => last.end += same,
            _ => chunks.push(start..start + same),
        }
        start += same;
    }
    chunks
}

/// Statistics of a whole vocabulary of which each rank saw `n` tokens; of equal ones the first stays the best.
fn over_ranks(own: &VocabStats, n: usize, ranks: &Arc<dyn Group>) -> Result<VocabStats> {
    let (rows, device) = (own.top.len(), own.top.device());
    let top = ranks.all_gather(&own.top)?.to_f32();
    let logsumexp = ranks.all_gather(&own.logsumexp)?.to_f32();
    let argmax = ranks.all_gather(&own.argmax)?.to_u32();
    let (mut tops, mut best, mut sums) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..rows {
        let places = || (0..ranks.size()).map(|rank| rank * rows + row);
        let at = places().reduce(|a, b| if top[b] > top[a] { b } else { a }).unwrap_or(row);
        tops.push(top[at]);
        best.push((at / rows * n) as u32 + argmax[at]);
        let most = places().map(|at| logsumexp[at]).fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = places().map(|at| f64::from(logsumexp[at] - most).exp()).sum();
        sums.push((f64::from(most) + sum.ln()) as f32);
    }
    Ok(VocabStats {
        top: Tensor::from_f32(device, tops, &[rows])?,
        argmax: Tensor::from_u32(device, best),
        logsumexp: Tensor::from_f32(device, sums, &[rows])?,
    })
}

impl Tape<'_> {
    /// The draft's head and the loss against the target's distributions, in chunks: no `[rows, vocabulary]` tensor
    /// outlives its chunk, the teacher's logits of a row are computed once for all groups that read it, and while
    /// recording the gradients are computed in the same pass. Terminal: its gradient is that of the sum over
    /// groups of `group_weight · loss`.
    pub fn soft_target_loss(&self, a: &SoftTargetLoss<'_>) -> Result<Later<LossFigures>> {
        self.soft_target_loss_shared(a, None)
    }

    /// As [`Tape::soft_target_loss`], with heads that ranks share: each has as many rows of both as the others, in their
    /// order (vocabulary parallel; Shoeybi et al., 2019). All ranks have the same draft rows and get the same figures.
    pub fn soft_target_loss_shared(
        &self,
        a: &SoftTargetLoss<'_>,
        ranks: Option<&Arc<dyn Group>>,
    ) -> Result<Later<LossFigures>> {
        let head = self.params().get(a.head).value.clone();
        check(a, &head)?;
        let (device, n_groups, objective) = (a.x.value().device(), a.group_weight.len(), a.objective);
        let teacher_row = Tensor::from_u32(device, a.rows.teacher_row.clone());
        let run = |[ce, acceptance]: [Vec<f32>; 2],
                   dhead: Option<(&mut Tensor, bool)>,
                   with_gradient|
         -> Result<RowLoss> {
            let n = ce.len();
            let targets = SoftTargets {
                teacher: a.teacher,
                logsumexp: a.logsumexp,
                teacher_row: &teacher_row,
                ce_weight: &Tensor::from_f32(device, ce, &[n])?,
                acceptance_weight: &Tensor::from_f32(device, acceptance, &[n])?,
                log_acceptance: objective == Objective::LkAlpha,
                wants_dx: a.x.is_needed() && with_gradient,
                ranks,
            };
            device.kernels().soft_target_loss(a.x.value(), &head, &targets, dhead)
        };
        // The lambda objective's weights need every row's acceptance before any gradient.
        let mut groups = vec![GroupLoss::default(); n_groups];
        a.rows.group.iter().for_each(|&g| groups[g as usize].count += 1.0);
        if self.is_recording() && matches!(objective, Objective::LkLambda { .. }) {
            let zeros = vec![0.0; a.rows.group.len()];
            let figures = run([zeros.clone(), zeros], None, false)?.figures.wait()?;
            groups = group_losses(&figures, a.rows, objective, n_groups);
        }
        let weights = row_weights(a, &groups);
        let rows = self.with_param_grad(a.head, |dhead| run(weights, dhead, true))?;
        if let Some(dx) = rows.dx {
            self.seed(a.x, dx);
        }
        let loss_rows = a.rows.clone();
        Ok(rows.figures.map(move |figures| LossFigures {
            groups: group_losses(&figures, &loss_rows, objective, n_groups),
            argmax: figures.argmax,
        }))
    }

    /// Best token and log-sum-exp of `hidden [R, Ht] · head [V, Ht]ᵀ` for every row, a chunk at a time: what the
    /// loss needs of the target's whole vocabulary (8 bytes per row).
    pub fn vocab_stats(hidden: &Tensor, head: &Tensor) -> Result<VocabStats> {
        expect_cols("vocab_stats", "hidden states", hidden, head.rows_cols().1)?;
        hidden.device().kernels().vocab_stats(hidden, head)
    }

    /// As [`Tape::vocab_stats`], with a head that ranks share: each has as many of its rows as the others, in their
    /// order. Waits for the device; alone it does not.
    pub fn vocab_stats_shared(
        hidden: &Tensor,
        head: &Tensor,
        ranks: Option<&Arc<dyn Group>>,
    ) -> Result<VocabStats> {
        let own = Self::vocab_stats(hidden, head)?;
        ranks.map_or(Ok(own.clone()), |ranks| over_ranks(&own, head.rows_cols().0, ranks))
    }

    /// As [`Tape::vocab_stats`], of given logits `[R, V]`.
    pub fn logit_stats(logits: &Tensor) -> Result<VocabStats> {
        if logits.dtype() == DType::U32 {
            return Err(Error::DType {
                op: "logit_stats",
                what: "logits",
                expected: "a float type",
                got: logits.dtype(),
            });
        }
        logits.device().kernels().logit_stats(logits)
    }
}
