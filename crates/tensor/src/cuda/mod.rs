//! The CUDA implementation of every operation: bfloat16 storage, float32 accumulation, no float atomics, so that the
//! same inputs give the same bits. Launchers are here; the kernels they launch are in `kernels/`.

#[macro_use]
mod launch;

mod adam;
mod attention;
mod delta;
mod fp8;
mod gemm;
mod loss;
mod mixture;
mod norm;
mod rows;
mod stored;
#[cfg(test)]
mod tests;
mod units;

use std::ops::Range;

pub(crate) use stored::Stored;
pub use units::units;

use crate::kernels::{
    Activation, AdamStep, AdamTensor, AddedRows, AttentionInputs, Columns, DeltaInputs, Kernels, Rotation,
    Router, Routes, RowLoss, SoftTargets, VocabStats,
};
use crate::{Across, DType, Later, Result, Tensor};

/// The operations of every CUDA device: tensors say which one.
#[derive(Debug)]
struct Cuda;

/// The operations of a device.
pub(crate) fn kernels(_ordinal: usize) -> &'static dyn Kernels {
    &Cuda
}

impl Kernels for Cuda {
    fn linear(
        &self,
        x: &Tensor,
        w: &[&Tensor],
        cols: Range<usize>,
        bias: &[&Tensor],
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        gemm::linear(x, w, cols, bias, residual)
    }
    fn linear_dgrad(
        &self,
        dy: &Tensor,
        w: &[&Tensor],
        cols: Range<usize>,
        into: Option<Tensor>,
    ) -> Result<Tensor> {
        gemm::linear_dgrad(dy, w, cols, into)
    }
    fn linear_wgrad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        dw: &mut [Tensor],
        cols: Range<usize>,
        fresh: bool,
    ) -> Result<()> {
        gemm::linear_wgrad(dy, x, dw, cols, fresh)
    }
    fn rms_norm_rounded(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<Option<Tensor>> {
        fp8::rms_norm(x, w, eps)
    }
    fn swiglu_rounded(&self, gate_up: &Tensor) -> Result<Option<Tensor>> {
        fp8::swiglu(gate_up)
    }
    fn wgrad_rows(&self) -> usize {
        gemm::WGRAD_ROWS
    }
    fn bias_grad(&self, dy: &Tensor, db: &mut [Tensor]) -> Result<()> {
        gemm::bias_grad(dy, db)
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
        norm::rms_norm(x, w, eps)
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
        norm::rms_norm_backward(dy, x, w, rstd, dw, into)
    }
    fn rope(&self, x: &Tensor, rotation: &Rotation<'_>, added: Option<AddedRows<'_>>) -> Result<Tensor> {
        norm::rope(x, rotation, added)
    }
    fn rope_backward(
        &self,
        dy: &Tensor,
        rotation: &Rotation<'_>,
        added: Option<(&mut Tensor, usize, &Tensor)>,
    ) -> Result<Tensor> {
        norm::rope_backward(dy, rotation, added)
    }
    fn attention(&self, inputs: &AttentionInputs<'_>) -> Result<(Tensor, Tensor)> {
        attention::forward(inputs)
    }
    fn attention_backward(
        &self,
        inputs: &AttentionInputs<'_>,
        out: [&Tensor; 3],
    ) -> Result<([Tensor; 3], Vec<[Tensor; 2]>)> {
        attention::backward(inputs, out)
    }
    fn merge_attention(&self, a: &(Tensor, Tensor), b: &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        rows::merge_attention(a, b)
    }
    fn swiglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        norm::swiglu(gate_up)
    }
    fn swiglu_backward(
        &self,
        dy: &Tensor,
        gate_up: &Tensor,
        into: [Option<Tensor>; 2],
    ) -> Result<(Tensor, Tensor)> {
        norm::swiglu_backward(dy, gate_up, into)
    }
    fn geglu(&self, gate_up: &Tensor) -> Result<Tensor> {
        norm::geglu(gate_up)
    }
    fn swiglu_clamped(&self, gate_up: &Tensor, alpha: f32, limit: f32) -> Result<Tensor> {
        norm::swiglu_clamped(gate_up, alpha, limit)
    }
    fn activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match activation {
            Activation::Sigmoid => rows::map(x, ["sigmoid_b", "sigmoid_f"], 1.0),
            Activation::Silu => rows::map(x, ["silu_b", "silu_f"], 1.0),
        }
    }
    fn route(&self, x: &Tensor, router: &Router<'_>) -> Result<Routes> {
        mixture::route(x, router)
    }
    fn linear_grouped(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, ends: &Tensor) -> Result<Tensor> {
        mixture::linear_grouped(x, w, bias, ends)
    }
    fn weighted_rows(
        &self,
        x: &Tensor,
        index: &Tensor,
        weights: &Tensor,
        base: Option<&Tensor>,
        k: usize,
    ) -> Result<Tensor> {
        mixture::weighted_rows(x, index, weights, base, k)
    }
    fn delta_rule(&self, inputs: &DeltaInputs<'_>, states: &mut Tensor) -> Result<Tensor> {
        delta::rule(inputs, states)
    }
    fn product(&self, a: Columns<'_>, b: Columns<'_>, width: usize) -> Result<Tensor> {
        rows::product(a, b, width)
    }
    fn short_conv(&self, x: &Tensor, index: &Tensor, w: &Tensor) -> Result<Tensor> {
        rows::short_conv(x, index, w)
    }
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        rows::map(x, ["scale_b", "scale_f"], factor)
    }
    fn soft_cap(&self, x: &Tensor, cap: f32) -> Result<Tensor> {
        rows::map(x, ["soft_cap_b", "soft_cap_f"], cap)
    }
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        rows::add(a, b)
    }
    fn add_assign(&self, dst: &mut Tensor, src: &Tensor) -> Result<()> {
        rows::add_assign(dst, src)
    }
    fn gather_rows(&self, x: &Tensor, index: &Tensor) -> Result<Tensor> {
        rows::gather(x, index)
    }
    fn scatter_add_rows(&self, dst: &mut Tensor, index: &Tensor, src: &Tensor) -> Result<()> {
        rows::scatter_add(dst, index, src)
    }
    fn copy_rows(&self, dst: &mut Tensor, to: &Tensor, src: &Tensor, from: &Tensor) -> Result<()> {
        rows::copy_rows(dst, to, src, from)
    }
    fn columns(&self, x: &Tensor, cols: Range<usize>) -> Result<Tensor> {
        rows::columns(x, cols)
    }
    fn add_columns(&self, dst: &mut Tensor, cols: Range<usize>, src: &Tensor) -> Result<()> {
        rows::add_columns(dst, cols, src)
    }
    fn vocab_stats(&self, hidden: &Tensor, head: &Tensor) -> Result<VocabStats> {
        loss::vocab_stats(hidden, head)
    }
    fn logit_stats(&self, logits: &Tensor) -> Result<VocabStats> {
        loss::logit_stats(logits)
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
        adam::remainder(param)
    }
    fn master(&self, param: &Tensor, remainder: &Tensor) -> Result<Tensor> {
        adam::master(param, remainder)
    }
    fn split_master(&self, master: &Tensor, _like: DType) -> Result<[Tensor; 2]> {
        adam::split_master(master)
    }
    fn adamw(
        &self,
        tensors: &mut [AdamTensor<'_>],
        step: &AdamStep,
        across: &Across<'_>,
    ) -> Result<Later<f64>> {
        adam::step(tensors, step, across)
    }
    fn all_finite(&self, x: &Tensor) -> Result<Later<bool>> {
        rows::all_finite(x)
    }
}
