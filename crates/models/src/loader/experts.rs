//! The matrices of experts, stacked to one tensor however a checkpoint has them.

use std::borrow::Cow;

use specforge_nn::weights::Dtype;
use specforge_tensor::{Experts, ParamId};

use super::raw::Raw;
use super::{Loader, Source};
use crate::Result;
use crate::quantization::Quantization;

impl Loader<'_> {
    /// Matrices `[n_out, n_in]` of `n` experts, from one tensor per expert and name: `{expert}.{name}.weight`, of these
    /// widths, one below the other.
    pub(crate) fn experts_apart(
        &mut self,
        n: usize,
        names: &[(&str, usize)],
        n_in: usize,
    ) -> Result<Experts> {
        let n_out: usize = names.iter().map(|(_, width)| width).sum();
        let shape = [n, n_out, n_in];
        let name =
            format!("{}*.{}.weight", self.prefix, names.iter().map(|n| n.0).collect::<Vec<_>>().join("+"));
        let Source::Files(weights) = self.source else { return self.drawn_experts(name, &shape) };
        let mut all: Option<Raw<'_>> = None;
        for (expert, (part, width)) in (0..n).flat_map(|expert| names.iter().map(move |part| (expert, part)))
        {
            let name = format!("{}{expert}.{part}.weight", self.prefix);
            let raw = self.read(weights, &name, &[*width, n_in])?;
            all = Some(match all {
                None => raw,
                Some(all) => all.followed_by(raw),
            });
        }
        let all = all.unwrap_or(Raw { dtype: Dtype::F32, bytes: Cow::default() });
        self.add_experts(name, &all, &shape)
    }

    /// Matrices `[n, n_out, n_in]` that are one tensor already.
    pub(crate) fn experts_stacked(&mut self, name: &str, shape: &[usize; 3]) -> Result<Experts> {
        let name = format!("{}{name}", self.prefix);
        let Source::Files(weights) = self.source else { return self.drawn_experts(name, shape) };
        let raw = self.read(weights, &name, shape)?;
        self.add_experts(name, &raw, shape)
    }

    /// Matrices of this shape, `[n, n_out, n_in]`, from a tensor that has them transposed, or in 4 bits and as they are.
    /// Row i is output `order[i]` of the file.
    pub(crate) fn experts_transposed(
        &mut self,
        name: &str,
        shape: &[usize; 3],
        order: &[usize],
    ) -> Result<Experts> {
        let name = format!("{}{name}", self.prefix);
        let &[n, n_out, n_in] = shape;
        let Source::Files(weights) = self.source else { return self.drawn_experts(name, shape) };
        let raw = if self.quantization == Quantization::Mxfp4 && weights.has_mxfp4(&name) {
            let rows: Vec<usize> = (0..n).flat_map(|e| order.iter().map(move |i| e * n_out + i)).collect();
            self.read(weights, &name, shape)?.rows_in_order(n * n_out, &rows)
        } else {
            self.read(weights, &name, &[n, n_in, n_out])?.transposed([n_in, n_out], order)
        };
        self.add_experts(name, &raw, shape)
    }

    /// Biases of experts, `[n, n_out]`, in another order.
    pub(crate) fn experts_bias(
        &mut self,
        name: &str,
        [n, n_out]: [usize; 2],
        order: &[usize],
    ) -> Result<ParamId> {
        let name = format!("{}{name}", self.prefix);
        let tensor = match self.source {
            Source::Random => self.draw(&[n, n_out])?,
            Source::Files(weights) => {
                let raw = self.read(weights, &name, &[n, n_out])?.columns_in_order(n_out, order);
                self.convert(&raw, &[n, n_out], None)?
            }
        };
        Ok(self.params.add(name, tensor, false))
    }

    fn drawn_experts(&mut self, name: String, shape: &[usize]) -> Result<Experts> {
        let tensor = self.draw(shape)?;
        let weight = self.params.add(name, tensor, false);
        self.round(weight)?;
        Ok(Experts { weight, bias: None })
    }

    fn add_experts(&mut self, name: String, raw: &Raw<'_>, shape: &[usize]) -> Result<Experts> {
        let tensor = self.convert(raw, shape, None)?;
        let weight = self.params.add(name, tensor, false);
        self.round(weight)?;
        Ok(Experts { weight, bias: None })
    }
}
