//! The SwiGLU MLP (Shazeer, 2020) that most families share.

use specforge_tensor::{Tape, Var, Weight};

use crate::loader::Loader;
use crate::{Result, TargetInfo};

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate: Weight,
    up: Weight,
    down: Weight,
}

impl Mlp {
    pub(crate) fn new(info: &TargetInfo, bias: bool, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, i) = (info.hidden_size, info.intermediate_size);
        Ok(Self {
            gate: loader.linear("gate_proj", h, i, bias)?,
            up: loader.linear("up_proj", h, i, bias)?,
            down: loader.linear("down_proj", i, h, bias)?,
        })
    }

    pub(crate) fn forward(&self, tape: &Tape<'_>, x: &Var) -> Result<Var> {
        let gate = tape.linear(x, self.gate.clone())?;
        let up = tape.linear(x, self.up.clone())?;
        Ok(tape.linear(&tape.swiglu(&gate, &up)?, self.down.clone())?)
    }
}
