//! OLMo 2 (OLMo team, 2025): Llama with the norms behind attention and MLP instead of before them, and with queries
//! and keys normed over all heads at once before their positions are applied.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use specforge_tensor::{KeyValue, ParamId, Part, Var, Weight};

use crate::config::parse;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass};
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Biases on q, k, v and o.
    #[serde(default)]
    attention_bias: bool,
}

#[derive(Debug)]
struct Olmo2Layer {
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    q_norm: ParamId,
    k_norm: ParamId,
    post_attention_layernorm: ParamId,
    mlp: Mlp,
    post_feedforward_layernorm: ParamId,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    loader.layers(0..info.n_layers, |_, loader| Olmo2Layer::new(info, &config, loader))
}

impl Olmo2Layer {
    fn new(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        let bias = config.attention_bias;
        Ok(Self {
            q_proj: loader.linear("self_attn.q_proj", h, q, bias)?,
            k_proj: loader.linear("self_attn.k_proj", h, kv, bias)?,
            v_proj: loader.linear("self_attn.v_proj", h, kv, bias)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, bias)?,
            q_norm: loader.norm("self_attn.q_norm", q)?,
            k_norm: loader.norm("self_attn.k_norm", kv)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::new(info, false, &mut loader.at("mlp"))?,
            post_feedforward_layernorm: loader.norm("post_feedforward_layernorm", h)?,
        })
    }
}

impl Layer for Olmo2Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the state as it is.
        let q = tape.linear(h, &self.q_proj)?;
        let k = tape.linear(h, &self.k_proj)?;
        let v = tape.linear(h, &self.v_proj)?;
        // 2. All heads of q, and of k, normed together, then positions.
        let q = pass.rope(&tape.rms_norm(&q, self.q_norm, pass.eps)?)?;
        let k = pass.rope(&tape.rms_norm(&k, self.k_norm, pass.eps)?)?;
        // 3. Attention to everything before, normed, and the residual sum.
        let a = pass.attention(&Part::new(&q, 0), &KeyValue::new(&k, &v), None)?;
        let a = tape.linear(&a, &self.o_proj)?;
        let h = tape.add(h, &tape.rms_norm(&a, self.post_attention_layernorm, pass.eps)?)?;
        // 4. MLP, normed, and the residual sum.
        let m = self.mlp.of(tape, &h)?;
        Ok(tape.add(&h, &tape.rms_norm(&m, self.post_feedforward_layernorm, pass.eps)?)?)
    }
}
