//! Small random targets in the form of Hugging Face folders.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use specforge_models::{Capture, Target};
use specforge_tensor::Device;
use specforge_testkit::Lcg;

use crate::mixtures;

/// Tokens of the small targets.
pub(crate) const VOCAB: usize = 50;

/// The configuration of a small target; `extra` keys are added or replace others.
pub(crate) fn config(architecture: &str, extra: &Value) -> Value {
    let mut config = json!({
        "architectures": [architecture], "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": VOCAB,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
        "max_position_embeddings": 64, "hidden_act": "silu", "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": [2, 3],
    });
    for (key, value) in extra.as_object().expect("extra keys") {
        config[key] = value.clone();
    }
    config
}

/// Names and shapes of its tensors.
pub(crate) fn tensors(config: &Value) -> Vec<(String, Vec<usize>)> {
    let n = |key: &str| config[key].as_u64().expect("a size") as usize;
    let (h, i, v, d) = (n("hidden_size"), n("intermediate_size"), n("vocab_size"), n("head_dim"));
    let (q, kv) = (n("num_attention_heads") * d, n("num_key_value_heads") * d);
    let architecture = config["architectures"][0].as_str().expect("a name");
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![v, h])];
    if architecture == "Lfm2ForCausalLM" {
        all.push(("model.embedding_norm.weight".to_owned(), vec![h]));
        for (layer, kind) in config["layer_types"].as_array().expect("kinds").iter().enumerate() {
            let tensors = lfm2_layer(kind == "conv", [h, i, d, q, kv]);
            all.extend(
                tensors.into_iter().map(|(n, shape)| (format!("model.layers.{layer}.{n}.weight"), shape)),
            );
        }
        return all;
    }
    for layer in 0..n("num_hidden_layers") {
        if let Some(tensors) = mixtures::layer(config, layer) {
            all.extend(
                tensors.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape)),
            );
            continue;
        }
        let mut add =
            |name: &str, shape: &[usize]| all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        let (phi, glm) = (architecture == "Phi3ForCausalLM", architecture == "Glm4ForCausalLM");
        let projections = [("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q), ("qkv", q + 2 * kv, h)];
        for (name, n_out, n_in) in projections.into_iter().filter(|p| phi == (p.0 == "qkv") || p.0 == "o") {
            add(&format!("self_attn.{name}_proj.weight"), &[n_out, n_in]);
            if architecture == "Qwen2ForCausalLM" && name != "o" {
                add(&format!("self_attn.{name}_proj.bias"), &[n_out]);
            }
        }
        let widths = match architecture {
            "Qwen3ForCausalLM" | "Gemma3ForCausalLM" => Some([d, d]),
            "Olmo2ForCausalLM" => Some([q, kv]),
            _ => None,
        };
        for (name, width) in ["q", "k"].into_iter().zip(widths.into_iter().flatten()) {
            add(&format!("self_attn.{name}_norm.weight"), &[width]);
        }
        let matrices = [("gate", i, h), ("up", i, h), ("down", h, i), ("gate_up", 2 * i, h)];
        for (name, n_out, n_in) in
            matrices.into_iter().filter(|m| (phi || glm) == (m.0 == "gate_up") || m.0 == "down")
        {
            add(&format!("mlp.{name}_proj.weight"), &[n_out, n_in]);
        }
        norms(architecture).iter().for_each(|norm| add(&format!("{norm}_layernorm.weight"), &[h]));
    }
    all.push(("model.norm.weight".to_owned(), vec![h]));
    all.push(("lm_head.weight".to_owned(), vec![v, h]));
    all
}

fn lfm2_layer(is_conv: bool, [h, i, d, q, kv]: [usize; 5]) -> Vec<(&'static str, Vec<usize>)> {
    let mut all = vec![
        ("operator_norm", vec![h]),
        ("ffn_norm", vec![h]),
        ("feed_forward.w1", vec![i, h]),
        ("feed_forward.w2", vec![h, i]),
        ("feed_forward.w3", vec![i, h]),
    ];
    all.extend(if is_conv {
        vec![("conv.in_proj", vec![3 * h, h]), ("conv.conv", vec![h, 1, 3]), ("conv.out_proj", vec![h, h])]
    } else {
        vec![
            ("self_attn.q_proj", vec![q, h]),
            ("self_attn.k_proj", vec![kv, h]),
            ("self_attn.v_proj", vec![kv, h]),
            ("self_attn.out_proj", vec![h, q]),
            ("self_attn.q_layernorm", vec![d]),
            ("self_attn.k_layernorm", vec![d]),
        ]
    });
    all
}

/// The norms of a layer, around attention and MLP.
fn norms(architecture: &str) -> &'static [&'static str] {
    match architecture {
        "Olmo2ForCausalLM" => &["post_attention", "post_feedforward"],
        "Glm4ForCausalLM" => &["input", "post_self_attn", "post_attention", "post_mlp"],
        "Gemma2ForCausalLM" | "Gemma3ForCausalLM" => {
            &["input", "post_attention", "pre_feedforward", "post_feedforward"]
        }
        _ => &["input", "post_attention"],
    }
}

/// Writes a folder with random float32 weights.
pub(crate) fn write(folder: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    fs_err::write(folder.join("config.json"), config.to_string()).expect("config.json is written");
    let mut lcg = Lcg::new(7);
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, shape)| {
            let (n, is_norm) = (shape.iter().product(), name.contains("norm"));
            let values = lcg.normals(n, if is_norm { 0.1 } else { 0.25 });
            values.iter().flat_map(|v| (v + f32::from(u8::from(is_norm))).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a view"))
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
        .expect("weights are written");
}

/// A small target in a folder of its own.
pub(crate) fn target(architecture: &str, extra: &Value) -> Target {
    let dir = specforge_testkit::tempdir();
    let config = config(architecture, extra);
    write(dir.path(), &config, &tensors(&config));
    Target::load(dir.path(), Device::Cpu, None).expect("a sound folder")
}

/// Everything: all layers and the last hidden state.
pub(crate) fn all(target: &Target) -> Capture {
    Capture { layers: (0..target.info().n_layers).collect(), last_hidden: true }
}

/// Random tokens.
pub(crate) fn tokens(seed: u64, n: usize) -> Vec<u32> {
    let mut lcg = Lcg::new(seed);
    (0..n).map(|_| lcg.below(VOCAB) as u32).collect()
}

/// The architectures under test, with what is special about each switched on.
pub(crate) fn kinds() -> Vec<(&'static str, Value)> {
    let window = json!({ "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1 });
    let long = json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3],
                                         "long_factor": [2.0, 3.0, 4.0, 5.0],
                                         "original_max_position_embeddings": 12 } });
    let gemma = json!({ "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4, "query_pre_attn_scalar": 6,
                        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
                        "sliding_window_pattern": 2, "tie_word_embeddings": false });
    let lfm = json!({ "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": false });
    let granite = json!({ "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4,
                          "logits_scaling": 4.0 });
    let dense = vec![
        ("LlamaForCausalLM", json!({})),
        ("LlamaForCausalLM", long),
        ("Qwen2ForCausalLM", window.clone()),
        ("Qwen3ForCausalLM", json!({})),
        ("Qwen3ForCausalLM", window),
        ("MistralForCausalLM", json!({ "sliding_window": 4 })),
        ("Phi3ForCausalLM", json!({ "partial_rotary_factor": 0.75 })),
        ("GraniteForCausalLM", granite),
        ("Olmo2ForCausalLM", json!({})),
        ("Glm4ForCausalLM", json!({ "partial_rotary_factor": 0.5 })),
        ("Gemma2ForCausalLM", gemma.clone()),
        ("Gemma3ForCausalLM", gemma),
        ("Lfm2ForCausalLM", lfm),
    ];
    [dense, mixtures::kinds()].concat()
}

/// Asserts that two ways to the same states agree up to rounding; the name begins with the architecture's. Linear attention
/// norms its outputs, which makes the rounding of small ones large.
pub(crate) fn close(name: &str, got: &[f32], want: &[f32]) {
    let is_linear = ["Qwen3Next", "Qwen3_5"].iter().any(|family| name.starts_with(family));
    let atol = if is_linear { 5e-4 } else { 2e-5 };
    specforge_testkit::assert_close(name, got, want, atol, 1e-4);
}
