//! Elementwise operations: the gate of a SwiGLU MLP, and the residual sum.

use super::expect_shape;
use crate::tape::{Backward, Sink};
use crate::{Result, Tape, Tensor, Var};

struct SwiGlu {
    gate: Var,
    up: Var,
}

struct Add {
    a: Var,
    b: Var,
}

impl Tape<'_> {
    /// `silu(gate) * up` (Shazeer, 2020); both `[R, I]`.
    pub fn swiglu(&self, gate: &Var, up: &Var) -> Result<Var> {
        expect_shape("swiglu", "up", up.value(), gate.value().shape())?;
        let y = gate.value().device().kernels().swiglu(gate.value(), up.value());
        let needed = self.any_needed(&[gate, up]);
        Ok(self.record(y, needed, || Box::new(SwiGlu { gate: gate.clone(), up: up.clone() })))
    }

    /// `a + b`, of equal shapes.
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var> {
        expect_shape("add", "right side", b.value(), a.value().shape())?;
        let y = a.value().device().kernels().add(a.value(), b.value());
        Ok(self.record(y, self.any_needed(&[a, b]), || Box::new(Add { a: a.clone(), b: b.clone() })))
    }
}

impl Backward for SwiGlu {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let [dgate, dup] = dy.device().kernels().swiglu_backward(&dy, self.gate.value(), self.up.value());
        sink.add(&self.gate, dgate);
        sink.add(&self.up, dup);
        Ok(())
    }
}

impl Backward for Add {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(&self.a, dy.clone());
        sink.add(&self.b, dy);
        Ok(())
    }
}
