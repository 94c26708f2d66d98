//! What a repository has, and which of it a model needs.

use super::id::is_commit;
use super::{Hub, Kind, RepoId};
use crate::http::{self, header};
use crate::{Error, Result};

/// The files of a repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

impl Hub {
    /// Asks the hub for a revision.
    pub(super) fn listing(&self, id: &RepoId) -> Result<Listing> {
        let revision = id.revision().replace('/', "%2F");
        let url = format!("{}/api/{}/revision/{revision}", self.endpoint, id.api_path());
        let response = self.http.get(&url, &[])?;
        let code = header(response.headers(), "x-error-code").map(str::to_owned);
        let answer = http::json(&url, response).map_err(|error| self.explain(id, error, code.as_deref()))?;
        let commit = answer["sha"].as_str().filter(|sha| is_commit(sha));
        let files = answer["siblings"].as_array();
        let (Some(commit), Some(files)) = (commit, files) else {
            let why = format!("expected sha and siblings, got {}", http::excerpt(&answer.to_string()));
            return Err(Error::Malformed { url, why });
        };
        let names = files.iter().filter_map(|file| file["rfilename"].as_str());
        let files = if id.kind() == Kind::Dataset { rows(names, id.part()) } else { needed(names) };
        Ok(Listing { commit: commit.to_owned(), files })
    }
}

/// Files that are read, if a repository has them.
const READ: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "training_state.pt",
];

/// Files of a dataset that hold rows, wherever they are in it, or in a part of it: a file, a folder or a pattern.
fn rows<'a>(names: impl Iterator<Item = &'a str>, part: Option<&str>) -> Vec<String> {
    let pattern = part.and_then(|part| glob::Pattern::new(part).ok());
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::default() };
    let meant = |name: &&str| {
        let Some(part) = part else { return true };
        let below = name.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        below || pattern.as_ref().is_some_and(|pattern| pattern.matches_with(name, options))
    };
    let of_rows = |name: &&str| {
        let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        [".jsonl", ".json", ".ndjson", ".parquet"].iter().any(|end| name.ends_with(end))
    };
    let inside = |name: &&str| {
        !name.starts_with('/')
            && !name.contains('\\')
            && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
    };
    names.filter(inside).filter(of_rows).filter(meant).map(str::to_owned).collect()
}

/// The files of a model: configuration, tokenizer, template, safetensors. Other forms of the same weights are left out;
/// PyTorch's is taken only where there is no other.
fn needed<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    // Nothing that leads out of the folder, and nothing in folders: those hold other forms of the weights.
    let names: Vec<&str> = names.filter(|name| !name.is_empty() && !name.contains(['/', '\\'])).collect();
    let usual = |name: &&&str| name.ends_with(".safetensors") && !name.starts_with("consolidated");
    let any = |name: &&&str| name.ends_with(".safetensors");
    let mut weights: Vec<&&str> = names.iter().filter(usual).collect();
    if weights.is_empty() {
        weights = names.iter().filter(any).collect();
    }
    if weights.is_empty() {
        weights = names.iter().filter(|name| **name == "pytorch_model.bin").collect();
    }
    let read = names.iter().filter(|name| READ.contains(*name));
    let mut files: Vec<String> = read.chain(weights).map(|name| (*name).to_owned()).collect();
    files.sort();
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::{needed, rows};

    #[test]
    fn rows_of_a_dataset_stay_inside_of_it() {
        let names = [
            "README.md",
            "data/train-0.parquet",
            "a.jsonl.gz",
            "../x.jsonl",
            "/y.json",
            "b/./c.json",
            "d.arrow",
        ];
        assert_eq!(rows(names.into_iter(), None), ["data/train-0.parquet", "a.jsonl.gz"]);
        for part in ["data", "data/train-0.parquet", "data/*.parquet", "**/train-*"] {
            assert_eq!(rows(names.into_iter(), Some(part)), ["data/train-0.parquet"], "{part}");
        }
        for part in ["dat", "*.parquet", "test", "../x.jsonl"] {
            assert!(rows(names.into_iter(), Some(part)).is_empty(), "{part}");
        }
    }

    #[test]
    fn only_what_is_read_is_taken() {
        let of = |names: &[&str]| needed(names.iter().copied()).join(" ");
        assert_eq!(
            of(&[
                "README.md",
                "config.json",
                "consolidated.safetensors",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "original/consolidated.00.pth",
                "pytorch_model.bin",
                "model.gguf",
                "tokenizer.json",
                "chat_template.jinja",
                "../evil.safetensors",
                "onnx/model.safetensors",
            ]),
            "chat_template.jinja config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors \
             model.safetensors.index.json tokenizer.json"
        );
        assert_eq!(
            of(&["config.json", "pytorch_model.bin", "flax_model.msgpack"]),
            "config.json pytorch_model.bin"
        );
        assert_eq!(of(&["consolidated.safetensors"]), "consolidated.safetensors");
    }
}
