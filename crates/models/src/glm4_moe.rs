//! GLM-4.5 and GLM-4.6 (Zeng et al., 2025): Qwen3's layer with biases on q, k and v and a rotation of a part of each
//! head, and DeepSeek-V3's mixture of experts in all but the first layers.

use serde::Deserialize;

use crate::config::parse;
use crate::deepseek::{self, RoutingConfig};
use crate::llama::Biases;
use crate::loader::Loader;
use crate::pass::Layers;
use crate::qwen3::Qwen3Layer;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    /// Biases on q, k and v.
    #[serde(default)]
    attention_bias: bool,
    /// Whether queries and keys are normed.
    #[serde(default)]
    use_qk_norm: bool,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let routing: RoutingConfig = parse(&info.path, &info.raw)?;
    let mixtures = routing.corrected(info)?;
    let biases = Biases { qkv: config.attention_bias, ..Biases::default() };
    loader.layers(0..info.n_layers, |layer, loader| {
        let mlp = deepseek::feed_forward(info, &mixtures, layer, &mut loader.at("mlp"))?;
        Qwen3Layer::new(info, biases, config.use_qk_norm, None, mlp, loader)
    })
}
