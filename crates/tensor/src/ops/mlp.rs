//! Elementwise operations: the gate of a SwiGLU MLP, and the residual sum.

use super::expect_shape;
use crate::tape::{Backward, Sink};
use crate::{Error, Result, Tape, Tensor, Var};

struct SwiGlu {
    gate_up: Var,
}

struct Add {
    a: Var,
    b: Var,
}

impl Tape<'_> {
    /// `silu(gate) * up` (Shazeer, 2020) of gate and up side by side, `[R, 2 I]` to `[R, I]`.
    pub fn swiglu(&self, gate_up: &Var) -> Result<Var> {
        if !gate_up.rows_cols().1.is_multiple_of(2) {
            return Err(Error::shape("swiglu", "gate and up", "[R, 2 I]", gate_up.value().shape()));
        }
        let y = gate_up.value().device().kernels().swiglu(gate_up.value())?;
        Ok(self.record(y, self.any_needed(&[gate_up]), || Box::new(SwiGlu { gate_up: gate_up.clone() })))
    }

    /// `a + b`, of equal shapes.
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var> {
        expect_shape("add", "right side", b.value(), a.value().shape())?;
        let y = a.value().device().kernels().add(a.value(), b.value())?;
        Ok(self.record(y, self.any_needed(&[a, b]), || Box::new(Add { a: a.clone(), b: b.clone() })))
    }
}

impl Backward for SwiGlu {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let d = dy.device().kernels().swiglu_backward(&dy, self.gate_up.value())?;
        sink.add(&self.gate_up, d)
    }
}

impl Backward for Add {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(&self.a, dy.clone())?;
        sink.add(&self.b, dy)
    }
}
