//! Values of the operations against plain formulas, and identities between operations.

use specforge_testkit::{Lcg, assert_close};

use super::{Op, bits, matrix, normal, rows, zoo};
use crate::{Collected, DType, Device, Params, Part, Rope, Tape, Tensor, Weight};

fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_f32().into_iter().map(f64::from).collect()
}

fn op(name: &str, n: usize) -> Op {
    zoo(n).into_iter().find(|(found, _)| *found == name).unwrap().1
}

/// `x · wᵀ` in float64.
fn product(x: &Tensor, w: &Tensor) -> Vec<f32> {
    let (k, x, w) = (x.rows_cols().1, f64s(x), f64s(w));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() as f32;
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| dot(x, w))).collect()
}

#[test]
fn linear_agrees_with_a_plain_product_at_every_size() {
    let mut rng = Lcg::new(1);
    // One task, tasks by columns, tasks by rows, more weight rows than are widened at once.
    for (r, n, k) in [(1, 1, 1), (3, 7, 5), (1, 1500, 200), (70, 300, 100), (700, 40, 33), (20, 2100, 16)] {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let (x, w) = (normal(&mut rng, &[r, k]), normal(&mut rng, &[n, k]).cast(dtype).unwrap());
            let expected = product(&x, &w);
            let got = Op::new(vec![x], vec![w], |t, v, p| t.linear(&v[0], &Weight::of(p[0]))).value();
            assert_eq!(got.shape(), [r, n]);
            assert_close(&format!("{r} x {n} x {k}, {dtype:?}"), &got.f32s(), &expected, 1e-4, 1e-5);
        }
    }
}

#[test]
fn weights_widened_in_blocks_give_the_gradients_of_whole_ones() {
    let mut rng = Lcg::new(8);
    let (x, w) = (normal(&mut rng, &[20, 16]), normal(&mut rng, &[2100, 16]).cast(DType::Bf16).unwrap());
    let gradients = |w: Tensor| {
        Op::new(vec![x.clone()], vec![w], |t, v, p| t.linear(&v[0], &Weight::of(p[0]))).gradients(1).2
    };
    let (blocks, whole) = (gradients(w.clone()), gradients(w.cast(DType::F32).unwrap()));
    for (i, (got, want)) in blocks.iter().zip(&whole).enumerate() {
        assert_close(&format!("gradient {i}"), &got.f32s(), &want.f32s(), 1e-4, 1e-5);
    }
}

#[test]
fn column_shares_of_a_linear_layer_sum_to_the_whole() {
    let mut rng = Lcg::new(2);
    let (x, w, b) = (normal(&mut rng, &[40, 90]), normal(&mut rng, &[50, 90]), normal(&mut rng, &[50]));
    let whole = Op::new(vec![x.clone()], vec![w.clone(), b.clone()], |t, v, p| {
        t.linear(&v[0], &Weight::of(p[0]).with_bias(Some(p[1])))
    });
    let shares = Op::new(vec![x], vec![w, b], |t, v, p| {
        let w = Weight::of(p[0]);
        let first = t.linear(&t.columns(&v[0], 0..30)?, &w.columns(0..30).with_bias(Some(p[1])))?;
        t.add(&first, &t.linear(&t.columns(&v[0], 30..90)?, &w.columns(30..90))?)
    });
    let ((y, _, dy), (y2, _, dy2)) = (whole.gradients(1), shares.gradients(1));
    assert_close("values", &y2.f32s(), &y.f32s(), 2e-5, 1e-5);
    for (i, (got, want)) in dy2.iter().zip(&dy).enumerate() {
        assert_close(&format!("gradient {i}"), &got.f32s(), &want.f32s(), 2e-5, 1e-5);
    }
}

#[test]
fn stacked_layers_are_the_layers_side_by_side() {
    let mut rng = Lcg::new(5);
    for (n, dtype) in [(3, DType::F32), (40, DType::F32), (40, DType::Bf16)] {
        let mut x = |shape: &[usize]| normal(&mut rng, shape);
        let leaves = vec![x(&[n, 30]), x(&[n, 50])];
        let weights = [x(&[20, 30]), x(&[30, 30])].map(|w| w.cast(dtype).unwrap());
        let params = [weights.to_vec(), vec![x(&[20]), x(&[30])]].concat();
        let stacked = Op::new(leaves.clone(), params.clone(), |t, v, p| {
            let layer = |i: usize| Weight::of(p[i]).with_bias(Some(p[i + 2]));
            t.linear_add(&v[0], &Weight::stacked(&[&layer(0), &layer(1)]), &v[1])
        });
        let whole = [weights[0].to_f32(), weights[1].to_f32()].concat();
        let bias = [params[2].to_f32(), params[3].to_f32()].concat();
        let params = vec![matrix(whole, &[50, 30]), matrix(bias, &[50])];
        let one = Op::new(leaves, params, |t, v, p| {
            let y = t.linear(&v[0], &Weight::of(p[0]).with_bias(Some(p[1])))?;
            t.add(&v[1], &y)
        });
        let ((y, _, dy), (y2, _, dy2)) = (stacked.gradients(1), one.gradients(1));
        assert_close("values", &y.f32s(), &y2.f32s(), 2e-5, 1e-5);
        let parts = [&dy[2], &dy[3], &dy[4], &dy[5]].map(Tensor::to_f32);
        let [dw, db] = [[&parts[0][..], &parts[1]].concat(), [&parts[2][..], &parts[3]].concat()];
        let got = [dy[0].to_f32(), dy[1].to_f32(), dw, db];
        for (i, (got, want)) in got.iter().zip(&dy2).enumerate() {
            assert_close(&format!("gradient {i}"), got, &want.f32s(), 2e-5, 1e-5);
        }
    }
}

#[test]
fn rope_of_added_rows_is_gather_add_and_rope() {
    let mut rng = Lcg::new(3);
    // No row is added twice; most are not added at all.
    let index = rows((0..30).map(|i| if i % 4 == 0 { u32::MAX } else { i * 7 % 31 }));
    let leaves = vec![normal(&mut rng, &[30, 20]), normal(&mut rng, &[31, 25])];
    let table = |f: fn(f32) -> f32| matrix((0..90).map(|i| f(i as f32 * 0.3)).collect(), &[30, 3]);
    let (cos, sin, positions) = (table(f32::cos), table(f32::sin), rows((0..30).rev()));
    let rope = Rope { n_heads: 2, head_dim: 8, cos, sin, positions };
    let (other, same) = (index.clone(), rope.clone());
    let fused = Op::new(leaves.clone(), vec![], move |t, v, _| {
        t.rope_added(&v[0], &rope, &Part::new(&v[1], 5), &index)
    });
    let apart = Op::new(leaves, vec![], move |t, v, _| {
        let added = t.gather_rows(&t.columns(&v[1], 5..25)?, &other)?;
        t.rope(&t.add(&v[0], &added)?, &same)
    });
    let ((y, _, dy), (y2, _, dy2)) = (fused.gradients(1), apart.gradients(1));
    assert_eq!(bits(&y), bits(&y2));
    assert!(dy.iter().zip(&dy2).all(|(a, b)| bits(a) == bits(b)));
}

#[test]
fn added_rows_gather_the_gradients_of_all_who_read_them() {
    let mut rng = Lcg::new(4);
    let leaves = vec![normal(&mut rng, &[5, 8]), normal(&mut rng, &[5, 8])];
    let none = matrix(vec![], &[1, 0]);
    let rope = Rope { n_heads: 0, head_dim: 8, cos: none.clone(), sin: none, positions: rows([0; 5]) };
    let op = Op::new(leaves, vec![], move |t, v, _| {
        let table = Part::new(&v[1], 0);
        let once = t.rope_added(&v[0], &rope, &table, &rows([4, 3, 2, 1, 0]))?;
        t.add(&t.rope_added(&once, &rope, &table, &rows([u32::MAX, 0, 1, 2, 3]))?, &v[1])
    });
    let (_, dy, gradients) = op.gradients(1);
    let dy: Vec<Vec<f32>> = dy.f32s().chunks(8).map(<[f32]>::to_vec).collect();
    let want = (0..5).flat_map(|row| {
        let next = dy.get(row + 1).cloned().unwrap_or(vec![0.0; 8]);
        let sum = dy[row].iter().zip(&dy[4 - row]).zip(next).map(|((a, b), c)| a + b + c);
        sum.collect::<Vec<_>>()
    });
    assert_close("table", &gradients[1].f32s(), &want.collect::<Vec<_>>(), 1e-6, 1e-6);
}

#[test]
fn rms_norm_agrees_with_its_formula() {
    for (name, d) in [("rms_norm", 40), ("rms_norm per head", 16)] {
        let op = op(name, 9);
        let (x, w) = (f64s(&op.leaves[0]), f64s(&op.params[0]));
        let expected = x.chunks(d).flat_map(|row| {
            let rms = (row.iter().map(|v| v * v).sum::<f64>() / d as f64 + 1e-5).sqrt();
            row.iter().zip(&w).map(move |(x, w)| (x / rms * w) as f32)
        });
        assert_close(name, &op.value().f32s(), &expected.collect::<Vec<_>>(), 1e-6, 1e-6);
    }
}

#[test]
fn rope_rotates_pairs_and_leaves_the_rest() {
    for (name, half, width) in [("rope", 8, 48), ("rope, partial", 5, 32)] {
        let op = op(name, 9);
        let (x, y) = (f64s(&op.leaves[0]), op.value().to_f32());
        for (i, got) in y.into_iter().enumerate() {
            let (r, j) = (i / width, i % 16);
            let position = (r * 3 % 11) as f64;
            let angle = position / 1.7f64.powi((j % half) as i32);
            let expected = match j {
                j if j < half => x[i] * angle.cos() - x[i + half] * angle.sin(),
                j if j < 2 * half => x[i] * angle.cos() + x[i - half] * angle.sin(),
                _ => x[i],
            };
            assert!((f64::from(got) - expected).abs() < 1e-5, "{name} [{i}]: {got}, want {expected}");
        }
    }
}

#[test]
fn swiglu_agrees_with_its_formula_far_out_too() {
    let gate: Vec<f32> = (-1500..1500).map(|i| i as f32 * 0.1).collect();
    let up: Vec<f32> = gate.iter().map(|g| 1.0 + g.sin()).collect();
    let silu = |g: f64| g / (1.0 + (-g).exp());
    let expected: Vec<f32> =
        gate.iter().zip(&up).map(|(g, u)| (silu(f64::from(*g)) * f64::from(*u)) as f32).collect();
    let packed = gate.chunks(100).zip(up.chunks(100)).flat_map(|(g, u)| [g, u].concat()).collect();
    let op = Op::new(vec![matrix(packed, &[30, 200])], vec![], |t, v, _| t.swiglu(&v[0]));
    assert_close("swiglu", &op.value().f32s(), &expected, 1e-6, 1e-6);
}

#[test]
fn rows_move_as_told() {
    let x = matrix((0..12).map(|v| v as f32).collect(), &[4, 3]);
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let mut params = Params::new();
        let table = params.add("table", x.cast(dtype).unwrap(), false);
        let tape = Tape::inference(&params);
        let input = tape.input(x.cast(dtype).unwrap());
        let looked_up = tape.embedding(table, &rows([3, 0, 3])).unwrap();
        assert_eq!(looked_up.value().to_f32(), [9.0, 10.0, 11.0, 0.0, 1.0, 2.0, 9.0, 10.0, 11.0]);
        let gathered = tape.gather_rows(&input, &rows([u32::MAX, 1])).unwrap();
        assert_eq!(gathered.value().to_f32(), [0.0, 0.0, 0.0, 3.0, 4.0, 5.0]);
        assert_eq!(tape.columns(&input, 1..2).unwrap().value().to_f32(), [1.0, 4.0, 7.0, 10.0]);
        let part = |from: [u32; 2], to: [u32; 2]| Collected {
            source: input.clone(),
            from: rows(from),
            to: rows(to),
        };
        let collected = tape.collect_rows(vec![part([0, 1], [3, 0]), part([0, 2], [1, 2])], 4).unwrap();
        let expected = [3.0, 4.0, 5.0, 0.0, 1.0, 2.0, 6.0, 7.0, 8.0, 0.0, 1.0, 2.0];
        assert_eq!(collected.value().to_f32(), expected);
    }
}

/// Best place and log-sum-exp of each row in float64.
fn plain_stats(logits: &[f32], vocab: usize) -> (Vec<u32>, Vec<f32>) {
    let row = |row: &[f32]| {
        let best = (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        let top = f64::from(row[best]);
        let sum: f64 = row.iter().map(|&v| (f64::from(v) - top).exp()).sum();
        (best as u32, (top + sum.ln()) as f32)
    };
    logits.chunks(vocab).map(row).unzip()
}

#[test]
fn vocabulary_statistics_agree_and_the_first_of_equals_wins() {
    let mut rng = Lcg::new(6);
    for (n, vocab, k) in [(1, 1, 3), (5, 31, 3), (40, 32, 4), (70, 200, 5), (3, 97, 8)] {
        // Small integers make the products exact and ties frequent, within blocks and across them.
        let mut whole = |shape: &[usize]| {
            let values = (0..shape.iter().product()).map(|_| rng.below(3) as f32 - 1.0).collect();
            matrix(values, shape)
        };
        let (hidden, head) = (whole(&[n, k]), whole(&[vocab, k]));
        let logits = product(&hidden, &head);
        let (argmax, logsumexp) = plain_stats(&logits, vocab);
        let given = Tape::logit_stats(&matrix(logits, &[n, vocab])).unwrap();
        let half = |t: &Tensor| t.cast(DType::Bf16).unwrap();
        for stats in [
            given,
            Tape::vocab_stats(&hidden, &head).unwrap(),
            Tape::vocab_stats(&half(&hidden), &half(&head)).unwrap(),
        ] {
            assert_eq!(stats.argmax.u32s().unwrap(), argmax, "{n} rows of {vocab}");
            assert_close("log-sum-exp", &stats.logsumexp.f32s(), &logsumexp, 1e-6, 1e-6);
        }
    }
    let spread = matrix(vec![-300.0, 500.0, -300.0, 80.0, 0.0, -1e4], &[2, 3]);
    assert_eq!(Tape::logit_stats(&spread).unwrap().logsumexp.to_f32(), [500.0, 80.0]);
}

#[test]
fn gradients_of_earlier_tapes_are_added_to() {
    let mut params = Params::new();
    let w = params.add("w", matrix(vec![1.0, 2.0], &[1, 2]), true);
    let frozen = params.add("frozen", matrix(vec![1.0, 2.0], &[1, 2]), false);
    let run = |grads, weight: f32| {
        let tape = Tape::accumulating(&params, grads);
        let x = tape.input(matrix(vec![3.0, 5.0], &[1, 2]));
        let seeds =
            [w, frozen].map(|id| (tape.linear(&x, &Weight::of(id)).unwrap(), matrix(vec![weight], &[1, 1])));
        tape.backward_from(seeds.to_vec()).unwrap()
    };
    let grads = run(run(crate::Grads::new(), 1.0), 10.0);
    assert_eq!(grads.get(w).unwrap().to_f32(), [33.0, 55.0]);
    assert!(grads.get(frozen).is_none());
    assert_eq!(Device::from_name("cpu").unwrap(), Device::Cpu);
    assert_eq!(Device::from_name("auto").unwrap(), Device::cuda(0).unwrap_or(Device::Cpu));
}
