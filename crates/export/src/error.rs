//! What can go wrong with a serving folder.

use std::path::{Path, PathBuf};

use specforge_nn::weights;

use crate::check::Problem;

/// The result of reading or writing a serving folder.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a serving folder could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// The tensor files could not be read.
    #[error(transparent)]
    Weights(#[from] weights::Error),

    /// The file system is full.
    #[error(
        "{path}: no space left on the device for a file of {needed} bytes; free some, or write to another disk"
    )]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// The file's size in bytes.
        needed: u64,
    },

    /// A file that should be JSON is not.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },

    /// A key of a `config.json` that is missing or has the wrong value.
    #[error("{path}: key {key}: {why}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Expected and got.
        why: String,
    },

    /// Capture layers that the serving engine cannot record.
    #[error("capture layers {layers:?} cannot be served: {why}")]
    CaptureLayers {
        /// 0-based layers whose outputs are captured.
        layers: Vec<usize>,
        /// The rule they break and what to do.
        why: String,
    },

    /// Tensors that do not make up the file to be written.
    #[error("tensor {tensor}: {why}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Expected and got.
        why: String,
    },

    /// An output folder that must not be replaced.
    #[error("{path}: {why}; {hint}")]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What is in it.
        why: String,
        /// What to do.
        hint: &'static str,
    },

    /// A draft that no engine would serve correctly; nothing was written.
    #[error("{path}: the draft cannot be served, nothing was written:{}", list(problems))]
    Rejected {
        /// The output folder.
        path: PathBuf,
        /// What is wrong.
        problems: Vec<Problem>,
    },
}

impl Error {
    pub(crate) fn key(path: &Path, key: &str, why: impl Into<String>) -> Self {
        Self::Key { path: path.to_path_buf(), key: key.to_owned(), why: why.into() }
    }

    pub(crate) fn tensor(tensor: &str, why: impl Into<String>) -> Self {
        Self::Tensor { tensor: tensor.to_owned(), why: why.into() }
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().fold(String::new(), |list, problem| list + "\n  " + &problem.to_string())
}
