//! Operations of the tape that reach other ranks: gradients against central differences over the inputs of all ranks, and
//! a ring against one rank that has every key.

use std::sync::Arc;
use std::time::Duration;

use specforge_parallel::threads;
use specforge_tensor::{
    Attention, AttentionShape, Device, Group, KeyValue, Params, Part, RingAttention, Spans, Tape, Tensor,
    Var, Weight,
};

const PATIENCE: Duration = Duration::from_mins(1);
/// Rows of a rank.
const ROWS: usize = 4;

type Ranks = Arc<dyn Group>;
/// An operation of one rank's rows.
type Op = dyn Fn(&Tape<'_>, &Var, &Ranks) -> Var + Sync;

/// Numbers that look random, the same everywhere.
fn values(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + seed * 101 + 7) as f32 * 1.37).sin()).collect()
}

fn tensor(values: Vec<f32>, rows: usize) -> Tensor {
    let width = values.len() / rows;
    Tensor::from_f32(Device::Cpu, values, &[rows, width]).unwrap()
}

/// For each rank's rows: the sum of its outputs by fixed weights, and the gradient of all ranks' sum.
fn run(op: &Op, inputs: &[Vec<f32>]) -> Vec<(f64, Vec<f32>)> {
    threads::run(inputs.len(), PATIENCE, |ranks| {
        let mut params = Params::new();
        let id = params.add("x", tensor(inputs[ranks.rank()].clone(), ROWS), true);
        let tape = Tape::recording(&params);
        let rows = Tensor::from_u32(Device::Cpu, (0..ROWS as u32).collect());
        let x = tape.embedding(id, &rows).unwrap();
        let y = op(&tape, &x, &ranks);
        let dy = values(90 + ranks.rank(), y.value().len());
        let sum = y.value().to_f32().iter().zip(&dy).map(|(y, d)| f64::from(*y) * f64::from(*d)).sum();
        let dy = tensor(dy, y.rows_cols().0);
        let grads = tape.backward_from(vec![(y, dy)]).unwrap();
        (sum, grads.get(id).unwrap().to_f32())
    })
}

/// Directions of each rank's inputs alone.
fn check(name: &str, op: &Op, inputs: &[Vec<f32>]) {
    let h = 0.01;
    let gradients = run(op, inputs);
    for rank in 0..inputs.len() {
        let u = values(40 + rank, inputs[rank].len());
        let at = |h: f64| -> f64 {
            let mut moved = inputs.to_vec();
            moved[rank].iter_mut().zip(&u).for_each(|(x, u)| *x = (f64::from(*x) + h * f64::from(*u)) as f32);
            run(op, &moved).iter().map(|(sum, _)| sum).sum()
        };
        let numeric = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
        let analytic: f64 =
            gradients[rank].1.iter().zip(&u).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
        let norm = gradients[rank].1.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let error = (numeric - analytic).abs();
        assert!(norm > 0.1 && error < 2e-3 * norm, "{name}, rank {rank}: {analytic}, differences {numeric}");
    }
}

fn inputs(size: usize, width: usize) -> Vec<Vec<f32>> {
    (0..size).map(|rank| values(rank, ROWS * width)).collect()
}

#[test]
fn parallel_heads_for_rows_have_the_gradient_of_differences() {
    for size in [2, 3] {
        let there = |tape: &Tape<'_>, x: &Var, ranks: &Ranks| tape.rows_to_heads(x, ranks).unwrap();
        check("rows to heads", &there, &inputs(size, 6 * size));
        let back = |tape: &Tape<'_>, x: &Var, ranks: &Ranks| {
            let y = tape.rows_to_heads(x, ranks).unwrap();
            tape.heads_to_rows(&tape.swiglu(&y).unwrap(), ranks).unwrap()
        };
        check("and back", &back, &inputs(size, 6 * size));
    }
    let same = threads::run(3, PATIENCE, |ranks| {
        let none = Params::new();
        let tape = Tape::inference(&none);
        let x = tape.input(tensor(values(ranks.rank(), ROWS * 6), ROWS));
        let heads = tape.rows_to_heads(&x, &ranks).unwrap();
        assert_eq!(heads.value().shape(), [3 * ROWS, 2]);
        (x.value().to_f32(), tape.heads_to_rows(&heads, &ranks).unwrap().value().to_f32())
    });
    same.iter().for_each(|(there, back)| assert_eq!(there, back));
}

#[test]
fn parallel_gathered_rows_have_the_gradient_of_differences() {
    let op = |tape: &Tape<'_>, x: &Var, ranks: &Ranks| {
        let y = tape.gather_ranks(x, ranks).unwrap();
        assert_eq!(y.value().shape(), [ranks.size() * ROWS, 6]);
        tape.swiglu(&y).unwrap()
    };
    check("gathered by 2", &op, &inputs(2, 6));
    check("gathered by 3", &op, &inputs(3, 6));
}

const SHAPE: AttentionShape = AttentionShape { n_heads: 4, n_kv_heads: 2, head_dim: 8, scale: 0.35 };
const KV: usize = 16;
/// Queries, keys and values of a row, and its two extra pairs.
const WIDTH: usize = 32 + 2 * KV + 4 * KV;

/// What each row of `rank` sees of every rank's keys: all rows up to itself, in two documents.
fn spans(rank: usize, size: usize) -> Vec<Spans> {
    let boundary = ROWS + 2;
    let sees = |row: usize, owner: usize| {
        let first = if row < boundary { 0 } else { boundary };
        let clamp = |key: usize| (key.clamp(owner * ROWS, (owner + 1) * ROWS) - owner * ROWS) as u32;
        (clamp(first), clamp(row + 1))
    };
    let of = |owner: usize| {
        let (lo, hi) = (0..ROWS).map(|r| sees(rank * ROWS + r, owner)).unzip();
        Spans { lo: Tensor::from_u32(Device::Cpu, lo), hi: Tensor::from_u32(Device::Cpu, hi) }
    };
    (0..size).map(of).collect()
}

fn extras(x: &Var) -> Vec<(KeyValue, Option<Tensor>)> {
    (0..2).map(|e| (KeyValue::packed(x, 32 + 2 * KV + e * 2 * KV, SHAPE), None)).collect()
}

fn ring(tape: &Tape<'_>, x: &Var, ranks: &Ranks) -> Var {
    let base = tape.columns(x, 32..32 + 2 * KV).unwrap();
    let (spans, extras) = (spans(ranks.rank(), ranks.size()), extras(x));
    let query = Part::new(x, 0);
    let ring = RingAttention { shape: SHAPE, query, base: &base, spans: &spans, extras: &extras, ranks };
    tape.attention_ring(&ring).unwrap()
}

#[test]
fn parallel_ring_attention_has_the_gradient_of_differences() {
    check("ring of 2", &ring, &inputs(2, WIDTH));
    check("ring of 3", &ring, &inputs(3, WIDTH));
}

#[test]
fn parallel_ring_attention_is_that_of_one_rank_with_all_keys() {
    let (size, all) = (3, inputs(3, WIDTH));
    let got = threads::run(size, PATIENCE, |ranks| {
        let none = Params::new();
        let tape = Tape::inference(&none);
        let x = tape.input(tensor(all[ranks.rank()].clone(), ROWS));
        ring(&tape, &x, &ranks).value().to_f32()
    });
    let none = Params::new();
    let tape = Tape::inference(&none);
    let x = tape.input(tensor(all.concat(), size * ROWS));
    let whole = |rank: usize| (0..ROWS).map(move |r| rank * ROWS + r);
    let rows = (0..size).flat_map(whole);
    let (lo, hi) = rows.map(|r| (if r < ROWS + 2 { 0 } else { ROWS as u32 + 2 }, r as u32 + 1)).unzip();
    let spans = Spans { lo: Tensor::from_u32(Device::Cpu, lo), hi: Tensor::from_u32(Device::Cpu, hi) };
    let base = KeyValue::packed(&x, 32, SHAPE);
    let (query, extras) = (Part::new(&x, 0), extras(&x));
    let attention = Attention { shape: SHAPE, query, base: &base, spans: &spans, extras: &extras };
    let want = tape.attention(&attention).unwrap().value().to_f32();
    for (got, want) in got.concat().iter().zip(&want) {
        assert!((got - want).abs() < 1e-6, "{got}, alone {want}");
    }
}

/// Ranks that have some outputs read the same input: its gradient is that of all outputs, on every rank.
#[test]
fn parallel_shared_layers_have_the_gradient_of_differences() {
    let w = |rank: usize, n: usize, k: usize| tensor(values(60 + rank, n * k), n);
    let size = 2;
    // Inputs are one rank's own, outputs are everyone's: counted once.
    let by_inputs = |tape: &Tape<'_>, x: &Var, ranks: &Ranks| {
        let id = tape.params().find("w").unwrap();
        tape.linear(x, &Weight::of(id).sharing_inputs(Some(ranks))).unwrap()
    };
    let by_outputs = |tape: &Tape<'_>, x: &Var, ranks: &Ranks| {
        let id = tape.params().find("w").unwrap();
        tape.linear(x, &Weight::of(id).sharing_outputs(Some(ranks))).unwrap()
    };
    let gradients = |x: [Vec<f32>; 2], op: &Op, same: bool| {
        threads::run(size, PATIENCE, |ranks| {
            let mut params = Params::new();
            let id = params.add("x", tensor(x[ranks.rank()].clone(), ROWS), true);
            params.add("w", w(ranks.rank(), 5, 6), true);
            let tape = Tape::recording(&params);
            let rows = Tensor::from_u32(Device::Cpu, (0..ROWS as u32).collect());
            let y = op(&tape, &tape.embedding(id, &rows).unwrap(), &ranks);
            let dy = values(if same { 9 } else { 9 + ranks.rank() }, y.value().len());
            let sum: f64 = y.value().to_f32().iter().zip(&dy).map(|(y, d)| f64::from(*y * *d)).sum();
            let grads = tape.backward_from(vec![(y, tensor(dy, ROWS))]).unwrap();
            let [dx, dw] = [id, params.find("w").unwrap()].map(|id| grads.get(id).unwrap().to_f32());
            (sum, dx, dw)
        })
    };
    // These are linear in x: the sum is the inner product of x with its gradient.
    let inner = |x: &[f32], d: &[f32]| x.iter().zip(d).map(|(x, d)| f64::from(*x * *d)).sum::<f64>();
    let own = [values(1, ROWS * 6), values(2, ROWS * 6)];
    let shared = gradients(own.clone(), &by_inputs, true);
    let expected: f64 = own.iter().zip(&shared).map(|(x, (_, dx, _))| inner(x, dx)).sum();
    for (rank, (sum, dx, dw)) in shared.iter().enumerate() {
        assert!((sum - expected).abs() < 1e-4, "inputs: {sum}, gradient {expected}");
        // And so is each rank's part of it in its own matrix.
        let part = inner(&own[rank], dx);
        let of_w = inner(&w(rank, 5, 6).to_f32(), dw);
        assert!((part - of_w).abs() < 1e-4, "inputs, rank {rank}: {part} by x, {of_w} by w");
    }
    let one = [own[0].clone(), own[0].clone()];
    let shared = gradients(one.clone(), &by_outputs, false);
    let sums: f64 = shared.iter().map(|(sum, ..)| sum).sum();
    for (_, dx, _) in &shared {
        assert!((inner(&one[0], dx) - sums).abs() < 1e-4, "outputs: {sums}");
        assert_eq!(dx, &shared[0].1, "the same on every rank");
    }
}

#[test]
fn parallel_embeddings_are_those_of_one_table() {
    let (all, ids) = (values(3, 8 * 5), vec![7, 0, 3, 3, 5]);
    let got = threads::run(4, PATIENCE, |ranks| {
        let mut params = Params::new();
        let own = all[ranks.rank() * 10..][..10].to_vec();
        let id = params.add("table", tensor(own, 2), true);
        let tape = Tape::recording(&params);
        let rows = Tensor::from_u32(Device::Cpu, ids.clone());
        let y = tape.embedding_shared(id, &rows, Some(&ranks)).unwrap();
        let (value, dy) = (y.value().to_f32(), tensor(values(4, 25), 5));
        let grads = tape.backward_from(vec![(y, dy)]).unwrap();
        (value, grads.get(id).unwrap().to_f32())
    });
    let want: Vec<f32> = ids.iter().flat_map(|&i| all[i as usize * 5..][..5].to_vec()).collect();
    let mut gradient = vec![0.0; 40];
    for (row, &i) in ids.iter().enumerate() {
        gradient[i as usize * 5..][..5].iter_mut().zip(&values(4, 25)[row * 5..]).for_each(|(g, d)| *g += d);
    }
    got.iter().for_each(|(value, _)| assert_eq!(value, &want));
    assert_eq!(got.iter().flat_map(|(_, d)| d.clone()).collect::<Vec<_>>(), gradient);
}
