//! One forward pass: where its rows sit, and what each of them may see. Layers ask it for positions and attention,
//! and need not know whether documents are packed or a cache is extended.

use std::fmt::Debug;
use std::ops::Range;

use specforge_tensor::{Attention, AttentionShape, KeyValue, Spans, Tape, Tensor, Var};

use crate::cache::{KvCache, Tree};
use crate::rotary::Rotary;
use crate::{Result, TargetInfo};

/// One decoder layer.
pub(crate) trait Layer: Debug + Send + Sync {
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
    shape: AttentionShape,
    rotary: Rotary,
    sight: Sight<'t>,
}

impl<'t, 'p> Pass<'t, 'p> {
    pub(crate) fn new(info: &TargetInfo, tape: &'t Tape<'p>, rotary: Rotary, sight: Sight<'t>) -> Self {
        let (eps, shape) = (info.rms_norm_eps as f32, info.attention_shape());
        Self { tape, eps, layer: 0, shape, rotary, sight }
    }

    /// Heads turned by their rows' positions; x `[R, heads · head_dim]`.
    pub(crate) fn rope(&self, x: &Var) -> Result<Var> {
        let Rotary { cos, sin, rows } = &self.rotary;
        Ok(self.tape.rope(x, self.shape.head_dim, (cos, sin), rows)?)
    }

    /// Attention of queries `[R, N·D]` to keys and values `[R, G·D]` of the pass and of the cache. With a window a
    /// query sees that many keys, itself included.
    pub(crate) fn attention(&mut self, q: &Var, k: &Var, v: &Var, window: Option<usize>) -> Result<Var> {
        let (tape, shape, device) = (self.tape, self.shape, q.value().device());
        let new = KeyValue { key: k.clone(), value: v.clone() };
        let attend = |base: &KeyValue, spans: Vec<(u32, u32)>, extras: &[(KeyValue, Option<Tensor>)]| {
            let (lo, hi) = spans.into_iter().unzip();
            let spans = Spans { lo: Tensor::from_u32(device, lo), hi: Tensor::from_u32(device, hi) };
            Ok(tape.attention(&Attention { shape, query: q, base, spans: &spans, extras })?)
        };
        let (cache, first, tree) = match &mut self.sight {
            Sight::Documents(bounds) => return attend(&new, document_spans(bounds, window), &[]),
            Sight::Cached { cache, first, tree } => (cache, *first, *tree),
        };
        cache.append(self.layer, [k.value(), v.value()])?;
        let [key, value] = cache.layer(self.layer).map(|rows| tape.input(rows));
        let base = KeyValue { key, value };
        match tree {
            None => attend(&base, continuation_spans(first, q.rows_cols().0, window), &[]),
            Some(tree) => {
                let ancestors = tree.ancestors(window).into_iter();
                let extras: Vec<_> =
                    ancestors.map(|rows| (new.clone(), Some(Tensor::from_u32(device, rows)))).collect();
                attend(&base, tree.spans(first, window), &extras)
            }
        }
    }
}

/// The first key in a window that ends with key `last`.
pub(crate) fn window_start(last: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (last + 1).saturating_sub(window))
}

fn document_spans(bounds: &[Range<usize>], window: Option<usize>) -> Vec<(u32, u32)> {
    let rows = bounds.iter().flat_map(|document| document.clone().map(|row| (document.start, row)));
    rows.map(|(start, row)| (start.max(window_start(row, window)) as u32, row as u32 + 1)).collect()
}

fn continuation_spans(first: usize, n: usize, window: Option<usize>) -> Vec<(u32, u32)> {
    (first..first + n).map(|row| (window_start(row, window) as u32, row as u32 + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_see_their_document_and_window() {
        let spans = document_spans(&[0..3, 3..5], None);
        assert_eq!(spans, [(0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]);
        assert_eq!(document_spans(&[0..3, 3..5], Some(2)), [(0, 1), (0, 2), (1, 3), (3, 4), (3, 5)]);
        assert_eq!(continuation_spans(3, 2, None), [(0, 4), (0, 5)]);
        assert_eq!(continuation_spans(3, 2, Some(2)), [(2, 4), (3, 5)]);
    }
}
