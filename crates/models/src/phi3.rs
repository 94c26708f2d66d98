//! Phi-3, Phi-4 and Phi-4-mini (Abdin et al., 2024; 2025): Llama with queries, keys and values in one matrix, gate and
//! up in another, and in the small models a rotation of a part of each head with LongRoPE's factors.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use specforge_tensor::{ParamId, Var, Weight};

use crate::config::parse;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass};
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Keys that a query sees, itself included; absent: all before it.
    sliding_window: Option<usize>,
}

#[derive(Debug)]
struct Phi3Layer {
    input_layernorm: ParamId,
    /// `[(N + 2 G)·D, H]`: queries, keys, values.
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
        Ok(Box::new(Phi3Layer::new(info, config.sliding_window, &mut loader.at(&i.to_string()))?))
    };
    (0..info.n_layers).map(layer).collect()
}

impl Phi3Layer {
    fn new(info: &TargetInfo, window: Option<usize>, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.linear("self_attn.qkv_proj", h, q + 2 * kv, false)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, false)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::fused(info, &mut loader.at("mlp"))?,
            window,
        })
    }
}

impl Layer for Phi3Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions, on the part of each head that the tables cover.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to what the window shows, and the residual sum.
        let a = pass.attention_packed(&qkv, self.window)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
