//! Begin, end and padding tokens of a target folder, which are spread over several files.

use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::tokenizer::read_json;

/// Special tokens of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin-of-sequence token as text; templates write it first.
    pub bos: Option<String>,
    /// End-of-sequence token as text.
    pub eos: Option<String>,
    /// Padding token as text.
    pub pad: Option<String>,
    /// Id of [`bos`](Self::bos).
    pub bos_id: Option<u32>,
    /// Id of [`pad`](Self::pad).
    pub pad_id: Option<u32>,
    /// Every id that ends an answer: the tokenizer's own and those of the generation settings, ascending.
    pub eos_ids: Vec<u32>,
}

impl SpecialTokens {
    pub(crate) fn open(folder: &Path, lookup: &dyn Fn(&str) -> Option<u32>) -> Result<Self> {
        let mut special = Self::default();
        // Later files only fill what earlier ones left open.
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Some(config) = read_json(&folder.join(file))? else { continue };
            for (key, slot) in [
                ("bos_token", &mut special.bos),
                ("eos_token", &mut special.eos),
                ("pad_token", &mut special.pad),
            ] {
                *slot = slot.take().or_else(|| config.get(key).and_then(token_text));
            }
        }
        special.bos_id = special.bos.as_deref().and_then(lookup);
        special.pad_id = special.pad.as_deref().and_then(lookup);
        special.eos_ids.extend(special.eos.as_deref().and_then(lookup));
        // As the serving side does: generation settings first, the model's own only without them.
        for file in ["generation_config.json", "config.json"] {
            let Some(config) = read_json(&folder.join(file))? else { continue };
            let ids = eos_ids(&config);
            if !ids.is_empty() {
                special.eos_ids.extend(ids);
                break;
            }
        }
        special.eos_ids.sort_unstable();
        special.eos_ids.dedup();
        Ok(special)
    }

    /// Whether `id` ends an answer.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos_ids.binary_search(&id).is_ok()
    }
}

/// A token as string, or as the object form of an added token.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn eos_ids(config: &Value) -> Vec<u32> {
    let value = config.get("eos_token_id").or_else(|| config.get("text_config")?.get("eos_token_id"));
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
