//! Mistral (Jiang et al., 2023): Llama whose queries see a sliding window of keys in every layer, where one is set.

use crate::config::window_everywhere;
use crate::llama::{Biases, LlamaLayer};
use crate::loader::Loader;
use crate::pass::Layers;
use crate::{Result, TargetInfo};

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let window = window_everywhere(info)?;
    loader.layers(0..info.n_layers, |_, loader| LlamaLayer::new(info, Biases::default(), window, loader))
}
