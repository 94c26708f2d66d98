//! Llama (Touvron et al., 2023; Dubey et al., 2024): pre-norm decoder, grouped-query attention, SwiGLU.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use specforge_tensor::{ParamId, Var, Weight};

use crate::config::parse;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass, qkv};
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Biases on q, k, v and o.
    #[serde(default)]
    attention_bias: bool,
    /// Biases on gate, up and down.
    #[serde(default)]
    mlp_bias: bool,
}

#[derive(Debug)]
struct LlamaLayer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    mlp: Mlp,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let layer = |i: usize| -> Result<Box<dyn Layer>> {
        Ok(Box::new(LlamaLayer::new(info, &config, &mut loader.at(&i.to_string()))?))
    };
    (0..info.n_layers).map(layer).collect()
}

impl LlamaLayer {
    fn new(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        let bias = config.attention_bias;
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked(&qkv(q, kv), h, bias)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, bias)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::new(info, config.mlp_bias, &mut loader.at("mlp"))?,
        })
    }
}

impl Layer for LlamaLayer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to everything before, and the residual sum.
        let a = pass.attention_packed(&qkv, None)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
