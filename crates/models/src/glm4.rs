//! GLM-4-0414 (Zhipu, 2025): Llama with norms before and behind attention and MLP, gate and up in one matrix, biases on
//! q, k and v, and a rotation of neighbouring elements in the first part of each head.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use specforge_tensor::{ParamId, Var, Weight};

use crate::config::parse;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass, qkv};
use crate::sandwich::Sandwich;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Biases on q, k and v.
    #[serde(default)]
    attention_bias: bool,
}

#[derive(Debug)]
struct Glm4Layer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    o_proj: Weight,
    end: Sandwich,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    loader.layers(0..info.n_layers, |_, loader| Glm4Layer::new(info, &config, loader))
}

impl Glm4Layer {
    fn new(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, d) = (info.hidden_size, info.head_dim);
        let (q, kv) = (info.n_heads * d, info.n_kv_heads * d);
        let [q_proj, k_proj, v_proj] = qkv(q, kv);
        let [q_rows, k_rows] = [q, kv].map(|n| half_split(n / d, d, info.rope.half()));
        let orders = [Some(&*q_rows), Some(&*k_rows), None];
        let qkv = [q_proj, k_proj, v_proj];
        let norms = ["post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"];
        let mlp = Mlp::fused(info, &mut loader.at("mlp"))?;
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked_in_order(&qkv, &orders, h, config.attention_bias)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, false)?,
            end: Sandwich::new(norms, info, mlp, loader)?,
        })
    }
}

/// For each row of a projection to heads, the row of the checkpoint that goes there: of each head the even elements of
/// the rotated part, then its odd ones, then the rest. Rotating halves then is what rotating neighbours was, and scores
/// do not see the order, which queries and keys share.
pub(crate) fn half_split(n_heads: usize, d: usize, half: usize) -> Vec<usize> {
    let head: Vec<usize> =
        (0..half).map(|j| 2 * j).chain((0..half).map(|j| 2 * j + 1)).chain(2 * half..d).collect();
    (0..n_heads).flat_map(|n| head.iter().map(move |j| n * d + j)).collect()
}

impl Layer for Glm4Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state, with biases.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions, on the part of each head that the tables cover.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to everything before.
        let a = tape.linear(&pass.attention_packed(&qkv, None)?, &self.o_proj)?;
        // 4. Both residual sums, the MLP between them.
        self.end.finish(pass, h, &a)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_head_has_its_even_elements_first() {
        assert_eq!(half_split(2, 6, 2), [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]);
    }
}
