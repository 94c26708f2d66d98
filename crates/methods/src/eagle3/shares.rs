//! What of the draft each rank has, where ranks share it: column-parallel q, k, v, gate and up, row-parallel o and down
//! (Shoeybi et al., 2019), and pieces of the vocabulary. Everything else, the norms and fc, every rank has whole, and
//! with the same gradient.

use std::sync::Arc;

use specforge_tensor::{Group, Params, Split, Tape, Tensor};

use super::config::config_error;
use super::dims::Dims;
use crate::{Counts, Error, Exchange, Frozen, Ranks, Result, VocabMap};

impl Dims {
    /// Into how many pieces `tensor` ranks cut a weight, and whether they cut its rows; nothing where every rank has the
    /// whole.
    pub fn pieces(&self, name: &str, tensor: usize) -> Option<(bool, usize)> {
        let part = name.strip_prefix("midlayer.").unwrap_or(name).trim_end_matches(".weight");
        match part {
            "self_attn.k_proj" | "self_attn.v_proj" => Some((true, tensor.min(self.num_key_value_heads))),
            "self_attn.q_proj" | "mlp.gate_proj" | "mlp.up_proj" | "lm_head" => Some((true, tensor)),
            "self_attn.o_proj" | "mlp.down_proj" => Some((false, tensor)),
            _ => None,
        }
    }
}

/// The piece of a weight that a rank has; nothing where every rank has the whole.
pub(super) fn split_of(name: &str, dims: &Dims, ranks: &Arc<dyn Group>) -> Option<Split> {
    dims.pieces(name, ranks.size()).map(|(rows, pieces)| Split::of(ranks, rows, pieces))
}

/// Fails where the draft cannot be shared by these ranks.
pub(super) fn check(dims: &Dims, ranks: Counts) -> Result<()> {
    let Counts { tensor: size, sequence: n, exchange } = ranks;
    let even = |key: &str, n: usize| {
        let reason = format!("{size} ranks share it (parallel.tensor), expected a multiple of {size}");
        if n.is_multiple_of(size) { Ok(()) } else { Err(config_error(key, n.to_string(), reason)) }
    };
    even("num-attention-heads", dims.num_attention_heads)?;
    if !size.is_multiple_of(dims.num_key_value_heads) {
        even("num-key-value-heads", dims.num_key_value_heads)?;
    }
    even("intermediate-size", dims.intermediate_size)?;
    even("draft-vocab-size", dims.draft_vocab_size)?;
    let heads = (dims.num_key_value_heads / size).max(1);
    if exchange == Exchange::Heads && !heads.is_multiple_of(n) {
        let reason = format!(
            "{n} ranks exchange heads for rows (parallel.sequence), expected a multiple of {n} on each; gather keys instead (parallel.exchange)"
        );
        return Err(config_error("num-key-value-heads", heads.to_string(), reason));
    }
    Ok(())
}

/// The rows of the target's head that the draft vocabulary keeps, `[Vd, Ht]`: this rank's, where the draft is shared. The
/// target's head may be whole or shared by the same ranks.
pub(super) fn teacher_head(frozen: &Frozen, vocab: &VocabMap, dims: &Dims, ranks: &Ranks) -> Result<Tensor> {
    let (head, none) = (&frozen.head, Params::new());
    let tape = Tape::inference(&none);
    let gather = |ids: Vec<u32>| -> Result<Tensor> {
        let ids = Tensor::from_u32(head.device(), ids);
        Ok(tape.gather_rows(&tape.input(head.clone()), &ids)?.value().clone())
    };
    let (ids, rows) = (vocab.target_ids().to_vec(), head.rows_cols().0);
    let Some(ranks) = ranks.tensor() else { return gather(ids) };
    if rows == dims.vocab_size {
        let (n, rank) = (ids.len() / ranks.size(), ranks.rank());
        return gather(ids[rank * n..(rank + 1) * n].to_vec());
    }
    if rows * ranks.size() != dims.vocab_size {
        let (whole, size) = (dims.vocab_size, ranks.size());
        let reason = format!("expected {whole} rows, or those of one of {size} ranks, got {rows}");
        return Err(Error::Weight { name: "the target's head".to_owned(), reason });
    }
    // Each kept row is some rank's, and goes to the rank that keeps it.
    let own = |&id: &u32| (id as usize).checked_sub(ranks.rank() * rows).filter(|&id| id < rows);
    let kept = gather(ids.iter().map(|id| own(id).map_or(u32::MAX, |id| id as u32)).collect())?;
    Ok(ranks.reduce_scatter(&kept)?)
}

/// What a rank has of the target's embedding, where the target is shared by the same ranks; `shape` is the whole.
pub(super) fn table_split(frozen: &Frozen, shape: &[usize], ranks: &Ranks) -> Option<Split> {
    let ranks = ranks.tensor()?;
    let (rows, width) = frozen.embedding.rows_cols();
    (shape == [rows * ranks.size(), width]).then(|| Split::of(ranks, true, ranks.size()))
}
