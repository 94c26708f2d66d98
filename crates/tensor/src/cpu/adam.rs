//! The AdamW update and the norm that clipping needs.

use half::{bf16, f16};
use rayon::prelude::*;

use super::f32_mut;
use super::simd::dot;
use crate::Tensor;
use crate::kernels::AdamStep;
use crate::tensor::Buffer;

const CHUNK: usize = 1 << 14;

pub(super) fn step(
    param: &mut Tensor,
    master: Option<&mut Tensor>,
    [m, v]: [&mut Tensor; 2],
    grad: &Tensor,
    step: AdamStep,
) {
    let grad = grad.f32s();
    let Some(master) = master else {
        return update(f32_mut(param), f32_mut(m), f32_mut(v), &grad, step);
    };
    let master = f32_mut(master);
    update(master, f32_mut(m), f32_mut(v), &grad, step);
    match param.buffer_mut() {
        Buffer::F32(p) => p.copy_from_slice(master),
        Buffer::Bf16(p) => p.iter_mut().zip(master).for_each(|(p, m)| *p = bf16::from_f32(*m)),
        Buffer::F16(p) => p.iter_mut().zip(master).for_each(|(p, m)| *p = f16::from_f32(*m)),
        Buffer::U32(_) => unreachable!("row numbers are not parameters"),
    }
}

fn update(p: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], s: AdamStep) {
    let correction1 = 1.0 - s.beta1.powf(s.step as f64);
    let correction2 = (1.0 - s.beta2.powf(s.step as f64)).sqrt();
    let (rate, keep) = ((s.lr / correction1) as f32, (1.0 - s.lr * s.weight_decay) as f32);
    let (b1, b2, eps) = (s.beta1 as f32, s.beta2 as f32, s.eps as f32);
    let (c1, c2) = ((1.0 - s.beta1) as f32, (1.0 - s.beta2) as f32);
    let (scale, correction2) = (s.grad_scale as f32, correction2 as f32);
    let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
    chunks.zip(grad.par_chunks(CHUNK)).for_each(|(((p, m), v), g)| {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * scale;
            *m = b1 * *m + c1 * g;
            *v = b2 * *v + c2 * g * g;
            *p = *p * keep - rate * *m / (v.sqrt() / correction2 + eps);
        }
    });
}

/// Blocks are summed in float32 lanes, the blocks' sums in float64 and in order.
pub(super) fn sum_squares(x: &Tensor) -> f64 {
    let sums: Vec<f32> = x.f32s().par_chunks(CHUNK).map(|chunk| dot(chunk, chunk)).collect();
    sums.into_iter().map(f64::from).sum()
}
