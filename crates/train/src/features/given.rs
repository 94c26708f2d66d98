//! Features whose states are there already: what is missing of a row are the teacher's statistics.

use specforge_data::RowRef;
use specforge_tensor::{Params, Tape, Tensor};

use super::{NOT_COMPUTED, RowFeatures, teacher_is_read};
use crate::{Error, Result};

/// The features of a row of T tokens from captured states `[T, A · Ht]` and the normed last hidden state `[T, Ht]`, with
/// the target's head `[V, Ht]`.
pub fn with_teacher(
    row: RowRef<'_>,
    hidden_states: Tensor,
    last_hidden: Tensor,
    head: &Tensor,
) -> Result<RowFeatures> {
    let n = row.ids.len();
    if [&hidden_states, &last_hidden].iter().any(|states| states.shape().first() != Some(&n)) {
        let got = [hidden_states.shape(), last_hidden.shape()];
        return Err(Error::NoRows(format!("states of shapes {got:?} for a row of {n} tokens")));
    }
    let read: Vec<u32> = (0..n).filter(|&t| teacher_is_read(row.loss_mask, t)).map(|t| t as u32).collect();
    let none = Params::new();
    let tape = Tape::inference(&none);
    let on_device = last_hidden.to_device(head.device())?;
    let index = Tensor::from_u32(head.device(), read.clone());
    let rows = tape.gather_rows(&tape.input(on_device), &index)?;
    let stats = Tape::vocab_stats(rows.value(), head)?;
    let (mut argmax, mut logsumexp) = (vec![NOT_COMPUTED; n], vec![0.0; n]);
    for ((&t, best), &lse) in read.iter().zip(stats.argmax.to_u32()).zip(stats.logsumexp.f32s().iter()) {
        argmax[t as usize] = best;
        logsumexp[t as usize] = lse;
    }
    Ok(RowFeatures {
        input_ids: row.ids.to_vec(),
        loss_mask: row.loss_mask.to_vec(),
        hidden_states,
        last_hidden,
        argmax,
        logsumexp,
    })
}
