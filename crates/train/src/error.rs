//! What can stop a run.

use std::path::PathBuf;

/// An error of the training loop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No row can be trained on.
    #[error("nothing to train on: {0}")]
    NoRows(String),
    /// The loss or a gradient is not finite.
    #[error(
        "step {step}: the {what} is {value}; rows {rows:?}; nothing of this step was applied; last good checkpoint: {checkpoint}"
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The rows of the step.
        rows: Vec<u64>,
        /// Where training can be taken up again.
        checkpoint: String,
    },
    /// A micro-batch does not fit into device memory.
    #[error(
        "{source}; the micro-batch has {tokens} tokens: lower train.tokens-per-batch (and data.max-length with it), or set train.on-oom = \"shrink\""
    )]
    OutOfMemory {
        /// What was asked for, what is free, what this process holds.
        source: Box<Self>,
        /// Tokens of the micro-batch.
        tokens: usize,
    },
    /// A checkpoint that cannot be read or does not belong to the run.
    #[error("checkpoint {path}: {reason}")]
    Checkpoint {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Another process works in the folder.
    #[error("{path}: in use by another run; wait for it to end or choose another name")]
    InUse {
        /// The lock file.
        path: PathBuf,
    },
    /// Settings of a source that cannot go together.
    #[error("{0}")]
    Mode(String),
    /// A row that the source cannot give.
    #[error("row {row}: {reason}")]
    Row {
        /// The row.
        row: u64,
        /// What is wrong.
        reason: String,
    },
    /// A file operation; the message names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The method.
    #[error(transparent)]
    Method(#[from] specforge_methods::Error),
    /// The target.
    #[error(transparent)]
    Target(#[from] specforge_models::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] specforge_store::Error),
    /// The engine.
    #[error(transparent)]
    Tensor(#[from] specforge_tensor::Error),
    /// Writing tensors.
    #[error(transparent)]
    Export(#[from] specforge_export::Error),
    /// Reading tensors.
    #[error(transparent)]
    Weights(#[from] specforge_nn::weights::Error),
    /// The optimizer's state.
    #[error(transparent)]
    Optimizer(#[from] specforge_nn::optimizer::Error),
    /// Decoding held-out prompts, or whatever else a hook does.
    #[error("{0}")]
    Hook(String),
}

/// The result of a call into the loop.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether device memory ran out.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Tensor(error) | Self::Method(specforge_methods::Error::Tensor(error)) => {
                error.is_out_of_memory()
            }
            _ => false,
        }
    }

    /// Says how large the micro-batch was that did not fit.
    pub(crate) fn of_batch(self, tokens: usize) -> Self {
        if self.is_out_of_memory() { Self::OutOfMemory { source: Box::new(self), tokens } } else { self }
    }
}
