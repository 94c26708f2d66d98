//! Granite 3 (IBM, 2024): Llama with factors on the embeddings, on the scores in place of `head_dim^-0.5` and on both
//! residual branches, and a divisor of the logits.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use specforge_tensor::{ParamId, Var, Weight};

use crate::config::parse;
use crate::frame::Frame;
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
    #[serde(default = "one")]
    embedding_multiplier: f32,
    #[serde(default = "one")]
    attention_multiplier: f32,
    #[serde(default = "one")]
    residual_multiplier: f32,
    /// What logits are divided by.
    #[serde(default = "one")]
    logits_scaling: f32,
}

fn one() -> f32 {
    1.0
}

#[derive(Debug)]
struct GraniteLayer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    mlp: Mlp,
    residual_multiplier: f32,
}

/// What stands around the layers.
pub(crate) fn frame(info: &TargetInfo) -> Result<Frame> {
    let config: Config = parse(&info.path, &info.raw)?;
    if config.logits_scaling <= 0.0 {
        return Err(info.wrong("logits_scaling", "expected a number above 0"));
    }
    Ok(Frame {
        attention_scale: Some(config.attention_multiplier),
        embedding_scale: config.embedding_multiplier,
        logit_scale: 1.0 / config.logits_scaling,
        ..Frame::default()
    })
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    loader.layers(0..info.n_layers, |_, loader| GraniteLayer::new(info, &config, loader))
}

impl GraniteLayer {
    fn new(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        let bias = config.attention_bias;
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked_outputs(&qkv(q, kv), h, info.head_dim, bias)?,
            o_proj: loader.inputs("self_attn.o_proj", q, h, bias)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::new(info, config.mlp_bias, &mut loader.at("mlp"))?,
            residual_multiplier: config.residual_multiplier,
        })
    }
}

impl Layer for GraniteLayer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let (tape, m) = (pass.tape, self.residual_multiplier);
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to everything before, and the residual sum with its factor.
        let a = tape.linear(&pass.attention_packed(&qkv, None)?, &self.o_proj)?;
        let h = tape.add(h, &tape.scale(&a, m)?)?;
        // 4. MLP of the normed state, and the residual sum with its factor.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        Ok(tape.add(&h, &tape.scale(&self.mlp.of(tape, &x)?, m)?)?)
    }
}
