//! Reading typed settings out of `config.json`, and those that several architectures share.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result, TargetInfo};

/// The settings that `T` declares; other keys are passed over. Errors name the file and the key.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, config: &Value) -> Result<T> {
    serde_path_to_error::deserialize(config).map_err(|error| {
        let why = match error.path().to_string() {
            key if key == "." => error.inner().to_string(),
            key => format!("{key}: {}", error.inner()),
        };
        Error::Config { path: path.to_path_buf(), why }
    })
}

/// The JSON file at `path`.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = fs_err::read(path)?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::Config { path: path.to_path_buf(), why: format!("not JSON: {error}") })
}

/// The most layers that a target may have; the largest published models have some 130.
pub(crate) const MOST_LAYERS: u64 = 1024;

/// The number of layers for what is written down layer by layer: never so many that a wrong number fills the memory.
pub(crate) fn n_layers(config: &Value) -> u64 {
    config["num_hidden_layers"].as_u64().unwrap_or(0).min(MOST_LAYERS + 1)
}

/// A configuration with what it leaves out taken from `defaults`.
pub(crate) fn with_defaults(mut config: Value, defaults: &Value) -> Value {
    for (key, value) in defaults.as_object().into_iter().flatten() {
        if config[key].is_null() {
            config[key] = value.clone();
        }
    }
    config
}

/// The configuration of a model with several towers as that of its language model: the keys of `text_config` go to the
/// top, but for those that name the whole model.
pub(crate) fn flattened(mut config: Value) -> Value {
    for (key, value) in config["text_config"].take().as_object().into_iter().flatten() {
        let is_of_whole = ["architectures", "model_type", "eos_token_id"].contains(&key.as_str());
        if !is_of_whole || config[key].is_null() {
            config[key] = value.clone();
        }
    }
    config
}

/// A number that has several names: the first key that is given, and its value. All that are given have to agree.
pub(crate) fn count<'k>(info: &TargetInfo, keys: &[&'k str]) -> Result<(&'k str, usize)> {
    let mut given = keys.iter().copied().filter(|key| !info.raw[*key].is_null());
    let Some(key) = given.next() else {
        return Err(info.wrong(keys[0], format!("expected a number under one of {}", keys.join(", "))));
    };
    let Some(n) = info.raw[key].as_u64().filter(|n| *n > 0) else {
        return Err(info.wrong(key, "expected a number of at least 1"));
    };
    match given.find(|other| info.raw[*other] != info.raw[key]) {
        Some(other) => Err(info.wrong(other, format!("but {key} = {n}: which is it?"))),
        None => Ok((key, n as usize)),
    }
}

/// The nearest bfloat16.
pub(crate) fn bf16_rounded(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

/// The sliding window of families that have one in every layer, where it is set.
pub(crate) fn window_everywhere(info: &TargetInfo) -> Result<Option<usize>> {
    #[derive(Deserialize)]
    struct Config {
        sliding_window: Option<usize>,
    }
    let Config { sliding_window } = parse(&info.path, &info.raw)?;
    match sliding_window {
        Some(0) => Err(info.wrong("sliding_window", "expected at least 1")),
        window => Ok(window),
    }
}

/// Sliding windows as several families declare them.
#[derive(Debug, Deserialize)]
pub(crate) struct Windows {
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    /// Layers from this one on have the window, where `layer_types` is missing.
    #[serde(default = "default_max_window_layers")]
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
}

fn default_max_window_layers() -> usize {
    28
}

impl Windows {
    /// Per layer, how many keys a query sees, itself included; `None` for all before it.
    pub(crate) fn per_layer(&self, info: &TargetInfo) -> Result<Vec<Option<usize>>> {
        let Some(window) = self.sliding_window.filter(|_| self.use_sliding_window) else {
            return Ok(vec![None; info.n_layers]);
        };
        if window == 0 {
            return Err(info.wrong("sliding_window", "expected at least 1"));
        }
        let Some(types) = &self.layer_types else {
            return Ok((0..info.n_layers).map(|i| (i >= self.max_window_layers).then_some(window)).collect());
        };
        if types.len() != info.n_layers {
            return Err(info.wrong("layer_types", format!("expected {} entries", info.n_layers)));
        }
        let per_type = types.iter().map(|layer_type| match layer_type.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(Some(window)),
            _ => Err(info.wrong("layer_types", "expected full_attention and sliding_attention only")),
        });
        per_type.collect()
    }
}
