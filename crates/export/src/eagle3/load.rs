//! Reading an EAGLE3 folder back: to evaluate it, or to go on training from it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use specforge_nn::weights::Weights;

use super::{Eagle3Config, canonical, slots, speculators};
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

/// Reads the EAGLE3 folder at `path`, written by us or by others: SpecForge, the EAGLE authors, speculators.
///
/// Every tensor that the configuration asks for has to be there in its shape, and no other may be:
/// a weight that is silently left out would make another draft of it.
pub fn read_eagle3(path: &Path) -> Result<Eagle3Folder> {
    let config_path = path.join(super::CONFIG_FILE);
    let config_json = speculators::flattened(&config_path, read_json(&config_path)?)?;
    let config = Eagle3Config::parse(&config_path, &config_json)?;
    let weights = open_weights(path)?;
    let mut names = canonical_names(&weights)?;
    let mut tensors = BTreeMap::new();
    for slot in slots(&config) {
        let name = names.remove(&slot.name);
        if name.is_none() && !slot.required {
            continue;
        }
        let view = weights.require(name.unwrap_or(&slot.name), &slot.shape)?;
        tensors.insert(slot.name.clone(), Tensor::from_view(&slot.name, view).into_owned());
    }
    if let Some(name) = names.values().next() {
        return Err(Error::tensor(name, format!("in {}: {}", path.display(), no_place(name))));
    }
    Ok(Eagle3Folder { config, config_json, tensors })
}

impl Eagle3Folder {
    /// What the draft computes otherwise than this program, as speculators can train it: weights that are good to begin
    /// with, but another model. Empty for most.
    pub fn departures(&self) -> Vec<&'static str> {
        let before_residual = self.config_json[speculators::NORM_BEFORE_RESIDUAL] == true;
        [
            (before_residual, "it norms before the residual (norm_before_residual)"),
            (self.config.norm_before_fc, "it norms the captured states together (norm_before_fc)"),
        ]
        .into_iter()
        .filter_map(|(departs, how)| departs.then_some(how))
        .collect()
    }

    /// How many tokens a query sees, itself included, if it was trained to see no more.
    pub fn window(&self) -> Option<u64> {
        let slides = self.config_json["layer_types"][0] == "sliding_attention";
        self.config_json["sliding_window"].as_u64().filter(|_| slides)
    }
}

/// The tensors of a draft by the names of our own files, where no `config.json` says which there have to be: a training
/// state of SpecForge, a single file.
pub fn read_eagle3_weights(path: &Path) -> Result<BTreeMap<String, Tensor<'static>>> {
    let state = path.join(STATE_FILE);
    let weights = if state.exists() { Weights::open(state)? } else { open_weights(path)? };
    let names = canonical_names(&weights)?;
    let tensor = |(canonical, name): (String, &str)| -> Option<(String, Tensor<'static>)> {
        let tensor = Tensor::from_view(&canonical, weights.get(name)?).into_owned();
        Some((canonical, tensor))
    };
    Ok(names.into_iter().filter_map(tensor).collect())
}

/// The draft's tensors: our name for each, and the file's.
fn canonical_names(weights: &Weights) -> Result<BTreeMap<String, &str>> {
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    for name in weights.names() {
        // Some files carry tables that a model computes itself, or parts of the target.
        if name.ends_with("rotary_emb.inv_freq") || name.starts_with(speculators::TARGET_PREFIX) {
            continue;
        }
        if let Some(twin) = names.insert(canonical(name), name) {
            return Err(Error::tensor(name, format!("is the same as {twin} under another name")));
        }
    }
    Ok(names)
}

/// Why a tensor is one too many.
fn no_place(name: &str) -> &'static str {
    if name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight") {
        return "queries and keys are normed, as in a layer of Qwen3; drafts here and in SGLang have a layer of Llama \
                (speculators: --draft-arch llama)";
    }
    "config.json has no place for it"
}

/// The weights as SGLang would find them: also a single file of another name.
pub(crate) fn open_weights(path: &Path) -> Result<Weights> {
    if path.is_file() {
        return Ok(Weights::open(path)?);
    }
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

/// Where SpecForge's trainer has the draft's weights.
const STATE_FILE: &str = "training_state.pt";
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
