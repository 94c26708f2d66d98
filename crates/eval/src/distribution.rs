//! From logits to tokens: argmax, softmax with temperature, top-p, and drawing. Probabilities are float64 so that
//! residuals of rejection sampling keep their small entries.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::{Error, Result, Sampling};

/// The most probable token: the largest logit, the first of equals.
pub(crate) fn argmax(logits: &[f32], model: &'static str) -> Result<u32> {
    check_finite(logits, model)?;
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    Ok(best as u32)
}

/// The probabilities of `logits` divided by `temperature`.
pub(crate) fn softmax(logits: &[f32], temperature: f64, model: &'static str) -> Result<Vec<f64>> {
    check_finite(logits, model)?;
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut p: Vec<f64> = logits.iter().map(|&x| ((f64::from(x) - max) / temperature).exp()).collect();
    normalise(&mut p);
    Ok(p)
}

/// The distribution a token is drawn from: softmax at the request's temperature, cut by top-p.
pub(crate) fn target_distribution(logits: &[f32], sampling: &Sampling) -> Result<Vec<f64>> {
    let mut p = softmax(logits, sampling.temperature, "target")?;
    if sampling.top_p < 1.0 {
        keep_top_p(&mut p, sampling.top_p);
    }
    Ok(p)
}

/// Keeps the fewest most probable tokens that reach `top_p` together (equals in the order of their ids).
fn keep_top_p(p: &mut [f64], top_p: f64) {
    let order = most_probable(p, p.len());
    let mut mass = 0.0;
    for token in order {
        if mass >= top_p {
            p[token] = 0.0;
        } else {
            mass += p[token];
        }
    }
    normalise(p);
}

/// The `k` most probable tokens, best first, equals in the order of their ids.
pub(crate) fn most_probable(p: &[f64], k: usize) -> Vec<usize> {
    let better = |a: &usize, b: &usize| p[*b].total_cmp(&p[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..p.len()).collect();
    if k < order.len() {
        order.select_nth_unstable_by(k, better);
        order.truncate(k);
    }
    order.sort_unstable_by(better);
    order
}

/// Scales non-negative weights to the sum 1; weights that are all 0 stay.
pub(crate) fn normalise(p: &mut [f64]) {
    let sum: f64 = p.iter().sum();
    if sum > 0.0 {
        p.iter_mut().for_each(|x| *x /= sum);
    }
}

/// Draws an index with probability proportional to its weight; never one of weight 0. `None` if all are.
pub(crate) fn draw(weights: &[f64], rng: &mut ChaCha8Rng) -> Option<usize> {
    let threshold = uniform(rng) * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let mut last = None;
    for (index, &weight) in weights.iter().enumerate().filter(|&(_, &w)| w > 0.0) {
        sum += weight;
        last = Some(index);
        if threshold < sum {
            break;
        }
    }
    last
}

/// A number in [0, 1) of 53 random bits.
pub(crate) fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Minus infinity is a token that is ruled out; all other non-finite values, or nothing left, are damage.
fn check_finite(logits: &[f32], model: &'static str) -> Result<()> {
    let bad = |x: &f32| x.is_nan() || *x == f32::INFINITY;
    let damaged = logits.iter().position(bad);
    let nothing_left = || logits.iter().all(|&x| x == f32::NEG_INFINITY).then_some(0);
    match damaged.or_else(nothing_left) {
        Some(token) => {
            let value = logits.get(token).copied().unwrap_or(f32::NAN);
            Err(Error::NonFinite { model, token, value })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use specforge_nn::init::stream;

    use super::*;

    #[test]
    fn argmax_takes_the_first_of_equals_and_refuses_damage() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, f32::NEG_INFINITY], "target").unwrap(), 1);
        for logits in [&[0.0, f32::NAN][..], &[0.0, f32::INFINITY], &[f32::NEG_INFINITY], &[]] {
            let error = argmax(logits, "draft").expect_err("must be refused").to_string();
            assert!(error.contains("the draft's logits are not finite"), "{error}");
        }
    }

    #[test]
    fn softmax_divides_by_the_temperature() {
        let p = softmax(&[0.0, 2.0 * 3.0f32.ln()], 2.0, "target").unwrap();
        assert!((p[1] - 0.75).abs() < 1e-7, "{p:?}");
        assert_eq!(softmax(&[0.0, 1.0], 1e-9, "target").unwrap(), [0.0, 1.0]);
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses() {
        let logits: Vec<f32> = [0.1f32, 0.4, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let p = target_distribution(&logits, &Sampling { temperature: 1.0, top_p: 0.6, seed: 0 }).unwrap();
        assert_eq!((p[0], p[3]), (0.0, 0.0));
        assert!((p[1] - 4.0 / 7.0).abs() < 1e-6 && (p[2] - 3.0 / 7.0).abs() < 1e-6, "{p:?}");
    }

    #[test]
    fn draws_follow_the_weights_and_never_take_a_zero() {
        let mut rng = stream(1, "draw");
        let mut counts = [0; 4];
        for _ in 0..10_000 {
            counts[draw(&[0.0, 1.0, 3.0, 0.0], &mut rng).expect("weights")] += 1;
        }
        assert_eq!((counts[0], counts[3]), (0, 0));
        assert!((counts[1] as f64 / 10_000.0 - 0.25).abs() < 0.02, "{counts:?}");
        assert_eq!(draw(&[0.0, 0.0], &mut rng), None);
    }

    #[test]
    fn the_most_probable_are_ordered() {
        assert_eq!(most_probable(&[0.1, 0.4, 0.4, 0.1], 3), [1, 2, 0]);
        assert_eq!(most_probable(&[0.1, 0.9], 5), [1, 0]);
    }
}
