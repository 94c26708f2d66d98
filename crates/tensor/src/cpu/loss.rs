//! The fused head and soft-target loss. Rows go in chunks of whole teacher rows: the teacher's logits of a chunk,
//! the draft's logits of all rows that read them, the loss, the gradient in place of the logits, its products with
//! the head and the rows, and the chunk is gone.

mod shared;

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{matmul, matmul_t, matmul_tn_add};
use super::rows::{f32_rows, gather_values};
use super::simd::{dot, exp_sum, max, overlap, scale, sum_exp, vectorised};
use super::{f32_mut, tensor, u32s};
use crate::kernels::{RowFigures, RowLoss, SoftTargets, TeacherRows, VocabStats};
use crate::ops::teacher_chunks;
use crate::{Device, Later, Result, Tensor};

/// The most logits of one kind that exist at once (16 MiB). Small in this crate's tests, so that they cross chunks.
const CHUNK_LOGITS: usize = if cfg!(test) { 1 << 10 } else { 1 << 22 };

/// Vocabulary entries per block of [`vocab_stats`]: a large head is read, and widened, once for many rows.
const VOCAB_BLOCK: usize = if cfg!(test) { 1 << 5 } else { 1 << 12 };

pub(super) fn vocab_stats(hidden: &Tensor, head: &Tensor) -> VocabStats {
    let ((rows, k), vocab) = (hidden.rows_cols(), head.rows_cols().0);
    let (hidden, step) = (hidden.f32s(), CHUNK_LOGITS / VOCAB_BLOCK);
    let (mut stats, mut logits) = (vec![RowStats::default(); rows], Vec::new());
    for start in (0..vocab).step_by(VOCAB_BLOCK) {
        let n = VOCAB_BLOCK.min(vocab - start);
        let block = f32_rows(head, start * k..(start + n) * k);
        for (i, stats) in stats.chunks_mut(step).enumerate() {
            let hidden = &hidden[i * step * k..][..stats.len() * k];
            logits.resize(stats.len() * n, 0.0);
            matmul_t(&mut logits, (hidden, stats.len()), (&block, n), k);
            stats.par_iter_mut().zip(logits.par_chunks(n)).for_each(|(stats, row)| stats.merge(start, row));
        }
    }
    collected(&stats)
}

pub(super) fn logit_stats(logits: &Tensor) -> VocabStats {
    let (rows, vocab) = logits.rows_cols();
    let mut stats = vec![RowStats::default(); rows];
    let values = logits.f32s();
    stats.par_iter_mut().zip(values.par_chunks(vocab.max(1))).for_each(|(stats, row)| stats.merge(0, row));
    collected(&stats)
}

/// Best entry and log-sum-exp of one row as far as its vocabulary was seen.
#[derive(Clone)]
struct RowStats {
    top: f32,
    argmax: u32,
    /// The sum of `e^(logit - top)`.
    sum: f32,
}

impl Default for RowStats {
    fn default() -> Self {
        Self { top: f32::NEG_INFINITY, argmax: 0, sum: 0.0 }
    }
}

impl RowStats {
    /// Takes in the logits of the entries from `start` on; of equal ones the first stays the best.
    fn merge(&mut self, start: usize, logits: &[f32]) {
        let top = max(logits);
        if top > self.top {
            self.sum *= (self.top - top).exp();
            self.argmax = start as u32 + argmax(logits, top);
            self.top = top;
        }
        self.sum += sum_exp(logits, self.top);
    }
}

fn collected(stats: &[RowStats]) -> VocabStats {
    let logsumexp: Vec<f32> = stats.iter().map(|s| s.top + s.sum.ln()).collect();
    VocabStats {
        top: tensor(stats.iter().map(|s| s.top).collect(), &[stats.len()]),
        argmax: Tensor::from_u32(Device::Cpu, stats.iter().map(|s| s.argmax).collect()),
        logsumexp: tensor(logsumexp, &[stats.len()]),
    }
}

/// The first place of the largest element.
fn argmax(row: &[f32], top: f32) -> u32 {
    row.iter().position(|&v| v == top).unwrap_or(0) as u32
}

pub(super) fn soft_target_loss(
    x: &Tensor,
    head: &Tensor,
    targets: &SoftTargets<'_>,
    mut dhead: Option<(&mut Tensor, bool)>,
) -> Result<RowLoss> {
    if let Some(ranks) = targets.ranks {
        return shared::soft_target_loss((x, head), targets, ranks, dhead);
    }
    let (k, vocab) = (x.rows_cols().1, head.rows_cols().0);
    let shape = x.shape();
    let (x, head) = (x.f32s(), head.f32s());
    let source = Source::new(targets.teacher);
    let mut figures = RowFigures::default();
    let mut dx = targets.wants_dx.then(|| vec![0.0; x.len()]);
    let mut logits = Vec::new();
    for rows in teacher_chunks(u32s(targets.teacher_row), (CHUNK_LOGITS / vocab.max(1)).max(1)) {
        let n = rows.len();
        let x = &x[rows.start * k..rows.end * k];
        let teacher = Teacher::new(&source, targets, &rows, vocab);
        logits.resize(n * vocab, 0.0);
        matmul_t(&mut logits, (x, n), (&head, vocab), k);
        chunk_loss(&mut logits, &teacher, &rows, targets, &mut figures);
        if let Some(dx) = &mut dx {
            matmul(&mut dx[rows.start * k..rows.end * k], (&logits, n), (&head, vocab), k);
        }
        // Fresh gradients are zeros here.
        if let Some((dhead, _)) = &mut dhead {
            matmul_tn_add(f32_mut(dhead), (&logits, vocab), x, n, k);
        }
    }
    Ok(RowLoss { figures: Later::ready(figures), dx: dx.map(|dx| tensor(dx, shape)) })
}

/// Loss of one chunk; its logits become the gradient of the objective with respect to them.
fn chunk_loss(
    logits: &mut [f32],
    teacher: &Teacher,
    rows: &Range<usize>,
    targets: &SoftTargets<'_>,
    out: &mut RowFigures,
) {
    let teacher_row = &u32s(targets.teacher_row)[rows.clone()];
    let (ce_weight, acceptance_weight) = (targets.ce_weight.f32s(), targets.acceptance_weight.f32s());
    let row = |(i, row): (usize, &mut [f32])| {
        let weights = (ce_weight[rows.start + i], acceptance_weight[rows.start + i]);
        row_loss(row, teacher.row(teacher_row[i]), weights, targets.log_acceptance)
    };
    let figures: Vec<OneRow> = logits.par_chunks_mut(teacher.vocab).enumerate().map(row).collect();
    for f in figures {
        out.cross_entropy.push(f.cross_entropy);
        out.acceptance.push(f.acceptance);
        out.argmax.push(f.argmax);
    }
}

struct OneRow {
    cross_entropy: f32,
    acceptance: f32,
    argmax: u32,
}

/// One row: logits become their gradient.
///
/// With q the draft's and P the teacher's distribution over the draft vocabulary, and c the share of the teacher's
/// whole probability that P covers: `dCE/dz = q - P`; acceptance `a = Σ min(c P, q)`,
/// `da/dz_j = q_j ([q_j < c P_j] - Σ_v [q_v < c P_v] q_v)`.
fn row_loss(row: &mut [f32], (p, share): (&[f32], f32), (a, b): (f32, f32), log: bool) -> OneRow {
    let top = max(row);
    let best = argmax(row, top);
    let expected = dot(p, row);
    let sum = exp_sum(row, top);
    scale(row, 1.0 / sum);
    let (acceptance, below) = overlap(p, share, row);
    let b = if log { of_logarithm(b, acceptance) } else { b };
    vectorised(|| {
        for (q, p) in row.iter_mut().zip(p) {
            let indicator = if *q < share * p { 1.0 } else { 0.0 };
            *q = a * (*q - p) + b * *q * (indicator - below);
        }
    });
    OneRow { cross_entropy: top + sum.ln() - expected, acceptance, argmax: best }
}

/// The weight of the acceptance's gradient where its logarithm is weighted; none of a row without overlap.
///
/// Products of the quotient with what counts in the acceptance stay within `weight`, but the quotient itself may be above
/// all float32: then the largest number stands for it, as infinity times 0 would be none.
fn of_logarithm(weight: f32, acceptance: f32) -> f32 {
    if acceptance > 0.0 { (weight / acceptance).clamp(-f32::MAX, f32::MAX) } else { 0.0 }
}

/// Where the teacher's logits come from, with a head that is widened once for all chunks.
enum Source<'a> {
    Hidden(&'a Tensor, Cow<'a, [f32]>),
    Logits(&'a Tensor),
}

impl<'a> Source<'a> {
    fn new(teacher: TeacherRows<'a>) -> Self {
        match teacher {
            TeacherRows::Hidden { hidden, head } => Self::Hidden(hidden, head.f32s()),
            TeacherRows::Logits(logits) => Self::Logits(logits),
        }
    }

    /// Logits over the draft vocabulary of some teacher rows.
    fn logits(&self, rows: &[u32], vocab: usize) -> Vec<f32> {
        match self {
            Self::Logits(logits) => gather_values(logits, rows),
            Self::Hidden(hidden, head) => {
                let mut logits = vec![0.0; rows.len() * vocab];
                let values = gather_values(hidden, rows);
                matmul_t(&mut logits, (&values, rows.len()), (head, vocab), hidden.rows_cols().1);
                logits
            }
        }
    }
}

/// The teacher's distributions over the draft vocabulary for the rows that a chunk reads.
struct Teacher {
    /// The teacher rows, ascending.
    rows: Vec<u32>,
    vocab: usize,
    /// `[rows, vocab]`.
    p: Vec<f32>,
    /// The share of the whole vocabulary's probability that the draft vocabulary covers, per row.
    share: Vec<f32>,
}

impl Teacher {
    /// The distributions that a range of draft rows reads.
    fn new(source: &Source<'_>, targets: &SoftTargets<'_>, range: &Range<usize>, vocab: usize) -> Self {
        let mut rows = u32s(targets.teacher_row)[range.clone()].to_vec();
        rows.dedup();
        let mut p = source.logits(&rows, vocab);
        let whole = targets.logsumexp.f32s();
        let pruned: Vec<f32> = p.par_chunks_mut(vocab).map(softmax).collect();
        let share = pruned.iter().zip(&rows).map(|(pruned, &r)| (pruned - whole[r as usize]).exp()).collect();
        Self { rows, vocab, p, share }
    }

    /// Distribution and share of a teacher row.
    fn row(&self, teacher_row: u32) -> (&[f32], f32) {
        let i = self.rows.binary_search(&teacher_row).expect("the chunk's teacher rows are all here");
        (&self.p[i * self.vocab..][..self.vocab], self.share[i])
    }
}

/// Softmax in place; returns the log-sum-exp.
fn softmax(row: &mut [f32]) -> f32 {
    let top = max(row);
    let sum = exp_sum(row, top);
    scale(row, 1.0 / sum);
    top + sum.ln()
}
