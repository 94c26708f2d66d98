//! Phi-3, Phi-4 and Phi-4-mini (Abdin et al., 2024; 2025): Llama with queries, keys and values in one matrix, gate and
//! up in another, a sliding window in every layer where one is set, and in the small models a rotation of a part of each
//! head with LongRoPE's factors.

use crate::config::window_everywhere;
use crate::llama::LlamaLayer;
use crate::loader::Loader;
use crate::mlp::Mlp;
use crate::pass::Layers;
use crate::{Result, TargetInfo};

/// All decoder layers.
pub(crate) fn layers(info: &TargetInfo, loader: &mut Loader<'_>) -> Result<Layers> {
    let window = window_everywhere(info)?;
    loader.layers(0..info.n_layers, |_, loader| fused_layer(info, window, loader))
}

fn fused_layer(info: &TargetInfo, window: Option<usize>, loader: &mut Loader<'_>) -> Result<LlamaLayer> {
    let h = info.hidden_size;
    let (q, kv) = (info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim);
    Ok(LlamaLayer {
        input_layernorm: loader.norm("input_layernorm", h)?,
        qkv_proj: loader.linear("self_attn.qkv_proj", h, q + 2 * kv, false)?,
        o_proj: loader.linear("self_attn.o_proj", q, h, false)?,
        post_attention_layernorm: loader.norm("post_attention_layernorm", h)?,
        mlp: Mlp::fused(info, &mut loader.at("mlp"))?.into(),
        window,
    })
}
