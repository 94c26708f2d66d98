//! Qwen3.5 (Qwen team, 2026), its language model: Qwen3-Next's layers with the projections of linear attention apart,
//! with an MLP or a mixture of experts. Published checkpoints have a vision tower beside it.

use serde_json::{Value, json};

use crate::config::{flattened, parse, with_defaults};
use crate::frame::Frame;
use crate::loader::Loader;
use crate::mixture::FeedForward;
use crate::mlp::Mlp;
use crate::pass::Layers;
use crate::qwen3_next::{self, Config, GatedAttention, LinearAttention, Mixer, Qwen3NextLayer};
use crate::{Result, TargetInfo, qwen3_moe};

/// `config.json` with Llama's keys, of the language model alone. Text has the same position on all three axes of the
/// rotary embedding.
pub(crate) fn settings(config: Value) -> Value {
    let mut config = flattened(config);
    if let Some(rope) = config["rope_parameters"].as_object_mut() {
        rope.retain(|key, _| !key.starts_with("mrope_"));
    }
    // The width of the MLP that a token goes through, where there are only experts.
    let number = |key: &str| config[key].as_u64();
    let experts =
        number("num_experts_per_tok").zip(number("moe_intermediate_size")).map(|(k, i)| k.saturating_mul(i));
    if let Some(width) = experts {
        let width = width.saturating_add(number("shared_expert_intermediate_size").unwrap_or(0));
        config = with_defaults(config, &json!({ "intermediate_size": width }));
    }
    qwen3_next::settings(config)
}

/// What stands around the layers of a checkpoint with a vision tower.
pub(crate) fn composite_frame() -> Frame {
    Frame { body: "model.language_model", ..qwen3_next::frame() }
}

/// All decoder layers, with MLPs.
pub(crate) fn dense_layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    layers(info, loader, |loader| Ok(Mlp::new(info, false, loader)?.into()))
}

/// All decoder layers, with mixtures of experts.
pub(crate) fn moe_layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let shape = parse::<qwen3_moe::Config>(&info.path, &info.raw)?.shape(info)?;
    layers(info, loader, |loader| qwen3_next::mixture(info, shape, loader))
}

fn layers(
    info: &TargetInfo,
    loader: &mut Loader<'_>,
    feed_forward: impl Fn(&mut Loader<'_>) -> Result<FeedForward>,
) -> Result<Layers> {
    let config = Config::of(info)?;
    loader.layers(&config.layer_types, |kind, loader| {
        let mlp = feed_forward(&mut loader.at("mlp"))?;
        let mixer = match kind.as_str() {
            "linear_attention" => Mixer::Linear(linear(info, &config, &mut loader.at("linear_attn"))?),
            _ => Mixer::Gated(GatedAttention::new(info, &config, &mut loader.at("self_attn"))?),
        };
        Qwen3NextLayer::new(info, mixer, mlp, loader)
    })
}

fn linear(info: &TargetInfo, config: &Config, loader: &mut Loader<'_>) -> Result<LinearAttention> {
    let (h, shape) = (info.hidden_size, config.shape());
    let (z, heads) = (shape.value_heads * shape.value_dim, shape.value_heads);
    let qkvz = loader.stacked(&[("in_proj_qkv", shape.width()), ("in_proj_z", z)], h, false)?;
    let ba = loader.unrounded().stacked(&[("in_proj_b", heads), ("in_proj_a", heads)], h, false)?;
    LinearAttention::new(info, config, [qkvz, ba], loader)
}
