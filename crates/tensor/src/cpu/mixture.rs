//! Mixtures of experts: picking, and weighted sums of rows.

use rayon::prelude::*;

use super::rows::for_rows;
use super::simd::axpy;
use super::{gemm, tensor, u32s};
use crate::Tensor;
use crate::kernels::{Router, Routes, Routing, Scoring};

pub(super) fn route(x: &Tensor, router: &Router<'_>) -> Routes {
    let bias: Vec<&Tensor> = router.bias.into_iter().collect();
    let logits = gemm::linear(x, &[router.weight], 0..x.rows_cols().1, &bias, None);
    let ((rows, n_experts), k) = (logits.rows_cols(), router.rule.top_k);
    let (logits, correction) = (logits.f32s(), router.correction.map(Tensor::f32s));
    let pick_row = |row: &[f32]| pick(row, correction.as_deref(), &router.rule);
    let picked: Vec<(Vec<u32>, Vec<f32>)> = logits.par_chunks(n_experts.max(1)).map(pick_row).collect();
    let (experts, weights): (Vec<_>, Vec<_>) = picked.into_iter().unzip();
    let weights = tensor(weights.concat(), &[rows * k, 1]);
    Routes::sorted(n_experts, k, &experts.concat(), weights)
}

/// The experts of one row, the best first, and their weights.
fn pick(logits: &[f32], correction: Option<&[f32]>, rule: &Routing) -> (Vec<u32>, Vec<f32>) {
    let scores = scores(logits, rule.scoring);
    // Without a correction the order is that of the logits, which rounding of the scores cannot blur.
    let mut worth: Vec<f32> = match correction {
        Some(correction) => scores.iter().zip(correction).map(|(score, c)| score + c).collect(),
        None => logits.to_vec(),
    };
    if let Some(groups) = rule.groups {
        let size = worth.len() / groups.n;
        let of_group = |group: &[f32]| best(group, groups.best).iter().map(|&e| group[e]).sum();
        let worths: Vec<f32> = worth.chunks(size).map(of_group).collect();
        let kept = best(&worths, groups.kept);
        let left_out = (0..groups.n).filter(|group| !kept.contains(group));
        left_out.for_each(|group| worth[group * size..][..size].fill(f32::NEG_INFINITY));
    }
    let experts = best(&worth, rule.top_k);
    let mut weights: Vec<f32> = experts.iter().map(|&e| scores[e]).collect();
    let sum = if rule.normalised { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
    weights.iter_mut().for_each(|w| *w = *w / sum * rule.scale);
    (experts.into_iter().map(|e| e as u32).collect(), weights)
}

fn scores(logits: &[f32], scoring: Scoring) -> Vec<f32> {
    match scoring {
        Scoring::Sigmoid => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
        Scoring::Softmax => {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers: Vec<f32> = logits.iter().map(|l| (l - top).exp()).collect();
            let sum: f32 = powers.iter().sum();
            powers.iter().map(|p| p / sum).collect()
        }
    }
}

/// The places of the `n` largest values, the largest first; of equal ones the first. What is no number counts as the
/// smallest.
fn best(values: &[f32], n: usize) -> Vec<usize> {
    let mut picked: Vec<usize> = Vec::with_capacity(n);
    for _ in 0..n {
        let mut top: Option<(usize, f32)> = None;
        for (at, &value) in values.iter().enumerate().filter(|(at, _)| !picked.contains(at)) {
            let value = if value.is_nan() { f32::NEG_INFINITY } else { value };
            top = top.filter(|(_, most)| value <= *most).or(Some((at, value)));
        }
        picked.extend(top.map(|(at, _)| at));
    }
    picked
}

pub(super) fn weighted_rows(
    x: &Tensor,
    index: &Tensor,
    weights: &Tensor,
    base: Option<&Tensor>,
    k: usize,
) -> Tensor {
    let (index, width) = (u32s(index), x.rows_cols().1);
    let (x, weights, rows) = (x.f32s(), weights.f32s(), index.len() / k.max(1));
    let mut y = base.map_or_else(|| vec![0.0; rows * width], Tensor::to_f32);
    for_rows(&mut y, width, |r, row| {
        for pair in r * k..(r + 1) * k {
            axpy(row, weights[pair], &x[index[pair] as usize * width..][..width]);
        }
    });
    tensor(y, &[rows, width])
}
