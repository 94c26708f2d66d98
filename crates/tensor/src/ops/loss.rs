//! The fused head and soft-target loss, and the objectives it can take.

mod groups;

use std::ops::Range;
use std::sync::Arc;

pub use self::groups::{GroupLoss, Objective};
use self::groups::{acceptance_over, group_losses, row_weights};
use super::{expect_cols, expect_rows, expect_shape};
use crate::kernels::{RowLoss, SoftTargets, TeacherRows, VocabStats};
use crate::{DType, Error, Group, Later, ParamId, Result, Tape, Tensor, Var};

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
    /// Rows of each group that means are over: those here, and those of other ranks.
    pub group_rows: Vec<usize>,
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

/// The ranks that compute one loss together; by default one alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct LossRanks<'a> {
    /// Those that share the heads: each has as many rows of both as the others, in their order (vocabulary parallel;
    /// Shoeybi et al., 2019). All of them have the same draft rows and get the same figures.
    pub heads: Option<&'a Arc<dyn Group>>,
    /// Those that have other rows of the same groups (sequence parallel), or none. Losses and gradients are shares that add
    /// up to those of all rows.
    pub rows: Option<&'a Arc<dyn Group>>,
}

/// What the loss computed.
#[derive(Debug, Clone, PartialEq)]
pub struct LossFigures {
    /// Each group's figures.
    pub groups: Vec<GroupLoss>,
    /// The draft's best token of each row (draft vocabulary).
    pub argmax: Vec<u32>,
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
    if a.rows.group_rows.len() != a.group_weight.len() {
        let (expected, got) =
            (format!("[{}] like the group weights", a.group_weight.len()), a.rows.group_rows.len());
        return Err(Error::shape(OP, "rows of groups", expected, &[got]));
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
        self.soft_target_loss_shared(a, LossRanks::default())
    }

    /// As [`Tape::soft_target_loss`], of one of several ranks; all of them call this. Between ranks with other rows the
    /// lambda objective waits for the device, others neither wait nor send.
    pub fn soft_target_loss_shared(
        &self,
        a: &SoftTargetLoss<'_>,
        ranks: LossRanks<'_>,
    ) -> Result<Later<LossFigures>> {
        let head = self.params().get(a.head).value.clone();
        check(a, &head)?;
        let (device, objective) = (a.x.value().device(), a.objective);
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
                ranks: ranks.heads,
            };
            device.kernels().soft_target_loss(a.x.value(), &head, &targets, dhead)
        };
        let is_lambda = matches!(objective, Objective::LkLambda { .. });
        // The lambda objective's weights need every row's acceptance before any gradient.
        let mut acceptance = None;
        if is_lambda && self.is_recording() {
            let zeros = vec![0.0; a.rows.group.len()];
            let figures = run([zeros.clone(), zeros], None, false)?.figures.wait()?;
            acceptance = Some(acceptance_over(&figures, a.rows, device, ranks.rows)?);
        }
        let weights = row_weights(a, acceptance.as_deref());
        let RowLoss { mut figures, dx } = self.with_param_grad(a.head, |dhead| run(weights, dhead, true))?;
        if let Some(dx) = dx {
            self.seed(a.x, dx);
        }
        if is_lambda && acceptance.is_none() && ranks.rows.is_some() {
            let own = figures.wait()?;
            acceptance = Some(acceptance_over(&own, a.rows, device, ranks.rows)?);
            figures = Later::ready(own);
        }
        let (loss_rows, n_ranks) = (a.rows.clone(), ranks.rows.map_or(1, |ranks| ranks.size()));
        Ok(figures.map(move |figures| LossFigures {
            groups: group_losses(&figures, &loss_rows, objective, (acceptance.as_deref(), n_ranks)),
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
