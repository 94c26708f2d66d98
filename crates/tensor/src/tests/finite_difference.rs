//! Gradients against central differences.
//!
//! The derivative of a scalar L along a direction u is estimated from four values by Richardson's rule,
//! `(8 (L(h) - L(-h)) - (L(2h) - L(-2h))) / 12h`, whose error is of order h⁴: at h = 0.02 below 1e-5 of the
//! gradient for functions whose derivatives are all of order one. L is a float64 sum of float32 outputs, each wrong by
//! a few units of its last place, so the estimate is uncertain by about `1e-6 · |outputs| / h`: the noise floor. Along
//! a random normal direction the derivative is about the gradient's norm, so a tolerance of 2e-3 of that norm lies far
//! above both errors and far below what a wrong formula does. Directions that touch only a window of the elements find
//! errors in small parts of a gradient.

use specforge_testkit::Lcg;

use super::{Op, attend, attention_of, documents, heads, matrix, normal, rows, zoo};
use crate::{AttentionShape, DType, Spans, Tensor};

/// How far to go, and how exact to be.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub(super) h: f64,
    /// Relative to the norm of the gradient in the direction's window.
    pub(super) tolerance: f64,
    /// The size of the outputs that L sums.
    pub(super) outputs: f64,
}

/// Compares `gradient` with differences of `objective` around `x`.
pub(super) fn compare(
    name: &str,
    x: &[f32],
    gradient: &[f32],
    step: Step,
    objective: impl Fn(&[f64]) -> f64,
) {
    const WINDOWS: usize = 6;
    assert_eq!(x.len(), gradient.len(), "{name}: one gradient per element");
    let mut rng = Lcg::new(3);
    for k in 0..2 + WINDOWS {
        let window =
            if k < 2 { 0..x.len() } else { (k - 2) * x.len() / WINDOWS..(k - 1) * x.len() / WINDOWS };
        let u: Vec<f32> =
            (0..x.len()).map(|i| if window.contains(&i) { rng.normal() } else { 0.0 }).collect();
        let at = |h: f64| {
            let moved: Vec<f64> = x.iter().zip(&u).map(|(x, u)| f64::from(*x) + h * f64::from(*u)).collect();
            objective(&moved)
        };
        let h = step.h;
        let numeric = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
        let analytic: f64 = gradient.iter().zip(&u).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
        let norm = gradient[window.clone()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let (noise, allowed) = (1e-6 * step.outputs / h, step.tolerance * norm);
        assert!(
            (numeric - analytic).abs() <= allowed + noise,
            "{name}, elements {window:?}: gradient {analytic}, differences {numeric}, allowed {allowed} + {noise}"
        );
    }
}

/// Checks the gradients of all leaves and parameters of an operation.
fn check(name: &str, op: &Op) {
    let (value, dy, gradients) = op.gradients(17);
    let dy: Vec<f64> = dy.f32s().iter().map(|&v| f64::from(v)).collect();
    let total = |y: &Tensor| y.f32s().iter().zip(&dy).map(|(y, d)| f64::from(*y) * d).sum::<f64>();
    let outputs = value.f32s().iter().zip(&dy).map(|(y, d)| (f64::from(*y) * d).powi(2)).sum::<f64>().sqrt();
    let step = Step { h: 0.02, tolerance: 2e-3, outputs };
    // Weights of two bytes are moved as float32 copies: the arithmetic is the same, the storage would round the move.
    let wide = |t: &Tensor| t.cast(DType::F32).unwrap();
    let inputs: Vec<Tensor> = op.leaves.iter().chain(&op.params).map(wide).collect();
    for (i, (input, gradient)) in inputs.iter().zip(&gradients).enumerate() {
        let moved = |x: &[f64]| {
            let mut all = inputs.clone();
            all[i] = matrix(x.iter().map(|&v| v as f32).collect(), input.shape());
            let params = all.split_off(op.leaves.len());
            let (params, ids) = Op { params, leaves: vec![], ..op.clone() }.declared();
            let tape = crate::Tape::inference(&params);
            let leaves: Vec<_> = all.into_iter().map(|t| tape.input(t)).collect();
            total((op.forward)(&tape, &leaves, &ids).unwrap().value())
        };
        compare(&format!("{name}, input {i}"), &input.f32s(), &gradient.f32s(), step, moved);
    }
}

#[test]
fn gradients_of_every_operation_agree_with_differences() {
    for n in [1, 13] {
        for (name, op) in zoo(n) {
            check(&format!("{name}, {n} rows"), &op);
        }
    }
}

#[test]
fn gradients_of_every_head_ratio_and_width_agree() {
    let shapes: [AttentionShape; 5] =
        [heads(1, 1, 8), heads(4, 4, 8), heads(6, 2, 24), heads(3, 1, 5), heads(2, 1, 32)];
    for shape in shapes {
        check(&format!("{shape:?}"), &attention_of(9, shape, &[4, 5], usize::MAX, &[None]));
    }
}

#[test]
fn gradients_of_attention_over_many_blocks_agree() {
    let lengths = [1, 70, 1, 2, 45];
    let n = lengths.iter().sum();
    let shared = rows((0..n as u32).map(|r| if r % 4 == 0 { u32::MAX } else { r / 8 }));
    for window in [usize::MAX, 7, 1] {
        let op = attention_of(n, heads(2, 1, 8), &lengths, window, &[None, Some(shared.clone())]);
        check(&format!("window {window}"), &op);
    }
}

#[test]
fn gradients_of_odd_spans_agree() {
    let mut rng = Lcg::new(2);
    let mut leaves = |queries: usize, keys: usize, extra: usize| {
        let mut x = |n| normal(&mut rng, &[n, 8]);
        let mut all = vec![x(queries), x(keys), x(keys)];
        if extra > 0 {
            all.extend([x(extra), x(extra)]);
        }
        all
    };
    let shape = heads(1, 1, 8);
    let spans = |lo: &[u32], hi: &[u32]| Spans { lo: rows(lo.to_vec()), hi: rows(hi.to_vec()) };
    // Empty, reversed, overlapping, and repeated spans; more keys than queries.
    let odd = spans(&[0, 0, 3, 5, 5, 6, 6, 9], &[0, 2, 2, 4, 7, 8, 8, 9]);
    let some = rows([u32::MAX, 0, 1, 1, u32::MAX, 2, 0, u32::MAX]);
    check("odd spans", &attend(shape, odd.clone(), leaves(8, 9, 0), vec![]));
    check("odd spans and extras", &attend(shape, odd, leaves(8, 9, 3), vec![Some(some.clone())]));
    // Nothing but extras.
    let none = spans(&[0; 8], &[0; 8]);
    check("only extras", &attend(shape, none.clone(), leaves(8, 0, 3), vec![Some(some)]));
    check("only own rows", &attend(shape, none, leaves(8, 4, 8), vec![None]));
    // Queries that all see every key (block-parallel drafting).
    let bidirectional = spans(&[0, 0, 0, 3, 3, 3], &[3, 3, 3, 6, 6, 6]);
    check("bidirectional", &attend(shape, bidirectional, leaves(6, 6, 0), vec![]));
    check("one document", &attend(shape, documents(&[6], usize::MAX), leaves(6, 6, 0), vec![]));
}
