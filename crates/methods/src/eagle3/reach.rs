//! How attention reaches the keys that a row may see: they are here, or on other ranks.

use std::ops::Range;
use std::sync::Arc;

use specforge_tensor::{
    Attention, AttentionShape, Device, Group, KeyValue, Part, RingAttention, Spans, Tape, Tensor, Var,
};

use super::plan::Plan;
use super::slice::{Pieces, Slice};
use crate::{Exchange, Result, Sequence};

/// One further key per query of every step before, as attention takes it.
pub(super) type Extras = Vec<(KeyValue, Option<Tensor>)>;

/// What the attention of all TTT steps has in common.
pub(super) struct Reach<'m> {
    shape: AttentionShape,
    how: How<'m>,
}

enum How<'m> {
    /// Every key is here.
    Here(Spans),
    /// Every key comes here, once for all steps; their gradients go home once, added up.
    Gather { ranks: &'m Arc<dyn Group>, spans: Spans, base: Tensor, places: Tensor },
    /// All rows with some heads, then back. Rows are filled up to as many as any rank has.
    Heads { ranks: &'m Arc<dyn Group>, spans: Spans, fill: Tensor, own: Tensor, base: Tensor },
    /// Spans within the keys of each rank.
    Ring { ranks: &'m Arc<dyn Group>, spans: Vec<Spans>, base: Tensor },
}

/// Rows `0..n`, filled up to `most` with rows of zeros.
fn filled(device: Device, n: usize, most: usize) -> Tensor {
    Tensor::from_u32(device, (0..most).map(|r| if r < n { r as u32 } else { u32::MAX }).collect())
}

fn spans(device: Device, pairs: impl Iterator<Item = (u32, u32)>) -> Spans {
    let (lo, hi) = pairs.unzip();
    Spans { lo: Tensor::from_u32(device, lo), hi: Tensor::from_u32(device, hi) }
}

impl<'m> Reach<'m> {
    /// For the live rows of `plan`; `sequence` are the ranks that share the rows.
    pub(super) fn new(
        plan: &Plan,
        shape: AttentionShape,
        sequence: Option<&'m Sequence>,
        device: Device,
    ) -> Self {
        let Some(Sequence { ranks, exchange }) = sequence else {
            return Self { shape, how: How::Here(plan.spans(device)) };
        };
        let slice = &plan.slice;
        let base = filled(device, slice.n_keys, slice.each);
        let how = match exchange {
            Exchange::Heads => Self::by_heads(plan, slice, ranks, base, device),
            Exchange::Ring => {
                let of = |keys: &Pieces| spans(device, plan.sight().map(|seen| within(&seen, keys)));
                How::Ring { ranks, spans: slice.keys.iter().map(of).collect(), base }
            }
            Exchange::Gather => {
                How::Gather { ranks, spans: plan.spans(device), base, places: slice.places_of_keys(device) }
            }
        };
        Self { shape, how }
    }

    fn by_heads(
        plan: &Plan,
        slice: &Slice,
        ranks: &'m Arc<dyn Group>,
        base: Tensor,
        device: Device,
    ) -> How<'m> {
        let (n, most) = (plan.live.len(), slice.sights.iter().map(Vec::len).max().unwrap_or(0));
        // Token p is key p of all: only the last rank's keys are filled up. Rows that fill up have no gradient; they see
        // what the last one saw, because bounds must never decrease.
        let mut last = (0, 0);
        let rows = slice.sights.iter().flat_map(|sight| (0..most).map(|r| sight.get(r)));
        let all: Vec<(u32, u32)> = rows
            .map(|keys| {
                last = keys.filter(|keys| !keys.is_empty()).map_or(last, |keys| (keys.start, keys.end));
                last
            })
            .collect();
        let own = Tensor::from_u32(device, (0..n as u32).collect());
        How::Heads { ranks, spans: spans(device, all.into_iter()), fill: filled(device, n, most), own, base }
    }

    /// Keys, then values of all rows of this rank, as attention takes them.
    pub(super) fn base(&self, tape: &Tape<'_>, packed: &Var) -> Result<KeyValue> {
        Ok(match &self.how {
            How::Here(_) => KeyValue::packed(packed, 0, self.shape),
            How::Heads { ranks, base, .. } => self.exchanged(tape, packed, 0, base, ranks)?,
            How::Ring { base, .. } => KeyValue::packed(&tape.gather_rows(packed, base)?, 0, self.shape),
            How::Gather { ranks, base, places, .. } => {
                let all = tape.gather_ranks(&tape.gather_rows(packed, base)?, ranks)?;
                KeyValue::packed(&tape.gather_rows(&all, places)?, 0, self.shape)
            }
        })
    }

    /// This step's own keys and values, columns of `packed` from `first` on, for the steps after it.
    pub(super) fn extra(&self, tape: &Tape<'_>, packed: &Var, first: usize) -> Result<KeyValue> {
        Ok(match &self.how {
            How::Here(_) | How::Ring { .. } | How::Gather { .. } => {
                KeyValue::packed(packed, first, self.shape)
            }
            How::Heads { ranks, fill, .. } => self.exchanged(tape, packed, first, fill, ranks)?,
        })
    }

    /// Keys and values, from column `first` on, of all rows with some heads.
    fn exchanged(
        &self,
        tape: &Tape<'_>,
        packed: &Var,
        first: usize,
        fill: &Tensor,
        ranks: &Arc<dyn Group>,
    ) -> Result<KeyValue> {
        let width = self.shape.n_kv_heads * self.shape.head_dim;
        let part = |first: usize| -> Result<Var> {
            let own = tape.gather_rows(&tape.columns(packed, first..first + width)?, fill)?;
            Ok(tape.rows_to_heads(&own, ranks)?)
        };
        Ok(KeyValue::new(&part(first)?, &part(first + width)?))
    }

    /// The attention of queries, the first columns of `packed`.
    pub(super) fn attention(
        &self,
        tape: &Tape<'_>,
        packed: &Var,
        base: &KeyValue,
        extras: &Extras,
    ) -> Result<Var> {
        let shape = self.shape;
        match &self.how {
            How::Here(spans) | How::Gather { spans, .. } => {
                let query = Part::new(packed, 0);
                Ok(tape.attention(&Attention { shape, query, base, spans, extras })?)
            }
            How::Heads { ranks, spans, fill, own, .. } => {
                let n = ranks.size();
                let q = tape.columns(packed, 0..shape.n_heads * shape.head_dim)?;
                let q = tape.rows_to_heads(&tape.gather_rows(&q, fill)?, ranks)?;
                let (n_heads, n_kv_heads) = (shape.n_heads / n, shape.n_kv_heads / n);
                let (shape, query) = (AttentionShape { n_heads, n_kv_heads, ..shape }, Part::new(&q, 0));
                let a = tape.attention(&Attention { shape, query, base, spans, extras })?;
                Ok(tape.gather_rows(&tape.heads_to_rows(&a, ranks)?, own)?)
            }
            How::Ring { ranks, spans, .. } => {
                let (query, base) = (Part::new(packed, 0), &base.key.of);
                Ok(tape.attention_ring(&RingAttention { shape, query, base, spans, extras, ranks })?)
            }
        }
    }
}

/// The keys `seen` as far as they are among those of one rank, by their places there, where they are in one piece; those of
/// rows in order never decrease, also where they are none.
fn within(seen: &Range<u32>, keys: &Pieces) -> (u32, u32) {
    let place = |key: u32| keys.before(key as usize) as u32;
    (place(seen.start), place(seen.end))
}
