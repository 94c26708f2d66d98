//! The fused head and soft-target loss. Rows go in chunks of whole teacher rows: the teacher's logits of a chunk,
//! the draft's logits of all rows that read them, the loss, the gradient in place of the logits, its products with
//! the head and the rows, and the chunk is gone.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{matmul, matmul_t, matmul_tn_add};
use super::rows::gather;
use super::simd::{dot, exp_sum, max, overlap, scale, sum_exp, vectorised};
use super::{f32_mut, tensor, u32s};
use crate::kernels::{RowLoss, SoftTargets, TeacherRows, VocabStats};
use crate::{Device, Tensor};

/// The most logits of one kind that exist at once (16 MiB).
const CHUNK_LOGITS: usize = 1 << 22;

pub(super) fn vocab_stats(hidden: &Tensor, head: &Tensor) -> VocabStats {
    let ((rows, k), vocab) = (hidden.rows_cols(), head.rows_cols().0);
    let (hidden, head) = (hidden.f32s(), head.f32s());
    let step = (CHUNK_LOGITS / vocab.max(1)).max(1);
    let mut stats = Stats::default();
    for start in (0..rows).step_by(step) {
        let n = step.min(rows - start);
        let mut logits = vec![0.0; n * vocab];
        matmul_t(&mut logits, (&hidden[start * k..][..n * k], n), (&head, vocab), k);
        stats.push(&logits, vocab);
    }
    stats.finish()
}

pub(super) fn logit_stats(logits: &Tensor) -> VocabStats {
    let mut stats = Stats::default();
    stats.push(&logits.f32s(), logits.rows_cols().1);
    stats.finish()
}

#[derive(Default)]
struct Stats {
    argmax: Vec<u32>,
    logsumexp: Vec<f32>,
}

impl Stats {
    fn push(&mut self, logits: &[f32], vocab: usize) {
        let row = |row: &[f32]| {
            let top = max(row);
            (argmax(row, top), top + sum_exp(row, top).ln())
        };
        let rows: Vec<(u32, f32)> = logits.par_chunks(vocab.max(1)).map(row).collect();
        self.argmax.extend(rows.iter().map(|r| r.0));
        self.logsumexp.extend(rows.iter().map(|r| r.1));
    }

    fn finish(self) -> VocabStats {
        let n = self.logsumexp.len();
        VocabStats { argmax: Tensor::from_u32(Device::Cpu, self.argmax), logsumexp: tensor(self.logsumexp, &[n]) }
    }
}

/// The first place of the largest element.
fn argmax(row: &[f32], top: f32) -> u32 {
    row.iter().position(|&v| v == top).unwrap_or(0) as u32
}

/// What the rows of the whole call give, filled chunk by chunk.
struct Output {
    cross_entropy: Vec<f32>,
    acceptance: Vec<f32>,
    argmax: Vec<u32>,
    dx: Option<Vec<f32>>,
}

pub(super) fn soft_target_loss(x: &Tensor, head: &Tensor, targets: &SoftTargets<'_>, mut dhead: Option<&mut Tensor>) -> RowLoss {
    let ((n_rows, k), vocab) = (x.rows_cols(), head.rows_cols().0);
    let shape = x.shape();
    let (x, head) = (x.f32s(), head.f32s());
    let mut out = Output {
        cross_entropy: Vec::with_capacity(n_rows),
        acceptance: Vec::with_capacity(n_rows),
        argmax: Vec::with_capacity(n_rows),
        dx: dhead.as_ref().map(|_| vec![0.0; x.len()]),
    };
    for rows in chunks(u32s(targets.teacher_row), (CHUNK_LOGITS / vocab.max(1)).max(1)) {
        let n = rows.len();
        let x = &x[rows.start * k..rows.end * k];
        let mut logits = vec![0.0; n * vocab];
        matmul_t(&mut logits, (x, n), (&head, vocab), k);
        chunk_loss(&mut logits, vocab, &rows, targets, &mut out);
        if let (Some(dx), Some(dhead)) = (&mut out.dx, dhead.as_deref_mut()) {
            matmul(&mut dx[rows.start * k..rows.end * k], (&logits, n), (&head, vocab), k);
            matmul_tn_add(f32_mut(dhead), (&logits, vocab), x, n, k);
        }
    }
    let column = |values: Vec<f32>| tensor(values, &[n_rows]);
    RowLoss {
        cross_entropy: column(out.cross_entropy),
        acceptance: column(out.acceptance),
        argmax: Tensor::from_u32(Device::Cpu, out.argmax),
        dx: out.dx.map(|dx| tensor(dx, shape)),
    }
}

/// Ranges of draft rows, at most `limit` long where a single teacher row allows it, never splitting the rows of a
/// teacher row.
fn chunks(teacher_row: &[u32], limit: usize) -> Vec<Range<usize>> {
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

/// Loss of one chunk; its logits become the gradient of the objective with respect to them.
fn chunk_loss(logits: &mut [f32], vocab: usize, rows: &Range<usize>, targets: &SoftTargets<'_>, out: &mut Output) {
    let teacher_row = &u32s(targets.teacher_row)[rows.clone()];
    let teacher = Teacher::new(targets, teacher_row, vocab);
    let (ce_weight, acceptance_weight) = (targets.ce_weight.f32s(), targets.acceptance_weight.f32s());
    let row = |(i, row): (usize, &mut [f32])| {
        let weights = (ce_weight[rows.start + i], acceptance_weight[rows.start + i]);
        row_loss(row, teacher.row(teacher_row[i]), weights, targets.log_acceptance)
    };
    let figures: Vec<RowFigures> = logits.par_chunks_mut(vocab).enumerate().map(row).collect();
    for f in figures {
        out.cross_entropy.push(f.cross_entropy);
        out.acceptance.push(f.acceptance);
        out.argmax.push(f.argmax);
    }
}

struct RowFigures {
    cross_entropy: f32,
    acceptance: f32,
    argmax: u32,
}

/// One row: logits become their gradient.
///
/// With q the draft's and P the teacher's distribution over the draft vocabulary, and c the share of the teacher's
/// whole probability that P covers: `dCE/dz = q - P`; acceptance `a = Σ min(c P, q)`,
/// `da/dz_j = q_j ([q_j < c P_j] - Σ_v [q_v < c P_v] q_v)`.
fn row_loss(row: &mut [f32], (p, share): (&[f32], f32), (a, b): (f32, f32), log: bool) -> RowFigures {
    let top = max(row);
    let best = argmax(row, top);
    let expected = dot(p, row);
    let sum = exp_sum(row, top);
    scale(row, 1.0 / sum);
    let (acceptance, below) = overlap(p, share, row);
    let b = match log {
        true if acceptance > 0.0 => b / acceptance,
        true => 0.0,
        false => b,
    };
    vectorised(|| {
        for (q, p) in row.iter_mut().zip(p) {
            let indicator = if *q < share * p { 1.0 } else { 0.0 };
            *q = a * (*q - p) + b * *q * (indicator - below);
        }
    });
    RowFigures { cross_entropy: top + sum.ln() - expected, acceptance, argmax: best }
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
    fn new(targets: &SoftTargets<'_>, teacher_row: &[u32], vocab: usize) -> Self {
        let mut rows = teacher_row.to_vec();
        rows.dedup();
        let index = Tensor::from_u32(Device::Cpu, rows.clone());
        let mut p = match targets.teacher {
            TeacherRows::Logits(logits) => gather(logits, &index).to_f32(),
            TeacherRows::Hidden { hidden, head } => {
                let mut logits = vec![0.0; rows.len() * vocab];
                let hidden = gather(hidden, &index);
                matmul_t(&mut logits, (&hidden.f32s(), rows.len()), (&head.f32s(), vocab), hidden.rows_cols().1);
                logits
            }
        };
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
