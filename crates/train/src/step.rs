//! One optimizer step, top to bottom: forward and backward of every micro-batch, then the update.

use specforge_methods::{Batch, DraftMethod, Loss};
use specforge_nn::optimizer::{AdamW, StepReport};
use specforge_tensor::{Grads, Later, Params, Tape};

use crate::log::Figures;
use crate::{Error, Result};

/// What a step did.
#[derive(Debug)]
pub(crate) struct Step {
    pub figures: Figures,
    pub grad_norm: f64,
}

/// A step that was asked for, and whose figures come when the device has got there.
#[derive(Debug)]
pub(crate) struct PendingStep {
    number: u64,
    rows: Vec<u64>,
    losses: Vec<(Later<Loss>, usize)>,
    report: Later<StepReport>,
}

/// Trains on the micro-batches of one step. Sums and weights are added over all of them and divided once.
///
/// Nothing waits for a device; [`PendingStep::wait`] does. A step whose loss or gradient is not finite applies nothing.
pub(crate) fn step(
    method: &dyn DraftMethod,
    (params, optimizer): (&mut Params, &mut AdamW),
    batches: impl Iterator<Item = Result<Batch>>,
    lr: f64,
) -> Result<PendingStep> {
    let (mut grads, mut losses, mut rows, mut weight) = (Grads::new(), Vec::new(), Vec::new(), 0.0);
    let number = optimizer.steps() + 1;
    for batch in batches {
        let batch = batch?;
        rows.extend(&batch.rows);
        // Forward; the loss leaves its gradients on the tape.
        let tape = Tape::accumulating(params, grads);
        let pending = method.loss(&tape, &batch)?;
        weight += pending.weight;
        if let Some(loss) = pending.loss.peek() {
            expect_finite("loss", loss.objective.value(), &rows, number)?;
        }
        losses.push((pending.loss, batch.n_tokens()));
        // Backward; gradients add up over the micro-batches.
        grads = tape.backward()?;
    }
    // Divide once, clip, update; nothing is updated if the norm is not finite.
    let report = optimizer.step(params, &grads, weight, lr)?;
    Ok(PendingStep { number, rows, losses, report })
}

impl PendingStep {
    /// The figures. A loss or gradient that is not finite is an error: then nothing was applied.
    pub(crate) fn wait(self) -> Result<Step> {
        let mut figures = Figures::default();
        for (loss, n_tokens) in self.losses {
            let loss = loss.wait()?;
            expect_finite("loss", loss.objective.value(), &self.rows, self.number)?;
            figures.add(&loss, n_tokens);
        }
        let grad_norm = self.report.wait()?.grad_norm;
        expect_finite("gradient norm", grad_norm, &self.rows, self.number)?;
        Ok(Step { figures, grad_norm })
    }
}

fn expect_finite(what: &'static str, value: f64, rows: &[u64], step: u64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    Err(Error::NotFinite { step, what, value, rows: rows.to_vec(), checkpoint: String::new() })
}

/// Losses and metrics of held-out batches; nothing is trained.
pub(crate) fn evaluate(
    method: &dyn DraftMethod,
    params: &Params,
    batches: impl Iterator<Item = Result<Batch>>,
) -> Result<Figures> {
    let mut figures = Figures::default();
    for batch in batches {
        let batch = batch?;
        let loss = method.loss(&Tape::inference(params), &batch)?.loss.wait()?;
        figures.add(&loss, batch.n_tokens());
    }
    Ok(figures)
}
