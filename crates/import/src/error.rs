//! What can be wrong with a file of features.

use std::path::{Path, PathBuf};

use specforge_nn::weights;

/// The result of reading features.
pub type Result<T> = std::result::Result<T, Error>;

/// Why features could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// The file's container could not be read.
    #[error(transparent)]
    Weights(#[from] weights::Error),

    /// A folder without features.
    #[error(
        "{path}: no features in this folder or below: expected data_*.ckpt or .ckpt.gz (SpecForge), hs_*.safetensors or \
         data_*.pt (speculators)"
    )]
    NoFiles {
        /// The folder.
        path: PathBuf,
    },

    /// A file that is no file of features, or not of this target.
    #[error("{path}: {why}")]
    Features {
        /// The file.
        path: PathBuf,
        /// Expected and got.
        why: String,
    },
}

impl Error {
    pub(crate) fn features(path: &Path, why: impl Into<String>) -> Self {
        Self::Features { path: path.to_path_buf(), why: why.into() }
    }
}
