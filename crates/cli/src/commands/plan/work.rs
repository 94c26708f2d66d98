//! What a recipe trains on: the rows of every micro-batch of the first epoch, and how many steps there are.

use anyhow::Result;
use specforge_config::{Length, RunPlan};
use specforge_train::Order;

use crate::commands::bench::flops::Rows;
use crate::setup;

/// Rows and steps of a run.
#[derive(Debug)]
pub(super) struct Work {
    /// Those of every micro-batch of the first epoch.
    pub(super) batches: Vec<Rows>,
    /// Steps of the whole run.
    pub(super) steps: u64,
    /// Tokens of the conversations, those held out included.
    pub(super) tokens: u64,
}

impl Work {
    /// From the prepared set, which is made if it is not there yet.
    pub(super) fn prepared(plan: &RunPlan, ttt_steps: usize) -> Result<Self> {
        let data = setup::prepared(plan)?;
        let (train, _) = data.split(plan.data.eval_fraction, plan.seed);
        let lengths = train.iter().map(|&row| (row, data.row(row).ids.len())).collect();
        let order = order(plan, lengths);
        let rows_of = |batch: &Vec<usize>| {
            let mut rows = Rows::default();
            batch.iter().for_each(|&row| rows.add_document(data.row(row).loss_mask, ttt_steps));
            rows
        };
        let batches = order.epoch(0).iter().flatten().map(rows_of).collect();
        Ok(Self { batches, steps: steps(plan, &order), tokens: data.report().tokens })
    }

    /// Of so many tokens in full rows, the last part of each supervised.
    pub(super) fn assumed(plan: &RunPlan, tokens: u64, supervised: f64, ttt_steps: usize) -> Self {
        let length = plan.data.max_length;
        let n = (tokens as usize).div_ceil(length).max(1);
        let order = order(plan, (0..n).map(|row| (row, length)).collect());
        let mask: Vec<u8> =
            (0..length).map(|t| u8::from(t as f64 >= (1.0 - supervised) * length as f64)).collect();
        let rows_of = |batch: &Vec<usize>| {
            let mut rows = Rows::default();
            batch.iter().for_each(|_| rows.add_document(&mask, ttt_steps));
            rows
        };
        let batches = order.epoch(0).iter().flatten().map(rows_of).collect();
        Self { batches, steps: steps(plan, &order), tokens }
    }

    /// All micro-batches together.
    pub(super) fn rows(&self) -> Rows {
        let mut all = Rows::default();
        self.batches.iter().for_each(|batch| all.add(batch));
        all
    }
}

fn order(plan: &RunPlan, rows: Vec<(usize, usize)>) -> Order {
    let (tokens_per_batch, accumulation) = (plan.train.tokens_per_batch, plan.train.accumulation);
    Order { rows, tokens_per_batch, accumulation, seed: plan.seed }
}

fn steps(plan: &RunPlan, order: &Order) -> u64 {
    match plan.train.length {
        Length::Epochs(epochs) => order.total_steps(epochs),
        Length::MaxSteps(steps) => steps,
    }
}
