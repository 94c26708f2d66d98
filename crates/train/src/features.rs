//! Where features come from: what one row's features are, how rows make a batch, and the sources.

mod cache;
mod given;
mod offline;
mod online;
mod received;

pub use cache::{Cache, Writers};
pub use given::with_teacher;
pub use offline::{Offline, record_features, schema};
pub use online::{Online, append};
pub use received::Received;

use std::ops::Range;

use specforge_methods::{Batch, Teacher};
use specforge_tensor::Tensor;

use crate::{Error, Result};

/// The captured features of one row of T tokens.
#[derive(Debug, Clone)]
pub struct RowFeatures {
    /// `[T]`.
    pub input_ids: Vec<u32>,
    /// `[T]`.
    pub loss_mask: Vec<u8>,
    /// Captured layers, concatenated: `[T, A · Ht]`.
    pub hidden_states: Tensor,
    /// After the final norm: `[T, Ht]`.
    pub last_hidden: Tensor,
    /// The target's best next token, `[T]`; [`NOT_COMPUTED`] where no loss can read it.
    pub argmax: Vec<u32>,
    /// Log-sum-exp of the target's logits, `[T]`; 0 where no loss can read it.
    pub logsumexp: Vec<f32>,
}

/// Marks tokens whose next-token distribution no loss reads: neither they nor the token before is supervised.
pub const NOT_COMPUTED: u32 = u32::MAX;

/// Whether a loss may read the teacher at token t, under either convention of the loss mask.
pub fn teacher_is_read(loss_mask: &[u8], t: usize) -> bool {
    loss_mask[t] == 1 || t > 0 && loss_mask[t - 1] == 1
}

/// Features for training, row by row of the prepared set. The trainer cannot tell the kinds apart.
pub trait FeatureSource: Send {
    /// The packed batch of these rows, in this order.
    fn fetch(&mut self, rows: &[usize]) -> Result<Batch>;

    /// The ranks whose fetches this rank takes part in, by their place among those that rows are dealt to; its own is one
    /// of them. `None`: it fetches alone, whenever it likes. Ranks that meet in a fetch must meet in the same order there
    /// and in the steps, so the loop fetches for them a round at a time, right where the batch is needed.
    fn meets(&self) -> Option<Range<usize>> {
        None
    }

    /// Takes part in a round of another rank, or in one in which this rank has no row.
    fn take_part(&mut self, _rows: &[usize]) -> Result<()> {
        Ok(())
    }

    /// All rows have been seen once more.
    fn end_of_epoch(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Packs rows into a batch, one document each.
pub fn assemble(rows: &[usize], features: Vec<RowFeatures>) -> Result<Batch> {
    let (mut bounds, mut input_ids, mut loss_mask) = (Vec::new(), Vec::new(), Vec::new());
    let (mut positions, mut argmax, mut logsumexp) = (Vec::new(), Vec::new(), Vec::new());
    let mut tensors: Option<[Tensor; 2]> = None;
    for row in features {
        let start = input_ids.len();
        input_ids.extend(row.input_ids);
        loss_mask.extend(row.loss_mask);
        positions.extend(0..(input_ids.len() - start) as u32);
        argmax.extend(row.argmax);
        logsumexp.extend(row.logsumexp);
        bounds.push(start..input_ids.len());
        match &mut tensors {
            Some([hidden, last]) => {
                hidden.append_rows(&row.hidden_states)?;
                last.append_rows(&row.last_hidden)?;
            }
            None => tensors = Some([row.hidden_states, row.last_hidden]),
        }
    }
    let [hidden_states, hidden] = tensors.ok_or_else(|| Error::NoRows("a batch without rows".to_owned()))?;
    let n = logsumexp.len();
    let logsumexp = Tensor::from_f32(hidden.device(), logsumexp, &[n])?;
    Ok(Batch {
        rows: rows.iter().map(|&r| r as u64).collect(),
        bounds,
        input_ids,
        loss_mask,
        positions,
        hidden_states,
        teacher: Teacher::LastHidden { hidden, argmax, logsumexp },
        position_weight: None,
    })
}
