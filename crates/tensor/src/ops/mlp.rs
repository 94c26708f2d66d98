//! Elementwise operations: the gate of a SwiGLU MLP, and the residual sum.

use super::expect_shape;
use super::linear::{Stack, Weight};
use crate::tape::{Backward, Sink, Slot};
use crate::{Error, Result, Tape, Tensor, Var};

struct SwiGlu {
    gate_up: Var,
}

struct SwiGluLinear {
    gate_up: Var,
    w: Stack,
    residual: Slot,
}

struct Add {
    a: Slot,
    b: Slot,
}

impl Tape<'_> {
    /// `silu(gate) * up` (Shazeer, 2020) of gate and up side by side, `[R, 2 I]` to `[R, I]`.
    pub fn swiglu(&self, gate_up: &Var) -> Result<Var> {
        expect_pairs(gate_up)?;
        let y = gate_up.value().device().kernels().swiglu(gate_up.value())?;
        Ok(self.record(y, self.any_needed(&[gate_up]), || Box::new(SwiGlu { gate_up: gate_up.clone() })))
    }

    /// `residual + swiglu(gate_up) · wᵀ`: the end of an MLP. What is multiplied by w, the widest activation but one, is
    /// computed again in the backward rather than kept.
    pub fn swiglu_linear_add(&self, gate_up: &Var, w: &Weight, residual: &Var) -> Result<Var> {
        expect_pairs(gate_up)?;
        let x = gate_up.value().device().kernels().swiglu(gate_up.value())?;
        let w = Stack::new(self, w, &x, Some(residual))?;
        let y = w.product(&x, Some(residual))?;
        let needed = w.is_trained(self) || self.any_needed(&[gate_up, residual]);
        Ok(self.record(y, needed, || {
            Box::new(SwiGluLinear { gate_up: gate_up.clone(), w, residual: residual.into() })
        }))
    }

    /// `a + b`, of equal shapes.
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var> {
        expect_shape("add", "right side", b.value(), a.value().shape())?;
        let y = a.value().device().kernels().add(a.value(), b.value())?;
        Ok(self.record(y, self.any_needed(&[a, b]), || Box::new(Add { a: a.into(), b: b.into() })))
    }
}

fn expect_pairs(gate_up: &Var) -> Result<()> {
    if gate_up.rows_cols().1.is_multiple_of(2) {
        return Ok(());
    }
    Err(Error::shape("swiglu", "gate and up", "[R, 2 I]", gate_up.value().shape()))
}

impl Backward for SwiGluLinear {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let dx = self.w.dgrad(&dy, None)?;
        let (d, x) = dy.device().kernels().swiglu_backward(&dx, self.gate_up.value())?;
        self.w.wgrad(&dy, &x, sink)?;
        sink.add(&self.gate_up, d)?;
        sink.add(self.residual, dy)
    }
}

impl Backward for SwiGlu {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let (d, _) = dy.device().kernels().swiglu_backward(&dy, self.gate_up.value())?;
        sink.add(&self.gate_up, d)
    }
}

impl Backward for Add {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(self.a, dy.clone())?;
        sink.add(self.b, dy)
    }
}
