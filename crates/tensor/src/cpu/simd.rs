//! Inner loops written so that the compiler vectorises them, and run through `pulp` with the widest instructions
//! the processor has. The order of a sum depends on lengths and on the width of the instructions alone: same bits on
//! the same processor.

#![expect(
    clippy::inline_always,
    reason = "a loop is vectorised only where it is inlined into the dispatched body"
)]

use pulp::{Arch, Simd, WithSimd};

const LANES: usize = 16;

/// `e^x` with a relative error below 2e-7 for x in [-87, 88], clamped outside (Cody-Waite reduction and a
/// polynomial of degree 6). Branch-free, so that it vectorises.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    let mut lanes = lanes;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// Folds `f(i)` over `0..n` into one sum, lane by lane.
#[inline(always)]
fn lane_sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let full = n / LANES * LANES;
    for start in (0..full).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
    }
    for i in full..n {
        lanes[i - full] += f(i);
    }
    sum_lanes(lanes)
}

/// One dot product with four independent sums, enough to hide the latency of an addition.
#[inline(always)]
fn dot_with<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let ((a_wide, a_rest), (b_wide, b_rest)) = (S::as_simd_f32s(&a[..n]), S::as_simd_f32s(&b[..n]));
    let ((a4, a1), (b4, b1)) = (a_wide.as_chunks::<4>(), b_wide.as_chunks::<4>());
    let mut sums = [simd.splat_f32s(0.0); 4];
    for (a, b) in a4.iter().zip(b4) {
        for i in 0..4 {
            sums[i] = simd.mul_add_f32s(a[i], b[i], sums[i]);
        }
    }
    for (a, b) in a1.iter().zip(b1) {
        sums[0] = simd.mul_add_f32s(*a, *b, sums[0]);
    }
    let halves = [simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3])];
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(simd.add_f32s(halves[0], halves[1])) + rest
}

struct Dot<'a>(&'a [f32], &'a [f32]);

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        dot_with(simd, self.0, self.1)
    }
}

/// The dot product.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    Arch::new().dispatch(Dot(a, b))
}

/// All dot products of rows of `x`, each `k` long, with `rows`: `out[j][r] = x[r] · rows[j]`.
pub(super) struct Products<'a> {
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    pub(super) rows: &'a [&'a [f32]],
    pub(super) out: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let n = self.x.len() / self.k;
        for (row, out) in self.rows.iter().zip(self.out.chunks_exact_mut(n)) {
            for (x, out) in self.x.chunks_exact(self.k).zip(out) {
                *out = dot_with(simd, x, row);
            }
        }
    }
}

impl Products<'_> {
    /// Computes them.
    pub(super) fn run(self) {
        Arch::new().dispatch(self);
    }
}

/// `y += factor * x`.
pub(super) fn axpy(y: &mut [f32], factor: f32, x: &[f32]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (y, x) in y.iter_mut().zip(x) {
                *y += factor * x;
            }
        },
    );
}

/// The largest element; negative infinity of nothing.
pub(super) fn max(x: &[f32]) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let (chunks, rest) = x.as_chunks::<LANES>();
            for chunk in chunks {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane = if *v > *lane { *v } else { *lane };
                }
            }
            lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
        },
    )
}

/// Replaces x by `e^(x - shift)` and returns the sum.
pub(super) fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for v in x.iter_mut() {
                *v = exp(*v - shift);
            }
            lane_sum(x.len(), |i| x[i])
        },
    )
}

/// Replaces x by `e^(x - shift)`.
pub(super) fn exp_shifted(x: &mut [f32], shift: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || x.iter_mut().for_each(|v| *v = exp(*v - shift)),
    );
}

/// The sum of `e^(x - shift)`.
pub(super) fn sum_exp(x: &[f32], shift: f32) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || lane_sum(x.len(), |i| exp(x[i] - shift)),
    )
}

/// `x *= factor`.
pub(super) fn scale(x: &mut [f32], factor: f32) {
    Arch::new().dispatch(
        #[inline(always)]
        || x.iter_mut().for_each(|v| *v *= factor),
    );
}

/// `sigmoid(x)`, vectorisable.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Runs an element-wise loop with the processor's widest instructions.
#[inline(always)]
pub(super) fn vectorised<T>(f: impl FnOnce() -> T) -> T {
    Arch::new().dispatch(f)
}

/// `sum_v min(scale_p · p_v, q_v)` and `sum_v [q_v < scale_p · p_v] q_v`.
pub(super) fn overlap(p: &[f32], scale_p: f32, q: &[f32]) -> (f32, f32) {
    let n = p.len();
    let q = &q[..n];
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let min = lane_sum(n, |i| if q[i] < scale_p * p[i] { q[i] } else { scale_p * p[i] });
            let below = lane_sum(n, |i| if q[i] < scale_p * p[i] { q[i] } else { 0.0 });
            (min, below)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_the_exact_value() {
        for i in -8600..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - exact) / exact).abs() < 2.5e-7, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_agree_with_plain_loops_at_every_length() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
            let plain: f32 = x.iter().map(|v| v * v).sum();
            assert!((dot(&x, &x) - plain).abs() < 1e-4);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let expected: f32 = x.iter().map(|v| (v - 1.0).exp()).sum();
            assert!((sum_exp(&x, 1.0) - expected).abs() < 1e-4);
        }
    }
}
