//! The CPU implementation of every operation, and the reference for other devices: float32 arithmetic, rows in
//! parallel, every sum in an order that depends on the shapes alone.

mod adam;
mod attention;
mod attention_backward;
mod delta;
mod gemm;
mod loss;
mod mixture;
mod norm;
mod rope;
mod rows;
mod simd;
mod swiglu;

use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::{
    Activation, AdamStep, AdamTensor, AddedRows, AttentionInputs, Columns, DeltaInputs, Kernels, Rotation,
    Router, Routes, RowLoss, SoftTargets, VocabStats,
};
use crate::tensor::Buffer;
use crate::{Across, DType, Device, Later, Result, Tensor};

/// The host processor.
#[derive(Debug)]
pub(crate) struct Cpu;

/// Normal values by a counter (splitmix64, Box-Muller).
pub(crate) fn normals(n: usize, std: f32, seed: u64) -> Vec<f32> {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let normal = |i: usize| {
        let bits = mix(seed.wrapping_add(i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (a, b) = ((bits >> 40) as f32, (bits & 0xff_ffff) as f32);
        let unit = |x: f32| (x + 0.5) / (1u32 << 24) as f32;
        std * (-2.0 * unit(a).ln()).sqrt() * (std::f32::consts::TAU * unit(b)).cos()
    };
    (0..n).into_par_iter().map(normal).collect()
}

/// A float32 tensor of this shape over `values`.
fn tensor(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_f32(Device::Cpu, values, shape).expect("a kernel's output has the elements of its shape")
}

/// The elements of a float32 tensor for writing.
fn f32_mut(t: &mut Tensor) -> &mut [f32] {
    match t.buffer_mut() {
        Buffer::F32(v) => v,
        other => unreachable!("gradients and masters are float32, got {other:?}"),
    }
}

/// The elements of a tensor of row numbers.
fn u32s(t: &Tensor) -> &[u32] {
    t.u32s().expect("row numbers are u32: the operation checked it")
}

impl Kernels for Cpu {
    fn linear(
        &self,
        x: &Tensor,
        w: &[&Tensor],
        cols: Range<usize>,
        bias: &[&Tensor],
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(gemm::linear(x, w, cols, bias, residual))
    }
    fn linear_dgrad(
        &self,
        dy: &Tensor,
        w: &[&Tensor],
        cols: Range<usize>,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        Ok(gemm::linear_dgrad(dy, w, cols, into))
    }
    fn linear_wgrad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        dw: &mut [Tensor],
        cols: Range<usize>,
        fresh: bool,
    ) -> Result<()> {
        gemm::linear_wgrad(dy, x, dw, cols, fresh);
        Ok(())
    }
    fn bias_grad(&self, dy: &Tensor, db: &mut [Tensor]) -> Result<()> {
        rows::bias_grad(dy, db);
        Ok(())
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
        Ok(norm::forward(x, w, eps))
    }
    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        rstd: &Tensor,
        dw: Option<&mut Tensor>,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        Ok(norm::backward(dy, x, w, rstd, dw, into))
    }
    fn rope(&self, x: &Tensor, rotation: &Rotation<'_>, added: Option<AddedRows<'_>>) -> Result<Tensor> {
        Ok(rope::forward(x, rotation, added))
    }
    fn rope_backward(
        &self,
        dy: &Tensor,
        rotation: &Rotation<'_>,
        added: Option<(&mut Tensor, usize, &Tensor)>,
    ) -> Result<Tensor> {
        Ok(rope::backward(dy, rotation, added))
    }
    fn attention(&self, inputs: &AttentionInputs<'_>) -> Result<(Tensor, Tensor)> {
        Ok(attention::forward(inputs))
    }
    fn attention_backward(
        &self,
        inputs: &AttentionInputs<'_>,
        out: [&Tensor; 3],
    ) -> Result<([Tensor; 3], Vec<[Tensor; 2]>)> {
        Ok(attention_backward::backward(inputs, out))
    }
    fn merge_attention(&self, a: &(Tensor, Tensor), b: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        Ok(attention::merge(a, b))
    }
    fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        Ok(swiglu::forward(gate_up))
    }
    fn swiglu_backward(
        &self,
        dy: &Tensor,
        gate_up: &Tensor,
        _: [Option<Tensor>; 2],
    ) -> Result<(Tensor, Tensor)> {
        Ok((swiglu::backward(dy, gate_up), swiglu::forward(gate_up)))
    }
    fn geglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        Ok(swiglu::geglu(gate_up))
    }
    fn swiglu_clamped(&self, gate_up: &Tensor, alpha: f32, limit: f32) -> Result<Tensor> {
        Ok(swiglu::clamped(gate_up, alpha, limit))
    }
    fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        Ok(match activation {
            Activation::Sigmoid => rows::map(x, simd::sigmoid),
            Activation::Silu => rows::map(x, |v| v * simd::sigmoid(v)),
        })
    }
    fn route(&self, x: &Tensor, router: &Router<'_>) -> Result<Routes> {
        Ok(mixture::route(x, router))
    }
    fn linear_grouped(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, ends: &Tensor) -> Result<Tensor> {
        Ok(gemm::linear_grouped(x, w, bias, ends))
    }
    fn weighted_rows(
        &self,
        x: &Tensor,
        index: &Tensor,
        weights: &Tensor,
        base: Option<&Tensor>,
        k: usize,
    ) -> Result<Tensor> {
        Ok(mixture::weighted_rows(x, index, weights, base, k))
    }
    fn delta_rule(&self, inputs: &DeltaInputs<'_>, states: &mut Tensor) -> Result<Tensor> {
        Ok(delta::rule(inputs, states))
    }
    fn product(&self, a: Columns<'_>, b: Columns<'_>, width: usize) -> Result<Tensor> {
        Ok(rows::product(a, b, width))
    }
    fn short_conv(&self, x: &Tensor, index: &Tensor, w: &Tensor) -> Result<Tensor> {
        Ok(rows::short_conv(x, index, w))
    }
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        Ok(rows::map(x, |v| factor * v))
    }
    fn soft_cap(&self, x: &Tensor, cap: f32) -> Result<Tensor> {
        Ok(rows::map(x, |v| cap * (v / cap).tanh()))
    }
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let mut y = tensor(a.to_f32(), a.shape());
        rows::add_assign(&mut y, b);
        Ok(y)
    }
    fn add_assign(&self, dst: &mut Tensor, src: &Tensor) -> Result<()> {
        rows::add_assign(dst, src);
        Ok(())
    }
    fn gather_rows(&self, x: &Tensor, index: &Tensor) -> Result<Tensor> {
        Ok(rows::gather(x, index))
    }
    fn scatter_add_rows(&self, dst: &mut Tensor, index: &Tensor, src: &Tensor) -> Result<()> {
        rows::scatter_add(dst, index, src);
        Ok(())
    }
    fn copy_rows(&self, dst: &mut Tensor, to: &Tensor, src: &Tensor, from: &Tensor) -> Result<()> {
        rows::copy_rows(dst, to, src, from);
        Ok(())
    }
    fn columns(&self, x: &Tensor, cols: Range<usize>) -> Result<Tensor> {
        Ok(rows::columns(x, cols))
    }
    fn add_columns(&self, dst: &mut Tensor, cols: Range<usize>, src: &Tensor) -> Result<()> {
        rows::add_columns(dst, cols, src);
        Ok(())
    }
    fn vocab_stats(&self, hidden: &Tensor, head: &Tensor) -> Result<VocabStats> {
        Ok(loss::vocab_stats(hidden, head))
    }
    fn logit_stats(&self, logits: &Tensor) -> Result<VocabStats> {
        Ok(loss::logit_stats(logits))
    }
    fn soft_target_loss(
        &self,
        x: &Tensor,
        head: &Tensor,
        targets: &SoftTargets<'_>,
        dhead: Option<(&mut Tensor, bool)>,
    ) -> Result<RowLoss> {
        loss::soft_target_loss(x, head, targets, dhead)
    }
    fn remainder(&self, param: &Tensor) -> Result<Option<Tensor>> {
        match param.dtype() {
            DType::F32 => Ok(None),
            stored => Ok(Some(adam::split_master(&param.cast(DType::F32)?, stored)?[1].clone())),
        }
    }
    fn master(&self, param: &Tensor, remainder: &Tensor) -> Result<Tensor> {
        Ok(adam::master(param, remainder))
    }
    fn split_master(&self, master: &Tensor, like: DType) -> Result<[Tensor; 2]> {
        adam::split_master(master, like)
    }
    fn adamw(
        &self,
        tensors: &mut [AdamTensor<'_>],
        step: &AdamStep,
        across: &Across<'_>,
    ) -> Result<Later<f64>> {
        Ok(Later::ready(adam::step(tensors, step, across)?))
    }
    fn all_finite(&self, x: &Tensor) -> Result<Later<bool>> {
        Ok(Later::ready(x.f32s().iter().all(|v| v.is_finite())))
    }
}
