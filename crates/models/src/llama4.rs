//! Llama 4 (Meta, 2025), its language model: chunks of attention with rotary positions and normed queries and keys in
//! three of four layers, attention to everything without positions in the others, and mixtures of experts that take one
//! expert beside a shared one.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size, I width of an
//! expert.

use serde::Deserialize;
use serde_json::{Value, json};
use specforge_tensor::{KeyValue, ParamId, Part, RouterParams, Routing, Scoring, Tensor, Var, Weight};

use crate::config::{flattened, n_layers, parse, with_defaults};
use crate::frame::Frame;
use crate::glm4::half_split;
use crate::loader::Loader;
use crate::mixture::{ExpertGate, FeedForward, Mixture, MixtureShape};
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass};
use crate::reach::Reach;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Biases on q, k, v and o.
    #[serde(default)]
    attention_bias: bool,
    /// Whether queries and keys are normed where they have positions.
    #[serde(default = "yes")]
    use_qk_norm: bool,
    /// Per layer 1 where it has positions, 0 where not.
    no_rope_layers: Vec<u8>,
    attention_chunk_size: Option<usize>,
    /// Layers with a mixture.
    moe_layers: Vec<usize>,
    num_experts_per_tok: usize,
    /// Width of the MLP where there is no mixture.
    intermediate_size_mlp: usize,
    #[serde(flatten)]
    temperature: Temperature,
}

/// The factor on queries without positions: `1 + attn_scale · ln(1 + floor((position + 1) / floor_scale))`.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Temperature {
    #[serde(rename = "attn_temperature_tuning")]
    is_on: bool,
    #[serde(default = "attn_scale")]
    attn_scale: f32,
    #[serde(default = "floor_scale")]
    floor_scale: f32,
}

fn yes() -> bool {
    true
}

fn attn_scale() -> f32 {
    0.1
}

fn floor_scale() -> f32 {
    8192.0
}

#[derive(Debug)]
struct Llama4Layer {
    input_layernorm: ParamId,
    q_proj: Weight,
    k_proj: Weight,
    v_proj: Weight,
    o_proj: Weight,
    /// Ones: the norm of queries and keys has no weight.
    norm: Option<ParamId>,
    has_positions: bool,
    temperature: Temperature,
    reach: Reach,
    post_attention_layernorm: ParamId,
    mlp: FeedForward,
}

/// `config.json` with Llama's keys, of the language model alone, and with a kind for every layer.
pub(crate) fn settings(config: Value) -> Value {
    let config = flattened(config);
    // Once a number, of layers.
    let tuning = config["attn_temperature_tuning"].as_f64().map(|n| n > 0.0);
    let defaults = json!({ "head_dim": 128, "attention_chunk_size": 8192, "interleave_moe_layer_step": 1,
        "attn_temperature_tuning": true, "no_rope_layer_interval": 4, "intermediate_size_mlp": 16384 });
    let mut config = with_defaults(config, &defaults);
    if let Some(is_on) = tuning {
        config["attn_temperature_tuning"] = json!(is_on);
    }
    let number = |key: &str| config[key].as_u64().unwrap_or(1).max(1);
    let (interval, step) = (number("no_rope_layer_interval"), number("interleave_moe_layer_step"));
    if config["no_rope_layers"].as_array().is_none_or(Vec::is_empty) {
        config["no_rope_layers"] =
            (1..=n_layers(&config)).map(|i| u8::from(!i.is_multiple_of(interval))).collect();
    }
    if config["moe_layers"].is_null() {
        config["moe_layers"] = (0..n_layers(&config)).filter(|i| (i + 1).is_multiple_of(step)).collect();
    }
    config
}

/// What stands around the layers of a checkpoint that has a vision tower beside the language model.
pub(crate) fn composite_frame() -> Frame {
    Frame { prefix: "language_model.", ..Frame::default() }
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    if config.no_rope_layers.len() != info.n_layers {
        return Err(info.wrong("no_rope_layers", format!("expected {} entries", info.n_layers)));
    }
    if config.attention_chunk_size == Some(0) {
        return Err(info.wrong("attention_chunk_size", "expected at least 1"));
    }
    let (top_k, scoring) = (config.num_experts_per_tok, Scoring::Sigmoid);
    let rule = Routing { scoring, top_k, groups: None, normalised: false, scale: 1.0 };
    let shape = MixtureShape::new(info, info.intermediate_size, rule)?;
    loader.layers(0..info.n_layers, |layer, loader| {
        let mut inside = loader.at("feed_forward");
        let mlp = if config.moe_layers.contains(&layer) {
            mixture(info, shape, &mut inside)?.into()
        } else {
            Mlp::of_width(config.intermediate_size_mlp, info, false, &mut inside)?.into()
        };
        Llama4Layer::new(info, &config, config.no_rope_layers[layer] != 0, mlp, loader)
    })
}

/// The experts of the file are transposed.
fn mixture(info: &TargetInfo, shape: MixtureShape, loader: &mut Loader<'_>) -> Result<Mixture> {
    let MixtureShape { n_experts: n, width: i, rule } = shape;
    let h = info.hidden_size;
    let weight = loader.tensor("router.weight", &[n, h])?;
    let in_order = |n: usize| (0..n).collect::<Vec<_>>();
    let mut experts = loader.at("experts");
    let gate_up = experts.experts_transposed("gate_up_proj", &[n, 2 * i, h], &in_order(2 * i))?;
    let down = experts.experts_transposed("down_proj", &[n, h, i], &in_order(h))?;
    let shared = Mlp::of_width(i, info, false, &mut loader.at("shared_expert"))?;
    Ok(Mixture {
        router: RouterParams { weight, bias: None, correction: None, rule },
        gate_up,
        gate: ExpertGate::Swiglu,
        down,
        scales_input: true,
        shared: Some((shared, None)),
        width: i,
    })
}

impl Llama4Layer {
    fn new(
        info: &TargetInfo,
        config: &Config,
        has_positions: bool,
        mlp: FeedForward,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        let (h, d, bias) = (info.hidden_size, info.head_dim, config.attention_bias);
        let (q, kv) = (info.n_heads * d, info.n_kv_heads * d);
        // Neighbouring elements are rotated.
        let [q_rows, k_rows] = [q, kv].map(|n| half_split(n / d, d, info.rope.half()));
        let norm = if config.use_qk_norm && has_positions {
            Some(loader.constant("self_attn.qk_norm", vec![1.0; d], &[d])?)
        } else {
            None
        };
        let chunk = config.attention_chunk_size.filter(|_| has_positions);
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", h)?,
            q_proj: loader.linear_in_order("self_attn.q_proj", h, q, bias, Some(&q_rows))?,
            k_proj: loader.linear_in_order("self_attn.k_proj", h, kv, bias, Some(&k_rows))?,
            v_proj: loader.linear("self_attn.v_proj", h, kv, bias)?,
            o_proj: loader.linear("self_attn.o_proj", q, h, bias)?,
            norm,
            has_positions,
            temperature: config.temperature,
            reach: chunk.map_or(Reach::All, Reach::Chunk),
            post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
            mlp,
        })
    }

    /// Queries or keys with their positions, normed.
    fn turned(&self, pass: &Pass<'_, '_>, x: &Var) -> Result<Var> {
        let x = pass.rope(x)?;
        Ok(match self.norm {
            Some(norm) => pass.tape.rms_norm(&x, norm, pass.eps)?,
            None => x,
        })
    }

    /// Queries without positions, the larger the later they are.
    fn tempered(&self, pass: &Pass<'_, '_>, q: &Var) -> Result<Var> {
        let Temperature { is_on, attn_scale, floor_scale } = self.temperature;
        if !is_on {
            return Ok(q.clone());
        }
        let (device, n) = (q.value().device(), pass.positions.len());
        let factor = |&at: &u32| 1.0 + attn_scale * ((at as f32 + 1.0) / floor_scale).floor().ln_1p();
        let factors = Tensor::from_f32(device, pass.positions.iter().map(factor).collect(), &[n, 1])?;
        let rows = Tensor::from_u32(device, (0..n as u32).collect());
        Ok(pass.tape.weighted_rows(q, &rows, &factors, 1, None)?)
    }
}

impl Layer for Llama4Layer {
    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Queries [R, N·D], keys and values [R, G·D] of the normed state.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let q = tape.linear(&x, &self.q_proj)?;
        let k = tape.linear(&x, &self.k_proj)?;
        let v = tape.linear(&x, &self.v_proj)?;
        // 2. Positions, then each head normed by itself; or no positions, and a factor on queries.
        let (q, k) = if self.has_positions {
            (self.turned(pass, &q)?, self.turned(pass, &k)?)
        } else {
            (self.tempered(pass, &q)?, k)
        };
        // 3. Attention to the chunk, or to everything before, and the residual sum.
        let a = pass.attention(&Part::new(&q, 0), &KeyValue::new(&k, &v), self.reach)?;
        let h = tape.linear_add(&a, &self.o_proj, h)?;
        // 4. MLP or mixture of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
