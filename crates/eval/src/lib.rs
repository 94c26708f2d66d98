//! Speculative decoding and acceptance length.
//!
//! [`evaluate`] decodes prompts with a target and a draft as a serving engine would: the draft proposes a chain or
//! a tree of tokens ([`propose`]), the target checks all of them in one forward pass ([`verify`]), the accepted
//! ones are kept and the draft takes up the target's fresh states of them ([`speculate`]). What comes out is
//! the target's own text: token for token when greedy, exactly its distribution when sampled.

mod decode;
mod distribution;
mod evaluate;
mod options;
pub mod propose;
mod report;
pub mod verify;

pub use decode::{Generated, Stop, plain, speculate};
pub use evaluate::{difference, evaluate};
pub use options::{Options, Sampling, Speculation};
pub use report::{Difference, Mode, PromptResult, Report};

/// What can go wrong while a draft is evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing to decode.
    #[error("no prompts: acceptance is measured by decoding at least one")]
    NoPrompts,
    /// A prompt that cannot be decoded; prompts are numbered from 0.
    #[error("prompt {prompt}: {reason}")]
    Prompt {
        /// The prompt's number.
        prompt: usize,
        /// What is wrong, and what would do.
        reason: String,
    },
    /// A setting of [`Options`] that cannot be.
    #[error("{key} = {got}: {reason}")]
    Options {
        /// The setting.
        key: &'static str,
        /// Its value.
        got: String,
        /// What would do.
        reason: String,
    },
    /// Logits from which no token can be chosen.
    #[error(
        "the {model}'s logits are not finite (token {token} has {value}): its weights or states are damaged"
    )]
    NonFinite {
        /// `target` or `draft`.
        model: &'static str,
        /// The first such token, an id of that model's vocabulary.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// A draft that breaks its contract.
    #[error("draft: {what}: expected {expected}, got {got}")]
    Draft {
        /// What is wrong.
        what: &'static str,
        /// The number that was needed.
        expected: usize,
        /// The number that came.
        got: usize,
    },
    /// A draft made for another target.
    #[error(
        "the draft's vocabulary names token {token}, the target has {vocab_size}: they do not belong together"
    )]
    Vocabulary {
        /// The largest token the draft can name.
        token: u32,
        /// The target's vocabulary.
        vocab_size: usize,
    },
    /// The draft.
    #[error(transparent)]
    Method(Box<specforge_methods::Error>),
    /// The target.
    #[error(transparent)]
    Target(Box<specforge_models::Error>),
    /// The engine.
    #[error(transparent)]
    Tensor(#[from] specforge_tensor::Error),
}

/// The result of an evaluation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<specforge_methods::Error> for Error {
    fn from(error: specforge_methods::Error) -> Self {
        Self::Method(Box::new(error))
    }
}

impl From<specforge_models::Error> for Error {
    fn from(error: specforge_models::Error) -> Self {
        Self::Target(Box::new(error))
    }
}
