//! RMSNorm.

use super::Weight;
use crate::tape::{Backward, Sink};
use crate::{Error, ParamId, Result, Tape, Tensor, Var};

struct RmsNorm {
    x: Var,
    id: ParamId,
    weight: Tensor,
    rstd: Tensor,
}

impl Tape<'_> {
    /// `y = x / sqrt(mean(x²) + eps) * w` over each row (Zhang and Sennrich, 2019), statistics in float32. With a
    /// weight narrower than the row, every group of that width is normed by itself (per-head norms).
    ///
    /// # Shapes
    /// x `[R, G·D]`, w `[D]`, y like x.
    pub fn rms_norm(&self, x: &Var, id: ParamId, eps: f32) -> Result<Var> {
        let weight = self.params().get(id).value.clone();
        let (d, width) = (weight.len(), x.rows_cols().1);
        if d == 0 || !width.is_multiple_of(d) {
            let expected = format!("[D] with D above 0 that divides the row width {width}");
            return Err(Error::shape("rms_norm", "weight", expected, weight.shape()));
        }
        let (y, rstd) = x.value().device().kernels().rms_norm(x.value(), &weight, eps)?;
        let needed = self.any_needed(&[x]) || self.is_trained(id);
        Ok(self.record(y, needed, || Box::new(RmsNorm { x: x.clone(), id, weight, rstd })))
    }

    /// As [`Tape::rms_norm`], for a value that only weights like `w` multiply: in 8 bits where w is frozen and has 8
    /// bits, which spares a pass over it.
    pub fn rms_norm_for(&self, x: &Var, id: ParamId, eps: f32, w: &Weight) -> Result<Var> {
        if self.takes_8_bits(w) {
            let (weight, kernels) = (&self.params().get(id).value, x.value().device().kernels());
            if let Some(y) = kernels.rms_norm_rounded(x.value(), weight, eps)? {
                return Ok(self.input(y));
            }
        }
        self.rms_norm(x, id, eps)
    }
}

impl Backward for RmsNorm {
    fn backward(self: Box<Self>, dy: Tensor, sink: &mut Sink<'_>) -> Result<()> {
        let (kernels, x) = (dy.device().kernels(), self.x.value());
        let into = sink.take(&self.x);
        let dx = sink.with_param(self.id, |dw| {
            kernels.rms_norm_backward(&dy, x, &self.weight, &self.rstd, dw, into)
        })?;
        sink.put(&self.x, dx);
        Ok(())
    }

    fn params(&self) -> Vec<ParamId> {
        vec![self.id]
    }
}
