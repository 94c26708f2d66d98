//! Draft methods, one file each.
//!
//! A method says what it records from the target ([`DraftMethod::capture`]), computes its loss on a packed
//! [`Batch`] ([`DraftMethod::loss`]) and proposes tokens while decoding ([`DraftMethod::drafter`]). It knows no
//! file, rank, device or feature source.
//!
//! To add a method: write its file (shape legend, `Config`, modules, numbered loss, drafter) and one line in
//! [`MethodConfig`].

mod batch;
pub mod eagle3;
mod ranks;
mod vocab;

pub use batch::{Batch, Loss, Metric, PendingLoss, Ratio, Teacher};
pub use ranks::{Counts, Exchange, Ranks, Sequence};
pub use vocab::VocabMap;

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use specforge_models::{Capture, TargetInfo};
use specforge_tensor::{Params, Tape, Tensor};

/// What can go wrong while a method is built or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that the target or another setting contradicts.
    #[error("method {method}: {key} = {got}: {reason}")]
    Config {
        /// The method.
        method: &'static str,
        /// The setting.
        key: String,
        /// Its value.
        got: String,
        /// Why it cannot be, and what could.
        reason: String,
    },
    /// A draft's configuration file lacks a key or has a wrong value there.
    #[error("draft config: {key}: {reason}")]
    DraftConfig {
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A weight that should be loaded has another shape, or is missing or unknown.
    #[error("draft weight {name}: {reason}")]
    Weight {
        /// The tensor.
        name: String,
        /// Expected and got.
        reason: String,
    },
    /// A batch that does not fit the method.
    #[error("batch: {0}")]
    Batch(String),
    /// The engine.
    #[error(transparent)]
    Tensor(#[from] specforge_tensor::Error),
    /// The target's description.
    #[error(transparent)]
    Target(#[from] specforge_models::Error),
    /// The rotary embedding's settings.
    #[error(transparent)]
    Rope(#[from] specforge_nn::rope::Error),
}

/// The result of a call into a method.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The `[method]` table of a recipe: one table named after the method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MethodConfig {
    /// EAGLE3 and EAGLE3.1: test-time training over three captured layers of the target.
    Eagle3(eagle3::Config),
}

/// The frozen parts of the target that a draft reads.
#[derive(Debug, Clone)]
pub struct Frozen {
    /// Token embeddings, `[V, Ht]`; a draft that shares them may read them from the host while it trains on a device.
    pub embedding: Tensor,
    /// The language-model head, `[V, Ht]`.
    pub head: Tensor,
}

impl MethodConfig {
    /// The method's name as recipes, checkpoints and reports write it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Eagle3(_) => eagle3::NAME,
        }
    }

    /// Refuses values that no target could make right.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Eagle3(config) => config.check(),
        }
    }

    /// What to record from the target.
    pub fn capture(&self, target: &TargetInfo) -> Result<Capture> {
        match self {
            Self::Eagle3(config) => config.capture(target),
        }
    }

    /// How many tokens the draft vocabulary keeps; `None` for all of the target's.
    pub fn draft_vocab_size(&self, target: &TargetInfo) -> Option<usize> {
        match self {
            Self::Eagle3(config) => config.draft_vocab_size.filter(|&n| n < target.vocab_size),
        }
    }

    /// Refuses settings of a draft for this target that so many ranks cannot share.
    pub fn check_shared(&self, target: &TargetInfo, ranks: Counts) -> Result<()> {
        match self {
            Self::Eagle3(config) => eagle3::Eagle3::check_shared(config, target, ranks),
        }
    }

    /// Builds the draft with fresh weights drawn from `seed`; `vocab` is absent where the draft keeps every token.
    pub fn build(
        &self,
        target: &TargetInfo,
        frozen: &Frozen,
        vocab: VocabMap,
        seed: u64,
    ) -> Result<(Box<dyn DraftMethod>, Params)> {
        self.build_on(&Ranks::default(), target, frozen, vocab, seed)
    }

    /// As [`MethodConfig::build`], for one of several ranks that share the work on a batch: the same weights as one would
    /// draw alone, of which it holds what [`specforge_tensor::Param::split`] says. The frozen parts are whole, or the
    /// rank's rows of them where the target is shared by the same ranks.
    pub fn build_on(
        &self,
        ranks: &Ranks,
        target: &TargetInfo,
        frozen: &Frozen,
        vocab: VocabMap,
        seed: u64,
    ) -> Result<(Box<dyn DraftMethod>, Params)> {
        match self {
            Self::Eagle3(config) => {
                let (method, params) = eagle3::Eagle3::new_on(ranks, config, target, frozen, vocab, seed)?;
                Ok((Box::new(method), params))
            }
        }
    }
}

/// A draft being trained or decoded with; its weights are kept apart, in a [`Params`].
pub trait DraftMethod: Debug + Send + Sync {
    /// What to record from the target: the single source of the feature store's schema and of batch checks.
    fn capture(&self) -> &Capture;

    /// Runs the draft on a packed batch and puts the loss on the tape.
    fn loss(&self, tape: &Tape<'_>, batch: &Batch) -> Result<PendingLoss>;

    /// Starts drafting for one sequence.
    fn drafter<'a>(&'a self, params: &'a Params) -> Result<Box<dyn Drafter + 'a>>;

    /// The draft's vocabulary.
    fn vocab(&self) -> &VocabMap;

    /// The keys of the exported `config.json` that the method decides, over those that follow the target.
    fn export_config(&self) -> BTreeMap<String, serde_json::Value>;
}

/// A draft decoding one sequence: committed tokens, and a tree of proposals on top of them.
pub trait Drafter: Debug {
    /// Takes up committed tokens: the captured states of n positions, `[n, A · Ht]`, and the token after each.
    /// Forgets all proposals. Returns the logits over the draft vocabulary for the token after those.
    fn commit(&mut self, hidden_states: &Tensor, next_tokens: &[u32]) -> Result<Vec<f32>>;

    /// Adds proposed tokens of one depth: `(token, parent)`, the parent a node added before or `None` for the
    /// committed tokens. Nodes are numbered from 0 in the order they are added. Returns each one's logits.
    fn expand(&mut self, nodes: &[(u32, Option<usize>)]) -> Result<Vec<Vec<f32>>>;
}
