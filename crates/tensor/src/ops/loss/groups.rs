//! Objectives: what rows come to in a group of them, and what each row's terms weigh in that.

use std::sync::Arc;

use super::{LossRows, SoftTargetLoss};
use crate::kernels::RowFigures;
use crate::{Combine, Device, Group, Result, Tensor};

/// What is minimised over each group of rows (each test-time-training step).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// Cross-entropy against the target's distribution: the KL divergence up to a constant.
    Kl,
    /// `-mean(ln acceptance)`, the acceptance of a row being `sum_v min(target_v, draft_v)`.
    LkAlpha,
    /// `w · KL + (1 - w) · (1 - mean acceptance)` with `w = kl_scale · exp(-kl_decay · mean acceptance)`, held
    /// constant in the gradient.
    LkLambda {
        /// Factor of w.
        kl_scale: f64,
        /// How fast w falls as the acceptance rises.
        kl_decay: f64,
    },
}

impl Objective {
    /// The weight of the cross-entropy in a group of this mean acceptance.
    fn kl_weight(self, acceptance: f64) -> f64 {
        match self {
            Self::Kl => 1.0,
            Self::LkAlpha => 0.0,
            Self::LkLambda { kl_scale, kl_decay } => kl_scale * (-kl_decay * acceptance).exp(),
        }
    }
}

/// One group's figures.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GroupLoss {
    /// The group's objective times `total_weight`, before its `group_weight`; of ranks that have its other rows, a share.
    pub loss: f64,
    /// Sum of acceptance over the rows here.
    pub acceptance: f64,
    /// The number of rows here.
    pub count: f64,
}

/// Each group's sum of acceptance over its rows on all ranks, in float64. All ranks call this, with rows or without.
pub(super) fn acceptance_over(
    figures: &RowFigures,
    rows: &LossRows,
    device: Device,
    ranks: Option<&Arc<dyn Group>>,
) -> Result<Vec<f64>> {
    let mut own = vec![0.0; rows.group_rows.len()];
    rows.group.iter().zip(&figures.acceptance).for_each(|(&g, &a)| own[g as usize] += f64::from(a));
    let Some(ranks) = ranks else { return Ok(own) };
    let mut sums = Tensor::from_f64(device, own)?;
    ranks.all_reduce(&mut sums, Combine::Sum)?;
    sums.later_f64()?.wait()
}

/// Figures of the rows here. `acceptance`: sums over the rows of all ranks, where they are known apart from these;
/// `n_ranks`: how many ranks have rows of the groups.
pub(super) fn group_losses(
    figures: &RowFigures,
    rows: &LossRows,
    objective: Objective,
    (acceptance, n_ranks): (Option<&[f64]>, usize),
) -> Vec<GroupLoss> {
    let mut groups = vec![GroupLoss::default(); rows.group_rows.len()];
    let mut kl = vec![0.0; groups.len()];
    let mut log_acceptance = vec![0.0; groups.len()];
    for (r, &g) in rows.group.iter().enumerate() {
        let (g, accepted) = (g as usize, f64::from(figures.acceptance[r]));
        kl[g] += f64::from(rows.weight[r]) * f64::from(figures.cross_entropy[r]);
        groups[g].acceptance += accepted;
        groups[g].count += 1.0;
        if accepted > 0.0 {
            log_acceptance[g] += accepted.ln();
        }
    }
    for (g, group) in groups.iter_mut().enumerate() {
        let n = rows.group_rows[g].max(1) as f64;
        group.loss = match objective {
            Objective::Kl => kl[g],
            Objective::LkAlpha => -rows.total_weight * log_acceptance[g] / n,
            Objective::LkLambda { .. } => {
                let w = objective.kl_weight(acceptance.map_or(group.acceptance, |all| all[g]) / n);
                // The part of 1 that the rows here are; where nobody has rows, each rank has the same.
                let one = if rows.group_rows[g] == 0 { 1.0 / n_ranks as f64 } else { group.count / n };
                w * kl[g] + rows.total_weight * (1.0 - w) * (one - group.acceptance / n)
            }
        };
    }
    groups
}

/// Each row's weights of the cross-entropy and of the acceptance term; `acceptance` as in [`acceptance_over`], which the
/// lambda objective alone asks for.
pub(super) fn row_weights(a: &SoftTargetLoss<'_>, acceptance: Option<&[f64]>) -> [Vec<f32>; 2] {
    let weights = a.rows.group.iter().zip(&a.rows.weight).map(|(&g, &weight)| {
        let (g, group_weight) = (g as usize, a.group_weight[g as usize]);
        let n = a.rows.group_rows[g].max(1) as f64;
        let w = a.objective.kl_weight(acceptance.map_or(0.0, |all| all[g]) / n);
        let per_row = group_weight * a.rows.total_weight / n;
        (group_weight * w * f64::from(weight), per_row * (w - 1.0))
    });
    let (ce, acceptance) = weights.map(|(c, a)| (c as f32, a as f32)).unzip();
    [ce, acceptance]
}
