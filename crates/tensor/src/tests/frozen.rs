//! Operations that only frozen targets use: their values, and that they refuse a gradient.

use specforge_testkit::assert_close;

use super::attention::{leaves_of, plain_of};
use super::{Op, documents, heads, matrix, rows};
use crate::{Activation, Attention, AttentionShape, KeyValue, Part, Spans, Tensor};

/// Numbers from far below 0 to far above, `[30, 40]`.
fn spread() -> Tensor {
    matrix((0..1200).map(|i| (i as f32 - 600.0) * 0.03).collect(), &[30, 40])
}

/// Operations of one value by name.
pub(crate) fn element_wise() -> Vec<(&'static str, Op)> {
    vec![
        ("geglu", Op::new(vec![spread()], vec![], |t, v, _| t.geglu(&v[0]))),
        ("soft_cap", Op::new(vec![spread()], vec![], |t, v, _| t.soft_cap(&v[0], 5.0))),
        (
            "product",
            Op::new(vec![spread()], vec![], |t, v, _| {
                t.product(&Part::new(&v[0], 3), &Part::new(&v[0], 20), 17)
            }),
        ),
        ("short_conv", short_conv()),
        ("swiglu_clamped", Op::new(vec![spread()], vec![], |t, v, _| t.swiglu_clamped(&v[0], 1.702, 7.0))),
        ("activated", Op::new(vec![spread()], vec![], |t, v, _| t.activated(&v[0], Activation::Sigmoid))),
        ("activated", Op::new(vec![spread()], vec![], |t, v, _| t.activated(&v[0], Activation::Silu))),
    ]
}

/// As [`attend`](super::attend), of capped scores.
pub(crate) fn capped(
    shape: AttentionShape,
    spans: Spans,
    leaves: Vec<Tensor>,
    indices: Vec<Option<Tensor>>,
    cap: f32,
) -> Op {
    Op::new(leaves, vec![], move |tape, v, _| {
        let there = |t: &Tensor| t.to_device(v[0].value().device());
        let mut extras = Vec::new();
        for (e, index) in indices.iter().enumerate() {
            let index = index.as_ref().map(there).transpose()?;
            extras.push((KeyValue::new(&v[3 + 2 * e], &v[4 + 2 * e]), index));
        }
        let spans = Spans { lo: there(&spans.lo)?, hi: there(&spans.hi)? };
        let (query, base) = (Part::new(&v[0], 0), KeyValue::new(&v[1], &v[2]));
        let attention = Attention { shape, query, base: &base, spans: &spans, extras: &extras };
        tape.attention_capped(&attention, cap)
    })
}

/// Three taps over 30 rows, 25 of them read; row r reads r, another, and none where r is a multiple of 5.
fn short_conv() -> Op {
    let third = |r: u32| if r.is_multiple_of(5) { u32::MAX } else { 29 - r };
    let index: Vec<u32> = (0..25).chain((0..25).map(|r| r * 7 % 30)).chain((0..25).map(third)).collect();
    let w = matrix((0..120).map(|i| (i as f32).cos()).collect(), &[40, 1, 3]);
    Op::new(vec![spread()], vec![w], move |t, v, p| {
        t.short_conv(&v[0], &rows(index.clone()).to_device(v[0].value().device())?, p[0])
    })
}

fn check_values(name: &str, got: &Tensor, expected: impl Iterator<Item = f64>) {
    let expected: Vec<f32> = expected.map(|v| v as f32).collect();
    assert_close(name, &got.f32s(), &expected, 2e-6, 2e-6);
}

#[test]
fn values_agree_with_their_formulas() {
    let x: Vec<f64> = spread().f32s().iter().map(|&v| f64::from(v)).collect();
    let gelu =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
    let geglu = x.chunks(40).flat_map(|row| (0..20).map(move |i| gelu(row[i]) * row[20 + i]));
    let [(_, gated), (_, capped), (_, product), (_, conv), (_, clamped), (_, sigmoid), (_, silu)] =
        &element_wise()[..]
    else {
        unreachable!()
    };
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
    check_values("sigmoid", &sigmoid.value(), x.iter().map(|v| logistic(*v)));
    check_values("silu", &silu.value(), x.iter().map(|v| v * logistic(*v)));
    let clamp = |g: f64, u: f64| (u.clamp(-7.0, 7.0) + 1.0) * g.min(7.0) * logistic(1.702 * g.min(7.0));
    let clamps = x.chunks(40).flat_map(|row| (0..20).map(move |i| clamp(row[i], row[20 + i])));
    check_values("swiglu_clamped", &clamped.value(), clamps);
    check_values("geglu", &gated.value(), geglu);
    check_values("soft_cap", &capped.value(), x.iter().map(|v| 5.0 * (v / 5.0).tanh()));
    let products = x.chunks(40).flat_map(|row| (0..17).map(move |i| row[3 + i] * row[20 + i]));
    check_values("product", &product.value(), products);
    let tap = |c: usize, k: usize| f64::from(((3 * c + k) as f32).cos());
    let conv_row = |r: usize| {
        let x = &x;
        (0..40).map(move |c| {
            let third = if r.is_multiple_of(5) { 0.0 } else { tap(c, 2) * x[(29 - r) * 40 + c] };
            tap(c, 0) * x[r * 40 + c] + tap(c, 1) * x[r * 7 % 30 * 40 + c] + third
        })
    };
    let expected: Vec<f32> = (0..25).flat_map(conv_row).map(|v| v as f32).collect();
    assert_close("short_conv", &conv.value().f32s(), &expected, 1e-5, 1e-5);
    let scaled = Op::new(vec![spread()], vec![], |t, v, _| t.scale(&v[0], 0.22));
    check_values("scale", &scaled.value(), x.iter().map(|v| 0.22 * v));
}

#[test]
fn capped_scores_agree_with_a_plain_softmax() {
    let (shape, spans, cap) = (heads(4, 2, 24), documents(&[1, 40, 20], 30), 0.7);
    let index = rows((0..61).map(|r| if r % 5 == 1 { u32::MAX } else { r * 7 % 61 }));
    for indices in [vec![], vec![Some(index)]] {
        let leaves = leaves_of(shape, 61, 61, indices.len());
        let squashed = |score: f64| cap * (score / cap).tanh();
        let [expected, _] = plain_of(shape, &spans, &leaves, &indices, None, squashed);
        let got = capped(shape, spans.clone(), leaves, indices, cap as f32);
        assert_close("capped attention", &got.value().f32s(), &expected, 2e-6, 2e-5);
        let error = got.try_gradients(1).unwrap_err().to_string();
        assert_eq!(error, "attention_capped has no gradient: only frozen targets use it");
    }
}

#[test]
fn sinks_are_parameters_of_an_attention_without_gradient() {
    let (shape, spans) = (heads(4, 2, 24), documents(&[1, 40, 20], 30));
    let leaves = leaves_of(shape, 61, 61, 0);
    let sinks = matrix(vec![-3.0, 0.5, 2.0, 4.0], &[4]);
    let [expected, _] = plain_of(shape, &spans, &leaves, &[], Some(&sinks), |score| score);
    let op = Op::new(leaves, vec![sinks], move |tape, v, p| {
        let (query, base) = (Part::new(&v[0], 0), KeyValue::new(&v[1], &v[2]));
        tape.attention_with_sinks(&Attention { shape, query, base: &base, spans: &spans, extras: &[] }, p[0])
    });
    assert_close("sinks", &op.value().f32s(), &expected, 2e-6, 2e-5);
    let error = op.try_gradients(1).unwrap_err().to_string();
    assert_eq!(error, "attention_with_sinks has no gradient: only frozen targets use it");
}

#[test]
fn they_have_no_gradient() {
    for (name, op) in element_wise() {
        let error = op.try_gradients(1).unwrap_err().to_string();
        assert_eq!(error, format!("{name} has no gradient: only frozen targets use it"));
    }
}
