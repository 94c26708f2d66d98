//! Gated activations: SwiGLU, `silu(gate) * up`, and GEGLU, `gelu(gate) * up`.

use super::rows::for_rows;
use super::simd::{sigmoid, vectorised};
use super::tensor;
use crate::Tensor;

pub(super) fn forward(gate_up: &Tensor) -> Tensor {
    gated(gate_up, |y, gate, up| {
        vectorised(|| y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| *y = u * (g * sigmoid(*g))));
    })
}

/// GELU by its tanh approximation (Hendrycks and Gimpel, 2016), as `x sigmoid(2 z)`, which `x (1 + tanh z) / 2` is.
pub(super) fn geglu(gate_up: &Tensor) -> Tensor {
    gated(gate_up, |y, gate, up| {
        vectorised(|| {
            for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                *y = u * (g * sigmoid(1.595_769 * (g + 0.044_715 * g * g * g)));
            }
        });
    })
}

/// SwiGLU with clamped inputs and a gate of slope `alpha` (gpt-oss).
pub(super) fn clamped(gate_up: &Tensor, alpha: f32, limit: f32) -> Tensor {
    gated(gate_up, |y, gate, up| {
        vectorised(|| {
            for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                let (g, u) = (g.min(limit), u.clamp(-limit, limit));
                *y = (u + 1.0) * (g * sigmoid(alpha * g));
            }
        });
    })
}

/// Rows of what `f` makes of gate and up.
fn gated(gate_up: &Tensor, f: impl Fn(&mut [f32], &[f32], &[f32]) + Sync) -> Tensor {
    let (rows, width) = gate_up.rows_cols();
    let (values, n) = (gate_up.f32s(), width / 2);
    let mut y = vec![0.0; rows * n];
    for_rows(&mut y, n, |r, y| {
        let (gate, up) = values[r * width..][..width].split_at(n);
        f(y, gate, up);
    });
    tensor(y, &[rows, n])
}

pub(super) fn backward(dy: &Tensor, gate_up: &Tensor) -> Tensor {
    let (width, n) = (gate_up.rows_cols().1, dy.rows_cols().1);
    let (dy, values) = (dy.f32s(), gate_up.f32s());
    let mut d = vec![0.0; values.len()];
    for_rows(&mut d, width, |r, d| {
        let (gate, up) = values[r * width..][..width].split_at(n);
        let (dy, (dgate, dup)) = (&dy[r * n..][..n], d.split_at_mut(n));
        vectorised(|| {
            for (((d, dy), g), u) in dgate.iter_mut().zip(dy).zip(gate).zip(up) {
                let s = sigmoid(*g);
                *d = dy * u * s * (1.0 + g * (1.0 - s));
            }
            dup.iter_mut().zip(dy).zip(gate).for_each(|((d, dy), g)| *d = dy * g * sigmoid(*g));
        });
    });
    tensor(d, gate_up.shape())
}
