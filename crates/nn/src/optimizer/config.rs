//! The optimizer's settings, as a recipe writes them.

use serde::{Deserialize, Serialize};
use specforge_tensor::AdamStep;

use super::{Error, Result};

/// The settings of [`AdamW`](super::AdamW).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// The largest learning rate of the schedule.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step multiplies by `1 - lr * weight-decay`.
    pub weight_decay: f64,
    /// Gradients of a larger global norm are scaled down to it; 0 switches clipping off.
    pub max_grad_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { lr: 1e-4, betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.5 }
    }
}

impl AdamWConfig {
    /// Fails if a setting is outside its range.
    pub fn check(&self) -> Result<()> {
        let not_negative = |v: f64| v >= 0.0 && v.is_finite();
        let beta = |v: f64| (0.0..1.0).contains(&v);
        let settings = [
            ("lr", self.lr, not_negative(self.lr), "a learning rate is a finite number of at least 0"),
            ("betas[0]", self.betas[0], beta(self.betas[0]), "a decay is at least 0 and below 1"),
            ("betas[1]", self.betas[1], beta(self.betas[1]), "a decay is at least 0 and below 1"),
            ("eps", self.eps, self.eps > 0.0 && self.eps.is_finite(), "it must be above 0, to divide by"),
            (
                "weight-decay",
                self.weight_decay,
                not_negative(self.weight_decay),
                "it must be finite and at least 0",
            ),
            (
                "max-grad-norm",
                self.max_grad_norm,
                not_negative(self.max_grad_norm),
                "it must be finite and at least 0 (0 switches clipping off)",
            ),
        ];
        let bad = settings.into_iter().find(|(_, _, holds, _)| !holds);
        bad.map_or(Ok(()), |(key, got, _, why)| Err(Error::Setting { key, got: got.to_string(), why }))
    }

    /// The kernel's arguments.
    pub(super) fn adam_step(&self, lr: f64, weight: f64) -> AdamStep {
        let ([beta1, beta2], eps, weight_decay) = (self.betas, self.eps, self.weight_decay);
        AdamStep { lr, beta1, beta2, eps, weight_decay, weight, max_norm: self.max_grad_norm }
    }
}
