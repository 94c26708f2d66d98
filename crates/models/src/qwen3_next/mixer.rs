//! What mixes the rows of a layer: linear attention, or attention with a gate.

use specforge_tensor::{Activation, KeyValue, ParamId, Part, Var, Weight};

use super::Config;
use crate::loader::Loader;
use crate::pass::Pass;
use crate::recurrent::DeltaRule;
use crate::{Result, TargetInfo};

#[derive(Debug)]
pub(crate) struct LinearAttention {
    /// `[2·K·C + 2·M·E, H]`: queries, keys, values, then gates of the output.
    qkvz: Weight,
    /// `[2·M, H]`: b, then a.
    ba: Weight,
    rule: DeltaRule,
    norm: ParamId,
    out_proj: Weight,
}

#[derive(Debug)]
pub(crate) struct GatedAttention {
    /// `[2·N·D, H]`: queries, then gates of the output.
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    q_norm: ParamId,
    k_norm: ParamId,
}

/// Rows that are grouped by head, each group having parts of these widths: for all heads the first part, then the
/// second, and so on.
pub(super) fn apart(heads: usize, widths: &[usize]) -> Vec<usize> {
    let (group, mut first) = (widths.iter().sum::<usize>(), 0);
    let mut order = Vec::with_capacity(heads * group);
    for width in widths {
        order.extend((0..heads).flat_map(|head| head * group + first..head * group + first + width));
        first += width;
    }
    order
}

impl LinearAttention {
    /// With the projections `[qkvz, ba]`.
    pub(crate) fn new(
        info: &TargetInfo,
        config: &Config,
        [qkvz, ba]: [Weight; 2],
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let shape = config.shape();
        let rule = DeltaRule {
            shape,
            taps: loader.tensor("conv1d.weight", &[shape.width(), 1, config.linear_conv_kernel_dim])?,
            a_log: loader.exact("A_log", &[shape.value_heads])?,
            dt_bias: loader.exact("dt_bias", &[shape.value_heads])?,
        };
        // This norm's weight is stored as it is.
        let norm = loader.tensor("norm.weight", &[shape.value_dim])?;
        let width = shape.value_heads * shape.value_dim;
        let out_proj = loader.linear("out_proj", width, info.hidden_size, false)?;
        Ok(Self { qkvz, ba, rule, norm, out_proj })
    }

    pub(super) fn add_to(&self, pass: &mut Pass<'_, '_>, h: &Var, x: &Var) -> Result<Var> {
        let (tape, eps, width) = (pass.tape, pass.eps, self.rule.shape.width());
        let (qkvz, ba) = (tape.linear(x, &self.qkvz)?, tape.linear(x, &self.ba)?);
        let (qkv, z) = (tape.columns(&qkvz, 0..width)?, tape.columns(&qkvz, width..qkvz.rows_cols().1)?);
        // Each head's output [R, M·E] normed by itself, and gated.
        let y = tape.rms_norm(&pass.delta_rule(&qkv, &ba, &self.rule)?, self.norm, eps)?;
        let gate = tape.activated(&z, Activation::Silu)?;
        let y = tape.product(&Part::new(&y, 0), &Part::new(&gate, 0), y.rows_cols().1)?;
        Ok(tape.linear_add(&y, &self.out_proj, h)?)
    }
}

impl GatedAttention {
    pub(crate) fn new(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, d, bias) = (info.hidden_size, info.head_dim, config.attention_bias);
        let (q, kv) = (info.n_heads * d, info.n_kv_heads * d);
        // The file has a head's query, then its gate.
        let order = apart(info.n_heads, &[d, d]);
        Ok(Self {
            q_proj: loader.linear_in_order("q_proj", h, 2 * q, bias, Some(&order))?,
            k_proj: loader.linear("k_proj", h, kv, bias)?,
            v_proj: loader.linear("v_proj", h, kv, bias)?,
            o_proj: loader.linear("o_proj", q, h, bias)?,
            q_norm: loader.norm("q_norm", d)?,
            k_norm: loader.norm("k_norm", d)?,
        })
    }

    pub(super) fn add_to(&self, pass: &mut Pass<'_, '_>, h: &Var, x: &Var) -> Result<Var> {
        let (tape, eps) = (pass.tape, pass.eps);
        // 1. Queries and gates [R, N·D], keys and values [R, G·D].
        let q = tape.linear(x, &self.q_proj)?;
        let width = q.rows_cols().1 / 2;
        let (q, gate) = (tape.columns(&q, 0..width)?, tape.columns(&q, width..2 * width)?);
        let (k, v) = (tape.linear(x, &self.k_proj)?, tape.linear(x, &self.v_proj)?);
        // 2. Each head of q and k normed by itself, then positions, on the part of each head that the tables cover.
        let q = pass.rope(&tape.rms_norm(&q, self.q_norm, eps)?)?;
        let k = pass.rope(&tape.rms_norm(&k, self.k_norm, eps)?)?;
        // 3. Attention to everything before, gated, and the residual sum.
        let a = pass.attention(&Part::new(&q, 0), &KeyValue::new(&k, &v), None)?;
        let gate = tape.activated(&gate, Activation::Sigmoid)?;
        let a = tape.product(&Part::new(&a, 0), &Part::new(&gate, 0), width)?;
        Ok(tape.linear_add(&a, &self.o_proj, h)?)
    }
}

impl LinearAttention {
    /// The widths of what is cached of a row.
    pub(super) fn cached(&self) -> Vec<usize> {
        vec![self.rule.shape.width(), 2 * self.rule.shape.value_heads]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_heads_go_together() {
        assert_eq!(apart(2, &[1, 2]), [0, 3, 1, 2, 4, 5]);
    }
}
