//! Which rows of a batch are computed, and which carry loss at which test-time-training step.

use std::ops::Range;

use specforge_tensor::{Device, LossRows, Spans, Tensor};

use super::slice::Slice;
use super::{Eagle3, LossMask, Normalization};
use crate::{Batch, Exchange};

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
    /// What this rank adds to the weight that figures are divided by.
    pub(super) weight: f64,
    /// The rows of the batch that are this rank's.
    pub(super) slice: Slice,
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
        rows.group_rows = vec![0; steps];
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
                        rows.group_rows[step] += 1;
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
        let (slice, weight) = (Slice::whole(batch.n_tokens()), rows.total_weight);
        Self { live, documents, rows, sources, best, supervised, weight, slice }
    }

    /// The share of rank `rank` of `size`, `steps` test-time-training steps being read ahead. Sums of losses are its
    /// rows' own; what figures are divided by is the first rank's, so that all of them add up to the batch's. What means
    /// are over, and what gradients are divided by, is the batch's on each.
    pub(super) fn share(self, (rank, size): (usize, usize), exchange: Exchange, steps: usize) -> Self {
        let mut slice = Slice::dealt(self.slice.rows.len(), (rank, size), exchange, steps);
        // 1. Live rows of every rank; at least one, so that all take part in every exchange.
        let live_of = |rank: usize| -> Vec<usize> {
            let own = |&i: &usize| slice.keys[rank].contains(self.live[i] as usize);
            (0..self.live.len()).filter(own).collect()
        };
        let sight_of = |rank: usize| -> Vec<Range<u32>> {
            let sight: Vec<Range<u32>> =
                live_of(rank).into_iter().map(|i| self.documents[i].start..self.live[i] + 1).collect();
            if sight.is_empty() { std::iter::once(0..0).collect() } else { sight }
        };
        let own = live_of(rank);
        let sights = if exchange == Exchange::Heads { (0..size).map(sight_of).collect() } else { Vec::new() };
        let (live, documents) = if own.is_empty() {
            let stand_in = slice.rows.iter().next().unwrap_or(0) as u32;
            (vec![stand_in], std::iter::once(stand_in..stand_in + 1).collect())
        } else {
            (
                own.iter().map(|&i| self.live[i]).collect(),
                own.iter().map(|&i| self.documents[i].clone()).collect(),
            )
        };
        slice.sights = sights;
        // 2. Rows with loss, and the place of each among the live ones.
        let is_own = |source: u32| own.binary_search(&(source as usize));
        let kept: Vec<usize> = (0..self.sources.len()).filter(|&r| is_own(self.sources[r]).is_ok()).collect();
        let pick = |all: &[u32]| kept.iter().map(|&r| all[r]).collect::<Vec<u32>>();
        let all = &self.rows;
        let first = if rank == 0 { 1.0 } else { 0.0 };
        Self {
            rows: LossRows {
                teacher_row: pick(&all.teacher_row),
                group: pick(&all.group),
                weight: kept.iter().map(|&r| all.weight[r]).collect(),
                group_rows: all.group_rows.clone(),
                total_weight: all.total_weight,
            },
            sources: kept.iter().filter_map(|&r| is_own(self.sources[r]).ok()).map(|i| i as u32).collect(),
            best: pick(&self.best),
            supervised: self.supervised.iter().map(|n| first * n).collect(),
            weight: first * self.weight,
            slice,
            live,
            documents,
        }
    }

    /// The step-0 keys that each live row sees: from its document's start up to itself.
    pub(super) fn sight(&self) -> impl Iterator<Item = Range<u32>> {
        let is_own = self.slice.n_keys > 0;
        let pairs = self.live.iter().zip(&self.documents);
        pairs.map(move |(p, document)| if is_own { document.start..p + 1 } else { 0..0 })
    }

    /// Step 0 of every row of the slice: the token after it in its document (`u32::MAX` at the end), by its place among
    /// the slice's, and its own position.
    pub(super) fn all_rows(&self, batch: &Batch, device: Device) -> At {
        let (slice, rows) = (&self.slice, &self.slice.rows);
        let mut is_last = vec![false; batch.n_tokens()];
        batch.bounds.iter().for_each(|bounds| is_last[bounds.end - 1] = true);
        let token = rows.iter().map(|row| if is_last[row] { u32::MAX } else { slice.token(row, 1) });
        At::new(device, token.collect(), rows.iter().map(|row| batch.positions[row]).collect())
    }

    /// Live rows at a TTT step; tokens by their places among the slice's.
    pub(super) fn live_rows(&self, batch: &Batch, step: usize, device: Device) -> At {
        let token = |(&p, d): (&u32, &Range<u32>)| {
            let ahead = 1 + step as u32;
            if p + ahead < d.end { self.slice.token(p as usize, ahead as usize) } else { u32::MAX }
        };
        let token = self.live.iter().zip(&self.documents).map(token).collect();
        let position = self.live.iter().map(|&p| batch.positions[p as usize] + step as u32).collect();
        At::new(device, token, position)
    }

    /// As [`Plan::sight`], for attention where all keys are here.
    pub(super) fn spans(&self, device: Device) -> Spans {
        let (lo, hi) = self.sight().map(|keys| (keys.start, keys.end)).unzip();
        Spans { lo: Tensor::from_u32(device, lo), hi: Tensor::from_u32(device, hi) }
    }

    /// The live rows, by their places among the slice's.
    pub(super) fn live_in_slice(&self, device: Device) -> Tensor {
        let place = |&p: &u32| self.slice.rows.before(p as usize) as u32;
        Tensor::from_u32(device, self.live.iter().map(place).collect())
    }

    /// A step's rows with loss: their live rows, and their places among all rows with loss.
    pub(super) fn places(&self, step: usize) -> [Vec<u32>; 2] {
        let here = self.rows.group.iter().enumerate().filter(|&(_, &group)| group as usize == step);
        let to: Vec<u32> = here.map(|(i, _)| i as u32).collect();
        [to.iter().map(|&i| self.sources[i as usize]).collect(), to]
    }
}
