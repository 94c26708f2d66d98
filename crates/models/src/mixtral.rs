//! Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in every layer.

use serde::Deserialize;
use specforge_tensor::{Routing, Scoring};

use crate::config::{parse, window_everywhere};
use crate::llama::{Biases, LlamaLayer};
use crate::loader::Loader;
use crate::mixture::{Mixture, MixtureShape};
use crate::pass::Layers;
use crate::{Result, TargetInfo};

/// The settings of `config.json` that only this family has.
#[derive(Debug, Deserialize)]
struct Config {
    num_experts_per_tok: usize,
}

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let Config { num_experts_per_tok: top_k } = parse(&info.path, &info.raw)?;
    let rule = Routing { scoring: Scoring::Softmax, top_k, groups: None, normalised: true, scale: 1.0 };
    let shape = MixtureShape::new(info, info.intermediate_size, rule)?;
    let window = window_everywhere(info)?;
    loader.layers(0..info.n_layers, |_, loader| {
        let names = ["w1", "w3", "w2"];
        let mixture = Mixture::named(names, info, shape, &mut loader.at("block_sparse_moe"))?;
        LlamaLayer::with(info, Biases::default(), window, mixture.into(), loader)
    })
}
