//! The serving folder of an EAGLE3 or EAGLE3.1 draft: `config.json` and `model.safetensors`, nothing else.
//!
//! ```text
//! H hidden size   T target hidden size   A captured states   V, Vd target and draft vocabulary
//! fc.weight [H, A*T]   midlayer.* (one Llama layer whose q, k, v read [embedding ; hidden], 2H wide)
//! norm.weight [H]   lm_head.weight [Vd, H]   d2t [Vd] I64: target id - draft id   t2d [V] BOOL
//! EAGLE3.1: fc_norm.{0..A}.weight [T]   optional: embed_tokens.weight [V, H]
//! ```
//! The names are those of the EAGLE authors' code, which SGLang, vLLM and that code itself all load.

mod config;
mod load;
mod slots;
mod speculators;

use std::path::Path;

use serde_json::Value;
use specforge_nn::weights::Dtype;

use crate::check::{self, Problem, Severity};
use crate::error::{Error, Result};
use crate::target::{TargetConfig, read_json};
use crate::tensor::Tensor;
use crate::{folder, json, safetensors};

pub use config::Eagle3Config;
pub use load::{Eagle3Folder, read_eagle3, read_eagle3_weights};

pub(crate) use config::IDS;
pub(crate) use load::{INDEX_FILE, SINGLE_FILE, open_weights, safetensors_names};
pub(crate) use slots::{Kind, Slot, canonical, slots};

/// A draft, ready to be written.
#[derive(Debug)]
pub struct Eagle3Export<'a> {
    /// Sizes and flags of the draft.
    pub config: Eagle3Config,
    /// The parameters (F32 or BF16), `d2t` (I64) and `t2d` (BOOL); of `layers.0.*` and `midlayer.*` either.
    pub tensors: Vec<Tensor<'a>>,
    /// The target's `config.json`.
    pub target: &'a Value,
}

/// How a folder is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Replace whatever is in the folder.
    pub overwrite: bool,
    /// Keep `embed_tokens.weight`, which SGLang takes from the target. (It is always kept when the draft
    /// and the target differ in width, because the target's would not fit.)
    pub with_embeddings: bool,
}

impl<'a> Eagle3Export<'a> {
    /// The `config.json` of the folder.
    pub fn config_json(&self) -> Result<Value> {
        self.config.to_json(&self.target_config()?)
    }

    /// Writes the folder, all or nothing, after checking that an engine will serve exactly this draft.
    ///
    /// Floats become BF16. With the whole vocabulary (`Vd = V`) no map is written, as vLLM requires.
    /// A folder with something in it is replaced only if it is an earlier export, or with `overwrite`.
    /// Returns the warnings of the check.
    pub fn write(self, path: &Path, options: WriteOptions) -> Result<Vec<Problem>> {
        if !options.overwrite {
            refuse_to_replace(path)?;
        }
        let config = json::to_json_text(&self.config_json()?);
        let (target, target_path) = (self.target_config()?, Path::new(TARGET));
        let tensors = self.tensors_to_write(options.with_embeddings)?;
        let mut warnings = Vec::new();
        folder::replace_folder(path, |new| {
            safetensors::write_safetensors(&new.join(SINGLE_FILE), &tensors)?;
            folder::write_file(&new.join(CONFIG_FILE), config.len() as u64, |out| {
                out.write_all(config.as_bytes())
            })?;
            let report = check::check_against(new, Some((target_path, &target)));
            let (errors, others) =
                report.problems.into_iter().partition(|problem| problem.severity == Severity::Error);
            warnings = others;
            if Vec::is_empty(&errors) {
                Ok(())
            } else {
                Err(Error::Rejected { path: path.to_path_buf(), problems: errors })
            }
        })?;
        Ok(warnings)
    }

    fn target_config(&self) -> Result<TargetConfig> {
        TargetConfig::parse(Path::new(TARGET), self.target)
    }

    /// The tensors under their names in the file, floats in BF16.
    fn tensors_to_write(self, with_embeddings: bool) -> Result<Vec<Tensor<'a>>> {
        let Eagle3Config { vocab_size, draft_vocab_size, hidden_size, target_hidden_size, .. } = self.config;
        let keep_embeddings = with_embeddings || hidden_size != target_hidden_size;
        let whole_vocabulary = vocab_size == draft_vocab_size;
        let mut tensors = Vec::new();
        for mut tensor in self.tensors {
            tensor.name = canonical(&tensor.name);
            match tensor.name.as_str() {
                "embed_tokens.weight" if !keep_embeddings => {}
                "d2t" if whole_vocabulary => expect_identity(&tensor)?,
                "t2d" if whole_vocabulary => {}
                _ => tensors.push(tensor.floats_to_bf16()),
            }
        }
        if keep_embeddings && !tensors.iter().any(|tensor| tensor.name == "embed_tokens.weight") {
            return Err(Error::tensor("embed_tokens.weight", "is to be written, but the draft has none"));
        }
        Ok(tensors)
    }
}

/// Whether the folder holds exactly what [`Eagle3Export::write`] writes, and says so itself.
pub fn is_earlier_export(path: &Path) -> Result<bool> {
    if folder::names(path)? != [CONFIG_FILE, SINGLE_FILE] {
        return Ok(false);
    }
    Ok(read_json(&path.join(CONFIG_FILE)).is_ok_and(|config| config.get(MARK).is_some()))
}

/// The key of `config.json` that says who wrote it; engines ignore it.
const MARK: &str = "specforge_version";
const CONFIG_FILE: &str = "config.json";
/// What the target's file is called in messages.
const TARGET: &str = "the target's config.json";

fn refuse_to_replace(path: &Path) -> Result<()> {
    if path.exists() && !path.is_dir() {
        let hint = "give a folder";
        return Err(Error::Occupied { path: path.to_path_buf(), why: "it is a file".to_owned(), hint });
    }
    let names = folder::names(path)?;
    let Some(first) = names.first() else { return Ok(()) };
    if is_earlier_export(path)? {
        return Ok(());
    }
    let why = format!(
        "the folder is not empty (it has {first}{}) and not an earlier export",
        more(names.len() - 1)
    );
    Err(Error::Occupied {
        path: path.to_path_buf(),
        why,
        hint: "choose another folder, or allow to overwrite it",
    })
}

fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" and {others} more") }
}

fn expect_identity(d2t: &Tensor<'_>) -> Result<()> {
    if d2t.dtype == Dtype::I64 && d2t.bytes.iter().any(|&byte| byte != 0) {
        return Err(Error::tensor("d2t", "has to be all zeros when the draft has the whole vocabulary"));
    }
    Ok(())
}
