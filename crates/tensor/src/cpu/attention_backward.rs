//! Attention backward: probabilities are recomputed from the log-sum-exp, block by block.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::attention::{Block, View};
use super::gemm::{Mat, gemm_into};
use super::simd::{axpy, dot, exp_shifted};
use super::tensor;
use crate::Tensor;
use crate::kernels::AttentionInputs;

/// Blocks that share keys and therefore add to the same gradients: one document, as a rule.
struct Segment {
    blocks: Vec<Block>,
    keys: Range<usize>,
}

/// Gradients of one segment and key head, in local rows.
struct Part {
    /// Per block and query head of the group: `[rows, head_dim]`.
    dq: Vec<Vec<f32>>,
    /// `[keys, head_dim]`.
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// Per extra, what each query that has it adds to its key's and value's gradient: `head_dim` elements each, by
    /// block, query head and query.
    extras: Vec<[Vec<f32>; 2]>,
}

/// The saved output, its log-sum-exp, and the gradient that came.
struct Saved<'a> {
    out: Cow<'a, [f32]>,
    lse: Cow<'a, [f32]>,
    dout: Cow<'a, [f32]>,
}

fn segments(blocks: Vec<Block>) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    for block in blocks {
        match segments.last_mut() {
            Some(s) if block.keys.start < s.keys.end && block.keys.start >= s.keys.start => {
                s.keys.end = s.keys.end.max(block.keys.end);
                s.blocks.push(block);
            }
            _ => segments.push(Segment { keys: block.keys.clone(), blocks: vec![block] }),
        }
    }
    segments
}

pub(super) fn backward(
    inputs: &AttentionInputs<'_>,
    [out, lse, dout]: [&Tensor; 3],
) -> ([Tensor; 3], Vec<[Tensor; 2]>) {
    let view = View::new(inputs);
    let shape = view.shape;
    let saved = Saved { out: out.f32s(), lse: lse.f32s(), dout: dout.f32s() };
    let tasks: Vec<(Segment, usize)> = segments(view.blocks())
        .into_iter()
        .flat_map(|s| {
            let copy = move |h| (Segment { blocks: s.blocks.clone(), keys: s.keys.clone() }, h);
            (0..shape.n_kv_heads).map(copy)
        })
        .collect();
    let parts: Vec<Part> = tasks.par_iter().map(|(s, h)| segment_backward(&view, &saved, s, *h)).collect();
    let (width, kv) = view.widths();
    let mut grads = [&view.q, &view.k, &view.v].map(|t| vec![0.0; t.len()]);
    let mut dextras: Vec<[Vec<f32>; 2]> =
        view.extras.iter().map(|e| [vec![0.0; e.key.len()], vec![0.0; e.value.len()]]).collect();
    for ((segment, h), part) in tasks.iter().zip(parts) {
        merge(&view, segment, *h, part, &mut grads, &mut dextras);
    }
    let matrix = |values: Vec<f32>, width: usize| {
        let rows = values.len() / width;
        tensor(values, &[rows, width])
    };
    let [dq, dk, dv] = grads;
    let dextras = dextras.into_iter().map(|pair| pair.map(|d| matrix(d, kv)));
    ([matrix(dq, width), matrix(dk, kv), matrix(dv, kv)], dextras.collect())
}

/// Adds one part to the whole gradients; parts come in a fixed order.
fn merge(
    view: &View<'_>,
    segment: &Segment,
    h: usize,
    part: Part,
    grads: &mut [Vec<f32>; 3],
    dextras: &mut [[Vec<f32>; 2]],
) {
    let (d, (width, kv)) = (view.shape.head_dim, view.widths());
    let group = view.shape.n_heads / view.shape.n_kv_heads;
    let add = |dst: &mut [f32], src: &[f32]| dst.iter_mut().zip(src).for_each(|(d, s)| *d += s);
    for (b, block) in segment.blocks.iter().enumerate() {
        for g in 0..group {
            for (i, r) in block.rows.clone().enumerate() {
                let dst = &mut grads[0][r * width + (h * group + g) * d..][..d];
                add(dst, &part.dq[b * group + g][i * d..][..d]);
            }
        }
    }
    for (i, r) in segment.keys.clone().enumerate() {
        add(&mut grads[1][r * kv + h * d..][..d], &part.dk[i * d..][..d]);
        add(&mut grads[2][r * kv + h * d..][..d], &part.dv[i * d..][..d]);
    }
    for ((extra, dst), [keys, values]) in view.extras.iter().zip(dextras).zip(part.extras) {
        let rows = segment.blocks.iter().flat_map(|block| (0..group).flat_map(|_| block.rows.clone()));
        let rows = rows.filter_map(|r| extra.row(r));
        for ((row, key), value) in rows.zip(keys.chunks_exact(d)).zip(values.chunks_exact(d)) {
            add(&mut dst[0][row * kv + h * d..][..d], key);
            add(&mut dst[1][row * kv + h * d..][..d], value);
        }
    }
}

fn segment_backward(view: &View<'_>, saved: &Saved<'_>, segment: &Segment, h: usize) -> Part {
    let (d, group) = (view.shape.head_dim, view.shape.n_heads / view.shape.n_kv_heads);
    let n = segment.keys.len() * d;
    let mut part = Part {
        dq: Vec::new(),
        dk: vec![0.0; n],
        dv: vec![0.0; n],
        extras: view.extras.iter().map(|_| [Vec::new(), Vec::new()]).collect(),
    };
    for block in &segment.blocks {
        for head in h * group..(h + 1) * group {
            let first_key = block.keys.start - segment.keys.start;
            head_backward(view, saved, block, head, first_key, &mut part);
        }
    }
    part
}

/// One block and query head. With P the probabilities and D = Σ dO·O per row:
/// `dV += Pᵀ dO`, `dS = P (dO Vᵀ - D) scale`, `dQ = dS K`, `dK += dSᵀ Q`.
fn head_backward(
    view: &View<'_>,
    saved: &Saved<'_>,
    block: &Block,
    head: usize,
    first_key: usize,
    part: &mut Part,
) {
    let s = view.shape;
    let (d, rows, n_keys, h) =
        (s.head_dim, block.rows.len(), block.keys.len(), head / (s.n_heads / s.n_kv_heads));
    let width = n_keys + view.extras.len();
    let row_of = |r: usize| (r * s.n_heads + head) * d;
    let mut p = view.scores(block, head);
    let mut ds = vec![0.0; rows * width];
    let dout = view.queries(&saved.dout, &block.rows, head);
    gemm_into(&mut ds, width, dout, view.keys(&view.v, &block.keys, h).t(), 1.0, false);
    let mut dq = vec![0.0; rows * d];
    for (i, r) in block.rows.clone().enumerate() {
        let (p, ds) = (&mut p[i * width..][..width], &mut ds[i * width..][..width]);
        let (dout, lse) = (&saved.dout[row_of(r)..][..d], saved.lse[r * s.n_heads + head]);
        let delta = dot(dout, &saved.out[row_of(r)..][..d]);
        for (e, extra) in view.extras.iter().enumerate() {
            ds[n_keys + e] = extra.row(r).map_or(0.0, |row| dot(dout, view.kv_head(&extra.value, row, h)));
        }
        probabilities(p, view.visible(block, r), n_keys, lse);
        ds.iter_mut().zip(p.iter()).for_each(|(ds, p)| *ds = p * (*ds - delta) * s.scale);
        let q = &view.q[row_of(r)..][..d];
        for (e, extra) in view.extras.iter().enumerate() {
            let Some(row) = extra.row(r) else { continue };
            axpy(&mut dq[i * d..][..d], ds[n_keys + e], view.kv_head(&extra.key, row, h));
            let [keys, values] = &mut part.extras[e];
            keys.extend(q.iter().map(|v| v * ds[n_keys + e]));
            values.extend(dout.iter().map(|v| v * p[n_keys + e]));
        }
    }
    let (p, ds) = (Mat::new(&p, rows, n_keys, width), Mat::new(&ds, rows, n_keys, width));
    gemm_into(&mut dq, d, ds, view.keys(&view.k, &block.keys, h), 1.0, true);
    gemm_into(&mut part.dk[first_key * d..], d, ds.t(), view.queries(&view.q, &block.rows, head), 1.0, true);
    gemm_into(&mut part.dv[first_key * d..], d, p.t(), dout, 1.0, true);
    part.dq.push(dq);
}

/// Scores to probabilities, given the log-sum-exp; zero where nothing is seen.
fn probabilities(row: &mut [f32], visible: Range<usize>, n_keys: usize, lse: f32) {
    if lse == f32::NEG_INFINITY {
        row.fill(0.0);
        return;
    }
    let (base, extras) = row.split_at_mut(n_keys);
    base[..visible.start].fill(0.0);
    base[visible.end..].fill(0.0);
    exp_shifted(&mut base[visible], lse);
    for e in extras {
        *e = if *e == f32::NEG_INFINITY { 0.0 } else { (*e - lse).exp() };
    }
}
