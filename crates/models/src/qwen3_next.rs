//! Qwen3-Next (Qwen team, 2025): linear attention by the gated delta rule in three of four layers, gated attention in
//! the others, and mixtures of experts with a gated shared one. Qwen3.5 has its layers too.
//!
//! Shape legend: R rows (packed tokens), H hidden size, N query heads, G key-value heads, D head size; of linear
//! attention K key heads of size C, M value heads of size E.

mod mixer;

use serde::Deserialize;
use serde_json::{Value, json};
use specforge_tensor::{DeltaShape, ParamId, Var};

use mixer::apart;
pub(crate) use mixer::{GatedAttention, LinearAttention};

use crate::config::{n_layers, parse, with_defaults};
use crate::frame::Frame;
use crate::loader::Loader;
use crate::mixture::{FeedForward, Mixture, MixtureShape};
use crate::mlp::Mlp;
use crate::pass::{Layer, Layers, Pass};
use crate::qwen3_moe;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only these families have.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    /// Biases on q, k, v and o.
    #[serde(default)]
    attention_bias: bool,
    /// `linear_attention` or `full_attention`.
    pub layer_types: Vec<String>,
    linear_num_key_heads: usize,
    linear_num_value_heads: usize,
    linear_key_head_dim: usize,
    linear_value_head_dim: usize,
    /// Taps of the convolution.
    linear_conv_kernel_dim: usize,
    /// Whether the output of attention is gated.
    attn_output_gate: bool,
}

/// What mixes the rows of a layer.
#[derive(Debug)]
pub(crate) enum Mixer {
    Linear(LinearAttention),
    Gated(GatedAttention),
}

#[derive(Debug)]
pub(crate) struct Qwen3NextLayer {
    input_layernorm: ParamId,
    mixer: Mixer,
    post_attention_layernorm: ParamId,
    mlp: FeedForward,
}

/// `config.json` with what is left out: every fourth layer has attention, a quarter of each head is rotated.
pub(crate) fn settings(config: Value) -> Value {
    let defaults = json!({ "head_dim": 256, "full_attention_interval": 4, "norm_topk_prob": true,
        "attn_output_gate": true, "linear_conv_kernel_dim": 4 });
    let mut config = with_defaults(config, &defaults);
    if config["rope_parameters"]["partial_rotary_factor"].is_null() {
        config = with_defaults(config, &json!({ "partial_rotary_factor": 0.25 }));
    }
    if config["layer_types"].is_null() {
        let interval = config["full_attention_interval"].as_u64().unwrap_or(0).max(1);
        let kind = |i: u64| if i.is_multiple_of(interval) { "full_attention" } else { "linear_attention" };
        config["layer_types"] = (1..=n_layers(&config)).map(kind).collect();
    }
    config
}

/// What stands around the layers.
pub(crate) fn frame() -> Frame {
    Frame { norm_offset: 1.0, ..Frame::default() }
}

/// All decoder layers of Qwen3-Next, whose projections of linear attention are ordered by key head.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config = Config::of(info)?;
    let experts: qwen3_moe::Config = parse(&info.path, &info.raw)?;
    let shape = experts.shape(info)?;
    let kinds = config.layer_types.iter().enumerate();
    loader.layers(kinds, |(layer, kind), loader| {
        let mlp = if experts.is_sparse(layer) {
            mixture(info, shape, &mut loader.at("mlp"))?
        } else {
            Mlp::new(info, false, &mut loader.at("mlp"))?.into()
        };
        let mixer = match kind.as_str() {
            "linear_attention" => Mixer::Linear(by_key_head(info, &config, &mut loader.at("linear_attn"))?),
            _ => Mixer::Gated(GatedAttention::new(info, &config, &mut loader.at("self_attn"))?),
        };
        Qwen3NextLayer::new(info, mixer, mlp, loader)
    })
}

/// The mixture of a layer, with a shared expert behind a gate.
pub(crate) fn mixture(
    info: &TargetInfo,
    shape: MixtureShape,
    loader: &mut Loader<'_>,
) -> Result<FeedForward> {
    #[derive(Deserialize)]
    struct Shared {
        shared_expert_intermediate_size: usize,
    }
    let Shared { shared_expert_intermediate_size: width } = parse(&info.path, &info.raw)?;
    let mut mixture = Mixture::new(info, shape, loader)?;
    let gate = loader.unrounded().linear("shared_expert_gate", info.hidden_size, 1, false)?;
    let shared = Mlp::of_width(width, info, false, &mut loader.at("shared_expert"))?;
    mixture.shared = Some((shared, Some(gate)));
    Ok(mixture.into())
}

fn by_key_head(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<LinearAttention> {
    let (h, s) = (info.hidden_size, config.shape());
    let (qkvz, ba) = (2 * s.key_heads * s.key_dim + 2 * s.value_heads * s.value_dim, 2 * s.value_heads);
    let per_key = s.value_heads / s.key_heads;
    let values = per_key * s.value_dim;
    let order = apart(s.key_heads, &[s.key_dim, s.key_dim, values, values]);
    let qkvz = loader.linear_in_order("in_proj_qkvz", h, qkvz, false, Some(&order))?;
    let order = apart(s.key_heads, &[per_key, per_key]);
    let ba = loader.unrounded().linear_in_order("in_proj_ba", h, ba, false, Some(&order))?;
    LinearAttention::new(info, config, [qkvz, ba], loader)
}

impl Config {
    /// The settings, checked.
    pub(crate) fn of(info: &TargetInfo) -> Result<Self> {
        let config: Self = parse(&info.path, &info.raw)?;
        if config.layer_types.len() != info.n_layers {
            return Err(info.wrong("layer_types", format!("expected {} entries", info.n_layers)));
        }
        let known = ["linear_attention", "full_attention"];
        if config.layer_types.iter().any(|kind| !known.contains(&kind.as_str())) {
            return Err(info.wrong("layer_types", "expected linear_attention and full_attention only"));
        }
        let (keys, values) = (config.linear_num_key_heads, config.linear_num_value_heads);
        if keys == 0 || !values.is_multiple_of(keys) {
            let why = format!("expected a divisor of linear_num_value_heads = {values}");
            return Err(info.wrong("linear_num_key_heads", why));
        }
        for (key, n) in [
            ("linear_num_value_heads", values),
            ("linear_key_head_dim", config.linear_key_head_dim),
            ("linear_value_head_dim", config.linear_value_head_dim),
            ("linear_conv_kernel_dim", config.linear_conv_kernel_dim),
        ] {
            if n == 0 {
                return Err(info.wrong(key, "expected at least 1"));
            }
        }
        if !config.attn_output_gate {
            return Err(info.wrong("attn_output_gate", "attention without a gate is not supported"));
        }
        Ok(config)
    }

    pub(crate) fn shape(&self) -> DeltaShape {
        DeltaShape {
            key_heads: self.linear_num_key_heads,
            value_heads: self.linear_num_value_heads,
            key_dim: self.linear_key_head_dim,
            value_dim: self.linear_value_head_dim,
        }
    }
}

impl Qwen3NextLayer {
    pub(crate) fn new(
        info: &TargetInfo,
        mixer: Mixer,
        mlp: FeedForward,
        loader: &mut Loader<'_>,
    ) -> Result<Self> {
        Ok(Self {
            input_layernorm: loader.norm("input_layernorm", info.hidden_size)?,
            mixer,
            post_attention_layernorm: loader.norm("post_attention_layernorm", info.hidden_size)?,
            mlp,
        })
    }
}

impl Layer for Qwen3NextLayer {
    fn cached(&self, kv: usize) -> Vec<usize> {
        match &self.mixer {
            Mixer::Linear(linear) => linear.cached(),
            Mixer::Gated(_) => vec![kv; 2],
        }
    }

    fn forward(&self, pass: &mut Pass<'_, '_>, h: &Var) -> Result<Var> {
        let tape = pass.tape;
        // 1. Linear or gated attention of the normed state, and the residual sum.
        let x = tape.rms_norm(h, self.input_layernorm, pass.eps)?;
        let h = match &self.mixer {
            Mixer::Linear(linear) => linear.add_to(pass, h, &x)?,
            Mixer::Gated(gated) => gated.add_to(pass, h, &x)?,
        };
        // 2. MLP or mixture of the normed state, and the residual sum.
        let x = tape.rms_norm(&h, self.post_attention_layernorm, pass.eps)?;
        self.mlp.add_to(tape, &h, &x)
    }
}
