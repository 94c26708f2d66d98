//! Which files of a folder an engine would read.
//!
//! SGLang reads every safetensors file there is, or, if there is an index, exactly those that it names.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use specforge_nn::weights::{self, Weights};

use super::Problem;
use crate::eagle3::{INDEX_FILE, SINGLE_FILE, canonical, safetensors_names};
use crate::target::read_json;

/// What is wrong with the list of files.
pub(super) fn problems(folder: &Path) -> Vec<Problem> {
    // A folder that cannot be listed is reported where its files are opened.
    let Ok(files) = safetensors_names(folder) else { return Vec::new() };
    let index = folder.join(INDEX_FILE);
    if index.exists() {
        let indexed = read_json(&index).map(|index| named_files(&index)).unwrap_or_default();
        return with_index(&files, &indexed);
    }
    match &files[..] {
        [] | [_] => files.iter().filter(|file| *file != SINGLE_FILE).map(|file| unusual_name(file)).collect(),
        _ => files.iter().filter(|file| *file != SINGLE_FILE).map(|file| stray(folder, file)).collect(),
    }
}

fn named_files(index: &Value) -> Vec<String> {
    let map = index.get("weight_map").and_then(Value::as_object);
    map.into_iter().flat_map(|map| map.values()).filter_map(|file| file.as_str().map(str::to_owned)).collect()
}

fn with_index(files: &[String], indexed: &[String]) -> Vec<Problem> {
    let unused = files.iter().filter(|file| !indexed.contains(file));
    unused
        .map(|file| {
            let what = format!("{INDEX_FILE} does not name it, so that SGLang does not read it");
            if file == SINGLE_FILE {
                Problem::error(
                    file,
                    format!("{what}, while others read it first"),
                    "remove the index, or this file",
                )
            } else {
                Problem::warning(file, what, "remove it")
            }
        })
        .collect()
}

/// A file that SGLang loads on top of `model.safetensors`, because no index says otherwise.
fn stray(folder: &Path, file: &str) -> Problem {
    let fix = "remove it";
    match tensor_in_both(folder, file) {
        Ok(None) => Problem::warning(file, "SGLang reads it as well, and has no use for its tensors", fix),
        Ok(Some(name)) => Problem::error(
            file,
            format!("SGLang reads it as well, and takes {name} from one file or the other"),
            fix,
        ),
        Err(error) => Problem::error(file, format!("SGLang reads it as well, and fails: {error}"), fix),
    }
}

/// A tensor of `file` that is also in `model.safetensors`, or would be taken for the vocabulary map.
fn tensor_in_both(folder: &Path, file: &str) -> weights::Result<Option<String>> {
    let main = Weights::open(folder.join(SINGLE_FILE))?;
    let main: BTreeSet<String> = main.names().map(canonical).collect();
    let other = Weights::open(folder.join(file))?;
    Ok(other.names().find(|name| main.contains(&canonical(name)) || name.contains("d2t")).map(str::to_owned))
}

fn unusual_name(file: &str) -> Problem {
    Problem::warning(file, "SGLang finds it, but other engines look for model.safetensors", "rename it")
}
