//! Attention over rows that ranks share: heads for rows and back (Ulysses; Jacobs et al., 2023), key blocks that pass
//! around a ring (Liu et al., 2023), and rows that come to all (Grattafiori et al., 2024).

use std::sync::Arc;

use super::attention::{Saved, expect_ordered, forward_parts};
use super::{KeyValue, Part, expect_shape};
use crate::kernels::{AttentionInputs, AttentionShape, Columns, Spans};
use crate::tape::{Backward, Sink, Slot};
use crate::{DType, Error, Group, Result, Tape, Tensor, Var};

type Ranks = Arc<dyn Group>;

/// An attention whose base keys are spread over ranks.
#[derive(Debug)]
pub struct RingAttention<'a> {
    /// Heads and scale.
    pub shape: AttentionShape,
    /// This rank's queries, R rows of `n_heads * head_dim` columns, after RoPE.
    pub query: Part,
    /// This rank's base keys, then values, `[n, 2 · n_kv_heads · head_dim]`; all ranks have as many rows.
    pub base: &'a Var,
    /// The keys that each query sees of every rank's base.
    pub spans: &'a [Spans],
    /// One further key per query and entry, as [`super::Attention`] has them; all of this rank.
    pub extras: &'a [(KeyValue, Option<Tensor>)],
    /// The ranks.
    pub ranks: &'a Ranks,
}

struct HeadsForRows {
    x: Slot,
    ranks: Ranks,
    back: bool,
}

struct GatherRanks {
    x: Slot,
    dtype: DType,
    ranks: Ranks,
}

struct Ring {
    saved: Saved,
    base: Var,
    spans: Vec<Spans>,
    ranks: Ranks,
}

impl Tape<'_> {
    /// Rows of this rank with all heads for the rows of all ranks with some heads: x `[R, W]` of every rank to
    /// `[size · R, W / size]`, the rows of rank 0 first. All ranks have as many rows.
    pub fn rows_to_heads(&self, x: &Var, ranks: &Ranks) -> Result<Var> {
        let y = rows_to_heads(x.value(), ranks)?;
        let node = || Box::new(HeadsForRows { x: x.into(), ranks: ranks.clone(), back: false });
        Ok(self.record(y, self.any_needed(&[x]), || node()))
    }

    /// The inverse of [`Tape::rows_to_heads`]: x `[size · R, W]` of every rank to `[R, size · W]`.
    pub fn heads_to_rows(&self, x: &Var, ranks: &Ranks) -> Result<Var> {
        let y = heads_to_rows(x.value(), ranks)?;
        let node = || Box::new(HeadsForRows { x: x.into(), ranks: ranks.clone(), back: true });
        Ok(self.record(y, self.any_needed(&[x]), || node()))
    }

    /// The rows x `[R, W]` of all ranks, `[size · R, W]`, those of rank 0 first; in the backward every rank's gradients of a
    /// row are added up in float32 where it came from. All ranks have as many rows.
    pub fn gather_ranks(&self, x: &Var, ranks: &Ranks) -> Result<Var> {
        let (y, dtype) = (ranks.all_gather(x.value())?, x.value().dtype());
        let node = || Box::new(GatherRanks { x: x.into(), dtype, ranks: ranks.clone() });
        Ok(self.record(y, self.any_needed(&[x]), || node()))
    }

    /// As [`Tape::attention`], with the base keys of all ranks: the blocks pass around, the partial results are merged by
    /// their log-sum-exp, and in the backward the gradients of a block travel with it until it is home.
    pub fn attention_ring(&self, a: &RingAttention<'_>) -> Result<Var> {
        let width = a.shape.n_kv_heads * a.shape.head_dim;
        let n = a.base.rows_cols().0;
        expect_shape("attention_ring", "base", a.base.value(), &[n, 2 * width])?;
        if a.spans.len() != a.ranks.size() {
            let (op, what) = ("attention_ring", "spans");
            return Err(Error::shape(op, what, format!("{} ranks", a.ranks.size()), &[a.spans.len()]));
        }
        let is_needed = self.any_needed(&[&a.query.of, a.base])
            || a.extras.iter().any(|(kv, _)| self.any_needed(&[&kv.key.of, &kv.value.of]));
        if is_needed {
            a.spans.iter().try_for_each(expect_ordered)?;
        }
        let (out, lse) = forward(a)?;
        Ok(self.record(out.clone(), is_needed, || {
            let base = KeyValue::packed(a.base, 0, a.shape);
            let saved = Saved {
                shape: a.shape,
                query: a.query.clone(),
                base,
                spans: a.spans[a.ranks.rank()].clone(),
                extras: a.extras.to_vec(),
                out,
                lse,
            };
            let (base, spans, ranks) = (a.base.clone(), a.spans.to_vec(), a.ranks.clone());
            Box::new(Ring { saved, base, spans, ranks })
        }))
    }
}

fn rows_to_heads(x: &Tensor, ranks: &Ranks) -> Result<Tensor> {
    let (kernels, size, (_, width)) = (x.device().kernels(), ranks.size(), x.rows_cols());
    if !width.is_multiple_of(size) {
        return Err(Error::shape("rows_to_heads", "x", format!("[R, a multiple of {size}]"), x.shape()));
    }
    let part = width / size;
    let mut pieces = kernels.columns(x, 0..part)?;
    for i in 1..size {
        pieces.append_rows(&kernels.columns(x, i * part..(i + 1) * part)?)?;
    }
    ranks.all_to_all(&pieces)
}

fn heads_to_rows(x: &Tensor, ranks: &Ranks) -> Result<Tensor> {
    let (size, (rows, width)) = (ranks.size(), x.rows_cols());
    if !rows.is_multiple_of(size) {
        return Err(Error::shape("heads_to_rows", "x", format!("[a multiple of {size}, W]"), x.shape()));
    }
    let (pieces, n) = (ranks.all_to_all(x)?, rows / size);
    let mut y = x.zeros_like(&[n, size * width])?;
    for i in 0..size {
        let part = pieces.rows(i * n..(i + 1) * n)?;
        x.device().kernels().add_columns(&mut y, i * width..(i + 1) * width, &part)?;
    }
    Ok(y)
}

/// The rank whose block is here after so many hops; each hop sends a block to the next rank.
fn owner(ranks: &Ranks, hop: usize) -> usize {
    (ranks.rank() + ranks.size() - hop) % ranks.size()
}

/// What the rank before this one has, for what this one has.
fn pass_on(x: &Tensor, ranks: &Ranks) -> Result<Tensor> {
    let (rank, size) = (ranks.rank(), ranks.size());
    ranks.exchange(x, (rank + 1) % size, (rank + size - 1) % size)
}

/// Whether no query sees a key.
fn is_blind(spans: &Spans) -> bool {
    let known = spans.lo.u32s().zip(spans.hi.u32s());
    known.is_some_and(|(lo, hi)| lo.iter().zip(hi).all(|(lo, hi)| lo >= hi))
}

/// Output and log-sum-exp over all blocks.
fn forward(a: &RingAttention<'_>) -> Result<(Tensor, Tensor)> {
    let (mut block, mut all) = (a.base.value().clone(), None);
    for hop in 0..a.ranks.size() {
        let spans = &a.spans[owner(a.ranks, hop)];
        if hop == 0 || !is_blind(spans) {
            let extras = if hop == 0 { a.extras } else { &[] };
            let part = forward_parts(a.shape, &a.query, &block, spans, extras)?;
            all = Some(match all {
                None => part,
                Some(so_far) => block.device().kernels().merge_attention(&so_far, &part)?,
            });
        }
        if hop + 1 < a.ranks.size() {
            block = pass_on(&block, a.ranks)?;
        }
    }
    all.ok_or_else(|| Error::shape("attention_ring", "ranks", "at least one", &[0]))
}

impl Backward for HeadsForRows {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let d = if self.back { rows_to_heads(&dy, &self.ranks)? } else { heads_to_rows(&dy, &self.ranks)? };
        sink.add(self.x, d)
    }
}

impl Backward for GatherRanks {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let dx = self.ranks.reduce_scatter(&dy.cast(DType::F32)?)?;
        sink.add(self.x, dx.cast(self.dtype)?)
    }
}

impl Backward for Ring {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let Self { saved, base, spans, ranks } = *self;
        let kernels = dy.device().kernels();
        let width = saved.shape.n_kv_heads * saved.shape.head_dim;
        let mut block = base.value().clone();
        // Sums over ranks: float32.
        let mut d_block = Tensor::zeros(dy.device(), base.value().shape())?;
        for hop in 0..ranks.size() {
            let spans = &spans[owner(&ranks, hop)];
            if hop == 0 || !is_blind(spans) {
                let extras = if hop == 0 { saved.extras() } else { Vec::new() };
                let part = |first| Columns { of: &block, first };
                let qkv = [saved.query.columns(), part(0), part(width)];
                let (shape, sinks, cap) = (saved.shape, None, None);
                let inputs = AttentionInputs { shape, qkv, spans, extras: &extras, sinks, cap };
                let ([dq, dk, dv], d_extras) =
                    kernels.attention_backward(&inputs, [&saved.out, &saved.lse, &dy])?;
                sink.add_columns(&saved.query.of, saved.query.first, dq)?;
                for (first, d) in [(0, dk), (width, dv)] {
                    kernels.add_columns(&mut d_block, first..first + width, &d.cast(DType::F32)?)?;
                }
                saved.add_extras(d_extras, sink)?;
            }
            if hop + 1 < ranks.size() {
                block = pass_on(&block, &ranks)?;
            }
            if ranks.size() > 1 {
                d_block = pass_on(&d_block, &ranks)?;
            }
        }
        sink.add(&base, d_block.cast(base.value().dtype())?)
    }
}
