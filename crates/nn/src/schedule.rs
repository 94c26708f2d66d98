//! Learning-rate schedules: warm-up, then a shape over the rest of the horizon.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::optimizer::{Error, Result};

/// How the learning rate goes over a run. The horizon, the run's number of optimizer steps, comes from the plan.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// The shape after warm-up.
    pub kind: ScheduleKind,
    /// Warm-up as a share of the horizon, rounded down to steps; 0.015 if neither this nor `warmup-steps` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// Warm-up in steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// The rate at and after the horizon's end, as a share of the largest rate.
    pub min_lr_ratio: f64,
    /// The share of the horizon that `wsd` decays over, at its end; 0.1 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_ratio: Option<f64>,
    /// Reproduces the rates of another trainer, defects included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
}

/// The shape of a schedule after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// The largest rate throughout.
    Constant,
    /// A straight line down to the floor.
    Linear,
    /// Half a cosine wave down to the floor (Loshchilov and Hutter, 2017, without restarts).
    #[default]
    Cosine,
    /// Warm-up, stable, decay (Hu et al., 2024): the largest rate, then a straight line to the floor at the end.
    Wsd,
}

/// Trainers whose schedules can be reproduced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compat {
    /// The Python SpecForge (0.2): its cosine is too large by `2 / (1 + cos(pi / T))`, T the steps after warm-up,
    /// and rises again beyond the horizon.
    Specforge,
}

const WARMUP_RATIO: f64 = 0.015;
const DECAY_RATIO: f64 = 0.1;

impl ScheduleConfig {
    /// Fails if a setting is outside its range or contradicts another.
    pub fn check(&self) -> Result<()> {
        let fail = |key, got: String, why| Err(Error::Setting { key, got, why });
        let share = |v: f64| (0.0..=1.0).contains(&v);
        if let Some(ratio) = self.warmup_ratio {
            if self.warmup_steps.is_some() {
                return fail(
                    "warmup-ratio",
                    ratio.to_string(),
                    "warmup-steps is given too; keep one of the two",
                );
            }
            if !share(ratio) {
                return fail("warmup-ratio", ratio.to_string(), "a share of the horizon is between 0 and 1");
            }
        }
        let floor = self.min_lr_ratio;
        if !share(floor) {
            return fail("min-lr-ratio", floor.to_string(), "a share of the largest rate is between 0 and 1");
        }
        if floor > 0.0 && self.kind == ScheduleKind::Constant {
            return fail(
                "min-lr-ratio",
                floor.to_string(),
                "a constant schedule has no floor; remove it or change kind",
            );
        }
        match self.decay_ratio {
            Some(ratio) if self.kind != ScheduleKind::Wsd => {
                return fail(
                    "decay-ratio",
                    ratio.to_string(),
                    "only kind = \"wsd\" decays at the end; remove it",
                );
            }
            Some(ratio) if !share(ratio) => {
                return fail("decay-ratio", ratio.to_string(), "a share of the horizon is between 0 and 1");
            }
            _ => {}
        }
        let reproduced = matches!(self.kind, ScheduleKind::Cosine | ScheduleKind::Constant) && floor == 0.0;
        if self.compat.is_some() && !reproduced {
            let why = "it knows only kind = \"cosine\" and \"constant\", without min-lr-ratio";
            return fail("compat", "specforge".to_owned(), why);
        }
        Ok(())
    }

    /// The factor on the largest learning rate for optimizer step `step` (from 0) of a run of `total` steps.
    /// Warm-up step s of W has `(s + 1) / W`; beyond the horizon the factor stays at the floor.
    pub fn lr_factor(&self, step: u64, total: u64) -> f64 {
        let warmup = self.warmup(total);
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let (done, rest) = (step - warmup, total.saturating_sub(warmup));
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine if self.compat == Some(Compat::Specforge) => specforge_cosine(done, rest),
            ScheduleKind::Cosine => self.above_floor(half_cosine(progress(done, rest))),
            ScheduleKind::Linear => self.above_floor(1.0 - progress(done, rest)),
            ScheduleKind::Wsd => {
                let decay = ((self.decay_ratio.unwrap_or(DECAY_RATIO) * total as f64) as u64).min(rest);
                let decayed = done.checked_sub(rest - decay).map_or(0.0, |done| progress(done, decay));
                self.above_floor(1.0 - decayed)
            }
        }
    }

    /// Warm-up steps of a run of `total` steps.
    fn warmup(&self, total: u64) -> u64 {
        let ratio = self.warmup_ratio.unwrap_or(WARMUP_RATIO);
        self.warmup_steps.unwrap_or((ratio * total as f64) as u64)
    }

    fn above_floor(&self, shape: f64) -> f64 {
        self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape
    }
}

/// How much of a stretch is done; all of it beyond its end.
fn progress(done: u64, all: u64) -> f64 {
    if done >= all { 1.0 } else { done as f64 / all as f64 }
}

fn half_cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

/// The recursion of PyTorch's `CosineAnnealingLR`, entered one step late: a constant factor up to the horizon, where
/// the recursion starts over from zero without it.
fn specforge_cosine(done: u64, rest: u64) -> f64 {
    if done == rest {
        return 0.0;
    }
    let shape = half_cosine(done as f64 / rest.max(1) as f64);
    if done < rest && rest > 1 { shape / half_cosine(1.0 / rest as f64) } else { shape }
}
