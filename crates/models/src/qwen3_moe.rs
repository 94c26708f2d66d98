//! Qwen3 with mixtures of experts (Yang et al., 2025) in all or some of its layers.

use serde::Deserialize;
use specforge_tensor::{Routing, Scoring};

use crate::config::{Windows, parse};
use crate::llama::Biases;
use crate::loader::Loader;
use crate::mixture::{FeedForward, Mixture, MixtureShape};
use crate::mlp::Mlp;
use crate::pass::Layers;
use crate::qwen3::Qwen3Layer;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that Qwen's mixtures have.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    /// Biases on q, k, v and o.
    #[serde(default)]
    pub attention_bias: bool,
    moe_intermediate_size: usize,
    num_experts_per_tok: usize,
    /// Whether the weights of a token's experts sum to 1.
    #[serde(default)]
    norm_topk_prob: bool,
    /// Every so many layers, counted from 1, have a mixture.
    #[serde(default = "one")]
    decoder_sparse_step: usize,
    /// Layers that have none.
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
}

fn one() -> usize {
    1
}

impl Config {
    /// The mixtures; checked.
    pub(crate) fn shape(&self, info: &TargetInfo) -> Result<MixtureShape> {
        if self.decoder_sparse_step == 0 {
            return Err(info.wrong("decoder_sparse_step", "expected at least 1"));
        }
        let (top_k, normalised) = (self.num_experts_per_tok, self.norm_topk_prob);
        let rule = Routing { scoring: Scoring::Softmax, top_k, groups: None, normalised, scale: 1.0 };
        MixtureShape::new(info, self.moe_intermediate_size, rule)
    }

    /// Whether a layer has a mixture.
    pub(crate) fn is_sparse(&self, layer: usize) -> bool {
        !self.mlp_only_layers.contains(&layer) && (layer + 1).is_multiple_of(self.decoder_sparse_step)
    }
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let config: Config = parse(&info.path, &info.raw)?;
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    let biases = Biases { qkv: config.attention_bias, o: config.attention_bias, mlp: false };
    let shape = config.shape(info)?;
    loader.layers(windows.into_iter().enumerate(), |(layer, window), loader| {
        let mlp: FeedForward = if config.is_sparse(layer) {
            Mixture::new(info, shape, &mut loader.at("mlp"))?.into()
        } else {
            Mlp::new(info, false, &mut loader.at("mlp"))?.into()
        };
        Qwen3Layer::new(info, biases, true, window, mlp, loader)
    })
}
