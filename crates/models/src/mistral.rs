//! Mistral (Jiang et al., 2023): Llama whose queries see a sliding window of keys in every layer, where one is set.
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
    /// Keys that a query sees, itself included; absent: all before it.
    sliding_window: Option<usize>,
}

#[derive(Debug)]
struct MistralLayer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    mlp: Mlp,
    window: Option<usize>,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    if config.sliding_window == Some(0) {
        return Err(info.wrong("sliding_window", "expected at least 1"));
    }
    let layer = |i: usize| -> Result<Box<dyn Layer>> {
        Ok(Box::new(MistralLayer::new(info, config.sliding_window, &mut loader.at(&i.to_string()))?))
    };
    (0..info.n_layers).map(layer).collect()
}

impl MistralLayer {
    fn new(info: &TargetInfo, window: Option<usize>, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked(&qkv(q, kv), h, false)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, false)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::new(info, false, &mut loader.at("mlp"))?,
            window,
        })
    }
}

impl Layer for MistralLayer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to what the window shows, and the residual sum.
        let a = pass.attention_packed(&qkv, self.window)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
