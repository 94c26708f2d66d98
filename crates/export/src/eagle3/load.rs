//! Reading an EAGLE3 folder back: to evaluate it, or to go on training from it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use specforge_nn::weights::Weights;

use super::{Eagle3Config, canonical, slots};
use crate::error::{Error, Result};
use crate::folder;
use crate::target::read_json;
use crate::tensor::Tensor;

/// An EAGLE3 draft as found in a folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Eagle3Folder {
    /// What its `config.json` says.
    pub config: Eagle3Config,
    /// The whole `config.json`.
    pub config_json: Value,
    /// Tensors by the names of our own files (`midlayer.*`), in the types of the file.
    pub tensors: BTreeMap<String, Tensor<'static>>,
}

/// Reads the EAGLE3 folder at `path`, written by us or by others.
///
/// Every tensor that the configuration asks for has to be there in its shape, and no other may be:
/// a weight that is silently left out would make another draft of it.
pub fn read_eagle3(path: &Path) -> Result<Eagle3Folder> {
    let config_path = path.join(super::CONFIG_FILE);
    let config_json = read_json(&config_path)?;
    let config = Eagle3Config::parse(&config_path, &config_json)?;
    let weights = open_weights(path)?;
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    for name in weights.names() {
        if let Some(twin) = names.insert(canonical(name), name) {
            return Err(Error::tensor(name, format!("is the same as {twin} under another name")));
        }
    }
    let mut tensors = BTreeMap::new();
    for slot in slots(&config) {
        let name = names.remove(&slot.name);
        if name.is_none() && !slot.required {
            continue;
        }
        let view = weights.require(name.unwrap_or(&slot.name), &slot.shape)?;
        tensors.insert(slot.name.clone(), Tensor::from_view(&slot.name, view).into_owned());
    }
    // Some files carry tables that a model computes itself.
    names.retain(|_, name| !name.ends_with("rotary_emb.inv_freq"));
    if let Some(name) = names.values().next() {
        return Err(Error::tensor(name, format!("in {}: config.json has no place for it", path.display())));
    }
    Ok(Eagle3Folder { config, config_json, tensors })
}

/// The weights as SGLang would find them: also a single file of another name.
pub(crate) fn open_weights(path: &Path) -> Result<Weights> {
    let files = safetensors_names(path)?;
    let has_usual_name = path.join(SINGLE_FILE).exists() || path.join(INDEX_FILE).exists();
    match &files[..] {
        [only] if !has_usual_name => Ok(Weights::open(path.join(only))?),
        _ => Ok(Weights::open(path)?),
    }
}

/// The names of the safetensors files in a folder, sorted.
pub(crate) fn safetensors_names(path: &Path) -> Result<Vec<String>> {
    let mut names = folder::names(path)?;
    names.retain(|name| name.ends_with(".safetensors"));
    Ok(names)
}

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
