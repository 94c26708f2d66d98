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
        Self::of_width(info.intermediate_size, info, bias, loader)
    }

    /// As [`Mlp::new`], of another width.
    pub(crate) fn of_width(i: usize, info: &TargetInfo, bias: bool, loader: &mut Loader<'_>) -> Result<Self> {
        Self::named(["gate_proj", "up_proj", "down_proj"], [info.hidden_size, i], bias, loader)
    }

    /// As [`Mlp::new`], with other names of gate, up and down; of an input width and a width of its own.
    pub(crate) fn named(
        [gate, up, down]: [&str; 3],
        [h, i]: [usize; 2],
        bias: bool,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
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

    /// What its input is multiplied by.
    pub(crate) fn first(&self) -> &Weight {
        &self.gate_up
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

    fn in_chunks(&self, tape: &Tape<'_>, h: Option<&Var>, x: &Var) -> Result<Var> {
        let row = 2 * self.intermediate * x.value().device().storage().size();
        in_chunks(tape, row, h, x, |h, x| self.chunk(tape, h, x))
    }

    fn chunk(&self, tape: &Tape<'_>, h: Option<&Var>, x: &Var) -> Result<Var> {
        let gate_up = tape.linear(x, &self.gate_up)?;
        let y = match self.gate {
            Gate::Silu => tape.swiglu_for(&gate_up, &self.down)?,
            Gate::Gelu => tape.geglu(&gate_up)?,
        };
        Ok(match h {
            Some(h) => tape.linear_add(&y, &self.down, h)?,
            None => tape.linear(&y, &self.down)?,
        })
    }
}

/// Long inputs go in chunks of rows, so that the widest activation of a target keeps within [`CHUNK`]: `row` bytes for
/// each row of x. `f` is given rows of h, if there is one, and of x.
pub(crate) fn in_chunks(
    tape: &Tape<'_>,
    row: usize,
    h: Option<&Var>,
    x: &Var,
    f: impl Fn(Option<&Var>, &Var) -> Result<Var>,
) -> Result<Var> {
    let (n, most) = (x.rows_cols().0, (CHUNK / row.max(1)).max(1));
    if n <= most {
        return f(h, x);
    }
    let mut all: Option<Tensor> = None;
    for first in (0..n).step_by(most) {
        let rows = first..(first + most).min(n);
        let part = |v: &Var| Ok::<_, crate::Error>(tape.input(v.value().rows(rows.clone())?));
        let y = f(h.map(part).transpose()?.as_ref(), &part(x)?)?;
        match &mut all {
            Some(all) => all.append_rows(y.value())?,
            None => all = Some(y.value().clone()),
        }
    }
    Ok(tape.input(all.expect("more rows than one chunk has")))
}
