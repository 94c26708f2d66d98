//! DeepSeek-V2 and V3 (DeepSeek-AI, 2024): multi-head latent attention, whose keys and values come out of a narrow
//! projection, and mixtures of experts in all but the first layers.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N heads, D head size, P elements of a head that are rotated,
//! L width of what keys and values come from. A head of queries and keys is [P rotated | the rest | zeros], one of values
//! [its elements | zeros], all of size D: zeros change no score and no sum.

mod heads;
mod routing;

use serde::Deserialize;
use serde_json::{Value, json};
use specforge_tensor::{KeyValue, ParamId, Part, Var, Weight};

use heads::Heads;
pub(crate) use routing::{Mixtures, RoutingConfig, feed_forward};

use crate::config::parse;
use crate::frame::Frame;
use crate::loader::Loader;
use crate::mixture::FeedForward;
use crate::pass::{Layer, Layers, Pass};
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Absent: queries are projected at once.
    q_lora_rank: Option<usize>,
    /// L.
    kv_lora_rank: usize,
    qk_nope_head_dim: usize,
    /// P.
    qk_rope_head_dim: usize,
    v_head_dim: usize,
    /// Whether neighbouring elements are rotated, not the halves.
    #[serde(default = "yes")]
    rope_interleave: bool,
    /// Biases on what queries, keys and values come from, and on o.
    #[serde(default)]
    attention_bias: bool,
}

fn yes() -> bool {
    true
}

/// How queries are made.
#[derive(Debug)]
enum Queries {
    Whole(Weight),
    /// Through a narrow projection, normed.
    Narrow {
        a_proj: Weight,
        norm: ParamId,
        b_proj: Weight,
    },
}

#[derive(Debug)]
struct DeepseekLayer {
    input_layernorm: ParamId,
    queries: Queries,
    /// `[L + P, H]`.
    kv_a_proj: Weight,
    kv_a_layernorm: ParamId,
    /// `[N·D, L]`: what is not rotated of the keys.
    k_b_proj: Weight,
    /// `[N·D, P]`, ones that put what is rotated, the same for all heads, into each.
    spread: Weight,
    /// `[N·D, L]`.
    v_b_proj: Weight,
    o_proj: Weight,
    post_attention_layernorm: ParamId,
    mlp: FeedForward,
    kv_lora_rank: usize,
}

/// `config.json` with Llama's keys: heads of queries, keys and values are of one size, which a device's kernels have.
pub(crate) fn settings(mut config: Value) -> Value {
    let size = |key: &str| config[key].as_u64();
    if let (Some(rest), Some(rotated), Some(value)) =
        (size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("v_head_dim"))
    {
        config["head_dim"] = json!((rest.saturating_add(rotated)).max(value).next_multiple_of(16));
    }
    config["num_key_value_heads"] = config["num_attention_heads"].clone();
    config
}

/// What stands around the layers.
pub(crate) fn frame(info: &TargetInfo) -> Result<Frame> {
    let config: Config = parse(&info.path, &info.raw)?;
    let width = config.qk_nope_head_dim + config.qk_rope_head_dim;
    let tables = ["rope_parameters", "rope_scaling"].map(|key| &info.raw[key]);
    let number = |key: &str| tables.iter().find_map(|table| table[key].as_f64());
    // YaRN's factor on scores, beside the one on cosines and sines.
    let yarn = match (number("mscale_all_dim"), number("factor")) {
        (Some(all_dim), Some(factor)) if all_dim != 0.0 && factor > 1.0 => 0.1 * all_dim * factor.ln() + 1.0,
        _ => 1.0,
    };
    let scale = (width as f64).powf(-0.5) * yarn * yarn;
    Ok(Frame { attention_scale: Some(scale as f32), ..Frame::default() })
}

/// All decoder layers of DeepSeek-V2.
pub(crate) fn layers_v2(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    layers(info, &parse::<RoutingConfig>(&info.path, &info.raw)?.plain(info)?, loader)
}

/// All decoder layers of DeepSeek-V3.
pub(crate) fn layers_v3(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    layers(info, &parse::<RoutingConfig>(&info.path, &info.raw)?.corrected(info)?, loader)
}

fn layers(info: &TargetInfo, mixtures: &Mixtures, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    loader.layers(0..info.n_layers, |layer, loader| {
        let mlp = feed_forward(info, mixtures, layer, &mut loader.at("mlp"))?;
        DeepseekLayer::new(info, &config, mlp, loader)
    })
}

impl DeepseekLayer {
    fn new(info: &TargetInfo, config: &Config, mlp: FeedForward, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, n, bias) = (info.hidden_size, info.n_heads, config.attention_bias);
        let heads = Heads { n, d: info.head_dim, config };
        let Config { kv_lora_rank: l, qk_rope_head_dim: p, .. } = *config;
        let mut attention = loader.at("self_attn");
        let kv_a_order: Vec<usize> = (0..l).chain(heads.rotated().map(|j| l + j)).collect();
        let kv_b = n * (config.qk_nope_head_dim + config.v_head_dim);
        let [k_order, v_order] = [heads.keys(), heads.values()];
        let out = n * config.v_head_dim;
        let layer = Self {
            queries: Queries::new(info, &heads, &mut attention)?,
            kv_a_proj: attention.linear_in_order("kv_a_proj_with_mqa", h, l + p, bias, Some(&kv_a_order))?,
            kv_a_layernorm: attention.norm("kv_a_layernorm", l)?,
            k_b_proj: attention.linear_in_order("kv_b_proj", l, kv_b, false, Some(&k_order))?,
            spread: Weight::of(attention.constant("spread", heads.spread(), &[n * info.head_dim, p])?),
            v_b_proj: attention.linear_in_order("kv_b_proj", l, kv_b, false, Some(&v_order))?,
            o_proj: attention.linear_of_columns("o_proj", out, h, bias, &heads.outputs())?,
            input_layernorm: loader.norm("input_layernorm", h)?,
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp,
            kv_lora_rank: l,
        };
        Ok(layer)
    }
}

impl Queries {
    fn new(info: &TargetInfo, heads: &Heads<'_>, loader: &mut Loader<'_>) -> Result<Self> {
        let (h, config, order) = (info.hidden_size, heads.config, heads.queries());
        let out = heads.n * (config.qk_nope_head_dim + config.qk_rope_head_dim);
        let Some(rank) = config.q_lora_rank else {
            return Ok(Self::Whole(loader.linear_in_order("q_proj", h, out, false, Some(&order))?));
        };
        Ok(Self::Narrow {
            a_proj: loader.linear("q_a_proj", h, rank, config.attention_bias)?,
            norm: loader.norm("q_a_layernorm", rank)?,
            b_proj: loader.linear_in_order("q_b_proj", rank, out, false, Some(&order))?,
        })
    }

    fn of(&self, pass: &Pass<'_, '_>, x: &Var) -> Result<Var> {
        let tape = pass.tape;
        Ok(match self {
            Self::Whole(proj) => tape.linear(x, proj)?,
            Self::Narrow { a_proj, norm, b_proj } => {
                let narrow = tape.rms_norm(&tape.linear(x, a_proj)?, *norm, pass.eps)?;
                tape.linear(&narrow, b_proj)?
            }
        })
    }
}

impl Layer for DeepseekLayer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let (tape, l) = (pass.tape, self.kv_lora_rank);
        // 1. Queries [R, N·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let q = self.queries.of(pass, &x)?;
        // 2. Keys and values [R, N·D]: of the narrow projection, normed, what differs between heads; of its last columns
        //    what is rotated.
        let kv = tape.linear(&x, &self.kv_a_proj)?;
        let c = tape.rms_norm(&tape.columns(&kv, 0..l)?, self.kv_a_layernorm, pass.eps)?;
        let rotated = tape.columns(&kv, l..kv.rows_cols().1)?;
        let k = tape.linear_add(&rotated, &self.spread, &tape.linear(&c, &self.k_b_proj)?)?;
        let v = tape.linear(&c, &self.v_b_proj)?;
        // 3. Positions.
        let (q, k) = (pass.rope(&q)?, pass.rope(&k)?);
        // 4. Attention to everything before, and the residual sum.
        let a = pass.attention(&Part::new(&q, 0), &KeyValue::new(&k, &v), None)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 5. MLP or mixture of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
