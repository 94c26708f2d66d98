//! The draft's shape, from a recipe and its target or from an exported `config.json`, and the weights it has.

use specforge_models::TargetInfo;
use specforge_nn::rope::{RopeConfig, whole_heads};

use super::config::{Config, config_error};
use crate::{Error, Result};

/// The draft's shape: the keys of its `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dims {
    /// H.
    pub hidden_size: usize,
    /// Ht.
    pub target_hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// V.
    pub vocab_size: usize,
    /// Vd.
    pub draft_vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Positions the tables cover.
    pub max_position_embeddings: usize,
    /// EAGLE3.1: norm every captured state before `fc`.
    pub fc_norm: bool,
    /// EAGLE3.1: feed the normed state to the next step.
    pub norm_output: bool,
}

/// Captured layers of an EAGLE3 draft.
pub(super) const N_CAPTURED: usize = 3;

impl Dims {
    /// The shape that a recipe's settings give for this target.
    pub fn resolve(config: &Config, target: &TargetInfo, draft_vocab_size: usize) -> Result<Self> {
        let dims = Self {
            hidden_size: config.hidden_size.unwrap_or(target.hidden_size),
            target_hidden_size: target.hidden_size,
            intermediate_size: config.intermediate_size.unwrap_or(target.intermediate_size),
            num_attention_heads: config.num_attention_heads.unwrap_or(target.n_heads),
            num_key_value_heads: config.num_key_value_heads.unwrap_or(target.n_kv_heads),
            head_dim: config.head_dim.unwrap_or(target.head_dim),
            vocab_size: target.vocab_size,
            draft_vocab_size,
            rms_norm_eps: target.rms_norm_eps,
            rope: RopeConfig::from_json(
                &whole_heads(&target.raw),
                config.head_dim.unwrap_or(target.head_dim),
            )?,
            max_position_embeddings: target.max_position_embeddings,
            fc_norm: config.fc_norm,
            norm_output: config.norm_output,
        };
        dims.check_heads()?;
        Ok(dims)
    }

    fn check_heads(&self) -> Result<()> {
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if kv == 0 || !heads.is_multiple_of(kv) {
            let reason = format!("expected a divisor of the {heads} attention heads");
            return Err(config_error("num-key-value-heads", kv.to_string(), reason));
        }
        Ok(())
    }

    /// From an exported `config.json`. Keys it may leave out: `head_dim`, `draft_vocab_size`, `target_hidden_size`.
    pub fn from_json(config: &serde_json::Value) -> Result<Self> {
        let optional = |key: &str| config[key].as_u64().map(|n| n as usize);
        let required = |key: &str| {
            let reason = format!("expected a positive number, got {}", config[key]);
            optional(key).filter(|&n| n > 0).ok_or(Error::DraftConfig { key: key.to_owned(), reason })
        };
        let (hidden_size, heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let vocab_size = required("vocab_size")?;
        let head_dim = optional("head_dim").unwrap_or(hidden_size / heads);
        let dims = Self {
            hidden_size,
            target_hidden_size: optional("target_hidden_size").unwrap_or(hidden_size),
            intermediate_size: required("intermediate_size")?,
            num_attention_heads: heads,
            num_key_value_heads: optional("num_key_value_heads").unwrap_or(heads),
            head_dim,
            vocab_size,
            draft_vocab_size: optional("draft_vocab_size").unwrap_or(vocab_size),
            rms_norm_eps: config["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope: RopeConfig::from_json(config, head_dim)?,
            max_position_embeddings: required("max_position_embeddings")?,
            fc_norm: config["fc_norm"].as_bool().unwrap_or(false),
            norm_output: config["norm_output"].as_bool().unwrap_or(false),
        };
        dims.check_heads()?;
        Ok(dims)
    }

    /// Every weight's checkpoint name and shape, in declaration order: the embedding, then the others about as a forward
    /// comes to them, which is the reverse of the order in which gradients leave for other ranks.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let (h, ht, i) = (self.hidden_size, self.target_hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let names = if self.fc_norm { 0..N_CAPTURED } else { 0..0 };
        let fc_norm = names.map(|a| (format!("fc_norm.{a}.weight"), vec![ht]));
        let embed_tokens = ("embed_tokens.weight".to_owned(), vec![self.vocab_size, h]);
        let weights = [
            ("fc.weight".to_owned(), vec![h, N_CAPTURED * ht]),
            ("midlayer.input_layernorm.weight".to_owned(), vec![h]),
            ("midlayer.hidden_norm.weight".to_owned(), vec![h]),
            ("midlayer.self_attn.q_proj.weight".to_owned(), vec![q, 2 * h]),
            ("midlayer.self_attn.k_proj.weight".to_owned(), vec![kv, 2 * h]),
            ("midlayer.self_attn.v_proj.weight".to_owned(), vec![kv, 2 * h]),
            ("midlayer.self_attn.o_proj.weight".to_owned(), vec![h, q]),
            ("midlayer.post_attention_layernorm.weight".to_owned(), vec![h]),
            ("midlayer.mlp.gate_proj.weight".to_owned(), vec![i, h]),
            ("midlayer.mlp.up_proj.weight".to_owned(), vec![i, h]),
            ("midlayer.mlp.down_proj.weight".to_owned(), vec![h, i]),
            ("norm.weight".to_owned(), vec![h]),
            ("lm_head.weight".to_owned(), vec![self.draft_vocab_size, h]),
        ];
        std::iter::once(embed_tokens).chain(fc_norm).chain(weights).collect()
    }
}
