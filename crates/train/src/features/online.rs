//! Online: the frozen target runs on every batch. Each row runs by itself, so that its features do not depend on
//! what it is batched with: the same bits as from a store.

use std::sync::Arc;

use rayon::prelude::*;
use specforge_data::Prepared;
use specforge_methods::Batch;
use specforge_models::{Capture, Target};
use specforge_store::{Values, Writer};
use specforge_tensor::{DType, Params, Tape, Tensor};

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
}

impl Online {
    /// Runs the target on one row.
    pub fn row(&self, row: usize) -> Result<RowFeatures> {
        let content = self.data.row(row);
        let captured = self.target.forward(&[content.ids], &self.capture)?;
        let device = self.target.device();
        let last_hidden =
            captured.last_hidden.map_or_else(|| Tensor::from_f32(device, vec![], &[0, 0]), Ok)?;
        expect_finite(row, &captured.hidden_states)?;
        expect_finite(row, &last_hidden)?;
        let last_hidden = last_hidden.cast(self.dtype)?;
        let (argmax, logsumexp) = self.teacher(&last_hidden, content.loss_mask)?;
        Ok(RowFeatures {
            input_ids: content.ids.to_vec(),
            loss_mask: content.loss_mask.to_vec(),
            hidden_states: captured.hidden_states.cast(self.dtype)?,
            last_hidden,
            argmax,
            logsumexp,
        })
    }

    /// Best token and log-sum-exp over the whole vocabulary, of the tokens where a loss may ask for them.
    fn teacher(&self, last_hidden: &Tensor, loss_mask: &[u8]) -> Result<(Vec<u32>, Vec<f32>)> {
        let read: Vec<u32> =
            (0..loss_mask.len()).filter(|&t| teacher_is_read(loss_mask, t)).map(|t| t as u32).collect();
        let none = Params::new();
        let tape = Tape::inference(&none);
        let index = Tensor::from_u32(last_hidden.device(), read.clone());
        let rows = tape.gather_rows(&tape.input(last_hidden.clone()), &index)?;
        let stats = Tape::vocab_stats(rows.value(), self.target.head())?;
        let (mut argmax, mut logsumexp) = (vec![NOT_COMPUTED; loss_mask.len()], vec![0.0; loss_mask.len()]);
        let best = stats.argmax.to_u32();
        for ((&t, &best), &lse) in read.iter().zip(&best).zip(stats.logsumexp.f32s().iter()) {
            argmax[t as usize] = best;
            logsumexp[t as usize] = lse;
        }
        Ok((argmax, logsumexp))
    }

    /// Runs the target on several rows, in parallel.
    pub fn rows(&self, rows: &[usize]) -> Result<Vec<RowFeatures>> {
        rows.par_iter().map(|&row| self.row(row)).collect()
    }
}

impl FeatureSource for Online {
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch> {
        assemble(rows, self.rows(rows)?)
    }
}

/// A target with damaged weights must not train a draft, nor fill a store.
fn expect_finite(row: usize, states: &Tensor) -> Result<()> {
    if states.device().kernels().all_finite(states)?.wait()? {
        return Ok(());
    }
    let reason = "the target's hidden states are not finite (NaN or infinity): its weights are damaged, or their type \
                  is too narrow; check them with `specforge info TARGET`, or set target.dtype = \"f32\"";
    Err(Error::Row { row: row as u64, reason: reason.to_owned() })
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
