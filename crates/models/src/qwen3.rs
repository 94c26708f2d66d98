//! Qwen3, dense (Yang et al., 2025): queries and keys are normed per head before their positions are applied.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size (N·D need not
//! be H).

use serde::Deserialize;
use specforge_tensor::{KeyValue, ParamId, Part, Var, Weight};

use crate::config::{Windows, parse};
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
struct Qwen3Layer {
    input_layernorm: ParamId,
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    q_norm: ParamId,
    k_norm: ParamId,
    post_attention_layernorm: ParamId,
    mlp: Mlp,
    window: Option<usize>,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    loader.layers(windows, |window, loader| Qwen3Layer::new(info, &config, window, loader))
}

impl Qwen3Layer {
    fn new(
        info: &TargetInfo,
        config: &Config,
        window: Option<usize>,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let (h, d) = (info.hidden_size, info.head_dim);
        let (q, kv) = (info.n_heads * d, info.n_kv_heads * d);
        let bias = config.attention_bias;
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            q_proj: loader.outputs("self_attn.q_proj", h, q, d, bias)?,
            k_proj: loader.outputs("self_attn.k_proj", h, kv, d, bias)?,
            v_proj: loader.outputs("self_attn.v_proj", h, kv, d, bias)?,
            o_proj: loader.inputs("self_attn.o_proj", q, h, bias)?,
            q_norm: loader.norm("self_attn.q_norm", d)?,
            k_norm: loader.norm("self_attn.k_norm", d)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp: Mlp::new(info, false, &mut loader.at("mlp"))?,
            window,
        })
    }
}

impl Layer for Qwen3Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let q = tape.linear(&x, &self.q_proj)?;
        let k = tape.linear(&x, &self.k_proj)?;
        let v = tape.linear(&x, &self.v_proj)?;
        // 2. Each head of q and k normed by itself, then positions.
        let q = pass.rope(&tape.rms_norm(&q, self.q_norm, pass.eps)?)?;
        let k = pass.rope(&tape.rms_norm(&k, self.k_norm, pass.eps)?)?;
        // 3. Attention to what the window shows, and the residual sum.
        let kv = KeyValue::new(&k, &v);
        let a = pass.attention(&Part::new(&q, 0), &kv, self.window)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
