//! The AdamW update and the norm that clipping needs.

use half::bf16;
use rayon::prelude::*;

use super::simd::dot;
use super::{f32_mut, tensor};
use crate::kernels::{AdamStep, AdamTensor};
use crate::tensor::Buffer;
use crate::{Across, Combine, DType, Device, Error, Group, Result, Tensor};

const CHUNK: usize = 1 << 14;

/// One step; returns the norm of the gradients divided by the weight.
pub(super) fn step(tensors: &mut [AdamTensor<'_>], step: &AdamStep, across: &Across<'_>) -> Result<f64> {
    let squares: f64 = tensors.iter().map(|t| t.share * sum_squares(t.grad)).sum();
    let squares = summed(squares, across.squares)?;
    let step = &AdamStep { weight: summed(step.weight, across.weight)?, ..*step };
    let norm = squares.sqrt() / step.weight;
    if !norm.is_finite() {
        return Ok(norm);
    }
    let clip = if step.max_norm == 0.0 { 1.0 } else { (step.max_norm / (norm + 1e-6)).min(1.0) };
    for t in tensors {
        let (grad, scale) = (t.grad.f32s(), clip / step.weight);
        let [m, v] = [f32_mut(t.exp_avg), f32_mut(t.exp_avg_sq)];
        let Some(remainder) = &mut t.remainder else {
            update(f32_mut(t.param), m, v, &grad, (step, t.step, scale));
            continue;
        };
        let mut exact = master(t.param, remainder).to_f32();
        update(&mut exact, m, v, &grad, (step, t.step, scale));
        let shape = t.param.shape().to_vec();
        let [param, rest] = split_master(&tensor(exact, &shape), t.param.dtype())?;
        (*t.param, **remainder) = (param, rest);
    }
    Ok(norm)
}

/// A number added up over the ranks of a group.
fn summed(own: f64, group: Option<&dyn Group>) -> Result<f64> {
    let Some(group) = group else { return Ok(own) };
    let mut sum = Tensor::from_f64(Device::Cpu, vec![own])?;
    group.all_reduce(&mut sum, Combine::Sum)?;
    Ok(sum.later_f64()?.wait()?[0])
}

fn update(
    p: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grad: &[f32],
    (s, step, scale): (&AdamStep, u64, f64),
) {
    let correction1 = 1.0 - s.beta1.powf(step as f64);
    let correction2 = (1.0 - s.beta2.powf(step as f64)).sqrt();
    let (rate, keep) = ((s.lr / correction1) as f32, (1.0 - s.lr * s.weight_decay) as f32);
    let (b1, b2, eps) = (s.beta1 as f32, s.beta2 as f32, s.eps as f32);
    let (c1, c2) = ((1.0 - s.beta1) as f32, (1.0 - s.beta2) as f32);
    let (scale, correction2) = (scale as f32, correction2 as f32);
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
fn sum_squares(x: &Tensor) -> f64 {
    let sums: Vec<f32> = x.f32s().par_chunks(CHUNK).map(|chunk| dot(chunk, chunk)).collect();
    sums.into_iter().map(f64::from).sum()
}

/// A master weight as the bfloat16 nearest to it, and the difference of their bits. Ties round away from zero: to even,
/// there would be one more difference than 16 bits can hold.
pub(super) fn split_master(master: &Tensor, like: DType) -> Result<[Tensor; 2]> {
    if like != DType::Bf16 {
        let (op, what) = ("split_master", "a trained parameter's storage");
        return Err(Error::DType { op, what, expected: "F32 or Bf16", got: like });
    }
    let values = master.f32s();
    let round = |v: &f32| {
        let rounded = (v.to_bits().wrapping_add(0x8000) >> 16) as u16;
        // The carry must not make another number of NaN.
        if v.is_nan() { bf16::NAN } else { bf16::from_bits(rounded) }
    };
    let rounded: Vec<bf16> = values.iter().map(round).collect();
    let rest = |(v, r): (&f32, &bf16)| v.to_bits().wrapping_sub(u32::from(r.to_bits()) << 16) as i16;
    let rest = Tensor::from_i16(values.iter().zip(&rounded).map(rest).collect(), master.shape());
    Ok([Tensor::from_bf16(master.device(), rounded, master.shape())?, rest])
}

/// The master weight of a bfloat16 parameter.
pub(super) fn master(param: &Tensor, remainder: &Tensor) -> Tensor {
    let (Buffer::Bf16(param_values), Buffer::I16(rest)) = (param.buffer(), remainder.buffer()) else {
        unreachable!("only bfloat16 parameters have a remainder")
    };
    let bits = |p: &bf16, rest: &i16| (u32::from(p.to_bits()) << 16).wrapping_add_signed(i32::from(*rest));
    let values = param_values.iter().zip(rest).map(|(p, rest)| f32::from_bits(bits(p, rest)));
    tensor(values.collect(), param.shape())
}
