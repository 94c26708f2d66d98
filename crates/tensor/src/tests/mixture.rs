//! Mixtures of experts against their rules written out in float64.

use specforge_testkit::{Lcg, assert_close};

use super::{bits, matrix, normal, rows};
use crate::kernels::Router;
use crate::{DType, Device, Experts, Groups, Params, RouterParams, Routes, Routing, Scoring, Tape, Tensor};

/// Inputs of a router over 12 experts.
pub(crate) struct Inputs {
    pub(crate) x: Tensor,
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
    pub(crate) correction: Option<Tensor>,
    pub(crate) rule: Routing,
}

impl Inputs {
    pub(crate) fn routes(&self) -> Routes {
        let Self { x, weight, bias, correction, rule } = self;
        let (bias, correction) = (bias.as_ref(), correction.as_ref());
        x.device().kernels().route(x, &Router { weight, bias, correction, rule: *rule }).unwrap()
    }
}

/// Routers of every kind.
pub(crate) fn routers(n: usize) -> Vec<(String, Inputs)> {
    let mut rng = Lcg::new(29);
    let mut all = Vec::new();
    let grouped = |n, kept, best| Some(Groups { n, kept, best });
    for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
        for groups in [None, grouped(4, 2, 1), grouped(4, 2, 2), grouped(3, 1, 2), grouped(1, 1, 2)] {
            for (normalised, scale, is_corrected) in [(true, 1.0, false), (false, 2.5, true)] {
                let mut draw = |shape: &[usize]| normal(&mut rng, shape);
                let rule = Routing { scoring, top_k: 3, groups, normalised, scale };
                let correction = is_corrected.then(|| draw(&[12]));
                let bias = (groups.is_none()).then(|| draw(&[12]));
                let inputs = Inputs { x: draw(&[n, 16]), weight: draw(&[12, 16]), bias, correction, rule };
                all.push((format!("{rule:?}, corrected: {is_corrected}"), inputs));
            }
        }
    }
    all
}

/// Experts and weights of one row, by sorting.
fn plain(inputs: &Inputs, r: usize) -> Vec<(usize, f64)> {
    let (x, w, rule) = (inputs.x.f32s(), inputs.weight.f32s(), inputs.rule);
    let of = |t: &Option<Tensor>, e: usize| t.as_ref().map_or(0.0, |t| f64::from(t.f32s()[e]));
    let product =
        |e: usize| -> f64 { (0..16).map(|i| f64::from(x[r * 16 + i]) * f64::from(w[e * 16 + i])).sum() };
    let logits: Vec<f64> = (0..12).map(|e| product(e) + of(&inputs.bias, e)).collect();
    let sum: f64 = logits.iter().map(|l| l.exp()).sum();
    let score = |e: usize| match rule.scoring {
        Scoring::Softmax => logits[e].exp() / sum,
        Scoring::Sigmoid => 1.0 / (1.0 + (-logits[e]).exp()),
    };
    let worth = |e: usize| match inputs.correction {
        Some(_) => score(e) + of(&inputs.correction, e),
        None => logits[e],
    };
    let sorted = |mut places: Vec<usize>, by: &dyn Fn(usize) -> f64| {
        places.sort_by(|a, b| by(*b).total_cmp(&by(*a)).then(a.cmp(b)));
        places
    };
    let Groups { n, kept, best } = rule.groups.unwrap_or(Groups { n: 1, kept: 1, best: 1 });
    let of_group = |g: usize| (g * 12 / n..(g + 1) * 12 / n).collect::<Vec<_>>();
    let group_worth = |g: usize| sorted(of_group(g), &worth)[..best].iter().map(|&e| worth(e)).sum::<f64>();
    let open = &sorted((0..n).collect(), &group_worth)[..kept];
    let experts = &sorted(open.iter().flat_map(|&g| of_group(g)).collect(), &worth)[..rule.top_k];
    let total: f64 = if rule.normalised { experts.iter().map(|&e| score(e)).sum() } else { 1.0 };
    experts.iter().map(|&e| (e, score(e) / total * f64::from(rule.scale))).collect()
}

/// The expert of each pair.
pub(crate) fn experts_of(routes: &Routes) -> Vec<usize> {
    let (slots, ends) = (routes.slots.to_u32(), routes.ends.to_u32());
    slots.iter().map(|slot| ends.partition_point(|end| end <= slot)).collect()
}

#[test]
fn rows_pick_by_their_rule() {
    for (name, inputs) in routers(40) {
        let routes = inputs.routes();
        let expected: Vec<(usize, f64)> = (0..40).flat_map(|r| plain(&inputs, r)).collect();
        let (experts, weights): (Vec<usize>, Vec<f64>) = expected.into_iter().unzip();
        assert_eq!(experts_of(&routes), experts, "{name}");
        let weights: Vec<f32> = weights.into_iter().map(|w| w as f32).collect();
        assert_close(&name, &routes.weights.f32s(), &weights, 1e-6, 1e-5);
        let pairs = routes.pairs.to_u32();
        assert!(
            routes.slots.to_u32().iter().zip(0..).all(|(&slot, pair)| pairs[slot as usize] == pair),
            "{name}"
        );
        assert!(routes.rows.to_u32().iter().zip(&pairs).all(|(&row, pair)| row == pair / 3), "{name}");
    }
}

/// A router whose logits are these.
pub(crate) fn of_logits(logits: &[f32], rule: Routing, correction: Option<Vec<f32>>) -> Inputs {
    let n = logits.len();
    let correction = correction.map(|c| matrix(c, &[n]));
    Inputs {
        x: matrix(vec![1.0], &[1, 1]),
        weight: matrix(logits.to_vec(), &[n, 1]),
        bias: None,
        correction,
        rule,
    }
}

/// Rows that leave a choice, or nothing to choose by, and what they pick.
pub(crate) fn ties() -> Vec<(Inputs, [usize; 2])> {
    let rule = Routing { scoring: Scoring::Sigmoid, top_k: 2, groups: None, normalised: false, scale: 1.0 };
    let groups = |kept, best| Routing { groups: Some(Groups { n: 2, kept, best }), ..rule };
    let nan = f32::NAN;
    vec![
        (of_logits(&[1.0, 1.0, 1.0, 1.0], rule, None), [0, 1]),
        (of_logits(&[0.0, 2.0, 0.0, 2.0], rule, None), [1, 3]),
        // Both sigmoids round to 1: the larger logit is still the better.
        (of_logits(&[0.0, 30.0, 40.0, 0.0], rule, None), [2, 1]),
        (of_logits(&[1.0, 1.0, 1.0, 1.0], groups(1, 2), None), [0, 1]),
        (of_logits(&[1.0, 0.0, 0.0, 1.0], groups(1, 1), None), [0, 1]),
        // What is corrected below zero is still better than a group that is closed.
        (of_logits(&[0.0, 0.0, 9.0, 9.0], groups(1, 2), Some(vec![-2.0, -3.0, -9.0, -9.0])), [0, 1]),
        (of_logits(&[nan, 0.0, nan, -1.0], rule, None), [1, 3]),
        (of_logits(&[nan; 4], rule, None), [0, 1]),
        (of_logits(&[f32::NEG_INFINITY; 4], groups(1, 2), None), [0, 1]),
    ]
}

#[test]
fn of_equals_the_first_is_picked() {
    for (case, (inputs, expected)) in ties().into_iter().enumerate() {
        assert_eq!(experts_of(&inputs.routes()), expected, "case {case}");
    }
}

/// x `[m, 24]`, matrices `[5, 9, 24]`, biases, and the ends of groups of every size.
pub(crate) fn grouped(ends: [usize; 5]) -> [Tensor; 3] {
    let mut rng = Lcg::new(31);
    [&[ends[4], 24][..], &[5, 9, 24], &[5, 9]].map(|shape| normal(&mut rng, shape))
}

/// The ends of groups as a device has them.
pub(crate) fn ends_on(device: Device, ends: [usize; 5]) -> Tensor {
    Tensor::from_u32(device, ends.map(|end| end as u32).to_vec())
}

/// Few rows and many, and none.
pub(crate) const ENDS: [[usize; 5]; 4] = [[0, 0, 1, 1, 1], [3, 3, 10, 60, 61], [0, 33, 33, 90, 200], [0; 5]];

#[test]
fn each_group_has_its_own_matrix() {
    for ends in ENDS {
        for storage in [DType::F32, DType::Bf16] {
            let [x, w, bias] = grouped(ends);
            let w = w.cast(storage).unwrap();
            let (xs, ws, bs) = (x.f32s(), w.f32s(), bias.f32s());
            let expert = |m: usize| ends.partition_point(|&end| end <= m);
            let element = |m: usize, n: usize, with: f64| {
                let row = (expert(m) * 9 + n) * 24;
                let products = (0..24).map(|k| f64::from(xs[m * 24 + k]) * f64::from(ws[row + k]));
                (products.sum::<f64>() + with * f64::from(bs[expert(m) * 9 + n])) as f32
            };
            for (with, bias) in [(0.0, None), (1.0, Some(&bias))] {
                let there = ends_on(Device::Cpu, ends);
                let got = Device::Cpu.kernels().linear_grouped(&x, &w, bias, &there).unwrap();
                let want: Vec<f32> = (0..ends[4])
                    .flat_map(|m| (0..9).map(move |n| (m, n)))
                    .map(|(m, n)| element(m, n, with))
                    .collect();
                assert_close(&format!("{ends:?}"), &got.f32s(), &want, 1e-5, 1e-5);
                assert_eq!(got.shape(), [ends[4], 9]);
            }
        }
    }
}

#[test]
fn weighted_rows_are_summed() {
    let x = matrix(vec![1.0, 10.0, 2.0, 20.0, 4.0, 40.0], &[3, 2]);
    let (index, weights) = (rows([0, 2, 1, 1]), matrix(vec![1.0, 0.5, 3.0, -1.0], &[4, 1]));
    let base = matrix(vec![100.0, 0.0, 0.0, 7.0], &[2, 2]);
    let sum = |base: Option<&Tensor>| {
        Device::Cpu.kernels().weighted_rows(&x, &index, &weights, base, 2).unwrap().to_f32()
    };
    assert_eq!(sum(None), [3.0, 30.0, 4.0, 40.0]);
    assert_eq!(sum(Some(&base)), [103.0, 30.0, 4.0, 47.0]);
}

#[test]
fn threads_change_no_bit_of_a_mixture() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (_, inputs) = routers(300).swap_remove(1);
            let routes = inputs.routes();
            let [x, w, bias] = grouped(ENDS[2]);
            let ends = ends_on(Device::Cpu, ENDS[2]);
            let y = Device::Cpu.kernels().linear_grouped(&x, &w, Some(&bias), &ends).unwrap();
            (bits(&routes.weights), routes.slots.to_u32(), bits(&y))
        })
    };
    let expected = run(1);
    assert!([2, 4].iter().all(|&threads| run(threads) == expected));
}

#[test]
fn wrong_mixtures_are_refused() {
    let mut params = Params::new();
    let zeros = |shape: &[usize]| Tensor::zeros(Device::Cpu, shape).unwrap();
    let (weight, w) =
        (params.add("router", zeros(&[6, 4]), false), params.add("w", zeros(&[2, 3, 4]), false));
    let bias = params.add("bias", zeros(&[5]), false);
    let tape = Tape::inference(&params);
    let x = tape.input(zeros(&[2, 4]));
    let rule = Routing { scoring: Scoring::Softmax, top_k: 2, groups: None, normalised: true, scale: 1.0 };
    let route = |rule, bias| {
        tape.route(&x, &RouterParams { weight, bias, correction: None, rule }).unwrap_err().to_string()
    };
    assert_eq!(route(rule, Some(bias)), "route: bias has shape [5], expected [6]");
    let message = |n, kept, best| route(Routing { groups: Some(Groups { n, kept, best }), ..rule }, None);
    for (n, kept, best) in [(4, 1, 1), (0, 1, 1), (3, 4, 1), (3, 2, 3)] {
        let got = message(n, kept, best);
        assert!(got.contains(&format!("has shape [{n}, {kept}, {best}], expected 2 of 6 experts")), "{got}");
    }
    assert!(route(Routing { top_k: 7, ..rule }, None).contains("expected 7 of 6 experts"));
    let linear = |w, rows: usize, experts: u32| {
        let weights = zeros(&[rows, 1]);
        let routes = Routes::sorted(experts as usize, 1, &vec![experts - 1; rows], weights);
        tape.linear_grouped(&x, &Experts { weight: w, bias: None }, &routes).unwrap_err().to_string()
    };
    assert_eq!(linear(weight, 2, 6), "linear_grouped: weight has shape [6, 4], expected [E, N, K]");
    assert_eq!(linear(w, 3, 2), "linear_grouped: input has shape [2, 4], expected [3, 4]");
    assert_eq!(linear(w, 2, 1), "linear_grouped: routes has shape [1], expected [2]");
    let rows_of =
        |index: Tensor, k| tape.weighted_rows(&x, &index, &zeros(&[2, 1]), k, None).unwrap_err().to_string();
    assert_eq!(rows_of(rows([0, 2]), 1), "weighted_rows: index 2 is outside the 2 rows of the input");
    assert!(rows_of(rows([0, 1, 1]), 2).contains("weights has shape [2, 1], expected 3 elements"));
    let recording = Tape::recording(&params);
    let leaf = recording.leaf(zeros(&[2, 4]));
    let frozen = recording.route(&leaf, &RouterParams { weight, bias: None, correction: None, rule });
    assert_eq!(frozen.unwrap_err().to_string(), "route has no gradient: only frozen targets use it");
}
