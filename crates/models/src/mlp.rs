//! The gated MLP (Shazeer, 2020) that most families share.

use specforge_tensor::{Tape, Tensor, Var, Weight};

use crate::loader::Loader;
use crate::{Result, TargetInfo};

/// Bytes of gate and up that exist at once. Small in this crate's own tests, so that they cross chunks.
const CHUNK: usize = if cfg!(test) { 1 << 12 } else { 1 << 30 };

/// The activation of the gate.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Gate {
    Silu,
    /// By its tanh approximation.
    Gelu,
}

/// `down(silu(gate(x)) * up(x))`, or with another activation.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate: Gate,
    gate_up: Weight,
    down: Weight,
    intermediate: usize,
}

impl Mlp {
    /// From a matrix each for gate, up and down.
    pub(crate) fn new(info: &TargetInfo, bias: bool, loader: &mut Loader<'_>) -> Result<Self> {
        Self::named(["gate_proj", "up_proj", "down_proj"], info, bias, loader)
    }

    /// As [`Mlp::new`], with other names of gate, up and down.
    pub(crate) fn named(
        [gate, up, down]: [&str; 3],
        info: &TargetInfo,
        bias: bool,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let (h, i) = (info.hidden_size, info.intermediate_size);
        Ok(Self {
            gate: Gate::Silu,
            gate_up: loader.stacked_outputs(&[(gate, i), (up, i)], h, 1, bias)?,
            down: loader.inputs(down, i, h, bias)?,
            intermediate: loader.own(i),
        })
    }

    /// From one matrix for gate and up, in this order, and one for down.
    pub(crate) fn fused(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, i) = (info.hidden_size, info.intermediate_size);
        Ok(Self {
            gate: Gate::Silu,
            gate_up: loader.linear("gate_up_proj", h, 2 * i, false)?,
            down: loader.linear("down_proj", i, h, false)?,
            intermediate: i,
        })
    }

    /// With another activation.
    pub(crate) fn gated_by(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// The residual stream `h` with the MLP of its normed state `x` added.
    pub(crate) fn add_to(&self, tape: &Tape<'_>, h: &Var, x: &Var) -> Result<Var> {
        self.in_chunks(tape, Some(h), x)
    }

    /// The MLP of `x` alone, for what is done to it before it is added.
    pub(crate) fn of(&self, tape: &Tape<'_>, x: &Var) -> Result<Var> {
        self.in_chunks(tape, None, x)
    }

    /// Long inputs go in chunks of rows, so that the widest activation of a target keeps within [`CHUNK`].
    fn in_chunks(&self, tape: &Tape<'_>, h: Option<&Var>, x: &Var) -> Result<Var> {
        let (n, row) = (x.rows_cols().0, self.row_bytes(x.value()));
        let most = (CHUNK / row.max(1)).max(1);
        if n <= most {
            return self.chunk(tape, h, x);
        }
        let mut all: Option<Tensor> = None;
        for first in (0..n).step_by(most) {
            let rows = first..(first + most).min(n);
            let part = |v: &Var| Ok::<_, crate::Error>(tape.input(v.value().rows(rows.clone())?));
            let y = self.chunk(tape, h.map(part).transpose()?.as_ref(), &part(x)?)?;
            match &mut all {
                Some(all) => all.append_rows(y.value())?,
                None => all = Some(y.value().clone()),
            }
        }
        Ok(tape.input(all.expect("more rows than one chunk has")))
    }

    fn chunk(&self, tape: &Tape<'_>, h: Option<&Var>, x: &Var) -> Result<Var> {
        let gate_up = tape.linear(x, &self.gate_up)?;
        let y = match self.gate {
            Gate::Silu => tape.swiglu(&gate_up)?,
            Gate::Gelu => tape.geglu(&gate_up)?,
        };
        Ok(match h {
            Some(h) => tape.linear_add(&y, &self.down, h)?,
            None => tape.linear(&y, &self.down)?,
        })
    }

    /// Bytes of a row of gate and up.
    fn row_bytes(&self, x: &Tensor) -> usize {
        2 * self.intermediate * x.dtype().size()
    }
}
