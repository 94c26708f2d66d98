//! Every operation of the tape with arguments, by the number of rows.

use specforge_testkit::Lcg;

use super::{Op, matrix, normal, rows};
use crate::{Attention, AttentionShape, Collected, DType, KeyValue, Part, Rope, Spans, Tensor, Weight};

/// Operations by name.
type Named = Vec<(&'static str, Op)>;

/// Every operation on `n` rows (of the tensor that gives the rows their number).
pub(crate) fn zoo(n: usize) -> Named {
    [linears(n), element_wise(n), rotations(n), attentions(n), movements(n)].into_iter().flatten().collect()
}

/// A tensor on the device of a value that it goes with.
fn there(index: &Tensor, with: &Tensor) -> Tensor {
    index.to_device(with.device()).unwrap()
}

fn spans_there(spans: &Spans, with: &Tensor) -> Spans {
    Spans { lo: there(&spans.lo, with), hi: there(&spans.hi, with) }
}

fn rope_there(rope: &Rope, with: &Tensor) -> Rope {
    let [cos, sin, positions] = [&rope.cos, &rope.sin, &rope.positions].map(|t| there(t, with));
    Rope { cos, sin, positions, ..*rope }
}

/// Causal spans of documents of these lengths, each query seeing at most `window` keys.
pub(crate) fn documents(lengths: &[usize], window: usize) -> Spans {
    let (mut lo, mut hi, mut start) = (Vec::new(), Vec::new(), 0);
    for &n in lengths {
        for i in 0..n {
            lo.push((start + (i + 1).saturating_sub(window)) as u32);
            hi.push((start + i + 1) as u32);
        }
        start += n;
    }
    Spans { lo: rows(lo), hi: rows(hi) }
}

/// An attention whose leaves are query, key, value, then each extra's key and value.
pub(crate) fn attend(
    shape: AttentionShape,
    spans: Spans,
    leaves: Vec<Tensor>,
    indices: Vec<Option<Tensor>>,
) -> Op {
    Op::new(leaves, vec![], move |tape, v, _| {
        let pair = |i: usize| KeyValue::new(&v[i], &v[i + 1]);
        let index = |i: &Option<Tensor>| i.as_ref().map(|i| there(i, v[0].value()));
        let extras: Vec<_> = indices.iter().enumerate().map(|(e, i)| (pair(3 + 2 * e), index(i))).collect();
        let (query, spans) = (Part::new(&v[0], 0), spans_there(&spans, v[0].value()));
        tape.attention(&Attention { shape, query, base: &pair(1), spans: &spans, extras: &extras })
    })
}

/// Query heads, key heads, head width.
pub(crate) fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { n_heads, n_kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5) }
}

pub(crate) fn attention_of(
    n: usize,
    shape: AttentionShape,
    lengths: &[usize],
    window: usize,
    extras: &[Option<Tensor>],
) -> Op {
    let mut rng = Lcg::new(11);
    let (width, kv) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
    let mut leaves =
        vec![normal(&mut rng, &[n, width]), normal(&mut rng, &[n, kv]), normal(&mut rng, &[n, kv])];
    for _ in extras {
        leaves.extend([normal(&mut rng, &[n, kv]), normal(&mut rng, &[n, kv])]);
    }
    attend(shape, documents(lengths, window), leaves, extras.to_vec())
}

fn linears(n: usize) -> Named {
    let mut r = Lcg::new(7);
    let mut x = |shape: &[usize]| normal(&mut r, shape);
    let linear =
        |x: Tensor, w: Tensor| Op::new(vec![x], vec![w], |t, v, p| t.linear(&v[0], &Weight::of(p[0])));
    let half = |t: Tensor, dtype| t.cast(dtype).unwrap();
    let stack = vec![x(&[12, 16]), x(&[21, 16]), x(&[12]), x(&[21])];
    vec![
        ("linear", linear(x(&[n, 72]), x(&[33, 72]))),
        ("linear, bfloat16 weight", linear(x(&[n, 24]), half(x(&[9, 24]), DType::Bf16))),
        ("linear, half weight", linear(x(&[n, 24]), half(x(&[9, 24]), DType::F16))),
        (
            "linear with bias",
            Op::new(vec![x(&[n, 20])], vec![x(&[12, 20]), x(&[12])], |t, v, p| {
                t.linear(&v[0], &Weight::of(p[0]).with_bias(Some(p[1])))
            }),
        ),
        (
            "linear on columns",
            Op::new(vec![x(&[n, 12])], vec![x(&[10, 30])], |t, v, p| {
                t.linear(&v[0], &Weight::of(p[0]).columns(11..23))
            }),
        ),
        (
            "linear on columns, bfloat16 weight",
            Op::new(vec![x(&[n, 7])], vec![half(x(&[10, 30]), DType::Bf16)], |t, v, p| {
                t.linear(&v[0], &Weight::of(p[0]).columns(23..30))
            }),
        ),
        (
            "linear with residual",
            Op::new(vec![x(&[n, 72]), x(&[n, 40])], vec![x(&[40, 72])], |t, v, p| {
                t.linear_add(&v[0], &Weight::of(p[0]), &v[1])
            }),
        ),
        (
            "linear, stacked, with residual",
            Op::new(vec![x(&[n, 16]), x(&[n, 33])], stack, |t, v, p| {
                let layer = |i: usize| Weight::of(p[i]).with_bias(Some(p[i + 2]));
                t.linear_add(&v[0], &Weight::stacked(&[&layer(0), &layer(1)]), &v[1])
            }),
        ),
    ]
}

fn element_wise(n: usize) -> Named {
    let mut r = Lcg::new(8);
    let mut x = |shape: &[usize]| normal(&mut r, shape);
    vec![
        ("rms_norm", Op::new(vec![x(&[n, 40])], vec![x(&[40])], |t, v, p| t.rms_norm(&v[0], p[0], 1e-5))),
        (
            "rms_norm per head",
            Op::new(vec![x(&[n, 48])], vec![x(&[16])], |t, v, p| t.rms_norm(&v[0], p[0], 1e-5)),
        ),
        (
            "rms_norm of a value that is read again",
            Op::new(vec![x(&[n, 40])], vec![x(&[40])], |t, v, p| {
                t.add(&t.rms_norm(&v[0], p[0], 1e-5)?, &v[0])
            }),
        ),
        (
            "swiglu, linear and residual",
            Op::new(vec![x(&[n, 60]), x(&[n, 21])], vec![x(&[21, 30])], |t, v, p| {
                t.swiglu_linear_add(&v[0], &Weight::of(p[0]), &v[1])
            }),
        ),
        ("swiglu", Op::new(vec![x(&[n, 100])], vec![], |t, v, _| t.swiglu(&v[0]))),
        ("scale", Op::new(vec![x(&[n, 50])], vec![], |t, v, _| t.scale(&v[0], -1.7))),
        ("add", Op::new(vec![x(&[n, 50]), x(&[n, 50])], vec![], |t, v, _| t.add(&v[0], &v[1]))),
        ("add of a value to itself", Op::new(vec![x(&[n, 50])], vec![], |t, v, _| t.add(&v[0], &v[0]))),
    ]
}

fn rotations(n: usize) -> Named {
    let mut r = Lcg::new(9);
    let mut x = |shape: &[usize]| normal(&mut r, shape);
    let positions = rows((0..n as u32).map(|i| i * 3 % 11));
    let rope_of = |half: usize, n_heads: usize| {
        let angle = move |i: usize| (i / half) as f32 / 1.7f32.powi((i % half) as i32);
        let table = |f: fn(f32) -> f32| matrix((0..11 * half).map(|i| f(angle(i))).collect(), &[11, half]);
        let (cos, sin, positions) = (table(f32::cos), table(f32::sin), positions.clone());
        Rope { n_heads, head_dim: 16, cos, sin, positions }
    };
    let rope = |x: Tensor, half: usize| {
        let rope = rope_of(half, x.rows_cols().1 / 16);
        Op::new(vec![x], vec![], move |t, v, _| t.rope(&v[0], &rope_there(&rope, v[0].value())))
    };
    // Rows that are added are distinct, as the engine promises.
    let shifted = rows((0..n as u32).map(|i| if i % 3 == 2 { u32::MAX } else { i + 5 }));
    let added = |x: Tensor, table: Tensor, rope: Rope, first: usize| {
        let index = shifted.clone();
        Op::new(vec![x, table], vec![], move |t, v, _| {
            let (rope, index) = (rope_there(&rope, v[0].value()), there(&index, v[0].value()));
            t.rope_added(&v[0], &rope, &Part::new(&v[1], first), &index)
        })
    };
    let (first, own) = (rows(0..n as u32), rope_of(8, 1));
    vec![
        ("rope", rope(x(&[n, 48]), 8)),
        ("rope, partial", rope(x(&[n, 32]), 5)),
        ("rope of added rows", added(x(&[n, 40]), x(&[9 + n, 48]), rope_of(8, 2), 8)),
        ("rope of added rows, unaligned", added(x(&[n, 37]), x(&[9 + n, 48]), rope_of(5, 2), 3)),
        ("added rows alone", added(x(&[n, 40]), x(&[9 + n, 40]), rope_of(0, 1), 0)),
        (
            // What is read after it in the tape has left its gradient before, in the type of activations.
            "added rows of a value with other readers",
            Op::new(vec![x(&[n, 24]), x(&[n, 24])], vec![], move |t, v, _| {
                let (rope, index) = (rope_there(&own, v[0].value()), there(&first, v[0].value()));
                let before = t.add(&v[0], &v[1])?;
                let y = t.rope_added(&before, &rope, &Part::new(&v[1], 0), &index)?;
                t.add(&y, &v[1])
            }),
        ),
        (
            // Its gradient, kept in float32, goes to the rows it was gathered from.
            "added rows of gathered ones",
            gathered_and_added(x(&[n, 24]), x(&[n + 1, 24]), rope_of(8, 1)),
        ),
    ]
}

fn gathered_and_added(x: Tensor, table: Tensor, rope: Rope) -> Op {
    let n = x.rows_cols().0 as u32;
    let (backwards, all) = (rows((0..n).rev()), rows(0..n));
    Op::new(vec![x, table], vec![], move |t, v, _| {
        let like = v[0].value();
        let gathered = t.gather_rows(&v[1], &there(&backwards, like))?;
        t.rope_added(&v[0], &rope_there(&rope, like), &Part::new(&gathered, 0), &there(&all, like))
    })
}

fn attentions(n: usize) -> Named {
    let halves = [n / 2, n - n / 2];
    let tree = rows((0..n).map(|i| if i % 3 == 2 { u32::MAX } else { (i * 5 % n) as u32 }));
    let packed = normal(&mut Lcg::new(10), &[n, 96]);
    vec![
        ("attention", attention_of(n, heads(4, 2, 16), &[n / 3, n - n / 3], usize::MAX, &[])),
        ("attention with extras", attention_of(n, heads(4, 1, 16), &halves, 9, &[None, None])),
        (TREE, attention_of(n, heads(4, 1, 16), &halves, 9, &[None, Some(tree)])),
        (
            "attention on columns",
            Op::new(vec![packed], vec![], move |t, v, _| {
                let shape = heads(4, 1, 16);
                let spans = spans_there(&documents(&[n], usize::MAX), v[0].value());
                let (query, base) = (Part::new(&v[0], 0), KeyValue::packed(&v[0], 64, shape));
                t.attention(&Attention { shape, query, base: &base, spans: &spans, extras: &[] })
            }),
        ),
    ]
}

/// The one operation that has a gradient on the CPU only.
pub(crate) const TREE: &str = "attention with extras of a tree";

fn movements(n: usize) -> Named {
    let mut r = Lcg::new(12);
    let mut x = |shape: &[usize]| normal(&mut r, shape);
    let table_rows = rows((0..n as u32).map(|i| i * 7 % 5));
    let gathered = rows((0..n as u32).rev().flat_map(|i| [i, u32::MAX, i / 2]));
    let (evens, odds) = ((0..n as u32).step_by(2), (0..n as u32).skip(1).step_by(2));
    let [to_even, to_odd] = [rows(evens), rows(odds)];
    vec![
        (
            "embedding",
            Op::new(vec![], vec![x(&[5, 40])], move |t, _, p| {
                t.embedding(p[0], &there(&table_rows, &t.params().get(p[0]).value))
            }),
        ),
        (
            "gather_rows",
            Op::new(vec![x(&[n, 40])], vec![], move |t, v, _| {
                t.gather_rows(&v[0], &there(&gathered, v[0].value()))
            }),
        ),
        ("columns", Op::new(vec![x(&[n, 40])], vec![], |t, v, _| t.columns(&v[0], 3..37))),
        (
            "collect_rows",
            Op::new(vec![x(&[n, 40]), x(&[n, 40])], vec![], move |t, v, _| {
                let part = |i: usize, to: &Tensor| {
                    let to = there(to, v[0].value());
                    Collected { source: v[i].clone(), from: to.clone(), to }
                };
                t.collect_rows(vec![part(0, &to_even), part(1, &to_odd)], n)
            }),
        ),
    ]
}
