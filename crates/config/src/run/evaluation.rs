//! The `[eval]` and `[export]` tables: how the draft is measured, and where it goes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Real speculative decoding with the draft. The names are SGLang's `--speculative-*` in short.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct EvalConfig {
    /// Prompts file, never trained on; absent: the prompts of the held-out rows.
    pub prompts: Option<PathBuf>,
    /// Prompts decoded at the end of a run and by `specforge eval`.
    pub max_prompts: usize,
    /// Prompts decoded by each evaluation during training; 0: held-out loss alone, and no best checkpoint before the end.
    pub training_prompts: usize,
    /// Tokens decoded for each prompt.
    pub max_new_tokens: usize,
    /// Depth: tokens the draft proposes one after the other (`num-steps`).
    pub draft_steps: usize,
    /// Breadth: 1 is a chain, more is the EAGLE tree (`eagle-topk`).
    pub topk: usize,
    /// Tokens that the target verifies at once, the last accepted one included (`num-draft-tokens`); absent:
    /// `draft-steps` + 1 for a chain, for a tree 8 or all of it if that is less.
    pub draft_tokens: Option<usize>,
    /// 0 is greedy; above 0 tokens are sampled, with exact rejection sampling.
    pub temperature: f64,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            prompts: None,
            max_prompts: 64,
            training_prompts: 8,
            max_new_tokens: 128,
            draft_steps: 5,
            topk: 1,
            draft_tokens: None,
            temperature: 0.0,
        }
    }
}

/// The folder that SGLang loads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ExportConfig {
    /// The folder; absent: `<output-dir>/<name>/export`.
    pub path: Option<PathBuf>,
    /// Also write the target's embeddings, for programs that do not share them with the target.
    pub embeddings: bool,
}
