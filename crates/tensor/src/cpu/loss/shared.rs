//! The fused head and soft-target loss with heads that ranks share: each has a piece of the draft vocabulary. A chunk
//! takes four calls between the ranks: the largest logits, the sums of exponentials, what the losses are summed of, and
//! the best tokens. Gradients of the draft rows are summed once, at the end.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::{Source, argmax, matmul, matmul_t, matmul_tn_add, of_logarithm};
use crate::cpu::simd::{dot, exp_shifted, max, overlap, scale, sum_exp, vectorised};
use crate::cpu::{f32_mut, tensor, u32s};
use crate::kernels::{RowFigures, RowLoss, SoftTargets};
use crate::ops::teacher_chunks;
use crate::{Combine, Device, Group, Later, Result, Tensor};

type Ranks = Arc<dyn Group>;

/// As [`super::soft_target_loss`].
pub(super) fn soft_target_loss(
    (x, head): (&Tensor, &Tensor),
    targets: &SoftTargets<'_>,
    ranks: &Ranks,
    mut dhead: Option<(&mut Tensor, bool)>,
) -> Result<RowLoss> {
    let ((k, vocab), shape) = ((x.rows_cols().1, head.rows_cols().0), x.shape());
    let (x, head) = (x.f32s(), head.f32s());
    let source = Source::new(targets.teacher);
    let mut figures = RowFigures::default();
    let mut dx = targets.wants_dx.then(|| vec![0.0; x.len()]);
    for rows in teacher_chunks(u32s(targets.teacher_row), (super::CHUNK_LOGITS / vocab.max(1)).max(1)) {
        let x = &x[rows.start * k..rows.end * k];
        let mut chunk = Chunk::new((x, &head, k), &source, targets, rows.clone(), vocab);
        chunk.loss(targets, ranks, &mut figures)?;
        let logits = &chunk.logits;
        if let Some(dx) = &mut dx {
            matmul(&mut dx[rows.start * k..rows.end * k], (logits, rows.len()), (&head, vocab), k);
        }
        // Fresh gradients are zeros here.
        if let Some((dhead, _)) = &mut dhead {
            matmul_tn_add(f32_mut(dhead), (logits, vocab), x, rows.len(), k);
        }
    }
    let summed = |dx: Vec<f32>| -> Result<Tensor> {
        let mut dx = tensor(dx, shape);
        ranks.all_reduce(&mut dx, Combine::Sum)?;
        Ok(dx)
    };
    Ok(RowLoss { figures: Later::ready(figures), dx: dx.map(summed).transpose()? })
}

/// This rank's logits of some draft rows and of the teacher rows that they read.
struct Chunk {
    rows: Range<usize>,
    vocab: usize,
    /// The draft's, `[rows, vocab]`; in the end their gradient.
    logits: Vec<f32>,
    /// The teacher rows, ascending.
    teacher_rows: Vec<u32>,
    /// Their logits, then probabilities over the draft vocabulary.
    teacher: Vec<f32>,
}

/// One figure per row from every rank, combined.
fn combined(values: Vec<f32>, ranks: &Ranks, how: Combine) -> Result<Vec<f32>> {
    let n = values.len();
    let mut all = tensor(values, &[n]);
    ranks.all_reduce(&mut all, how)?;
    Ok(all.to_f32())
}

impl Chunk {
    fn new(
        (x, head, k): (&[f32], &[f32], usize),
        source: &Source<'_>,
        targets: &SoftTargets<'_>,
        rows: Range<usize>,
        vocab: usize,
    ) -> Self {
        let mut teacher_rows = u32s(targets.teacher_row)[rows.clone()].to_vec();
        teacher_rows.dedup();
        let teacher = source.logits(&teacher_rows, vocab);
        let mut logits = vec![0.0; rows.len() * vocab];
        matmul_t(&mut logits, (x, rows.len()), (head, vocab), k);
        Self { rows, vocab, logits, teacher_rows, teacher }
    }

    /// Figures of the chunk; its logits become the gradient of the objective with respect to them.
    fn loss(&mut self, targets: &SoftTargets<'_>, ranks: &Ranks, out: &mut RowFigures) -> Result<()> {
        let (n, v) = (self.rows.len(), self.vocab);
        // 1. The largest logits of the whole draft vocabulary, draft rows first.
        let own: Vec<f32> = self.both().map(max).collect();
        let tops = combined(own.clone(), ranks, Combine::Max)?;
        out.argmax.extend(self.best(&own[..n], &tops[..n], ranks)?);
        // 2. Sums of exponentials.
        let sums: Vec<f32> = self.both().zip(&tops).map(|(row, top)| sum_exp(row, *top)).collect();
        let sums = combined(sums, ranks, Combine::Sum)?;
        self.teacher.par_chunks_mut(v).zip(&tops[n..]).zip(&sums[n..]).for_each(|((row, top), sum)| {
            exp_shifted(row, *top);
            scale(row, 1.0 / sum);
        });
        let whole = targets.logsumexp.f32s();
        let share = |(i, &row): (usize, &u32)| (tops[n + i] + sums[n + i].ln() - whole[row as usize]).exp();
        let shares: Vec<f32> = self.teacher_rows.iter().enumerate().map(share).collect();
        // 3. Expected logit, acceptance, and the draft's probability where it is below the teacher's.
        let teacher_row = &u32s(targets.teacher_row)[self.rows.clone()];
        let read: Vec<usize> =
            teacher_row.iter().map(|t| self.teacher_rows.partition_point(|r| r < t)).collect();
        let teacher = &self.teacher;
        let parts = self.logits.par_chunks_mut(v).enumerate().map(|(i, row)| {
            let p = &teacher[read[i] * v..][..v];
            let expected = dot(p, row);
            exp_shifted(row, tops[i]);
            scale(row, 1.0 / sums[i]);
            let (acceptance, below) = overlap(p, shares[read[i]], row);
            [expected, acceptance, below]
        });
        let parts: Vec<f32> = parts.collect::<Vec<_>>().concat();
        let parts = combined(parts, ranks, Combine::Sum)?;
        for (i, part) in parts.chunks_exact(3).enumerate() {
            out.cross_entropy.push(tops[i] + sums[i].ln() - part[0]);
            out.acceptance.push(part[1]);
        }
        // 4. The gradient, as `super::row_loss` has it.
        let (ce_weight, acceptance_weight) = (targets.ce_weight.f32s(), targets.acceptance_weight.f32s());
        let first = self.rows.start;
        self.logits.par_chunks_mut(v).enumerate().for_each(|(i, row)| {
            let (acceptance, below) = (parts[3 * i + 1], parts[3 * i + 2]);
            let (a, b) = (ce_weight[first + i], acceptance_weight[first + i]);
            let b = if targets.log_acceptance { of_logarithm(b, acceptance) } else { b };
            let (p, share) = (&teacher[read[i] * v..][..v], shares[read[i]]);
            vectorised(|| {
                for (q, p) in row.iter_mut().zip(p) {
                    let indicator = if *q < share * p { 1.0 } else { 0.0 };
                    *q = a * (*q - p) + b * *q * (indicator - below);
                }
            });
        });
        Ok(())
    }

    /// Rows of the draft's logits, then of the teacher's.
    fn both(&self) -> impl Iterator<Item = &[f32]> {
        self.logits.chunks_exact(self.vocab).chain(self.teacher.chunks_exact(self.vocab))
    }

    /// The best token of the whole draft vocabulary for each draft row; of equal ones the first.
    fn best(&self, own: &[f32], tops: &[f32], ranks: &Ranks) -> Result<Vec<u32>> {
        let first = ranks.rank() * self.vocab;
        // The largest of `last - token` is that of the first token.
        let last = (ranks.size() * self.vocab) as u32;
        let mine =
            self.logits.chunks_exact(self.vocab).zip(own).zip(tops).map(|((row, own), top)| {
                if own == top { last - (first as u32 + argmax(row, *own)) } else { 0 }
            });
        let mut best = Tensor::from_u32(Device::Cpu, mine.collect());
        ranks.all_reduce(&mut best, Combine::Max)?;
        Ok(best.to_u32().into_iter().map(|places| last.saturating_sub(places)).collect())
    }
}
