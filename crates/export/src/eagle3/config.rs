//! `config.json` of an EAGLE3 draft: what of it matters, how it is read, how it is written.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::target::{TargetConfig, index, positive, rope_parameters, scaled};

/// Sizes and flags of an EAGLE3 or EAGLE3.1 draft.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent keys of config.json")]
pub struct Eagle3Config {
    /// Width of the draft (H).
    pub hidden_size: usize,
    /// Width of the target's hidden states (T).
    pub target_hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Layers of the draft; more than one is read and checked but served by newer engines only.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; heads * head_dim need not be H.
    pub head_dim: usize,
    /// Rows of the target's embedding (V).
    pub vocab_size: usize,
    /// Rows of the draft's head (Vd).
    pub draft_vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// RoPE as trained: `rope_theta`, `rope_type` and the type's parameters, see [`rope_parameters`].
    pub rope: Map<String, Value>,
    /// Captured states (A): the width of `fc` is A * T.
    pub num_aux_hidden_states: usize,
    /// 0-based layers of the target whose outputs were captured, ascending; none for SGLang's default.
    pub capture_layers: Option<Vec<usize>>,
    /// EAGLE3.1: an RMSNorm on each captured state before `fc`.
    pub fc_norm: bool,
    /// EAGLE3.1: the next step gets the hidden state after the final norm, not before it.
    pub norm_output: bool,
    /// One RMSNorm over all captured states before `fc` (newer SGLang only).
    pub norm_before_fc: bool,
    /// The draft has no head of its own and uses the target's (`draft_vocab_size: null`).
    pub shares_target_head: bool,
}

impl Eagle3Config {
    /// Reads a `config.json` of anybody's EAGLE3 draft; `path` is only for messages.
    ///
    /// Missing optional keys get the values SGLang gives them.
    pub fn parse(path: &Path, config: &Value) -> Result<Self> {
        let keys = Keys { path, config };
        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        let vocab_size = keys.size("vocab_size")?;
        let draft_vocab_size = keys.optional_size("draft_vocab_size")?;
        let capture_layers = keys.layers()?;
        let default_aux = capture_layers.as_ref().map_or(3, Vec::len);
        Ok(Self {
            hidden_size,
            target_hidden_size: keys.optional_size("target_hidden_size")?.unwrap_or(hidden_size),
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys
                .count("num_hidden_layers")?
                .ok_or_else(|| keys.missing("num_hidden_layers"))?,
            num_attention_heads,
            num_key_value_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim: keys.optional_size("head_dim")?.unwrap_or(hidden_size / num_attention_heads),
            vocab_size,
            draft_vocab_size: draft_vocab_size.unwrap_or(vocab_size),
            rms_norm_eps: keys.epsilon()?,
            rope: rope_parameters(config),
            num_aux_hidden_states: keys.count("num_aux_hidden_states")?.unwrap_or(default_aux),
            capture_layers,
            fc_norm: keys.flag("fc_norm")? || keys.flag("use_aux_norm")?,
            norm_output: keys.flag("norm_output")?,
            norm_before_fc: keys.norm_before_fc()?,
            shares_target_head: config.get("draft_vocab_size").is_some_and(Value::is_null),
        })
    }

    /// The `config.json` of this draft beside this target: every key SGLang and vLLM read, no other
    /// (but for the version of this program, which they ignore).
    pub(super) fn to_json(&self, target: &TargetConfig) -> Result<Value> {
        self.reject_unwritable()?;
        let mut config = json!({
            "architectures": ["LlamaForCausalLMEagle3"],
            "attention_bias": false,
            "bos_token_id": target.bos_token_id,
            "draft_vocab_size": self.draft_vocab_size,
            "dtype": target.dtype,
            "eos_token_id": target.eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings(target),
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": target.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope,
            // The same once more for readers from before `rope_parameters`.
            "rope_scaling": legacy_scaling(&self.rope),
            "rope_theta": self.rope.get("rope_theta"),
            "tie_word_embeddings": false,
            // `dtype` for readers from before it was called so.
            "torch_dtype": target.dtype,
            "vocab_size": self.vocab_size,
        });
        let keys = config.as_object_mut().expect("it was written as an object");
        keys.insert(super::MARK.to_owned(), json!(env!("CARGO_PKG_VERSION")));
        if self.target_hidden_size != self.hidden_size {
            keys.insert("target_hidden_size".to_owned(), json!(self.target_hidden_size));
        }
        // Absent unless true: older readers give both flags other meanings.
        for (key, set) in [("fc_norm", self.fc_norm), ("norm_output", self.norm_output)] {
            if set {
                keys.insert(key.to_owned(), json!(true));
            }
        }
        if let Some(ids) = self.capture_ids(target)? {
            keys.insert("eagle_config".to_owned(), json!({ IDS: ids.sglang, "use_aux_hidden_state": true }));
            keys.insert(IDS.to_owned(), json!(ids.vllm));
        }
        Ok(config)
    }

    fn reject_unwritable(&self) -> Result<()> {
        let config = Path::new("the draft's configuration");
        let no = |key, why: &str| Err(Error::key(config, key, why));
        match self {
            Self { num_hidden_layers: 2.., .. } => {
                no("num_hidden_layers", "only drafts of one layer are exported")
            }
            Self { norm_before_fc: true, .. } => {
                no("norm_before_fc", "older engines ignore it; train with fc_norm")
            }
            Self { shares_target_head: true, .. } => {
                no("draft_vocab_size", "a draft is exported with its own head")
            }
            Self { rope, .. } if !(rope.contains_key("rope_theta") && rope.contains_key("rope_type")) => {
                no("rope", "needs rope_theta and rope_type")
            }
            _ => Ok(()),
        }
    }

    /// The target's, or more where the draft's RoPE would make the context shorter than the target's:
    /// SGLang refuses to start then.
    fn max_position_embeddings(&self, target: &TargetConfig) -> usize {
        let factor = scaled(1 << 20, Some(&self.rope)) as f64 / f64::from(1 << 20);
        let needed = (target.context_length as f64 / factor).ceil() as usize;
        target.max_position_embeddings.max(needed)
    }

    /// The ids to write; none when they are what the engines capture anyway.
    fn capture_ids(&self, target: &TargetConfig) -> Result<Option<CaptureIds>> {
        let default = target.default_capture_layers();
        let Some(layers) = self.capture_layers.as_ref().or(default.as_ref()) else {
            let why = format!("a target of {} layers has no default; name them", target.num_hidden_layers);
            return Err(Error::CaptureLayers { layers: Vec::new(), why });
        };
        let no = |why: String| Err(Error::CaptureLayers { layers: layers.clone(), why });
        if layers.len() != self.num_aux_hidden_states {
            return no(format!("the draft takes {} states", self.num_aux_hidden_states));
        }
        if !layers.is_sorted_by(|a, b| a < b) {
            return no("they have to ascend, because the states come in the order of the layers".to_owned());
        }
        let last = target.num_hidden_layers - 1;
        if layers.iter().any(|&layer| layer >= last) {
            return no(format!(
                "layer {last} is the last one, whose output is not captured; take earlier ones"
            ));
        }
        if Some(layers) == default.as_ref() {
            return Ok(None);
        }
        let inputs: Vec<usize> = layers.iter().map(|layer| layer + 1).collect();
        // These families take ids as they are, unless the first is 1.
        let raw = target.takes_raw_capture_ids() && layers.first() != Some(&1);
        if raw && inputs.first() == Some(&1) {
            return no("SGLang cannot be told to capture layer 0 of this family; begin with a later layer"
                .to_owned());
        }
        let sglang = if raw { inputs.clone() } else { layers.clone() };
        Ok(Some(CaptureIds { sglang, vllm: inputs }))
    }
}

/// The same layers as two engines count them.
struct CaptureIds {
    sglang: Vec<usize>,
    vllm: Vec<usize>,
}

pub(crate) const IDS: &str = "eagle_aux_hidden_state_layer_ids";

/// `rope_scaling` of old: what is beside `rope_theta`, or null for plain RoPE.
fn legacy_scaling(rope: &Map<String, Value>) -> Value {
    if rope.get("rope_type").is_none_or(|rope_type| rope_type == "default") {
        return Value::Null;
    }
    rope.iter()
        .filter(|(key, _)| *key != "rope_theta")
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Typed access to the keys of a file.
struct Keys<'a> {
    path: &'a Path,
    config: &'a Value,
}

impl Keys<'_> {
    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    /// Of layers or states: few, because each stands for tensors.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        match self.optional_size(key)? {
            Some(1025..) => Err(self.wrong(key, "at most 1024", &self.config[key])),
            count => Ok(count),
        }
    }

    fn missing(&self, key: &str) -> Error {
        Error::key(self.path, key, "is missing")
    }

    /// None when the key is absent or null.
    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match positive(value) {
                Some(size) => Ok(Some(size)),
                None => Err(self.wrong(key, "a positive number", value)),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        self.flag_in(self.config, key)
    }

    fn flag_in(&self, object: &Value, key: &str) -> Result<bool> {
        match object.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value)),
        }
    }

    fn norm_before_fc(&self) -> Result<bool> {
        match self.config.get("eagle_config") {
            Some(eagle) if eagle.get("norm_before_fc").is_some() => self.flag_in(eagle, "norm_before_fc"),
            _ => self.flag("norm_before_fc"),
        }
    }

    fn epsilon(&self) -> Result<f64> {
        match self.config.get("rms_norm_eps") {
            None => Ok(1e-6),
            Some(value) => value
                .as_f64()
                .filter(|&epsilon| epsilon > 0.0)
                .ok_or_else(|| self.wrong("rms_norm_eps", "a positive number", value)),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        let Some(value) =
            self.config.pointer(&format!("/eagle_config/{IDS}")).filter(|value| !value.is_null())
        else {
            return Ok(None);
        };
        let ids = value.as_array().and_then(|ids| ids.iter().map(index).collect());
        ids.map(Some).ok_or_else(|| self.wrong(&format!("eagle_config.{IDS}"), "a list of layers", value))
    }

    fn wrong(&self, key: &str, expected: &str, got: &Value) -> Error {
        Error::key(self.path, key, format!("expected {expected}, got {got}"))
    }
}
