//! Gemma 3 (Gemma team, 2025), its language model: Gemma 2 without caps, with queries and keys normed per head, and
//! with rotary frequencies of their own in the layers that have a sliding window, five of six.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size.

use serde_json::{Value, json};
use specforge_nn::rope::RopeConfig;
use specforge_tensor::{KeyValue, ParamId, Part, Var, Weight};

use crate::config::{Windows, flattened, parse, with_defaults};
use crate::frame::Frame;
use crate::gemma2::{self, Config};
use crate::loader::Loader;
use crate::pass::{Layer, Layers, Pass};
use crate::sandwich::Sandwich;
use crate::{Error, Result, TargetInfo};

#[derive(Debug)]
struct Gemma3Layer {
    input_layernorm: ParamId,
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    q_norm: ParamId,
    k_norm: ParamId,
    end: Sandwich,
    window: Option<usize>,
}

/// `config.json` with Llama's keys, of the language model alone; the frequencies of sliding layers go to
/// `local_rope_parameters`. Published configurations leave out much of what is the family's default.
pub(crate) fn settings(config: Value) -> Value {
    let mut config = with_defaults(
        flattened(config),
        &json!({
            "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072,
            "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        }),
    );
    let per_kind = config["rope_parameters"].take();
    if per_kind["full_attention"].is_object() {
        config["rope_parameters"] = per_kind["full_attention"].clone();
        config["local_rope_parameters"] = per_kind["sliding_attention"].clone();
    }
    if config["local_rope_parameters"].is_null() {
        config["local_rope_parameters"] = json!({ "rope_theta": config["rope_local_base_freq"] });
    }
    let pattern =
        ["sliding_window_pattern", "_sliding_window_pattern"].iter().find_map(|k| config[k].as_u64());
    gemma2::settings(gemma2::sliding_but_every(config, pattern.unwrap_or(6).max(1)))
}

/// What stands around the layers.
pub(crate) fn frame(info: &TargetInfo) -> Result<Frame> {
    let local = json!({
        "rope_parameters": info.raw["local_rope_parameters"],
        "max_position_embeddings": info.max_position_embeddings,
    });
    let local_rope = RopeConfig::from_json(&local, info.head_dim)
        .map_err(|source| Error::Rope { path: info.path.clone(), source })?;
    Ok(Frame { local_rope: Some(local_rope), ..gemma2::frame(info)? })
}

/// As [`frame`], of a checkpoint that has a vision tower beside the language model.
pub(crate) fn composite_frame(info: &TargetInfo) -> Result<Frame> {
    Ok(Frame { prefix: "language_model.", ..frame(info)? })
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    loader.layers(windows, |window, loader| Gemma3Layer::new(info, &config, window, loader))
}

impl Gemma3Layer {
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
            q_proj: loader.linear("self_attn.q_proj", h, q, bias)?,
            k_proj: loader.linear("self_attn.k_proj", h, kv, bias)?,
            v_proj: loader.linear("self_attn.v_proj", h, kv, bias)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, bias)?,
            q_norm: loader.norm("self_attn.q_norm", d)?,
            k_norm: loader.norm("self_attn.k_norm", d)?,
            end: gemma2::end(info, loader)?,
            window,
        })
    }
}

impl Layer for Gemma3Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let q = tape.linear(&x, &self.q_proj)?;
        let k = tape.linear(&x, &self.k_proj)?;
        let v = tape.linear(&x, &self.v_proj)?;
        // 2. Each head of q and k normed by itself, then positions, by the frequencies of the layer's kind.
        let turn = |x: &Var| if self.window.is_some() { pass.rope_local(x) } else { pass.rope(x) };
        let q = turn(&tape.rms_norm(&q, self.q_norm, pass.eps)?)?;
        let k = turn(&tape.rms_norm(&k, self.k_norm, pass.eps)?)?;
        // 3. Attention to what the window shows.
        let a = pass.attention(&Part::new(&q, 0), &KeyValue::new(&k, &v), self.window)?;
        let a = tape.linear(&a, &self.o_proj)?;
        // 4. Both residual sums, the MLP between them.
        self.end.finish(pass, h, &a)
    }
}
