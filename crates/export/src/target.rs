//! What a serving folder has to take over from the target's `config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};
use specforge_nn::rope::whole_heads;

use crate::error::{Error, Result};

/// The facts of a target that its draft depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetConfig {
    /// `architectures[0]`, empty if there is none.
    pub architecture: String,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// `max_position_embeddings`, or what this model calls it.
    pub max_position_embeddings: usize,
    /// The context length SGLang derives: positions, times a RoPE factor that is not yet in them.
    pub context_length: usize,
    /// The element type it is served with when the user asks for none: `bfloat16` or `float16`.
    pub dtype: &'static str,
    /// `bos_token_id`, as it stands (a number or null).
    pub bos_token_id: Value,
    /// `eos_token_id`, as it stands (a number, a list or null).
    pub eos_token_id: Value,
    /// `pad_token_id`, as it stands (a number or null).
    pub pad_token_id: Value,
    /// RoPE in the present form of Hugging Face, see [`rope_parameters`].
    pub rope: Map<String, Value>,
}

impl TargetConfig {
    /// Reads the `config.json` of the target folder `path` (or the file `path`).
    pub fn open(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
        Self::parse(&path, &read_json(&path)?)
    }

    /// Takes the facts out of a parsed `config.json`; `path` is only for messages.
    ///
    /// Of a multimodal model the text part (`text_config`) counts.
    pub fn parse(path: &Path, config: &Value) -> Result<Self> {
        let text = text_part(config);
        let size = |key: &str| {
            let value = text.get(key).or_else(|| config.get(key)).unwrap_or(&Value::Null);
            positive(value)
                .ok_or_else(|| Error::key(path, key, format!("expected a positive number, got {value}")))
        };
        let either = |key: &str| text.get(key).or_else(|| config.get(key)).cloned().unwrap_or(Value::Null);
        let max_position_embeddings = positions(text);
        Ok(Self {
            architecture: architecture(config).to_owned(),
            hidden_size: size("hidden_size")?,
            num_hidden_layers: size("num_hidden_layers")?,
            vocab_size: size("vocab_size")?,
            max_position_embeddings,
            context_length: scaled(max_position_embeddings, raw_scaling(text)),
            dtype: serving_dtype(config),
            bos_token_id: either("bos_token_id"),
            eos_token_id: either("eos_token_id"),
            pad_token_id: either("pad_token_id"),
            rope: rope_parameters(config),
        })
    }

    /// The layers whose outputs SGLang captures when a draft asks for none: `[1, L/2 - 1, L - 4]`;
    /// none for a target too shallow for three different ones.
    pub fn default_capture_layers(&self) -> Option<Vec<usize>> {
        let l = self.num_hidden_layers;
        (l >= 7).then(|| vec![1, l / 2 - 1, l - 4])
    }

    /// Whether SGLang takes explicit ids of this family as layer *inputs*, unless the first id is 1.
    pub(crate) fn takes_raw_capture_ids(&self) -> bool {
        ["Deepseek", "Kimi", "MistralLarge3", "GlmMoeDsa", "Glm4MoeLite"]
            .iter()
            .any(|family| self.architecture.starts_with(family))
    }
}

/// RoPE of a `config.json` in the one form used here: an object with `rope_theta`, `rope_type` and the
/// parameters of that type.
///
/// Older files have `rope_theta` beside `rope_scaling`. Where full and sliding attention differ, full
/// attention counts. What describes the target's own heads (rotating only part of them, positions on
/// several axes) is left out: a draft rotates whole heads at plain positions.
pub fn rope_parameters(config: &Value) -> Map<String, Value> {
    let text = &whole_heads(text_part(config));
    let modern = text.get("rope_parameters").and_then(Value::as_object);
    let modern = modern.map(|rope| rope.get("full_attention").and_then(Value::as_object).unwrap_or(rope));
    let legacy = || text.get("rope_scaling").and_then(Value::as_object);
    let mut rope = modern.or_else(legacy).cloned().unwrap_or_default();
    let own_type = rope.remove("type");
    let rope_type = match rope.get("rope_type").or(own_type.as_ref()).and_then(Value::as_str) {
        None | Some("mrope") => "default",
        Some("su") => "longrope",
        Some(other) => other,
    };
    let rope_type = json!(rope_type);
    for key in ["mrope_section", "mrope_interleaved", "partial_rotary_factor"] {
        rope.remove(key);
    }
    rope.insert("rope_type".to_owned(), rope_type);
    let theta = rope.get("rope_theta").or_else(|| text.get("rope_theta")).cloned().filter(Value::is_number);
    rope.insert("rope_theta".to_owned(), theta.unwrap_or_else(|| json!(10000.0)));
    rope
}

/// The context length SGLang derives from a `config.json`.
pub(crate) fn context_length(config: &Value) -> usize {
    let text = text_part(config);
    scaled(positions(text), raw_scaling(text))
}

/// `positions` times the factor of a RoPE scaling that is not yet in them (SGLang's rule).
pub(crate) fn scaled(positions: usize, rope: Option<&Map<String, Value>>) -> usize {
    let Some(rope) = rope else { return positions };
    let factor = rope.get("factor").and_then(Value::as_f64).unwrap_or(1.0);
    let rope_type = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str);
    let contained = rope.contains_key("original_max_position_embeddings") || rope_type == Some("llama3");
    if contained { positions } else { (positions as f64 * factor) as usize }
}

/// The element type a config leads to with `--dtype auto`: a float32 model is served in half precision.
pub(crate) fn serving_dtype(config: &Value) -> &'static str {
    let text = text_part(config);
    let model_type = text.get("model_type").and_then(Value::as_str).unwrap_or("");
    match declared_dtype(text).or_else(|| declared_dtype(config)) {
        Some("bfloat16") => "bfloat16",
        Some("float16" | "half") => "float16",
        _ if model_type.starts_with("gemma") => "bfloat16",
        _ => "float16",
    }
}

/// `dtype`, or `torch_dtype` as it was called.
pub(crate) fn declared_dtype(config: &Value) -> Option<&str> {
    config.get("dtype").and_then(Value::as_str).or_else(|| config.get("torch_dtype").and_then(Value::as_str))
}

pub(crate) fn architecture(config: &Value) -> &str {
    config.pointer("/architectures/0").and_then(Value::as_str).unwrap_or("")
}

/// A number from 1 to 2^31 - 1, so that products of two stay far from overflowing.
pub(crate) fn positive(value: &Value) -> Option<usize> {
    index(value).filter(|&number| number > 0)
}

/// A number from 0 to 2^31 - 1.
pub(crate) fn index(value: &Value) -> Option<usize> {
    value.as_u64().filter(|&number| i32::try_from(number).is_ok()).map(|number| number as usize)
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_slice(&fs_err::read(path)?)
        .map_err(|source| Error::Json { path: path.to_path_buf(), source })
}

fn text_part(config: &Value) -> &Value {
    config.get("text_config").filter(|text| text.is_object()).unwrap_or(config)
}

/// The keys SGLang looks for, in its order; 2048 when there is none of them.
fn positions(text: &Value) -> usize {
    ["max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings"]
        .iter()
        .find_map(|key| positive(text.get(key)?))
        .unwrap_or(2048)
}

/// The scaling that counts for the context: none where full and sliding attention have their own.
fn raw_scaling(text: &Value) -> Option<&Map<String, Value>> {
    if text.get("rope_local_base_freq").is_some() {
        return None;
    }
    let modern = text.get("rope_parameters").and_then(Value::as_object);
    modern.or_else(|| text.get("rope_scaling").and_then(Value::as_object))
}
