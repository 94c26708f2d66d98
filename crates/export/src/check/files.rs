//! Which files of a folder an engine would read.
//!
//! SGLang reads every safetensors file there is, or, if there is an index, exactly those that it names.

use std::path::Path;

use serde_json::Value;

use super::Problem;
use crate::eagle3::{INDEX_FILE, SINGLE_FILE, safetensors_names};
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
        _ => files.iter().filter(|file| *file != SINGLE_FILE).map(|file| stray(file)).collect(),
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

fn stray(file: &str) -> Problem {
    let what = "it lies beside other weights without an index, and SGLang loads the tensors of all of them";
    Problem::error(file, what, format!("leave only {SINGLE_FILE}, or add an index"))
}

fn unusual_name(file: &str) -> Problem {
    Problem::warning(file, "SGLang finds it, but other engines look for model.safetensors", "rename it")
}
