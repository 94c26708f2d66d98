//! Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v and, where switched on, a sliding window
//! in the upper layers.

use crate::config::{Windows, parse};
use crate::llama::{Biases, LlamaLayer};
use crate::loader::Loader;
use crate::pass::Layers;
use crate::{Result, TargetInfo};

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let windows = parse::<Windows>(&info.path, &info.raw)?.per_layer(info)?;
    let biases = Biases { qkv: true, ..Biases::default() };
    loader.layers(windows, |window, loader| LlamaLayer::new(info, biases, window, loader))
}
