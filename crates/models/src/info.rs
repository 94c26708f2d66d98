//! A target described by its `config.json`, without its weights.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use specforge_nn::rope::RopeConfig;
use specforge_tensor::AttentionShape;

use crate::config::{MOST_LAYERS, parse, read_json};
use crate::quantization::Quantization;
use crate::{Error, Result, architecture};

/// A target's description.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetInfo {
    /// The name in `architectures`, for example `LlamaForCausalLM`.
    pub architecture: String,
    /// H, the width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// V.
    pub vocab_size: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head; times `n_heads` it need not be H.
    pub head_dim: usize,
    /// Width of the MLP; where all layers have experts, what the configuration calls so.
    pub intermediate_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// The type of the weights as the configuration says, for example `bfloat16`.
    pub dtype: String,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token before a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text: those of `generation_config.json` where it names some.
    pub eos_token_ids: Vec<u32>,
    /// The token that fills up batches.
    pub pad_token_id: Option<u32>,
    /// The whole `config.json`, with Llama's keys where the family has others.
    pub raw: Value,
    /// Where `raw` comes from, for messages.
    pub path: PathBuf,
}

/// The settings that every architecture here has.
#[derive(Debug, Deserialize)]
struct Common {
    hidden_size: usize,
    num_hidden_layers: usize,
    vocab_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    qk_rope_head_dim: Option<usize>,
    intermediate_size: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    max_position_embeddings: usize,
    hidden_act: Option<String>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    #[serde(default)]
    tie_word_embeddings: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Ids>,
    pad_token_id: Option<u32>,
}

/// One token or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Several(Vec<u32>),
}

/// The part of `generation_config.json` that matters here.
#[derive(Debug, Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

fn default_eps() -> f64 {
    1e-6
}

impl Ids {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Several(ids) => ids,
        }
    }
}

impl TargetInfo {
    /// Reads `config.json`, and `generation_config.json` if there is one, from a Hugging Face folder.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let mut info = Self::from_json(&path, read_json(&path)?)?;
        let path = folder.join("generation_config.json");
        if path.exists() {
            let generation: Generation = parse(&path, &read_json(&path)?)?;
            if let Some(ids) = generation.eos_token_id {
                info.eos_token_ids = ids.into_vec();
            }
        }
        Ok(info)
    }

    /// The description in an already parsed `config.json`; `path` is for messages.
    pub fn from_json(path: &Path, raw: Value) -> Result<Self> {
        let architecture = architecture::of(path, &raw)?;
        let raw = (architecture.settings)(raw);
        let common: Common = parse(path, &raw)?;
        expect_sizes(path, &raw)?;
        let head_dim = head_dim(path, &raw, &common, architecture.head_dim)?;
        // Multi-head latent attention rotates a part of each head, whose width has a key of its own.
        let rope = RopeConfig::from_json(&raw, common.qk_rope_head_dim.unwrap_or(head_dim))
            .map_err(|source| Error::Rope { path: path.to_path_buf(), source })?;
        let info = Self {
            architecture: architecture.name.to_owned(),
            hidden_size: common.hidden_size,
            n_layers: common.num_hidden_layers,
            vocab_size: common.vocab_size,
            n_heads: common.num_attention_heads,
            n_kv_heads: common.num_key_value_heads.unwrap_or(common.num_attention_heads),
            head_dim,
            intermediate_size: common.intermediate_size,
            rms_norm_eps: common.rms_norm_eps,
            max_position_embeddings: common.max_position_embeddings,
            rope,
            dtype: common.dtype.or(common.torch_dtype).unwrap_or_else(|| "float32".to_owned()),
            tie_word_embeddings: common.tie_word_embeddings,
            bos_token_id: common.bos_token_id,
            eos_token_ids: common.eos_token_id.map_or_else(Vec::new, Ids::into_vec),
            pad_token_id: common.pad_token_id,
            raw,
            path: path.to_path_buf(),
        };
        info.check(common.hidden_act.as_deref(), architecture.activations)?;
        Ok(info)
    }

    /// Heads and scale of the attention; the scale of most is `head_dim^-0.5`.
    pub(crate) fn attention_shape(&self, scale: Option<f32>) -> AttentionShape {
        AttentionShape {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: scale.unwrap_or_else(|| (self.head_dim as f32).powf(-0.5)),
        }
    }

    /// Fails where logits are not the product with the head: training takes the teacher's logits from there.
    pub fn expect_teacher(&self) -> Result<()> {
        let frame = (architecture::of(&self.path, &self.raw)?.frame)(self)?;
        if frame.logit_cap.is_none() {
            return Ok(());
        }
        let why =
            "the losses know no cap on the teacher's logits: this target can be run, but train no draft";
        Err(self.wrong("final_logit_softcapping", why))
    }

    /// What one of `size` ranks computes of it (tensor parallel): some heads and some of the MLP. Fails where its layers
    /// cannot be shared, or where that does not come out even.
    pub fn shared_by(&self, size: usize) -> Result<Self> {
        if size > 1 && !architecture::of(&self.path, &self.raw)?.is_shared {
            let known = architecture::shared();
            let why = format!("ranks cannot share it (parallel.target-tensor); they can share {known}");
            return Err(self.wrong("architectures", why));
        }
        let even = |key: &str, n: usize| {
            let why =
                format!("{size} ranks share it (parallel.target-tensor), expected a multiple of {size}");
            if n.is_multiple_of(size) { Ok(n / size) } else { Err(self.wrong(key, why)) }
        };
        even("vocab_size", self.vocab_size)?;
        let n_kv_heads = if size.is_multiple_of(self.n_kv_heads) {
            1
        } else {
            even("num_key_value_heads", self.n_kv_heads)?
        };
        let n_heads = even("num_attention_heads", self.n_heads)?;
        let intermediate_size = even("intermediate_size", self.intermediate_size)?;
        Ok(Self { n_heads, n_kv_heads, intermediate_size, ..self.clone() })
    }

    /// An error about one key.
    pub(crate) fn wrong(&self, key: &str, why: impl Into<String>) -> Error {
        setting(&self.path, &self.raw, key, why)
    }

    /// Refuses what would silently give another model than the checkpoint is.
    fn check(&self, hidden_act: Option<&str>, activations: &[&str]) -> Result<()> {
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let why = format!("expected a divisor of num_attention_heads = {}", self.n_heads);
            return Err(self.wrong("num_key_value_heads", why));
        }
        if hidden_act.is_some_and(|name| !activations.contains(&name)) {
            let why = format!("this activation is not supported, expected {:?}", activations[0]);
            return Err(self.wrong("hidden_act", why));
        }
        Quantization::of(self)?;
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps < 1.0) {
            return Err(self.wrong("rms_norm_eps", "expected a small number, not below 0"));
        }
        Ok(())
    }
}

/// Refuses sizes of 0, before anything divides by them, and more layers than any model has.
fn expect_sizes(path: &Path, raw: &Value) -> Result<()> {
    for key in [
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "qk_rope_head_dim",
        "intermediate_size",
        "max_position_embeddings",
    ] {
        if raw.get(key).and_then(Value::as_u64) == Some(0) {
            return Err(setting(path, raw, key, "expected at least 1"));
        }
    }
    let key = "num_hidden_layers";
    if raw.get(key).and_then(Value::as_u64).is_some_and(|n| n > MOST_LAYERS) {
        return Err(setting(path, raw, key, format!("expected at most {MOST_LAYERS}")));
    }
    Ok(())
}

fn setting(path: &Path, raw: &Value, key: &str, why: impl Into<String>) -> Error {
    let got = raw.get(key).unwrap_or(&Value::Null).to_string();
    Error::Setting { path: path.to_path_buf(), key: key.to_owned(), got, why: why.into() }
}

fn head_dim(path: &Path, raw: &Value, common: &Common, default: Option<usize>) -> Result<usize> {
    if let Some(given) = common.head_dim.or(default) {
        return Ok(given);
    }
    let heads = common.num_attention_heads;
    if !common.hidden_size.is_multiple_of(heads) {
        let why = format!("expected head_dim, or a divisor of hidden_size = {}", common.hidden_size);
        return Err(setting(path, raw, "num_attention_heads", why));
    }
    Ok(common.hidden_size / heads)
}
