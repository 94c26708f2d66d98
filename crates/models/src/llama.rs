//! Llama (Touvron et al., 2023; Dubey et al., 2024): pre-norm decoder, grouped-query attention, SwiGLU.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use specforge_tensor::{ParamId, Var, Weight};

use crate::config::parse;
use crate::loader::Loader;
use crate::mixture::FeedForward;
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

/// Which linear layers have biases.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Biases {
    pub qkv: bool,
    pub o: bool,
    pub mlp: bool,
}

/// Llama's layer, which Mistral, Phi-3 and Qwen2 have too.
#[derive(Debug)]
pub(crate) struct LlamaLayer {
    pub input_layernorm: ParamId,
    /// `[(N + 2 G)·D, H]`: queries, keys, values.
    pub qkv_proj: Weight,
    pub o_proj: Weight,
    pub post_attention_layernorm: ParamId,
    pub mlp: FeedForward,
    /// Keys that a query sees, itself included; absent: all before it.
    pub window: Option<usize>,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let biases = Biases { qkv: config.attention_bias, o: config.attention_bias, mlp: config.mlp_bias };
    loader.layers(0..info.n_layers, |_, loader| LlamaLayer::new(info, biases, None, loader))
}

impl LlamaLayer {
    /// With a matrix each for queries, keys, values, gate and up.
    pub(crate) fn new(
        info: &TargetInfo,
        biases: Biases,
        window: Option<usize>,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let mlp = Mlp::new(info, biases.mlp, &mut loader.at("mlp"))?.into();
        Self::with(info, biases, window, mlp, loader)
    }

    /// As [`LlamaLayer::new`], with another part behind the attention.
    pub(crate) fn with(
        info: &TargetInfo,
        biases: Biases,
        window: Option<usize>,
        mlp: FeedForward,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked_outputs(&qkv(q, kv), h, info.head_dim, biases.qkv)?,
            o_proj: loader.inputs("self_attn.o_proj", q, h, biases.o)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp,
            window,
        })
    }
}

impl Layer for LlamaLayer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm_for(h, self.input_layernorm, pass.eps, &self.qkv_proj)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions, on the part of each head that the tables cover.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention to what the window shows, and the residual sum.
        let a = pass.attention_packed(&qkv, self.window)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP of the normed state, and the residual sum.
        let x = self.mlp.norm(tape, &h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
