//! What can be wrong with a checkpoint, and what to do about it.

use std::path::{Path, PathBuf};

/// The result of reading a checkpoint.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a checkpoint could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// A folder without safetensors weights.
    #[error("{path}: no model.safetensors and no model.safetensors.index.json in this folder ({hint})")]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// What was found instead and what to do.
        hint: String,
    },

    /// The file's beginning is not that of a safetensors file.
    #[error("{path}: not a safetensors file: {why}; {hint}")]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
        /// What to do.
        hint: &'static str,
    },

    /// A file of PyTorch that is damaged, or that holds more than data.
    #[error("{path}: {why}; {hint}")]
    Torch {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
        /// What to do.
        hint: &'static str,
    },

    /// The file has more or fewer bytes than its header describes.
    #[error("{path}: {got} bytes, but its header describes {expected}; {}", size_hint(*expected, *got))]
    Size {
        /// The file.
        path: PathBuf,
        /// The length the header describes, in bytes.
        expected: u64,
        /// The file's length, in bytes.
        got: u64,
    },

    /// A header entry that contradicts itself or its neighbours.
    #[error("{path}: tensor {tensor}: {why}; the file is damaged or was written wrongly, download it again")]
    Entry {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Expected and got.
        why: String,
    },

    /// A shard index that does not fit the files.
    #[error("{path}: {why}; download the folder again")]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },

    /// A tensor that should exist does not.
    #[error("tensor {tensor} is missing in {searched}{}", nearest_hint(nearest.as_deref()))]
    Missing {
        /// The tensor.
        tensor: String,
        /// The most similar name there is, if one is similar.
        nearest: Option<String>,
        /// The files searched, as text.
        searched: String,
    },

    /// A tensor of another shape than the model needs.
    #[error(
        "{path}: tensor {tensor} has shape {got:?}, expected {expected:?}; config.json and weights do not belong together"
    )]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape the model needs.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
}

impl Error {
    pub(super) fn no_weights(folder: &Path) -> Self {
        let mut others: Vec<String> = std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| {
                [".bin", ".pt", ".pth", ".gguf", ".safetensors"].iter().any(|end| name.ends_with(end))
            })
            .collect();
        others.sort();
        let hint = match others.first() {
            None => "is it the right folder, and is the download complete?".to_owned(),
            Some(file) if file.ends_with(".safetensors") => {
                format!("it has {file}: give that file's path, or rename it to model.safetensors")
            }
            Some(file) => format!("it has {file}: convert the weights to safetensors first"),
        };
        Self::NoWeights { path: folder.to_path_buf(), hint }
    }

    pub(super) fn index(path: &Path, why: String) -> Self {
        Self::Index { path: path.to_path_buf(), why }
    }

    pub(super) fn missing_shards(index: &Path, first: &Path, missing: usize, all: usize) -> Self {
        Self::index(
            index,
            format!("{missing} of the {all} files it names are missing, {} first", first.display()),
        )
    }

    pub(super) fn missing(tensor: &str, nearest: Option<String>, searched: &[PathBuf]) -> Self {
        let searched = match searched {
            [one] => one.display().to_string(),
            [first, .., last] => {
                format!("{} .. {} ({} files)", first.display(), last.display(), searched.len())
            }
            [] => "no file".to_owned(),
        };
        Self::Missing { tensor: tensor.to_owned(), nearest, searched }
    }

    pub(super) fn entry(path: &Path, tensor: &str, why: String) -> Self {
        Self::Entry { path: path.to_path_buf(), tensor: tensor.to_owned(), why }
    }
}

fn size_hint(expected: u64, got: u64) -> &'static str {
    if got < expected {
        "the file is cut off, download it again"
    } else {
        "the file is damaged, download it again"
    }
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(
        || "; no name there is similar: is it the right model?".to_owned(),
        |name| format!("; the nearest name there is {name}"),
    )
}
