//! The `[method.eagle3]` table of a recipe.

use serde::{Deserialize, Serialize};
use specforge_models::{Capture, TargetInfo};
use specforge_tensor::Objective;

use super::NAME;
use crate::{Error, Result};

/// The `[method.eagle3]` table of a recipe. Sizes left out follow the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Test-time-training steps: how many tokens ahead the draft learns to run on its own outputs.
    pub ttt_steps: usize,
    /// Weight of step i: `step-decay^i`.
    pub step_decay: f64,
    /// What is minimised: `kl`, `lk-alpha` or `lk-lambda`.
    pub objective: ObjectiveName,
    /// `lk-lambda`: factor of the KL weight.
    pub kl_scale: f64,
    /// `lk-lambda`: how fast the KL weight falls as acceptance rises.
    pub kl_decay: f64,
    /// Which rows carry loss: `aligned` (rows whose input token is supervised, as at serving) or `specforge`
    /// (shifted back by one token, as SpecForge and the authors' code have it).
    pub loss_mask: LossMask,
    /// What a row's loss is divided by: `sequence` (all tokens of its document, so each document counts equally, as
    /// SpecForge has it for one document a batch) or `supervised` (all supervised tokens count equally).
    pub normalization: Normalization,
    /// Tokens the draft's head can name; absent or the target's size: all of them.
    pub draft_vocab_size: Option<usize>,
    /// Width H; absent: the target's. A draft of another width cannot share the target's embedding and trains its own.
    pub hidden_size: Option<usize>,
    /// Width of the MLP; absent: the target's.
    pub intermediate_size: Option<usize>,
    /// Query heads; absent: the target's.
    pub num_attention_heads: Option<usize>,
    /// Key-value heads; absent: the target's.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; absent: the target's.
    pub head_dim: Option<usize>,
    /// Layers whose outputs are captured (0-based, ascending); absent: `[1, n/2-1, n-4]`.
    pub capture_layers: Option<Vec<usize>>,
    /// EAGLE3.1: norm every captured state before `fc`.
    pub fc_norm: bool,
    /// EAGLE3.1: feed the normed state to the next step.
    pub norm_output: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
}

/// Names of the objectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectiveName {
    /// Cross-entropy against the target's distribution.
    Kl,
    /// Minus the log of the acceptance probability.
    LkAlpha,
    /// KL and acceptance, weighed by how high the acceptance is.
    LkLambda,
}

/// Which rows carry loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossMask {
    /// The row's input token is supervised.
    Aligned,
    /// The token before it is.
    Specforge,
}

/// What a row's loss is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalization {
    /// All tokens of its document.
    Sequence,
    /// All supervised tokens.
    Supervised,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttt_steps: 7,
            step_decay: 0.8,
            objective: ObjectiveName::Kl,
            kl_scale: 1.0,
            kl_decay: 1.0,
            loss_mask: LossMask::Aligned,
            normalization: Normalization::Sequence,
            draft_vocab_size: None,
            hidden_size: None,
            intermediate_size: None,
            num_attention_heads: None,
            num_key_value_heads: None,
            head_dim: None,
            capture_layers: None,
            fc_norm: false,
            norm_output: false,
            initializer_range: 0.02,
        }
    }
}

impl Config {
    /// What to record from the target: the layers, and the last hidden state as the teacher.
    pub fn capture(&self, target: &TargetInfo) -> Result<Capture> {
        let Some(layers) = &self.capture_layers else { return Ok(Capture::eagle3_default(target.n_layers)?) };
        // The last layer's output is never captured by serving engines (sglang-contract: capture at layer entry).
        let ascending = layers.windows(2).all(|w| w[0] < w[1]);
        if layers.len() != 3 || !ascending || layers[2] + 1 >= target.n_layers {
            let reason =
                format!("expected three ascending layers below {}", target.n_layers.saturating_sub(1));
            return Err(config_error("capture-layers", format!("{layers:?}"), reason));
        }
        Ok(Capture { layers: layers.clone(), last_hidden: true })
    }

    pub(super) fn objective(&self) -> Objective {
        match self.objective {
            ObjectiveName::Kl => Objective::Kl,
            ObjectiveName::LkAlpha => Objective::LkAlpha,
            ObjectiveName::LkLambda => {
                Objective::LkLambda { kl_scale: self.kl_scale, kl_decay: self.kl_decay }
            }
        }
    }

    /// Refuses values that no target could make right.
    pub fn check(&self) -> Result<()> {
        let fail = |key, got: String, why: &str| Err(config_error(key, got, format!("expected {why}")));
        if !(1..=32).contains(&self.ttt_steps) {
            return fail("ttt-steps", self.ttt_steps.to_string(), "1 to 32");
        }
        if !(self.step_decay > 0.0 && self.step_decay <= 1.0) {
            return fail("step-decay", self.step_decay.to_string(), "above 0 and at most 1");
        }
        let scales = [
            ("kl-scale", self.kl_scale),
            ("kl-decay", self.kl_decay),
            ("initializer-range", self.initializer_range),
        ];
        if let Some((key, got)) = scales.into_iter().find(|(_, v)| !(*v >= 0.0 && v.is_finite())) {
            return fail(key, got.to_string(), "0 or above");
        }
        let sizes = [
            ("draft-vocab-size", self.draft_vocab_size),
            ("hidden-size", self.hidden_size),
            ("intermediate-size", self.intermediate_size),
            ("num-attention-heads", self.num_attention_heads),
            ("num-key-value-heads", self.num_key_value_heads),
            ("head-dim", self.head_dim),
        ];
        match sizes.into_iter().find(|(_, size)| *size == Some(0)) {
            Some((key, _)) => fail(key, "0".to_owned(), "1 or more; leave it out to follow the target"),
            None => Ok(()),
        }
    }
}

pub(super) fn config_error(key: &str, got: String, reason: String) -> Error {
    Error::Config { method: NAME, key: key.to_owned(), got, reason }
}
