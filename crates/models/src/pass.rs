//! One forward pass: where its rows sit, and what each of them may see. Layers ask it for positions and attention,
//! and need not know whether documents are packed or a cache is extended.

use std::fmt::Debug;
use std::ops::Range;

use specforge_tensor::{Attention, AttentionShape, KeyValue, ParamId, Part, Rope, Spans, Tape, Tensor, Var};

use crate::cache::{KvCache, Tree};
use crate::frame::Frame;
use crate::reach::Reach;
use crate::rotary::{Rotary, Sequence};
use crate::{Result, TargetInfo};

/// One decoder layer.
pub(crate) trait Layer: Debug + Send + Sync {
    /// The widths of what is cached of a row; `kv` is that of keys, and of values.
    fn cached(&self, kv: usize) -> Vec<usize> {
        vec![kv; 2]
    }

    /// The residual stream after the layer, from that before it; both `[R, H]`.
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var>;
}

/// The decoder layers of a target, from the first to the last.
pub(crate) type Layers = Vec<Box<dyn Layer>>;

/// What the rows of a pass may see.
#[derive(Debug)]
pub(crate) enum Sight<'a> {
    /// Each row what comes before it in its document.
    Documents(&'a [Range<usize>]),
    /// The cached rows, and what comes before among the new ones, which are appended.
    Cached {
        cache: &'a mut KvCache,
        /// Rows cached before the pass.
        first: usize,
        /// Absent: the new rows are a continuation.
        tree: Option<&'a Tree>,
    },
}

/// A forward pass in progress.
#[derive(Debug)]
pub(crate) struct Pass<'t, 'p> {
    /// What computes.
    pub tape: &'t Tape<'p>,
    /// Epsilon of the norms.
    pub eps: f32,
    /// The layer that runs, which is that of the cache.
    pub layer: usize,
    /// The position of each row.
    pub positions: Vec<u32>,
    shape: AttentionShape,
    cap: Option<f32>,
    rotary: Rotary,
    /// Of layers with a rotary embedding of their own.
    local: Option<Rotary>,
    pub sight: Sight<'t>,
}

impl<'t, 'p> Pass<'t, 'p> {
    pub(crate) fn new(
        info: &TargetInfo,
        frame: &Frame,
        tape: &'t Tape<'p>,
        (rotary, local): (Rotary, Option<Rotary>),
        sequences: &[Sequence],
        sight: Sight<'t>,
    ) -> Self {
        let (eps, shape) = (info.rms_norm_eps as f32, info.attention_shape(frame.attention_scale));
        let positions = sequences.iter().flat_map(|s| s.positions.iter().copied()).collect();
        Self { tape, eps, layer: 0, positions, shape, cap: frame.attention_cap, rotary, local, sight }
    }

    /// Heads turned by their rows' positions; x `[R, heads · head_dim]`.
    pub(crate) fn rope(&self, x: &Var) -> Result<Var> {
        self.turn(x, x.rows_cols().1 / self.shape.head_dim, &self.rotary)
    }

    /// As [`Pass::rope`], by the frequencies of the layers that have some of their own.
    pub(crate) fn rope_local(&self, x: &Var) -> Result<Var> {
        self.turn(x, x.rows_cols().1 / self.shape.head_dim, self.local.as_ref().unwrap_or(&self.rotary))
    }

    /// As [`Pass::rope`], of queries, keys and values side by side: the values stay.
    pub(crate) fn rope_packed(&self, qkv: &Var) -> Result<Var> {
        self.turn(qkv, self.shape.n_heads + self.shape.n_kv_heads, &self.rotary)
    }

    fn turn(&self, x: &Var, n_heads: usize, rotary: &Rotary) -> Result<Var> {
        let Rotary { cos, sin, rows } = rotary;
        let (cos, sin, positions) = (cos.clone(), sin.clone(), rows.clone());
        Ok(self.tape.rope(x, &Rope { n_heads, head_dim: self.shape.head_dim, cos, sin, positions })?)
    }

    /// As [`Pass::attention`], of queries, keys and values side by side.
    pub(crate) fn attention_packed(&mut self, qkv: &Var, reach: impl Into<Reach>) -> Result<Var> {
        self.attention_packed_with(qkv, reach, None)
    }

    /// As [`Pass::attention_packed`], with sinks (float32, a logit per query head) where there are some.
    pub(crate) fn attention_packed_with(
        &mut self,
        qkv: &Var,
        reach: impl Into<Reach>,
        sinks: Option<ParamId>,
    ) -> Result<Var> {
        let first_key = self.shape.n_heads * self.shape.head_dim;
        let kv = KeyValue::packed(qkv, first_key, self.shape);
        self.attention_with(&Part::new(qkv, 0), &kv, reach.into(), sinks)
    }

    /// Attention of queries `[R, N·D]` to keys and values `[R, G·D]` of the pass and of the cache, as far back as the
    /// layer sees.
    pub(crate) fn attention(&mut self, query: &Part, new: &KeyValue, reach: impl Into<Reach>) -> Result<Var> {
        self.attention_with(query, new, reach.into(), None)
    }

    fn attention_with(
        &mut self,
        query: &Part,
        new: &KeyValue,
        reach: Reach,
        sinks: Option<ParamId>,
    ) -> Result<Var> {
        let (tape, shape, device, cap) = (self.tape, self.shape, query.of.value().device(), self.cap);
        let n = query.of.rows_cols().0;
        let attend = |base: &KeyValue, spans: Vec<(u32, u32)>, extras: &[(KeyValue, Option<Tensor>)]| {
            let (lo, hi) = spans.into_iter().unzip();
            let spans = Spans { lo: Tensor::from_u32(device, lo), hi: Tensor::from_u32(device, hi) };
            let attention = Attention { shape, query: query.clone(), base, spans: &spans, extras };
            Ok(match (cap, sinks) {
                (Some(cap), _) => tape.attention_capped(&attention, cap)?,
                (None, Some(sinks)) => tape.attention_with_sinks(&attention, sinks)?,
                (None, None) => tape.attention(&attention)?,
            })
        };
        let (cache, first, tree) = match &mut self.sight {
            Sight::Documents(bounds) => return attend(new, document_spans(bounds, reach), &[]),
            Sight::Cached { cache, first, tree } => (cache, *first, *tree),
        };
        let width = shape.n_kv_heads * shape.head_dim;
        let rows = |part: &Part| tape.columns(&part.of, part.first..part.first + width);
        cache.append(self.layer, &[rows(&new.key)?.value(), rows(&new.value)?.value()])?;
        let cached: Vec<Var> = cache.layer(self.layer).into_iter().map(|rows| tape.input(rows)).collect();
        let base = KeyValue::new(&cached[0], &cached[1]);
        drop(cached);
        match tree {
            None => attend(&base, continuation_spans(first, n, reach), &[]),
            Some(tree) => {
                let ancestors = tree.ancestors(first, reach).into_iter();
                let extras: Vec<_> =
                    ancestors.map(|rows| (new.clone(), Some(Tensor::from_u32(device, rows)))).collect();
                attend(&base, tree.spans(first, reach), &extras)
            }
        }
    }
}

/// Names and widths of the projections to queries and to keys and values, for [`Loader::stacked`].
///
/// [`Loader::stacked`]: crate::loader::Loader::stacked
pub(crate) fn qkv(q: usize, kv: usize) -> [(&'static str, usize); 3] {
    [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)]
}

fn document_spans(bounds: &[Range<usize>], reach: Reach) -> Vec<(u32, u32)> {
    let rows = bounds.iter().flat_map(|document| document.clone().map(|row| (document.start, row)));
    rows.map(|(start, row)| ((start + reach.start(row - start)) as u32, row as u32 + 1)).collect()
}

fn continuation_spans(first: usize, n: usize, reach: Reach) -> Vec<(u32, u32)> {
    (first..first + n).map(|row| (reach.start(row) as u32, row as u32 + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_see_their_document_and_window() {
        let spans = document_spans(&[0..3, 3..5], Reach::All);
        assert_eq!(spans, [(0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]);
        assert_eq!(document_spans(&[0..3, 3..5], Reach::Window(2)), [(0, 1), (0, 2), (1, 3), (3, 4), (3, 5)]);
        assert_eq!(document_spans(&[0..3, 3..5], Reach::Chunk(2)), [(0, 1), (0, 2), (2, 3), (3, 4), (3, 5)]);
        assert_eq!(continuation_spans(3, 2, Reach::All), [(0, 4), (0, 5)]);
        assert_eq!(continuation_spans(3, 2, Reach::Window(2)), [(2, 4), (3, 5)]);
    }
}
