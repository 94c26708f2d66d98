//! SwiGLU: `silu(gate) * up`.

use super::rows::for_rows;
use super::simd::{sigmoid, vectorised};
use super::tensor;
use crate::Tensor;

/// Elements per task.
const CHUNK: usize = 1024;

pub(super) fn forward(gate: &Tensor, up: &Tensor) -> Tensor {
    let (shape, gate) = (gate.shape(), gate.f32s());
    let mut y = up.to_f32();
    for_chunks(&mut y, |start, y| {
        let gate = &gate[start..][..y.len()];
        vectorised(|| y.iter_mut().zip(gate).for_each(|(y, g)| *y *= g * sigmoid(*g)));
    });
    tensor(y, shape)
}

pub(super) fn backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> [Tensor; 2] {
    let shape = gate.shape();
    let (dy, gate, up) = (dy.f32s(), gate.f32s(), up.f32s());
    let mut dgate = vec![0.0; gate.len()];
    for_chunks(&mut dgate, |start, d| {
        let (dy, gate, up) = (&dy[start..][..d.len()], &gate[start..][..d.len()], &up[start..][..d.len()]);
        vectorised(|| {
            for (((d, dy), g), u) in d.iter_mut().zip(dy).zip(gate).zip(up) {
                let s = sigmoid(*g);
                *d = dy * u * s * (1.0 + g * (1.0 - s));
            }
        });
    });
    let mut dup = vec![0.0; gate.len()];
    for_chunks(&mut dup, |start, d| {
        let (dy, gate) = (&dy[start..][..d.len()], &gate[start..][..d.len()]);
        vectorised(|| d.iter_mut().zip(dy).zip(gate).for_each(|((d, dy), g)| *d = dy * g * sigmoid(*g)));
    });
    [tensor(dgate, shape), tensor(dup, shape)]
}

/// Calls `f(start, elements)` for every piece of `dst`; the last may be shorter.
fn for_chunks(dst: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    let full = dst.len() / CHUNK * CHUNK;
    let (head, tail) = dst.split_at_mut(full);
    for_rows(head, CHUNK, |i, chunk| f(i * CHUNK, chunk));
    f(full, tail);
}
