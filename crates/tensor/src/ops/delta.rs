//! The gated delta rule. Only frozen targets have it: it has no gradient.

use super::{Part, expect_cols, expect_cols_from, expect_rows, expect_shape};
use crate::kernels::{DeltaInputs, DeltaShape};
use crate::{DType, Error, ParamId, Result, Tape, Tensor, Var};

/// What a gated delta rule over R rows reads; see [`DeltaInputs`].
#[derive(Debug)]
pub struct Delta<'a> {
    /// Heads.
    pub shape: DeltaShape,
    /// Queries, keys, values side by side, `[R, width]`.
    pub qkv: &'a Var,
    /// How strongly rows are written, `[R, value_heads]`.
    pub b: Part,
    /// How fast states fade, `[R, value_heads]`.
    pub a: Part,
    /// Float32 `[value_heads]`.
    pub a_log: ParamId,
    /// Float32 `[value_heads]`.
    pub dt_bias: ParamId,
    /// The state before each row, `u32 [R]`; `u32::MAX` for that after the row before it.
    pub from: &'a Tensor,
    /// Where the state after each row is kept, `u32 [R]`; `u32::MAX` for nowhere. State 0 is read only.
    pub to: &'a Tensor,
}

impl Tape<'_> {
    /// The gated delta rule (Yang et al., 2025) per value head: with q and k of unit length, q divided by `√key_dim`,
    /// `S ← exp(g) S`, `S ← S + k (sigmoid(b) (v - Sᵀ k))ᵀ`, `out = Sᵀ q`, where `g = -exp(a_log) softplus(a + dt_bias)`.
    ///
    /// # Shapes
    /// states float32 `[n, state]`, read and written; the result `[R, value_heads · value_dim]`.
    pub fn delta_rule(&self, delta: &Delta<'_>, states: &mut Tensor) -> Result<Var> {
        const OP: &str = "delta_rule";
        let (s, rows) = (delta.shape, delta.qkv.rows_cols().0);
        if s.key_heads == 0 || !s.value_heads.is_multiple_of(s.key_heads) {
            let got = [s.value_heads, s.key_heads];
            return Err(Error::shape(OP, "heads", "a multiple of the key heads", &got));
        }
        for x in [delta.qkv, &delta.b.of, &delta.a.of] {
            self.expect_frozen(OP, x)?;
        }
        expect_cols(OP, "queries, keys and values", delta.qkv.value(), s.width())?;
        for (what, part) in [("b", &delta.b), ("a", &delta.a)] {
            expect_cols_from(OP, what, part.of.value(), part.first, s.value_heads)?;
        }
        expect_cols(OP, "states", states, s.state())?;
        if states.dtype() != DType::F32 {
            return Err(Error::DType { op: OP, what: "states", expected: "F32", got: states.dtype() });
        }
        for (what, index) in [("states before", delta.from), ("states after", delta.to)] {
            expect_shape(OP, what, index, &[rows])?;
            expect_rows(OP, "the states", index, states.rows_cols().0, true)?;
        }
        let value = |id: ParamId| &self.params().get(id).value;
        let (a_log, dt_bias) = (value(delta.a_log), value(delta.dt_bias));
        expect_shape(OP, "a_log", a_log, &[s.value_heads])?;
        expect_shape(OP, "dt_bias", dt_bias, &[s.value_heads])?;
        let (qkv, b, a) = (delta.qkv.value(), delta.b.columns(), delta.a.columns());
        let inputs = DeltaInputs { shape: s, qkv, b, a, a_log, dt_bias, from: delta.from, to: delta.to };
        Ok(self.input(qkv.device().kernels().delta_rule(&inputs, states)?))
    }
}
