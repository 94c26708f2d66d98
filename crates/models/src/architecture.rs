//! The architectures that are known, by the names that `config.json` gives them.

use std::path::Path;

use serde_json::Value;

use crate::frame::Frame;
use crate::loader::Loader;
use crate::pass::Layers;
use crate::{
    Error, Result, TargetInfo, deepseek, gemma2, gemma3, glm4, glm4_moe, gpt_oss, granite, lfm2, llama,
    llama4, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_5, qwen3_moe, qwen3_next,
};

/// One architecture.
#[derive(Debug)]
pub(crate) struct Architecture {
    /// The name in `architectures`.
    pub name: &'static str,
    /// The name in `model_type`, which counts where `architectures` is missing.
    model_type: &'static str,
    /// `head_dim` where `config.json` has none; absent: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// The names of its activation in `hidden_act`.
    pub activations: &'static [&'static str],
    /// `config.json` with the keys that Llama has, where the family says it otherwise.
    pub settings: fn(Value) -> Value,
    /// What stands around the decoder layers.
    pub frame: fn(&TargetInfo) -> Result<Frame>,
    /// Whether its layers can be shared by ranks: they declare all that is split as the loader's `outputs` and `inputs`.
    pub is_shared: bool,
    /// Builds the decoder layers.
    pub layers: fn(&TargetInfo, &mut Loader<'_>) -> Result<Layers>,
}

/// Llama, and what the others say only where they differ.
const LLAMA: Architecture = Architecture {
    name: "LlamaForCausalLM",
    model_type: "llama",
    head_dim: None,
    activations: &["silu", "swish"],
    settings: |config| config,
    frame: |_| Ok(Frame::default()),
    is_shared: false,
    layers: llama::layers,
};

/// As Llama, and its layers can be shared by ranks.
const SHARED: Architecture = Architecture { is_shared: true, ..LLAMA };

const GEMMA2: Architecture = Architecture {
    activations: &["gelu_pytorch_tanh"],
    settings: gemma2::settings,
    frame: gemma2::frame,
    layers: gemma2::layers,
    ..LLAMA
};

const GEMMA3: Architecture =
    Architecture { settings: gemma3::settings, frame: gemma3::frame, layers: gemma3::layers, ..GEMMA2 };

const LLAMA4: Architecture = Architecture { settings: llama4::settings, layers: llama4::layers, ..LLAMA };

const DEEPSEEK: Architecture = Architecture {
    settings: deepseek::settings,
    frame: deepseek::frame,
    layers: deepseek::layers_v3,
    ..LLAMA
};

const QWEN3_5: Architecture = Architecture {
    settings: qwen3_5::settings,
    frame: |_| Ok(qwen3_next::frame()),
    layers: qwen3_5::dense_layers,
    ..LLAMA
};

const QWEN3_5_MOE: Architecture = Architecture { layers: qwen3_5::moe_layers, ..QWEN3_5 };

/// All architectures: a new one is a file and a line here.
#[rustfmt::skip]
const KNOWN: [Architecture; 25] = [
    SHARED,
    Architecture { name: "Qwen2ForCausalLM", model_type: "qwen2", layers: qwen2::layers, ..SHARED },
    Architecture { name: "Qwen3ForCausalLM", model_type: "qwen3", head_dim: Some(128), layers: qwen3::layers, ..SHARED },
    Architecture { name: "MistralForCausalLM", model_type: "mistral", layers: mistral::layers, ..SHARED },
    Architecture { name: "Phi3ForCausalLM", model_type: "phi3", layers: phi3::layers, ..LLAMA },
    Architecture { name: "GraniteForCausalLM", model_type: "granite", frame: granite::frame, layers: granite::layers, ..SHARED },
    Architecture { name: "Olmo2ForCausalLM", model_type: "olmo2", layers: olmo2::layers, ..LLAMA },
    Architecture { name: "Glm4ForCausalLM", model_type: "glm4", layers: glm4::layers, ..LLAMA },
    Architecture { name: "Gemma2ForCausalLM", model_type: "gemma2", ..GEMMA2 },
    Architecture { name: "Gemma3ForCausalLM", model_type: "gemma3_text", ..GEMMA3 },
    Architecture { name: "Gemma3ForConditionalGeneration", model_type: "gemma3", frame: gemma3::composite_frame, ..GEMMA3 },
    Architecture { name: "Lfm2ForCausalLM", model_type: "lfm2", settings: lfm2::settings, frame: lfm2::frame, layers: lfm2::layers, ..LLAMA },
    Architecture { name: "MixtralForCausalLM", model_type: "mixtral", layers: mixtral::layers, ..LLAMA },
    Architecture { name: "Qwen3MoeForCausalLM", model_type: "qwen3_moe", layers: qwen3_moe::layers, ..LLAMA },
    Architecture { name: "Qwen3NextForCausalLM", model_type: "qwen3_next", settings: qwen3_next::settings, frame: |_| Ok(qwen3_next::frame()), layers: qwen3_next::layers, ..LLAMA },
    Architecture { name: "Qwen3_5ForCausalLM", model_type: "qwen3_5_text", ..QWEN3_5 },
    Architecture { name: "Qwen3_5ForConditionalGeneration", model_type: "qwen3_5", frame: |_| Ok(qwen3_5::composite_frame()), ..QWEN3_5 },
    Architecture { name: "Qwen3_5MoeForCausalLM", model_type: "qwen3_5_moe_text", ..QWEN3_5_MOE },
    Architecture { name: "Qwen3_5MoeForConditionalGeneration", model_type: "qwen3_5_moe", frame: |_| Ok(qwen3_5::composite_frame()), ..QWEN3_5_MOE },
    Architecture { name: "Glm4MoeForCausalLM", model_type: "glm4_moe", head_dim: Some(128), layers: glm4_moe::layers, ..LLAMA },
    Architecture { name: "GptOssForCausalLM", model_type: "gpt_oss", settings: gpt_oss::settings, layers: gpt_oss::layers, ..LLAMA },
    Architecture { name: "DeepseekV2ForCausalLM", model_type: "deepseek_v2", layers: deepseek::layers_v2, ..DEEPSEEK },
    Architecture { name: "DeepseekV3ForCausalLM", model_type: "deepseek_v3", ..DEEPSEEK },
    Architecture { name: "Llama4ForCausalLM", model_type: "llama4_text", ..LLAMA4 },
    Architecture { name: "Llama4ForConditionalGeneration", model_type: "llama4", frame: |_| Ok(llama4::composite_frame()), ..LLAMA4 },
];

/// The architecture of a configuration.
pub(crate) fn of(path: &Path, config: &Value) -> Result<&'static Architecture> {
    let named = config["architectures"][0].as_str();
    let typed = config["model_type"].as_str();
    let found = match named {
        Some(name) => KNOWN.iter().find(|a| a.name == name),
        None => KNOWN.iter().find(|a| Some(a.model_type) == typed),
    };
    found.ok_or_else(|| unknown(path, named.or(typed).unwrap_or("(none is named)")))
}

/// The architectures whose layers can be shared by ranks.
pub(crate) fn shared() -> String {
    KNOWN.iter().filter(|a| a.is_shared).map(|a| a.name).collect::<Vec<_>>().join(", ")
}

fn unknown(path: &Path, got: &str) -> Error {
    let nearest = KNOWN
        .iter()
        .map(|a| (strsim::normalized_levenshtein(a.name, got), a.name))
        .filter(|(similarity, _)| *similarity > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    Error::Architecture {
        path: path.to_path_buf(),
        got: got.to_owned(),
        known: KNOWN.map(|a| a.name).join(", "),
        nearest: nearest.map(|(_, name)| name.to_owned()),
    }
}
