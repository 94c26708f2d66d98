//! Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v and, where switched on, a sliding window
//! in the upper layers.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use specforge_tensor::{ParamId, Var, Weight};

use crate::config::{Windows, parse};
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass, qkv};
use crate::{Result, TargetInfo};

#[derive(Debug)]
struct Qwen2Layer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    mlp: Mlp,
    window: Option<usize>,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    let layer = |(i, window): (usize, Option<usize>)| -> Result<Box<dyn Layer>> {
        Ok(Box::new(Qwen2Layer::new(info, window, &mut loader.at(&i.to_string()))?))
    };
    windows.into_iter().enumerate().map(layer).collect()
}

impl Qwen2Layer {
    fn new(info: &TargetInfo, window: Option<usize>, loader: &mut Loader<'_>) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked(&qkv(q, kv), h, true)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, false)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::new(info, false, &mut loader.at("mlp"))?,
            window,
        })
    }
}

impl Layer for Qwen2Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state, with biases.
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
