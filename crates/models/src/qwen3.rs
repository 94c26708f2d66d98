//! Qwen3, dense (Yang et al., 2025), and the layer of its relatives: queries and keys are normed per head before their positions are applied.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size (N·D need not
//! be H).

use serde::Deserialize;
use specforge_tensor::{KeyValue, ParamId, Part, Var, Weight};

use crate::config::{Windows, parse};
use crate::llama::Biases;
use crate::loader::Loader;
use crate::mixture::FeedForward;
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

/// Qwen3's layer, which its mixtures and GLM-4.5 have too.
#[derive(Debug)]
pub(crate) struct Qwen3Layer {
    input_layernorm: ParamId,
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    /// Of queries and of keys.
    norms: Option<[ParamId; 2]>,
    post_attention_layernorm: ParamId,
    mlp: FeedForward,
    window: Option<usize>,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    let biases = Biases { qkv: config.attention_bias, o: config.attention_bias, mlp: false };
    loader.layers(windows, |window, loader| {
        let mlp = Mlp::new(info, false, &mut loader.at("mlp"))?.into();
        Qwen3Layer::new(info, biases, true, window, mlp, loader)
    })
}

impl Qwen3Layer {
    /// With queries and keys normed or not.
    pub(crate) fn new(
        info: &TargetInfo,
        biases: Biases,
        is_normed: bool,
        window: Option<usize>,
        mlp: FeedForward,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let (h, d) = (info.hidden_size, info.head_dim);
        let (q, kv) = (info.n_heads * d, info.n_kv_heads * d);
        let norms = ["self_attn.q_norm", "self_attn.k_norm"];
        let norms =
            if is_normed { Some([loader.norm(norms[0], d)?, loader.norm(norms[1], d)?]) } else { None };
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            q_proj: loader.outputs("self_attn.q_proj", h, q, d, biases.qkv)?,
            k_proj: loader.outputs("self_attn.k_proj", h, kv, d, biases.qkv)?,
            v_proj: loader.outputs("self_attn.v_proj", h, kv, d, biases.qkv)?,
            o_proj: loader.inputs("self_attn.o_proj", q, h, biases.o)?,
            norms,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp,
            window,
        })
    }
}

impl Layer for Qwen3Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm_for(h, self.input_layernorm, pass.eps, &self.q_proj)?;
        let q = tape.linear(&x, &self.q_proj)?;
        let k = tape.linear(&x, &self.k_proj)?;
        let v = tape.linear(&x, &self.v_proj)?;
        // 2. Each head of q and k normed by itself, then positions.
        let normed = |x: Var, which: usize| match self.norms {
            Some(norms) => tape.rms_norm(&x, norms[which], pass.eps),
            None => Ok(x),
        };
        let (q, k) = (pass.rope(&normed(q, 0)?)?, pass.rope(&normed(k, 1)?)?);
        // 3. Attention to what the window shows, and the residual sum.
        let kv = KeyValue::new(&k, &v);
        let a = pass.attention(&Part::new(&q, 0), &kv, self.window)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP of the normed state, and the residual sum.
        let x = self.mlp.norm(tape, &h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
