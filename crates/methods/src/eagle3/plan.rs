//! Which rows of a batch are computed, and which carry loss at which test-time-training step.

use std::ops::Range;

use specforge_tensor::{Device, LossRows, Spans, Tensor};

use super::{Eagle3, LossMask, Normalization};
use crate::Batch;

/// The token each row reads and the position it sits at.
pub(super) struct At {
    pub(super) token: Tensor,
    pub(super) position: Tensor,
    /// One past the last position.
    pub(super) end: usize,
}

impl At {
    pub(super) fn new(device: Device, token: Vec<u32>, position: Vec<u32>) -> Self {
        let end = position.iter().max().map_or(0, |&p| p as usize + 1);
        Self { token: Tensor::from_u32(device, token), position: Tensor::from_u32(device, position), end }
    }
}

/// Which rows are computed, and which carry loss at which step.
pub(super) struct Plan {
    /// Rows that some loss depends on, ascending.
    pub(super) live: Vec<u32>,
    /// First token and end of each live row's document.
    pub(super) documents: Vec<Range<u32>>,
    /// Rows with loss, over all steps.
    pub(super) rows: LossRows,
    /// The live row of each row with loss.
    pub(super) sources: Vec<u32>,
    /// The best target token of each row with loss.
    pub(super) best: Vec<u32>,
    /// Supervised rows per step, whether the draft can name their best token or not.
    pub(super) supervised: Vec<f64>,
}

impl Plan {
    /// Row p carries loss at step i if t = p+1+i is in its document, supervised, and the draft can name the
    /// target's best token there. Rows are ordered by t, so that all steps that read teacher row t are together.
    pub(super) fn new(method: &Eagle3, batch: &Batch, argmax: &[u32]) -> Self {
        let steps = method.config.ttt_steps;
        let mask = |t: usize| match method.config.loss_mask {
            LossMask::Aligned => batch.loss_mask[t] == 1,
            LossMask::Specforge => batch.loss_mask[t - 1] == 1,
        };
        let n_supervised = |b: &Range<usize>| (b.start + 1..b.end).filter(|&t| mask(t)).count();
        let total_supervised: usize = batch.bounds.iter().map(n_supervised).sum();
        let (mut rows, mut pairs) = (LossRows::default(), Vec::new());
        let (mut best, mut supervised) = (Vec::new(), vec![0.0; steps]);
        let mut document_of = vec![0; batch.n_tokens()];
        for (d, bounds) in batch.bounds.iter().enumerate() {
            let given = batch.position_weight.as_ref().map(|w| w[d]);
            let weight = given.unwrap_or(match method.config.normalization {
                Normalization::Sequence => 1.0 / bounds.len() as f32,
                Normalization::Supervised => 1.0,
            });
            document_of[bounds.clone()].fill(d);
            for t in (bounds.start + 1..bounds.end).filter(|&t| mask(t)) {
                for (step, supervised) in supervised.iter_mut().enumerate().take(t - bounds.start) {
                    *supervised += 1.0;
                    if method.vocab.draft_id(argmax[t]).is_some() {
                        pairs.push((t - 1 - step) as u32);
                        rows.teacher_row.push(t as u32);
                        rows.group.push(step as u32);
                        rows.weight.push(weight);
                        best.push(argmax[t]);
                    }
                }
            }
        }
        rows.total_weight = match method.config.normalization {
            Normalization::Supervised if batch.position_weight.is_none() => total_supervised as f64,
            _ => batch.bounds.len() as f64,
        };
        let mut is_live = vec![method.all_rows_live; batch.n_tokens()];
        pairs.iter().for_each(|&p| is_live[p as usize] = true);
        let live: Vec<u32> = (0..batch.n_tokens() as u32).filter(|&p| is_live[p as usize]).collect();
        // Each live row's place among them.
        let mut place = vec![0; batch.n_tokens()];
        live.iter().enumerate().for_each(|(i, &p)| place[p as usize] = i as u32);
        let sources = pairs.iter().map(|&p| place[p as usize]).collect();
        let document = |&p: &u32| &batch.bounds[document_of[p as usize]];
        let documents = live.iter().map(|p| document(p).start as u32..document(p).end as u32).collect();
        Self { live, documents, rows, sources, best, supervised }
    }

    /// Step 0 of every row: the token after it in its document (`u32::MAX` at the end), its own position.
    pub(super) fn all_rows(batch: &Batch, device: Device) -> At {
        let mut token: Vec<u32> = (1..=batch.n_tokens() as u32).collect();
        batch.bounds.iter().for_each(|b| token[b.end - 1] = u32::MAX);
        At::new(device, token, batch.positions.clone())
    }

    /// Live rows at a TTT step.
    pub(super) fn live_rows(&self, batch: &Batch, step: usize, device: Device) -> At {
        let step = step as u32;
        let token = |(&p, d): (&u32, &Range<u32>)| if p + 1 + step < d.end { p + 1 + step } else { u32::MAX };
        let token = self.live.iter().zip(&self.documents).map(token).collect();
        let position = self.live.iter().map(|&p| batch.positions[p as usize] + step).collect();
        At::new(device, token, position)
    }

    /// Live rows see the step-0 keys from their document's start up to themselves.
    pub(super) fn spans(&self, device: Device) -> Spans {
        let lo = self.documents.iter().map(|d| d.start).collect();
        let hi = self.live.iter().map(|p| p + 1).collect();
        Spans { lo: Tensor::from_u32(device, lo), hi: Tensor::from_u32(device, hi) }
    }

    /// A step's rows with loss: their live rows, and their places among all rows with loss.
    pub(super) fn places(&self, step: usize) -> [Vec<u32>; 2] {
        let here = self.rows.group.iter().enumerate().filter(|&(_, &group)| group as usize == step);
        let to: Vec<u32> = here.map(|(i, _)| i as u32).collect();
        [to.iter().map(|&i| self.sources[i as usize]).collect(), to]
    }
}
