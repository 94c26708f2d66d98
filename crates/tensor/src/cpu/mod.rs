//! The CPU implementation of every operation, and the reference for other devices: float32 arithmetic, rows in
//! parallel, every sum in an order that depends on the shapes alone.

mod adam;
mod attention;
mod attention_backward;
mod gemm;
mod loss;
mod norm;
mod rope;
mod rows;
mod simd;
mod swiglu;

use std::ops::Range;

use crate::kernels::{AdamStep, AttentionShape, Extra, Kernels, RowLoss, SoftTargets, Spans, VocabStats};
use crate::tensor::Buffer;
use crate::{Device, Tensor};

/// The host processor.
#[derive(Debug)]
pub(crate) struct Cpu;

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
    fn linear(&self, x: &Tensor, w: &Tensor, cols: Range<usize>, bias: Option<&Tensor>) -> Tensor {
        gemm::linear(x, w, cols, bias)
    }
    fn linear_dgrad(&self, dy: &Tensor, w: &Tensor, cols: Range<usize>) -> Tensor {
        gemm::linear_dgrad(dy, w, cols)
    }
    fn linear_wgrad(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor, cols: Range<usize>) {
        gemm::linear_wgrad(dy, x, dw, cols);
    }
    fn bias_grad(&self, dy: &Tensor, db: &mut Tensor) {
        rows::bias_grad(dy, db);
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32) -> (Tensor, Tensor) {
        norm::forward(x, w, eps)
    }
    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        rstd: &Tensor,
        dw: Option<&mut Tensor>,
    ) -> Tensor {
        norm::backward(dy, x, w, rstd, dw)
    }
    fn rope(
        &self,
        x: &Tensor,
        head_dim: usize,
        tables: (&Tensor, &Tensor),
        positions: &Tensor,
        inverse: bool,
    ) -> Tensor {
        rope::rotate(x, head_dim, tables, positions, inverse)
    }
    fn attention(
        &self,
        shape: AttentionShape,
        qkv: [&Tensor; 3],
        spans: &Spans,
        extras: &[Extra<'_>],
    ) -> (Tensor, Tensor) {
        attention::forward(shape, qkv, spans, extras)
    }
    fn attention_backward(
        &self,
        shape: AttentionShape,
        qkv: [&Tensor; 3],
        spans: &Spans,
        extras: &[Extra<'_>],
        out: [&Tensor; 3],
    ) -> ([Tensor; 3], Vec<[Tensor; 2]>) {
        attention_backward::backward(shape, qkv, spans, extras, out)
    }
    fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        swiglu::forward(gate, up)
    }
    fn swiglu_backward(&self, dy: &Tensor, gate: &Tensor, up: &Tensor) -> [Tensor; 2] {
        swiglu::backward(dy, gate, up)
    }
    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let mut y = tensor(a.to_f32(), a.shape());
        rows::add_assign(&mut y, b);
        y
    }
    fn add_assign(&self, dst: &mut Tensor, src: &Tensor) {
        rows::add_assign(dst, src);
    }
    fn gather_rows(&self, x: &Tensor, index: &Tensor) -> Tensor {
        rows::gather(x, index)
    }
    fn scatter_add_rows(&self, dst: &mut Tensor, index: &Tensor, src: &Tensor) {
        rows::scatter_add(dst, index, src);
    }
    fn columns(&self, x: &Tensor, cols: Range<usize>) -> Tensor {
        rows::columns(x, cols)
    }
    fn add_columns(&self, dst: &mut Tensor, cols: Range<usize>, src: &Tensor) {
        rows::add_columns(dst, cols, src);
    }
    fn vocab_stats(&self, hidden: &Tensor, head: &Tensor) -> VocabStats {
        loss::vocab_stats(hidden, head)
    }
    fn logit_stats(&self, logits: &Tensor) -> VocabStats {
        loss::logit_stats(logits)
    }
    fn soft_target_loss(
        &self,
        x: &Tensor,
        head: &Tensor,
        targets: &SoftTargets<'_>,
        dhead: Option<&mut Tensor>,
    ) -> RowLoss {
        loss::soft_target_loss(x, head, targets, dhead)
    }
    fn adam_step(
        &self,
        param: &mut Tensor,
        master: Option<&mut Tensor>,
        moments: [&mut Tensor; 2],
        grad: &Tensor,
        step: AdamStep,
    ) {
        adam::step(param, master, moments, grad, step);
    }
    fn sum_squares(&self, x: &Tensor) -> f64 {
        adam::sum_squares(x)
    }
}
