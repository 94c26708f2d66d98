//! Tests of every operation: gradients against finite differences, values against plain float64 arithmetic, and
//! what must hold for all of them (no rows, any number of threads, wrong shapes). `zoo` lists the operations once.

mod attention;
mod finite_difference;
mod invariants;
mod loss;
mod shapes;
mod values;

use specforge_testkit::Lcg;

use crate::{
    Attention, AttentionShape, DType, Device, Grads, KeyValue, ParamId, Params, Result, Spans, Tape, Tensor,
    Var, Weight,
};

type Forward = dyn Fn(&Tape<'_>, &[Var], &[ParamId]) -> Result<Var> + Sync + Send;

/// One operation with its arguments: leaves (values whose gradient is read) and trained parameters.
struct Op {
    leaves: Vec<Tensor>,
    params: Vec<Tensor>,
    forward: Box<Forward>,
}

impl Op {
    fn new(
        leaves: Vec<Tensor>,
        params: Vec<Tensor>,
        forward: impl Fn(&Tape<'_>, &[Var], &[ParamId]) -> Result<Var> + Sync + Send + 'static,
    ) -> Self {
        Self { leaves, params, forward: Box::new(forward) }
    }

    fn declared(&self) -> (Params, Vec<ParamId>) {
        let mut params = Params::new();
        let ids = self.params.iter().enumerate().map(|(i, p)| params.add(format!("p{i}"), p.clone(), true));
        let ids = ids.collect();
        (params, ids)
    }

    fn value(&self) -> Tensor {
        let (params, ids) = self.declared();
        let tape = Tape::inference(&params);
        let leaves: Vec<Var> = self.leaves.iter().map(|t| tape.input(t.clone())).collect();
        (self.forward)(&tape, &leaves, &ids).unwrap().value().clone()
    }

    /// The value, and the gradients of leaves, then parameters, of `Σ dy · value`; dy is drawn from `seed`.
    fn gradients(&self, seed: u64) -> (Tensor, Tensor, Vec<Tensor>) {
        let (params, ids) = self.declared();
        let tape = Tape::recording(&params);
        let leaves: Vec<Var> = self.leaves.iter().map(|t| tape.leaf(t.clone())).collect();
        let y = (self.forward)(&tape, &leaves, &ids).unwrap();
        let value = y.value().clone();
        let dy = normal(&mut Lcg::new(seed), value.shape());
        let (grads, mut all) = tape.backward_to(vec![(y, dy.clone())], &leaves).unwrap();
        let of = |grads: &Grads, id| grads.get(id).cloned();
        all.extend(
            ids.iter()
                .zip(&self.params)
                .map(|(&id, p)| of(&grads, id).unwrap_or_else(|| Tensor::zeros(Device::Cpu, p.shape()))),
        );
        (value, dy, all)
    }
}

fn normal(rng: &mut Lcg, shape: &[usize]) -> Tensor {
    matrix(rng.normals(shape.iter().product(), 1.0), shape)
}

fn matrix(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_f32(Device::Cpu, values, shape).unwrap()
}

fn rows(index: impl IntoIterator<Item = u32>) -> Tensor {
    Tensor::from_u32(Device::Cpu, index.into_iter().collect())
}

fn bits(t: &Tensor) -> Vec<u32> {
    t.u32s().map_or_else(|| t.to_f32().iter().map(|v| v.to_bits()).collect(), <[u32]>::to_vec)
}

/// Causal spans of documents of these lengths, each query seeing at most `window` keys.
fn documents(lengths: &[usize], window: usize) -> Spans {
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
fn attend(shape: AttentionShape, spans: Spans, leaves: Vec<Tensor>, indices: Vec<Option<Tensor>>) -> Op {
    Op::new(leaves, vec![], move |tape, v, _| {
        let pair = |i: usize| KeyValue { key: v[i].clone(), value: v[i + 1].clone() };
        let extras: Vec<_> = indices.iter().enumerate().map(|(e, i)| (pair(3 + 2 * e), i.clone())).collect();
        tape.attention(&Attention { shape, query: &v[0], base: &pair(1), spans: &spans, extras: &extras })
    })
}

/// Query heads, key heads, head width.
fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { n_heads, n_kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5) }
}

fn attention_of(
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

/// Every operation on `n` rows (of the tensor that gives the rows their number).
fn zoo(n: usize) -> Vec<(&'static str, Op)> {
    let mut r = Lcg::new(7);
    let mut x = |shape: &[usize]| normal(&mut r, shape);
    let linear =
        |x: Tensor, w: Tensor| Op::new(vec![x], vec![w], |t, v, p| t.linear(&v[0], Weight::of(p[0])));
    let half = |t: Tensor, dtype| t.cast(dtype).unwrap();
    let every_third = |bound: usize| {
        rows((0..n).map(move |i| if i % 3 == 2 { u32::MAX } else { (i * 5 % bound.max(1)) as u32 }))
    };
    let table_rows = rows((0..n as u32).map(|i| i * 7 % 5));
    let (shifted, positions) = (every_third(6), rows((0..n as u32).map(|i| i * 3 % 11)));
    let gathered = rows((0..n as u32).rev().flat_map(|i| [i, u32::MAX, i / 2]));
    let rope = |x: Tensor, half: usize| {
        let angle = move |i: usize| (i / half) as f32 / 1.7f32.powi((i % half) as i32);
        let table = |f: fn(f32) -> f32| matrix((0..11 * half).map(|i| f(angle(i))).collect(), &[11, half]);
        let (cos, sin, positions) = (table(f32::cos), table(f32::sin), positions.clone());
        Op::new(vec![x], vec![], move |t, v, _| t.rope(&v[0], 16, (&cos, &sin), &positions))
    };
    let tree = every_third(n);
    let (evens, odds) = ((0..n as u32).step_by(2), (0..n as u32).skip(1).step_by(2));
    let [to_even, to_odd] = [rows(evens.clone()), rows(odds.clone())];
    vec![
        ("linear", linear(x(&[n, 72]), x(&[33, 72]))),
        ("linear, bfloat16 weight", linear(x(&[n, 24]), half(x(&[9, 24]), DType::Bf16))),
        ("linear, half weight", linear(x(&[n, 24]), half(x(&[9, 24]), DType::F16))),
        (
            "linear with bias",
            Op::new(vec![x(&[n, 20])], vec![x(&[12, 20]), x(&[12])], |t, v, p| {
                t.linear(&v[0], Weight::of(p[0]).with_bias(Some(p[1])))
            }),
        ),
        (
            "linear on columns",
            Op::new(vec![x(&[n, 12])], vec![x(&[10, 30])], |t, v, p| {
                t.linear(&v[0], Weight::of(p[0]).columns(11..23))
            }),
        ),
        (
            "linear on columns, bfloat16 weight",
            Op::new(vec![x(&[n, 7])], vec![half(x(&[10, 30]), DType::Bf16)], |t, v, p| {
                t.linear(&v[0], Weight::of(p[0]).columns(23..30))
            }),
        ),
        ("rms_norm", Op::new(vec![x(&[n, 40])], vec![x(&[40])], |t, v, p| t.rms_norm(&v[0], p[0], 1e-5))),
        (
            "rms_norm per head",
            Op::new(vec![x(&[n, 48])], vec![x(&[16])], |t, v, p| t.rms_norm(&v[0], p[0], 1e-5)),
        ),
        ("rope", rope(x(&[n, 48]), 8)),
        ("rope, partial", rope(x(&[n, 32]), 5)),
        ("attention", attention_of(n, heads(4, 2, 16), &[n / 3, n - n / 3], usize::MAX, &[])),
        (
            "attention with extras",
            attention_of(n, heads(4, 1, 16), &[n / 2, n - n / 2], 9, &[None, Some(tree)]),
        ),
        ("swiglu", Op::new(vec![x(&[n, 50]), x(&[n, 50])], vec![], |t, v, _| t.swiglu(&v[0], &v[1]))),
        ("add", Op::new(vec![x(&[n, 50]), x(&[n, 50])], vec![], |t, v, _| t.add(&v[0], &v[1]))),
        ("add of a value to itself", Op::new(vec![x(&[n, 50])], vec![], |t, v, _| t.add(&v[0], &v[0]))),
        ("embedding", Op::new(vec![], vec![x(&[5, 40])], move |t, _, p| t.embedding(p[0], &table_rows))),
        ("gather_rows", Op::new(vec![x(&[n, 40])], vec![], move |t, v, _| t.gather_rows(&v[0], &gathered))),
        (
            "add_rows",
            Op::new(vec![x(&[n, 40]), x(&[6, 40])], vec![], move |t, v, _| {
                t.add_rows(&v[0], &v[1], &shifted)
            }),
        ),
        ("columns", Op::new(vec![x(&[n, 40])], vec![], |t, v, _| t.columns(&v[0], 3..37))),
        (
            "collect_rows",
            Op::new(vec![x(&[n, 40]), x(&[n, 40])], vec![], move |t, v, _| {
                let part = |i: usize, to: &Tensor| crate::Collected {
                    source: v[i].clone(),
                    from: to.clone(),
                    to: to.clone(),
                };
                t.collect_rows(vec![part(0, &to_even), part(1, &to_odd)], n)
            }),
        ),
    ]
}
