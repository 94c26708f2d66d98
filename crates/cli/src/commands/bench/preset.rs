//! The shapes that a step is measured on: those of published targets, and the quick start's.

use std::path::Path;
use std::str::FromStr;

use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};
use specforge_methods::VocabMap;
use specforge_models::TargetInfo;

/// A target whose draft is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::commands) enum Preset {
    /// meta-llama/Llama-3.1-8B-Instruct; draft vocabulary 32000.
    #[value(name = "llama3-8b")]
    Llama3_8b,
    /// Qwen/Qwen3-4B, tied embeddings; draft vocabulary 32000.
    #[value(name = "qwen3-4b")]
    Qwen3_4b,
    /// Qwen/Qwen3-8B; draft vocabulary 32000.
    #[value(name = "qwen3-8b")]
    Qwen3_8b,
    /// assets/quickstart/target: small enough for a CPU; draft vocabulary 1024.
    Quickstart,
}

impl Preset {
    /// Its name on the command line.
    pub(in crate::commands) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// The target's description: only what shapes and arithmetic depend on.
    pub(in crate::commands) fn info(self) -> Result<TargetInfo> {
        let config = match self {
            Self::Llama3_8b => sizes("Llama", [4096, 32, 32, 8, 128, 14336, 128_256, 131_072], 5e5, false),
            Self::Qwen3_4b => sizes("Qwen3", [2560, 36, 32, 8, 128, 9728, 151_936, 40_960], 1e6, true),
            Self::Qwen3_8b => sizes("Qwen3", [4096, 36, 32, 8, 128, 12288, 151_936, 40_960], 1e6, false),
            Self::Quickstart => sizes("Llama", [128, 14, 2, 1, 64, 384, 2048, 2048], 1e4, true),
        };
        Ok(TargetInfo::from_json(Path::new(&self.name()), config)?)
    }

    /// Draft tokens, spread evenly over the target's.
    pub(in crate::commands) fn vocab(self, vocab_size: usize) -> Result<VocabMap> {
        let n = if self == Self::Quickstart { 1024 } else { 32_000 };
        let d2t: Vec<i64> = (0..n).map(|id| (id * vocab_size / n - id) as i64).collect();
        Ok(VocabMap::from_offsets(&d2t, vocab_size)?)
    }
}

/// A `config.json`; sizes are H, layers, heads, key-value heads, width of a head, width of the MLP, V, positions.
fn sizes(family: &str, n: [usize; 8], rope_theta: f64, tied: bool) -> Value {
    json!({
        "architectures": [format!("{family}ForCausalLM")],
        "hidden_size": n[0],
        "num_hidden_layers": n[1],
        "num_attention_heads": n[2],
        "num_key_value_heads": n[3],
        "head_dim": n[4],
        "intermediate_size": n[5],
        "vocab_size": n[6],
        "max_position_embeddings": n[7],
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
    })
}

/// `DxT`: so many documents of so many tokens each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::commands) struct Tokens {
    pub(in crate::commands) documents: usize,
    pub(in crate::commands) each: usize,
}

impl FromStr for Tokens {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (documents, each) = text.split_once('x').unwrap_or(("1", text));
        match (documents.parse(), each.parse()) {
            (Ok(documents), Ok(each)) if documents > 0 && each > 1 => Ok(Self { documents, each }),
            _ => {
                Err("expected DxT, as in 2x2048: D documents (1 or more) of T tokens (2 or more) each"
                    .to_owned())
            }
        }
    }
}

impl std::fmt::Display for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.documents, self.each)
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::{Preset, Tokens};

    #[test]
    fn every_preset_is_a_target_with_a_draft_vocabulary() {
        for preset in Preset::value_variants() {
            let info = preset.info().unwrap();
            let vocab = preset.vocab(info.vocab_size).unwrap();
            assert!(vocab.len() * 2 <= info.vocab_size, "{}", preset.name());
        }
    }

    #[test]
    fn tokens_are_documents_times_length() {
        assert_eq!("2x2048".parse(), Ok(Tokens { documents: 2, each: 2048 }));
        assert_eq!("64".parse(), Ok(Tokens { documents: 1, each: 64 }));
        for wrong in ["0x5", "2x0", "2x1", "x", "", "2x3x4", "-1x5"] {
            assert!(wrong.parse::<Tokens>().is_err(), "{wrong}");
        }
    }
}
