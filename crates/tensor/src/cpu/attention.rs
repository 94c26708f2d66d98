//! Attention forward. Queries go in blocks whose keys overlap; a block's scores exist only while it is computed.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Mat, gemm_into};
use super::simd::{axpy, dot, exp_sum, max, scale};
use super::{rows, tensor, u32s};
use crate::Tensor;
use crate::kernels::{AttentionInputs, AttentionShape, Columns, Extra};

/// Queries per block.
const BLOCK: usize = 32;

/// Consecutive queries and the union of their key ranges.
#[derive(Debug, Clone)]
pub(super) struct Block {
    pub rows: Range<usize>,
    pub keys: Range<usize>,
}

/// Everything one attention reads, as slices.
pub(super) struct View<'a> {
    pub shape: AttentionShape,
    pub q: Cow<'a, [f32]>,
    pub k: Cow<'a, [f32]>,
    pub v: Cow<'a, [f32]>,
    pub lo: &'a [u32],
    pub hi: &'a [u32],
    pub extras: Vec<ExtraView<'a>>,
    /// Per query head, a logit without a value.
    pub sinks: Option<Cow<'a, [f32]>>,
    cap: Option<f32>,
}

/// One extra key per query, as slices.
pub(super) struct ExtraView<'a> {
    pub key: Cow<'a, [f32]>,
    pub value: Cow<'a, [f32]>,
    index: Option<&'a [u32]>,
}

impl ExtraView<'_> {
    /// The key row of query r, if it has one.
    pub(super) fn row(&self, r: usize) -> Option<usize> {
        self.index.map_or(Some(r), |index| (index[r] != u32::MAX).then_some(index[r] as usize))
    }
}

/// The elements of some columns: borrowed where they are all there are.
fn part<'a>(columns: &Columns<'a>, width: usize) -> Cow<'a, [f32]> {
    if columns.of.rows_cols().1 == width {
        return columns.of.f32s();
    }
    Cow::Owned(rows::columns(columns.of, columns.first..columns.first + width).to_f32())
}

impl<'a> View<'a> {
    pub(super) fn new(inputs: &AttentionInputs<'a>) -> Self {
        let (shape, [q, k, v]) = (inputs.shape, inputs.qkv);
        let (width, kv) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
        let extra = |e: &Extra<'a>| ExtraView {
            key: part(&e.key, kv),
            value: part(&e.value, kv),
            index: e.index.map(u32s),
        };
        Self {
            shape,
            q: part(&q, width),
            k: part(&k, kv),
            v: part(&v, kv),
            lo: u32s(&inputs.spans.lo),
            hi: u32s(&inputs.spans.hi),
            extras: inputs.extras.iter().map(extra).collect(),
            sinks: inputs.sinks.map(Tensor::f32s),
            cap: inputs.cap,
        }
    }

    /// Row widths of queries and of keys.
    pub(super) fn widths(&self) -> (usize, usize) {
        (self.shape.n_heads * self.shape.head_dim, self.shape.n_kv_heads * self.shape.head_dim)
    }

    /// The elements of key head `h` of row `r` in a key-shaped tensor.
    pub(super) fn kv_head<'b>(&self, data: &'b [f32], r: usize, h: usize) -> &'b [f32] {
        let (_, kv) = self.widths();
        &data[r * kv + h * self.shape.head_dim..][..self.shape.head_dim]
    }

    /// The base keys (or values) of a block and key head, as a matrix.
    pub(super) fn keys<'b>(&self, data: &'b [f32], keys: &Range<usize>, h: usize) -> Mat<'b> {
        let (d, (_, kv)) = (self.shape.head_dim, self.widths());
        Mat::new(&data[(keys.start * kv + h * d).min(data.len())..], keys.len(), d, kv)
    }

    /// The rows of a block and query head of a query-shaped tensor, as a matrix.
    pub(super) fn queries<'b>(&self, data: &'b [f32], rows: &Range<usize>, head: usize) -> Mat<'b> {
        let (d, (width, _)) = (self.shape.head_dim, self.widths());
        Mat::new(&data[rows.start * width + head * d..], rows.len(), d, width)
    }

    /// Query `r`'s visible keys, relative to the block's.
    pub(super) fn visible(&self, block: &Block, r: usize) -> Range<usize> {
        let start = self.lo[r] as usize;
        start - block.keys.start..(self.hi[r] as usize).max(start) - block.keys.start
    }

    /// Blocks of at most [`BLOCK`] queries, broken where the next query shares no key with the block.
    pub(super) fn blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = Vec::new();
        for r in 0..self.lo.len() {
            let (lo, hi) = (self.lo[r] as usize, self.hi[r].max(self.lo[r]) as usize);
            match blocks.last_mut() {
                Some(b) if b.rows.len() < BLOCK && lo < b.keys.end && lo >= b.keys.start => {
                    b.rows.end = r + 1;
                    b.keys.end = b.keys.end.max(hi);
                }
                _ => blocks.push(Block { rows: r..r + 1, keys: lo..hi }),
            }
        }
        blocks
    }

    /// Raw scaled scores of a block and query head: `[rows, keys + extras]`, base keys first, in rows of that
    /// width. Scores of keys a query does not see are meaningless.
    pub(super) fn scores(&self, block: &Block, head: usize) -> Vec<f32> {
        let (s, width) = (self.shape, block.keys.len() + self.extras.len());
        let h = head / (s.n_heads / s.n_kv_heads);
        let mut scores = vec![f32::NEG_INFINITY; block.rows.len() * width];
        let q = self.queries(&self.q, &block.rows, head);
        gemm_into(&mut scores, width, q, self.keys(&self.k, &block.keys, h).t(), s.scale, false);
        for (e, extra) in self.extras.iter().enumerate() {
            for (i, r) in block.rows.clone().enumerate() {
                let Some(row) = extra.row(r) else { continue };
                let q = &self.q[r * self.widths().0 + head * s.head_dim..][..s.head_dim];
                scores[i * width + block.keys.len() + e] = s.scale * dot(q, self.kv_head(&extra.key, row, h));
            }
        }
        if let Some(cap) = self.cap {
            // Negative infinity stands for no key.
            let there = scores.iter_mut().filter(|s| **s != f32::NEG_INFINITY);
            there.for_each(|s| *s = cap * (*s / cap).tanh());
        }
        scores
    }
}

pub(super) fn forward(inputs: &AttentionInputs<'_>) -> (Tensor, Tensor) {
    let view = View::new(inputs);
    let (shape, rows, d) = (view.shape, view.lo.len(), view.shape.head_dim);
    let tasks: Vec<(Block, usize)> =
        view.blocks().into_iter().flat_map(|b| (0..shape.n_heads).map(move |h| (b.clone(), h))).collect();
    let run = |(block, head): &(Block, usize)| head_forward(&view, block, *head);
    let work = rows * inputs.qkv[1].of.rows_cols().0 * d * shape.n_heads;
    let parts: Vec<_> =
        if work < 1 << 16 { tasks.iter().map(run).collect() } else { tasks.par_iter().map(run).collect() };
    let (mut out, mut lse) = (vec![0.0; rows * shape.n_heads * d], vec![0.0; rows * shape.n_heads]);
    for ((block, head), (o, l)) in tasks.iter().zip(parts) {
        for (i, r) in block.rows.clone().enumerate() {
            out[(r * shape.n_heads + head) * d..][..d].copy_from_slice(&o[i * d..][..d]);
            lse[r * shape.n_heads + head] = l[i];
        }
    }
    (tensor(out, &[rows, shape.n_heads * d]), tensor(lse, &[rows, shape.n_heads]))
}

/// Output `[rows, head_dim]` and log-sum-exp of one block and query head.
fn head_forward(view: &View<'_>, block: &Block, head: usize) -> (Vec<f32>, Vec<f32>) {
    let (d, n_keys) = (view.shape.head_dim, block.keys.len());
    let (width, h) = (n_keys + view.extras.len(), head / (view.shape.n_heads / view.shape.n_kv_heads));
    let mut p = view.scores(block, head);
    let lse = block.rows.clone().zip(p.chunks_exact_mut(width.max(1)));
    let sink = view.sinks.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
    let lse: Vec<f32> = lse.map(|(r, row)| softmax(row, view.visible(block, r), n_keys, sink)).collect();
    if width == 0 {
        return (vec![0.0; block.rows.len() * d], vec![sink; block.rows.len()]);
    }
    let mut out = vec![0.0; block.rows.len() * d];
    gemm_into(
        &mut out,
        d,
        Mat::new(&p, block.rows.len(), n_keys, width),
        view.keys(&view.v, &block.keys, h),
        1.0,
        false,
    );
    for (e, extra) in view.extras.iter().enumerate() {
        for (i, r) in block.rows.clone().enumerate() {
            if let Some(row) = extra.row(r) {
                axpy(&mut out[i * d..][..d], p[i * width + n_keys + e], view.kv_head(&extra.value, row, h));
            }
        }
    }
    (out, lse)
}

/// Softmax in place over the visible base keys, all extras and the sink; other entries become zero. Returns the
/// log-sum-exp.
fn softmax(row: &mut [f32], visible: Range<usize>, n_keys: usize, sink: f32) -> f32 {
    let (base, extras) = row.split_at_mut(n_keys);
    base[..visible.start].fill(0.0);
    base[visible.end..].fill(0.0);
    let base = &mut base[visible];
    let top = max(base).max(max(extras)).max(sink);
    if top == f32::NEG_INFINITY {
        base.fill(0.0);
        extras.fill(0.0);
        return top;
    }
    let mut sum = exp_sum(base, top);
    for e in extras.iter_mut() {
        *e = if *e == f32::NEG_INFINITY { 0.0 } else { (*e - top).exp() };
        sum += *e;
    }
    sum += (sink - top).exp();
    scale(base, 1.0 / sum);
    scale(extras, 1.0 / sum);
    top + sum.ln()
}

/// Two attentions of the same queries as one, each weighed by its share of the sum of exponentials.
pub(super) fn merge(a: &(Tensor, Tensor), b: &(Tensor, Tensor)) -> (Tensor, Tensor) {
    let (lse_a, lse_b) = (a.1.f32s(), b.1.f32s());
    let sums: Vec<f64> = lse_a.iter().zip(lse_b.iter()).map(|(a, b)| log_sum(*a, *b)).collect();
    let lse: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
    let (mut out, more, dim) = (a.0.to_f32(), b.0.f32s(), a.0.len() / lse.len().max(1));
    let heads = out.par_chunks_mut(dim.max(1)).zip(more.par_chunks(dim.max(1))).enumerate();
    heads.for_each(|(i, (out, more))| {
        let share =
            |of: f32| if of == f32::NEG_INFINITY { 0.0 } else { (f64::from(of) - sums[i]).exp() as f32 };
        let (own, other) = (share(lse_a[i]), share(lse_b[i]));
        out.iter_mut().zip(more).for_each(|(o, m)| *o = own * *o + other * m);
    });
    (tensor(out, a.0.shape()), tensor(lse, a.1.shape()))
}

/// `ln(e^a + e^b)`; in float64, so that the shares of both add up to one.
fn log_sum(a: f32, b: f32) -> f64 {
    let (a, b) = (f64::from(a), f64::from(b));
    let most = a.max(b);
    if most == f64::NEG_INFINITY { most } else { most + ((a - most).exp() + (b - most).exp()).ln() }
}
