//! RMSNorm, forward and backward, over groups of the weight's width.

use rayon::prelude::*;

use super::rows::{for_rows, onto};
use super::simd::{axpy, dot, vectorised};
use super::{f32_mut, tensor};
use crate::Tensor;

pub(super) fn forward(x: &Tensor, w: &Tensor, eps: f32) -> (Tensor, Tensor) {
    let (values, w) = (x.f32s(), w.f32s());
    let d = w.len();
    let mut rstd = vec![0.0; values.len() / d];
    for_rows(&mut rstd, 1, |r, out| {
        let row = &values[r * d..][..d];
        out[0] = 1.0 / (dot(row, row) / d as f32 + eps).sqrt();
    });
    let mut y = vec![0.0; values.len()];
    for_rows(&mut y, d, |r, row| {
        let (x, scale) = (&values[r * d..][..d], rstd[r]);
        vectorised(|| row.iter_mut().zip(x).zip(w.iter()).for_each(|((y, x), w)| *y = x * scale * w));
    });
    let n = rstd.len();
    (tensor(y, x.shape()), tensor(rstd, &[n]))
}

/// With x̂ = x·rstd and g = dy·w: `dx = rstd (g - x̂ mean(g x̂))`, `dw = Σ dy x̂`.
pub(super) fn backward(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    rstd: &Tensor,
    dw: Option<&mut Tensor>,
    into: Option<Tensor>,
) -> Tensor {
    let shape = x.shape();
    let (dy, x, w, rstd) = (dy.f32s(), x.f32s(), w.f32s(), rstd.f32s());
    let d = w.len();
    let mut dx = vec![0.0; x.len()];
    for_rows(&mut dx, d, |r, dx| {
        let (x, dy, rstd) = (&x[r * d..][..d], &dy[r * d..][..d], rstd[r]);
        vectorised(|| dx.iter_mut().zip(dy).zip(w.iter()).for_each(|((g, dy), w)| *g = dy * w));
        let mean = dot(dx, x) * rstd * rstd / d as f32;
        axpy(dx, -mean, x);
        vectorised(|| dx.iter_mut().for_each(|v| *v *= rstd));
    });
    if let Some(dw) = dw {
        add_weight_gradient(f32_mut(dw), &dy, &x, &rstd);
    }
    onto(into, tensor(dx, shape))
}

/// Blocks of rows are summed apart and added up in order.
fn add_weight_gradient(dw: &mut [f32], dy: &[f32], x: &[f32], rstd: &[f32]) {
    const ROWS: usize = 64;
    let d = dw.len();
    let sums: Vec<Vec<f32>> = rstd
        .par_chunks(ROWS)
        .enumerate()
        .map(|(block, rstd)| {
            let mut sum = vec![0.0; d];
            for (i, scale) in rstd.iter().enumerate() {
                let r = block * ROWS + i;
                let (dy, x) = (&dy[r * d..][..d], &x[r * d..][..d]);
                vectorised(|| sum.iter_mut().zip(dy).zip(x).for_each(|((s, dy), x)| *s += dy * x * scale));
            }
            sum
        })
        .collect();
    sums.iter().for_each(|sum| dw.iter_mut().zip(sum).for_each(|(d, s)| *d += s));
}
