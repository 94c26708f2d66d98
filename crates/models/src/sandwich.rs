//! The end of a layer whose branches are normed on both sides (Ding et al., 2021), as Gemma 2 and 3 and GLM-4 have it.

use specforge_tensor::{ParamId, Var};

use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::Pass;
use crate::{Result, TargetInfo};

/// The norm after attention, and the MLP between two norms.
#[derive(Debug)]
pub(crate) struct Sandwich {
    after_attention: ParamId,
    before_mlp: ParamId,
    mlp: Mlp,
    after_mlp: ParamId,
}

impl Sandwich {
    /// With the checkpoint's names of the three norms.
    pub(crate) fn new(
        [after_attention, before_mlp, after_mlp]: [&str; 3],
        info: &TargetInfo,
        mlp: Mlp,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let mut norm = |name| loader.norm(name, info.hidden_size);
        Ok(Self {
            after_attention: norm(after_attention)?,
            before_mlp: norm(before_mlp)?,
            mlp,
            after_mlp: norm(after_mlp)?,
        })
    }

    /// The residual stream `h` with attention `a` added, normed, and then the MLP of that, normed on both sides.
    pub(crate) fn finish(&self, pass: &Pass<'_, '_>, h: &Var, a: &Var) -> Result<Var> {
        let tape = pass.tape;
        let h = tape.add(h, &tape.rms_norm(a, self.after_attention, pass.eps)?)?;
        let x = tape.rms_norm(&h, self.before_mlp, pass.eps)?;
        let m = self.mlp.of(tape, &x)?;
        Ok(tape.add(&h, &tape.rms_norm(&m, self.after_mlp, pass.eps)?)?)
    }
}
