//! Attention against a softmax written out row by row in float64.

use specforge_testkit::{Lcg, assert_close};

use super::{attend, documents, heads, matrix, normal, rows};
use crate::kernels::{AttentionInputs, Columns, Extra};
use crate::{AttentionShape, Result, Spans, Tensor};

/// The keys a query sees, written out: rows of the base and of each extra.
fn visible(spans: &Spans, indices: &[Option<Tensor>], r: usize) -> Vec<(usize, usize)> {
    let (lo, hi) = (spans.lo.u32s().unwrap()[r], spans.hi.u32s().unwrap()[r]);
    let base = (lo..hi).map(|j| (0, j as usize));
    let extras = indices.iter().enumerate().filter_map(|(e, index)| {
        let row = index.as_ref().map_or(r as u32, |index| index.u32s().unwrap()[r]);
        (row != u32::MAX).then_some((e + 1, row as usize))
    });
    base.chain(extras).collect()
}

/// One call of the forward kernel, on the device of `leaves`: query, key, value, then each extra's key and value.
pub(crate) fn kernel_forward(
    shape: AttentionShape,
    spans: &Spans,
    leaves: &[Tensor],
    indices: &[Option<Tensor>],
    sinks: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let whole = |of| Columns { of, first: 0 };
    let extra = |(e, index): (usize, _)| Extra {
        key: whole(&leaves[3 + 2 * e]),
        value: whole(&leaves[4 + 2 * e]),
        index: Option::as_ref(index),
    };
    let extras: Vec<Extra<'_>> = indices.iter().enumerate().map(extra).collect();
    let qkv = [0, 1, 2].map(|i| whole(&leaves[i]));
    let inputs = AttentionInputs { shape, qkv, spans, extras: &extras, sinks, cap: None };
    leaves[0].device().kernels().attention(&inputs)
}

/// Output and log-sum-exp of every row and head.
pub(crate) fn plain(
    s: AttentionShape,
    spans: &Spans,
    leaves: &[Tensor],
    indices: &[Option<Tensor>],
    sinks: Option<&Tensor>,
) -> [Vec<f32>; 2] {
    plain_of(s, spans, leaves, indices, sinks, |score| score)
}

/// As [`plain`], of what `f` makes of the scores.
pub(crate) fn plain_of(
    s: AttentionShape,
    spans: &Spans,
    leaves: &[Tensor],
    indices: &[Option<Tensor>],
    sinks: Option<&Tensor>,
    f: impl Fn(f64) -> f64,
) -> [Vec<f32>; 2] {
    let (width, kv) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
    let values: Vec<Vec<f64>> =
        leaves.iter().map(|t| t.to_f32().into_iter().map(f64::from).collect()).collect();
    let [mut out, mut lse] = [Vec::new(), Vec::new()];
    for r in 0..leaves[0].rows_cols().0 {
        for head in 0..s.n_heads {
            let h = head / (s.n_heads / s.n_kv_heads);
            let q = &values[0][r * width + head * s.head_dim..][..s.head_dim];
            let seen = visible(spans, indices, r);
            let row = |tensor: usize, (source, j): (usize, usize)| {
                &values[1 + 2 * source + tensor][j * kv + h * s.head_dim..][..s.head_dim]
            };
            let score = |key| q.iter().zip(row(0, key)).map(|(a, b)| a * b).sum::<f64>() * f64::from(s.scale);
            let weights: Vec<f64> = seen.iter().map(|&key| f(score(key)).exp()).collect();
            let sink = sinks.map_or(0.0, |sinks| f64::from(sinks.f32s()[head]).exp());
            let sum = weights.iter().sum::<f64>() + sink;
            lse.push(sum.ln() as f32);
            out.extend((0..s.head_dim).map(|d| {
                let mixed: f64 = seen.iter().zip(&weights).map(|(&key, w)| w * row(1, key)[d]).sum();
                if seen.is_empty() { 0.0 } else { (mixed / sum) as f32 }
            }));
        }
    }
    [out, lse]
}

/// Normal queries, keys, values, and each extra's key and value.
pub(crate) fn leaves_of(s: AttentionShape, rows: usize, keys: usize, n_extras: usize) -> Vec<Tensor> {
    let mut rng = Lcg::new(23);
    let (width, kv) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
    let mut leaves: Vec<Tensor> =
        [[rows, width], [keys, kv], [keys, kv]].iter().map(|shape| normal(&mut rng, shape)).collect();
    leaves.extend((0..2 * n_extras).map(|_| normal(&mut rng, &[rows, kv])));
    leaves
}

fn check(name: &str, s: AttentionShape, spans: &Spans, n_keys: usize, indices: &[Option<Tensor>]) {
    let n = spans.lo.len();
    let leaves = leaves_of(s, n, n_keys, indices.len());
    let [expected, _] = plain(s, spans, &leaves, indices, None);
    let got = attend(s, spans.clone(), leaves, indices.to_vec()).value();
    assert_eq!(got.shape(), [n, s.n_heads * s.head_dim]);
    assert_close(name, &got.f32s(), &expected, 2e-6, 2e-5);
}

#[test]
fn documents_windows_heads_and_extras_agree() {
    let lengths = [1, 33, 2, 100, 1, 64];
    let n: usize = lengths.iter().sum();
    let index = rows((0..n as u32).map(|r| if r % 5 == 1 { u32::MAX } else { r * 7 % n as u32 }));
    for shape in [heads(4, 4, 32), heads(6, 2, 24), heads(4, 1, 64)] {
        for window in [usize::MAX, 40, 5, 1] {
            for indices in [vec![], vec![None; 3], vec![Some(index.clone()), None]] {
                let name = format!("{shape:?}, window {window}, {} extras", indices.len());
                check(&name, shape, &documents(&lengths, window), n, &indices);
            }
        }
    }
}

#[test]
fn a_query_that_sees_nothing_gives_zeros() {
    let spans = Spans { lo: rows([0, 2, 4, 3, 4]), hi: rows([0, 4, 4, 1, 2]) };
    check("empty spans", heads(2, 1, 8), &spans, 4, &[]);
    let missing = rows([u32::MAX, 0, 2, u32::MAX, 1]);
    check("empty spans with extras", heads(2, 1, 8), &spans, 4, &[Some(missing)]);
    check("no keys at all", heads(2, 2, 8), &Spans { lo: rows([0; 5]), hi: rows([0; 5]) }, 0, &[]);
}

#[test]
fn sinks_take_part_in_the_softmax_and_have_no_value() {
    // Some queries see nothing: they have their sink.
    let spans = Spans { lo: rows([0, 0, 2, 3, 3, 4]), hi: rows([1, 2, 2, 5, 6, 6]) };
    let index = rows([u32::MAX, 0, u32::MAX, 2, 5, 1]);
    for shape in [heads(4, 2, 8), heads(3, 1, 16)] {
        // From one that hardly counts to one that takes all.
        let sinks = matrix([-30.0, 0.5, 2.0, 30.0][..shape.n_heads].to_vec(), &[shape.n_heads]);
        for indices in [vec![], vec![None; 2], vec![Some(index.clone())]] {
            let leaves = leaves_of(shape, 6, 6, indices.len());
            let [out, lse] = plain(shape, &spans, &leaves, &indices, Some(&sinks));
            let (got, got_lse) = kernel_forward(shape, &spans, &leaves, &indices, Some(&sinks)).unwrap();
            let name = format!("{shape:?}, {} extras", indices.len());
            assert_close(&name, &got.f32s(), &out, 2e-6, 2e-5);
            assert_close(&format!("{name}, log-sum-exp"), &got_lse.f32s(), &lse, 2e-6, 2e-5);
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let s = AttentionShape { scale: 40.0, ..heads(1, 1, 8) };
    let mut rng = Lcg::new(4);
    let leaves: Vec<Tensor> = (0..3).map(|_| normal(&mut rng, &[50, 8])).collect();
    let op = attend(s, documents(&[50], usize::MAX), leaves, vec![]);
    let (value, _, gradients) = op.gradients(1);
    assert!(gradients.iter().chain([&value]).all(|t| t.f32s().iter().all(|v| v.is_finite())));
}
