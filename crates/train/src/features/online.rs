//! Online: the frozen target runs on every batch. On the CPU each row runs by itself, so that its features do not
//! depend on what it is batched with: the same bits as from a store.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use specforge_data::{Prepared, RowRef};
use specforge_methods::Batch;
use specforge_models::{Capture, Target};
use specforge_store::{Values, Writer};
use specforge_tensor::{DType, Device, Params, Tape, Tensor, VocabStats};

use super::{FeatureSource, NOT_COMPUTED, RowFeatures, assemble, teacher_is_read};
use crate::{Error, Result};

/// A target in memory over a prepared set.
#[derive(Debug, Clone)]
pub struct Online {
    /// The frozen target.
    pub target: Arc<Target>,
    /// The rows.
    pub data: Arc<Prepared>,
    /// What to record.
    pub capture: Capture,
    /// What captured states are rounded to: bf16, as a store keeps them, or f32.
    pub dtype: DType,
    /// The ranks that share the target with this one, by their place among those that rows are dealt to.
    pub peers: Option<Range<usize>>,
}

impl Online {
    /// Runs the target on several rows.
    ///
    /// On the CPU each row goes alone, in parallel: its features do not depend on what it is batched with. A GPU gets
    /// all rows as one pack; which rows those are is part of the order of a run, so a resumed one sees the same bits.
    pub fn rows(&self, rows: &[usize]) -> Result<Vec<RowFeatures>> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        if self.target.device() != Device::Cpu {
            return self.pack(rows);
        }
        // Ranks that share a target meet in its calls, which therefore keep their order.
        if self.target.ranks().is_some() {
            let alone = rows.iter().map(|&row| self.pack(&[row])).collect::<Result<Vec<_>>>()?;
            return Ok(alone.into_iter().flatten().collect());
        }
        let alone = rows.par_iter().map(|&row| self.pack(&[row])).collect::<Result<Vec<_>>>()?;
        Ok(alone.into_iter().flatten().collect())
    }

    /// Runs the target once, on all these rows side by side.
    fn pack(&self, rows: &[usize]) -> Result<Vec<RowFeatures>> {
        let content: Vec<_> = rows.iter().map(|&row| self.data.row(row)).collect();
        let documents: Vec<&[u32]> = content.iter().map(|row| row.ids).collect();
        let captured = self.target.forward(&documents, &self.capture)?;
        let device = self.target.device();
        let last_hidden =
            captured.last_hidden.map_or_else(|| Tensor::from_f32(device, vec![], &[0, 0]), Ok)?;
        let finite =
            [&captured.hidden_states, &last_hidden].map(|states| device.kernels().all_finite(states));
        let hidden_states = captured.hidden_states.cast(self.dtype)?;
        let last_hidden = last_hidden.cast(self.dtype)?;
        let loss_mask: Vec<u8> = content.iter().flat_map(|row| row.loss_mask).copied().collect();
        let read: Vec<u32> = captured
            .bounds
            .iter()
            .flat_map(|bounds| {
                bounds.clone().filter(|&t| teacher_is_read(&loss_mask[bounds.clone()], t - bounds.start))
            })
            .map(|t| t as u32)
            .collect();
        let stats = self.teacher(&last_hidden, read.clone())?;
        for (finite, states) in finite.into_iter().zip([&captured.hidden_states, &last_hidden]) {
            if !finite?.wait()? {
                return Err(not_finite(rows, &captured.bounds, states));
            }
        }
        let (mut argmax, mut logsumexp) = (vec![NOT_COMPUTED; loss_mask.len()], vec![0.0; loss_mask.len()]);
        let best = stats.argmax.to_u32();
        for ((&t, &best), &lse) in read.iter().zip(&best).zip(stats.logsumexp.f32s().iter()) {
            argmax[t as usize] = best;
            logsumexp[t as usize] = lse;
        }
        let row = |(row, bounds): (&RowRef<'_>, Range<usize>)| -> Result<RowFeatures> {
            Ok(RowFeatures {
                input_ids: row.ids.to_vec(),
                loss_mask: row.loss_mask.to_vec(),
                hidden_states: hidden_states.rows(bounds.clone())?,
                last_hidden: last_hidden.rows(bounds.clone())?,
                argmax: argmax[bounds.clone()].to_vec(),
                logsumexp: logsumexp[bounds].to_vec(),
            })
        };
        content.iter().zip(captured.bounds.iter().cloned()).map(row).collect()
    }

    /// Best token and log-sum-exp over the whole vocabulary of the tokens `read`.
    fn teacher(&self, last_hidden: &Tensor, read: Vec<u32>) -> Result<VocabStats> {
        let none = Params::new();
        let tape = Tape::inference(&none);
        let index = Tensor::from_u32(last_hidden.device(), read);
        let rows = tape.gather_rows(&tape.input(last_hidden.clone()), &index)?;
        Ok(self.target.vocab_stats(rows.value())?)
    }
}

impl FeatureSource for Online {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        assemble(rows, self.rows(rows)?)
    }

    fn meets(&self) -> Option<Range<usize>> {
        self.peers.clone()
    }

    fn take_part(&mut self, rows: &[usize]) -> Result<()> {
        self.rows(rows).map(|_| ())
    }
}

/// A target with damaged weights must not train a draft, nor fill a store.
fn not_finite(rows: &[usize], bounds: &[Range<usize>], states: &Tensor) -> Error {
    let is_bad = |bounds: &Range<usize>| {
        states.rows(bounds.clone()).is_ok_and(|states| states.f32s().iter().any(|v| !v.is_finite()))
    };
    let bad = rows.iter().zip(bounds).find(|(_, bounds)| is_bad(bounds));
    let reason = "the target's hidden states are not finite (NaN or infinity): its weights are damaged, or their type \
                  is too narrow; check them with `specforge info TARGET`, or set target.dtype = \"f32\"";
    Error::Row { row: bad.map_or(rows[0], |(row, _)| *row) as u64, reason: reason.to_owned() }
}

/// Appends a row's features to a store of the schema of [`super::schema`].
pub fn append(writer: &mut Writer, row: usize, features: &RowFeatures) -> Result<()> {
    let (hidden_states, last_hidden) = (features.hidden_states.to_bf16(), features.last_hidden.to_bf16());
    let fields = [
        ("input_ids", Values::U32(&features.input_ids)),
        ("loss_mask", Values::U8(&features.loss_mask)),
        ("hidden_states", Values::Bf16(&hidden_states)),
        ("last_hidden", Values::Bf16(&last_hidden)),
        ("teacher_argmax", Values::U32(&features.argmax)),
        ("teacher_logsumexp", Values::F32(&features.logsumexp)),
    ];
    Ok(writer.append(row as u64, features.input_ids.len() as u32, &fields)?)
}
