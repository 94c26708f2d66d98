//! DeepSeek's mixtures of experts, which GLM-4.5 has too: which layers have one, and how experts are picked.

use serde::Deserialize;
use specforge_tensor::{Groups, Routing, Scoring};

use crate::loader::Loader;
use crate::mixture::{FeedForward, Mixture, MixtureShape};
use crate::mlp::Mlp;
use crate::{Result, TargetInfo};

/// The settings of `config.json` about mixtures.
#[derive(Debug, Deserialize)]
pub(crate) struct RoutingConfig {
    moe_intermediate_size: usize,
    num_experts_per_tok: usize,
    n_shared_experts: Option<usize>,
    /// Layers without a mixture, the first ones.
    #[serde(default)]
    first_k_dense_replace: usize,
    /// Every so many layers have a mixture.
    #[serde(default = "one")]
    moe_layer_freq: usize,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    norm_topk_prob: Option<bool>,
    #[serde(default = "factor")]
    routed_scaling_factor: f32,
    scoring_func: Option<String>,
    topk_method: Option<String>,
}

fn one() -> usize {
    1
}

fn factor() -> f32 {
    1.0
}

/// The mixtures of a target.
#[derive(Debug)]
pub(crate) struct Mixtures {
    shape: MixtureShape,
    /// Whether a number per expert is added to the scores for picking.
    is_corrected: bool,
    /// Width of the expert of all rows.
    shared: Option<usize>,
    first: usize,
    every: usize,
}

impl RoutingConfig {
    /// As DeepSeek-V2 has it where nothing else is said: softmax, the best experts, their weights as they are.
    pub(crate) fn plain(&self, info: &TargetInfo) -> Result<Mixtures> {
        self.mixtures(info, ("greedy", "softmax", false))
    }

    /// As DeepSeek-V3 and GLM-4.5 have it where nothing else is said: sigmoid with a correction, weights that sum to 1.
    pub(crate) fn corrected(&self, info: &TargetInfo) -> Result<Mixtures> {
        self.mixtures(info, ("noaux_tc", "sigmoid", true))
    }

    fn mixtures(
        &self,
        info: &TargetInfo,
        (method, scoring, normalised): (&str, &str, bool),
    ) -> Result<Mixtures> {
        let scoring = match self.scoring_func.as_deref().unwrap_or(scoring) {
            "softmax" => Scoring::Softmax,
            "sigmoid" => Scoring::Sigmoid,
            _ => {
                return Err(
                    info.wrong("scoring_func", "unknown router function, expected softmax or sigmoid")
                );
            }
        };
        let (is_corrected, best) = match self.topk_method.as_deref().unwrap_or(method) {
            "greedy" => (false, None),
            "group_limited_greedy" => (false, Some(1)),
            "noaux_tc" => (true, Some(2)),
            _ => {
                let why = "unknown way to pick experts, expected greedy, group_limited_greedy or noaux_tc";
                return Err(info.wrong("topk_method", why));
            }
        };
        // One group is none, whatever counts in it.
        let n = self.n_group.filter(|n| *n != 1);
        let groups = best.zip(n).map(|(best, n)| Groups { n, kept: self.topk_group.unwrap_or(n), best });
        let normalised = self.norm_topk_prob.unwrap_or(normalised);
        let (top_k, scale) = (self.num_experts_per_tok, self.routed_scaling_factor);
        let rule = Routing { scoring, top_k, groups, normalised, scale };
        if self.moe_layer_freq == 0 {
            return Err(info.wrong("moe_layer_freq", "expected at least 1"));
        }
        Ok(Mixtures {
            shape: MixtureShape::new(info, self.moe_intermediate_size, rule)?,
            is_corrected,
            shared: self.n_shared_experts.filter(|n| *n > 0).map(|n| n * self.moe_intermediate_size),
            first: self.first_k_dense_replace,
            every: self.moe_layer_freq,
        })
    }
}

/// What stands behind the attention of a layer.
pub(crate) fn feed_forward(
    info: &TargetInfo,
    mixtures: &Mixtures,
    layer: usize,
    loader: &mut Loader<'_>,
) -> Result<FeedForward> {
    if layer < mixtures.first || !layer.is_multiple_of(mixtures.every) {
        return Ok(Mlp::new(info, false, loader)?.into());
    }
    let mut mixture = Mixture::new(info, mixtures.shape, loader)?;
    if mixtures.is_corrected {
        let correction = loader.exact("gate.e_score_correction_bias", &[mixtures.shape.n_experts])?;
        mixture.router.correction = Some(correction);
    }
    if let Some(width) = mixtures.shared {
        let shared = Mlp::of_width(width, info, false, &mut loader.at("shared_experts"))?;
        mixture.shared = Some((shared, None));
    }
    Ok(mixture.into())
}
