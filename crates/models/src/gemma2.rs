//! Gemma 2 (Gemma team, 2024): norms before and behind attention and MLP with weights stored minus 1, GELU gates,
//! embeddings times √H, every other layer with a sliding window, and soft caps on scores and logits.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde::Deserialize;
use serde_json::{Value, json};
use specforge_tensor::{ParamId, Var, Weight};

use crate::config::{Windows, bf16_rounded, n_layers, parse, with_defaults};
use crate::frame::Frame;
use crate::loader::Loader;
use crate::mlp::{Gate, Mlp};
use crate::pass::{Layer, Layers, Pass, qkv};
use crate::sandwich::Sandwich;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only the Gemma families have.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    /// Biases on q, k, v and o.
    #[serde(default)]
    pub attention_bias: bool,
    /// Scores are divided by the root of it.
    #[serde(default = "default_query_scalar")]
    query_pre_attn_scalar: f32,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
}

fn default_query_scalar() -> f32 {
    256.0
}

#[derive(Debug)]
struct Gemma2Layer {
    input_layernorm: ParamId,
    qkv_proj: Weight,
    o_proj: Weight,
    end: Sandwich,
    window: Option<usize>,
}

/// `config.json` with Llama's keys: what is left out there is what the family had in mind.
pub(crate) fn settings(config: Value) -> Value {
    let mut config = with_defaults(
        config,
        &json!({ "head_dim": 256, "tie_word_embeddings": true, "sliding_window": 4096, "use_sliding_window": true }),
    );
    if config["hidden_activation"].is_string() {
        config["hidden_act"] = config["hidden_activation"].clone();
    }
    // Layer 0 slides, layer 1 sees all, and so on.
    sliding_but_every(config, 2)
}

/// `layer_types` where there are none: every `nth` layer sees all keys, the others have the window.
pub(crate) fn sliding_but_every(mut config: Value, nth: u64) -> Value {
    if config["layer_types"].is_null() {
        let kind = |i| if i % nth == 0 { "full_attention" } else { "sliding_attention" };
        config["layer_types"] = (1..=n_layers(&config)).map(kind).collect();
    }
    config
}

/// What stands around the layers.
pub(crate) fn frame(info: &TargetInfo) -> Result<Frame> {
    let config: Config = parse(&info.path, &info.raw)?;
    let expect_positive = |key: &str, value: Option<f32>| match value {
        Some(value) if value <= 0.0 => Err(info.wrong(key, "expected a number above 0")),
        _ => Ok(()),
    };
    expect_positive("query_pre_attn_scalar", Some(config.query_pre_attn_scalar))?;
    expect_positive("attn_logit_softcapping", config.attn_logit_softcapping)?;
    expect_positive("final_logit_softcapping", config.final_logit_softcapping)?;
    // The factor is rounded as everything is where the model is served.
    let root = (info.hidden_size as f32).sqrt();
    let embedding_scale = if info.dtype == "bfloat16" { bf16_rounded(root) } else { root };
    Ok(Frame {
        attention_scale: Some(config.query_pre_attn_scalar.powf(-0.5)),
        attention_cap: config.attn_logit_softcapping,
        embedding_scale,
        logit_cap: config.final_logit_softcapping,
        norm_offset: 1.0,
        ..Frame::default()
    })
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    loader.layers(windows, |window, loader| Gemma2Layer::new(info, &config, window, loader))
}

/// What follows attention.
pub(crate) fn end(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Sandwich> {
    let norms = ["post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"];
    let mlp = Mlp::new(info, false, &mut loader.at("mlp"))?.gated_by(Gate::Gelu);
    Sandwich::new(norms, info, mlp, loader)
}

impl Gemma2Layer {
    fn new(
        info: &TargetInfo,
        config: &Config,
        window: Option<usize>,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let h = info.hidden_size;
        let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
        let bias = config.attention_bias;
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            qkv_proj: loader.stacked(&qkv(q, kv), h, bias)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, bias)?,
            end: end(info, loader)?,
            window,
        })
    }
}

impl Layer for Gemma2Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let qkv = tape.linear(&x, &self.qkv_proj)?;
        // 2. Positions.
        let qkv = pass.rope_packed(&qkv)?;
        // 3. Attention with capped scores to what the window shows.
        let a = tape.linear(&pass.attention_packed(&qkv, self.window)?, &self.o_proj)?;
        // 4. Both residual sums, the MLP between them.
        self.end.finish(pass, h, &a)
    }
}
