//! The SwiGLU MLP (Shazeer, 2020) that most families share.

use specforge_tensor::{Tape, Var, Weight};

use crate::loader::Loader;
use crate::{Result, TargetInfo};

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate_up: Weight,
    down: Weight,
}

impl Mlp {
    pub(crate) fn new(info: &TargetInfo, bias: bool, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, i) = (info.hidden_size, info.intermediate_size);
        Ok(Self {
            gate_up: loader.stacked(&[("gate_proj", i), ("up_proj", i)], h, bias)?,
            down: loader.linear("down_proj", i, h, bias)?,
        })
    }

    /// The residual stream `h` with the MLP of its normed state `x` added.
    pub(crate) fn add_to(&self, tape: &Tape<'_>, h: &Var, x: &Var) -> Result<Var> {
        let gate_up = tape.linear(x, &self.gate_up)?;
        Ok(tape.linear_add(&tape.swiglu(&gate_up)?, &self.down, h)?)
    }
}
