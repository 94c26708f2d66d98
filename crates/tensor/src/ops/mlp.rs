//! Elementwise operations: the gate of an MLP, the residual sum, factors and caps.

use super::linear::{Stack, Weight};
use super::{Part, expect_cols_from, expect_rows, expect_shape};
use crate::tape::{Backward, Sink, Slot};
use crate::{Error, ParamId, Result, Tape, Tensor, Var};

struct SwiGlu {
    gate_up: Var,
}

struct SwiGluLinear {
    gate_up: Var,
    w: Stack,
    residual: Slot,
}

struct Scale {
    x: Slot,
    factor: f32,
}

struct Add {
    a: Slot,
    b: Slot,
}

impl Tape<'_> {
    /// `silu(gate) * up` (Shazeer, 2020) of gate and up side by side, `[R, 2 I]` to `[R, I]`.
    pub fn swiglu(&self, gate_up: &Var) -> Result<Var> {
        expect_pairs("swiglu", gate_up)?;
        let y = gate_up.value().device().kernels().swiglu(gate_up.value())?;
        Ok(self.record(y, self.any_needed(&[gate_up]), || Box::new(SwiGlu { gate_up: gate_up.clone() })))
    }

    /// As [`Tape::swiglu`], for a value that only `w` multiplies: in 8 bits where w is frozen and has 8 bits.
    pub fn swiglu_for(&self, gate_up: &Var, w: &Weight) -> Result<Var> {
        expect_pairs("swiglu", gate_up)?;
        if self.takes_8_bits(w) {
            let kernels = gate_up.value().device().kernels();
            if let Some(y) = kernels.swiglu_rounded(gate_up.value())? {
                return Ok(self.input(y));
            }
        }
        self.swiglu(gate_up)
    }

    /// `residual + swiglu(gate_up) · wᵀ`: the end of an MLP. What is multiplied by w, the widest activation but one, is
    /// computed again in the backward rather than kept.
    pub fn swiglu_linear_add(&self, gate_up: &Var, w: &Weight, residual: &Var) -> Result<Var> {
        expect_pairs("swiglu", gate_up)?;
        let x = gate_up.value().device().kernels().swiglu(gate_up.value())?;
        let w = Stack::new(self, w, &x, Some(residual))?;
        let y = w.product(&x, Some(residual))?;
        let trained = w.trained_product(self);
        let needed = trained.is_some() || self.any_needed(&[gate_up, residual]);
        Ok(self.record_product(y, needed, trained, || {
            Box::new(SwiGluLinear { gate_up: gate_up.clone(), w, residual: residual.into() })
        }))
    }

    /// `gelu(gate) * up` of gate and up side by side, `[R, 2 I]` to `[R, I]`; GELU by its tanh approximation. It has no
    /// gradient.
    pub fn geglu(&self, gate_up: &Var) -> Result<Var> {
        expect_pairs("geglu", gate_up)?;
        self.expect_frozen("geglu", gate_up)?;
        Ok(self.input(gate_up.value().device().kernels().geglu(gate_up.value())?))
    }

    /// `(clamp(up, -limit, limit) + 1) · g · sigmoid(alpha · g)` with `g = min(gate, limit)` (gpt-oss), of gate and up
    /// side by side, `[R, 2 I]` to `[R, I]`. It has no gradient.
    pub fn swiglu_clamped(&self, gate_up: &Var, alpha: f32, limit: f32) -> Result<Var> {
        expect_pairs("swiglu_clamped", gate_up)?;
        self.expect_frozen("swiglu_clamped", gate_up)?;
        Ok(self.input(gate_up.value().device().kernels().swiglu_clamped(gate_up.value(), alpha, limit)?))
    }

    /// `cap · tanh(x / cap)`. It has no gradient.
    pub fn soft_cap(&self, x: &Var, cap: f32) -> Result<Var> {
        self.expect_frozen("soft_cap", x)?;
        Ok(self.input(x.value().device().kernels().soft_cap(x.value(), cap)?))
    }

    /// `a · b`, element by element, of `width` columns each. It has no gradient.
    pub fn product(&self, a: &Part, b: &Part, width: usize) -> Result<Var> {
        let rows = a.of.rows_cols().0;
        for (what, part) in [("left side", a), ("right side", b)] {
            self.expect_frozen("product", &part.of)?;
            let of = part.of.value();
            expect_cols_from("product", what, of, part.first, width)?;
            if part.of.rows_cols().0 != rows {
                return Err(Error::shape("product", what, format!("[{rows}, ..]"), of.shape()));
            }
        }
        Ok(self.input(a.of.value().device().kernels().product(a.columns(), b.columns(), width)?))
    }

    /// A convolution over few rows, each column by itself: `y[r, c] = Σ_k w[c, k] · x[index[k][r], c]`, `u32::MAX`
    /// naming a row of zeros. It has no gradient.
    ///
    /// # Shapes
    /// x `[T, H]`, index `u32 [K·R]` (K lists of R rows), w of `H·K` elements, y `[R, H]`.
    pub fn short_conv(&self, x: &Var, index: &Tensor, w: ParamId) -> Result<Var> {
        self.expect_frozen("short_conv", x)?;
        let ((rows, h), w) = (x.rows_cols(), &self.params().get(w).value);
        if h == 0 || w.is_empty() || !w.len().is_multiple_of(h) {
            return Err(Error::shape("short_conv", "weight", format!("[{h}, K]"), w.shape()));
        }
        if !index.len().is_multiple_of(w.len() / h) {
            let expected = format!("[{} * R]", w.len() / h);
            return Err(Error::shape("short_conv", "index", expected, index.shape()));
        }
        expect_rows("short_conv", "the input", index, rows, true)?;
        Ok(self.input(x.value().device().kernels().short_conv(x.value(), index, w)?))
    }

    pub(super) fn expect_frozen(&self, op: &'static str, x: &Var) -> Result<()> {
        if self.any_needed(&[x]) { Err(Error::NoGradient { op }) } else { Ok(()) }
    }

    /// `factor · x`.
    pub fn scale(&self, x: &Var, factor: f32) -> Result<Var> {
        let y = x.value().device().kernels().scale(x.value(), factor)?;
        Ok(self.record(y, self.any_needed(&[x]), || Box::new(Scale { x: x.into(), factor })))
    }

    /// `a + b`, of equal shapes.
    pub fn add(&self, a: &Var, b: &Var) -> Result<Var> {
        expect_shape("add", "right side", b.value(), a.value().shape())?;
        let y = a.value().device().kernels().add(a.value(), b.value())?;
        Ok(self.record(y, self.any_needed(&[a, b]), || Box::new(Add { a: a.into(), b: b.into() })))
    }
}

fn expect_pairs(op: &'static str, gate_up: &Var) -> Result<()> {
    if gate_up.rows_cols().1.is_multiple_of(2) {
        return Ok(());
    }
    Err(Error::shape(op, "gate and up", "[R, 2 I]", gate_up.value().shape()))
}

impl Backward for SwiGluLinear {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let dx = self.w.dgrad(&dy, None)?;
        // Both are wide: they are computed where they wait for the gradients of their weights.
        let d = sink.room_for_gradient(&self.gate_up, &dx)?;
        let x = sink.room_for_input(&self.w.as_product(), dx.rows_cols().0, &dx)?;
        let (d, x) = dy.device().kernels().swiglu_backward(&dx, self.gate_up.value(), [d, x])?;
        self.w.wgrad(&dy, &x, sink)?;
        sink.add(&self.gate_up, d)?;
        sink.add(self.residual, dy)
    }

    fn params(&self) -> Vec<ParamId> {
        self.w.params()
    }
}

impl Backward for SwiGlu {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let (d, _) = dy.device().kernels().swiglu_backward(&dy, self.gate_up.value(), [None, None])?;
        sink.add(&self.gate_up, d)
    }
}

impl Backward for Scale {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let d = dy.device().kernels().scale(&dy, self.factor)?;
        sink.add(self.x, d)
    }
}

impl Backward for Add {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        sink.add(self.a, dy.clone())?;
        sink.add(self.b, dy)
    }
}
