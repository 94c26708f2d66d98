//! What can be wrong with a target folder or with what a target is asked.

use std::path::PathBuf;

/// The result of a call into this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a target.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be read; the message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A configuration file that is not what it should be; the message names the key where one is at fault.
    #[error("{path}: {why}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// An architecture that is not known.
    #[error("{path}: architecture {got} is not known; known are {known}{}", nearest_hint(nearest.as_deref()))]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The architecture.
        got: String,
        /// Those known.
        known: String,
        /// The known one whose name is most similar, if one is similar.
        nearest: Option<String>,
    },
    /// A setting that is not supported, or that contradicts another.
    #[error("{path}: {key} = {got}: {why}")]
    Setting {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value as JSON; `null` where it is missing.
        got: String,
        /// Why it cannot be, and what could.
        why: String,
    },
    /// The settings of the rotary embedding.
    #[error("{path}: {source}")]
    Rope {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        source: specforge_nn::rope::Error,
    },
    /// A tensor of an element type that weights do not have.
    #[error(
        "{path}: tensor {tensor} is {got}, expected F32, BF16 or F16; use an unquantised checkpoint of the model"
    )]
    WeightType {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        got: String,
    },
    /// Layers that cannot be captured.
    #[error("capture of layers {layers:?} in a model of {n_layers} layers: {why}")]
    Capture {
        /// The layers asked for.
        layers: Vec<usize>,
        /// Layers there are.
        n_layers: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A token that the vocabulary does not have.
    #[error(
        "document {document}: token {token} at {at} is outside the vocabulary of {vocab_size}; were the ids made with another tokenizer?"
    )]
    Token {
        /// The document's number in the batch.
        document: usize,
        /// The position in it.
        at: usize,
        /// The token id.
        token: u32,
        /// The vocabulary.
        vocab_size: usize,
    },
    /// A document without tokens, or longer than the model's positions.
    #[error(
        "document {document} has {len} tokens, expected 1 to {max} (max_position_embeddings); truncate it"
    )]
    Length {
        /// The document's number in the batch.
        document: usize,
        /// Its length.
        len: usize,
        /// The model's positions.
        max: usize,
    },
    /// A cache that has no room, or that is asked for something it does not hold.
    #[error("key-value cache: {0}")]
    Cache(String),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] specforge_nn::weights::Error),
    /// The engine.
    #[error(transparent)]
    Tensor(#[from] specforge_tensor::Error),
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; the nearest is {name}"))
}
