//! One optimizer step, top to bottom: forward and backward of every micro-batch, then the update.

use specforge_methods::{Batch, DraftMethod};
use specforge_nn::optimizer::AdamW;
use specforge_tensor::{Grads, Params, Tape};

use crate::log::Figures;
use crate::{Error, Result};

/// What a step did.
#[derive(Debug)]
pub(crate) struct Step {
    pub figures: Figures,
    pub grad_norm: f64,
}

/// Trains on the micro-batches of one step. Sums and weights are added over all of them and divided once. A loss or
/// gradient that is not finite is an error, and then nothing was applied.
pub(crate) fn step(
    method: &dyn DraftMethod,
    (params, optimizer): (&mut Params, &mut AdamW),
    batches: impl Iterator<Item = Result<Batch>>,
    lr: f64,
) -> Result<Step> {
    let (mut grads, mut figures, mut rows) = (Grads::new(), Figures::default(), Vec::new());
    let not_finite = |what, value, rows: &[u64], step| Error::NotFinite {
        step,
        what,
        value,
        rows: rows.to_vec(),
        checkpoint: String::new(),
    };
    let number = optimizer.steps() + 1;
    for batch in batches {
        let batch = batch?;
        rows.extend(&batch.rows);
        // Forward; the loss leaves its gradients on the tape.
        let tape = Tape::accumulating(params, grads);
        let loss = method.loss(&tape, &batch)?;
        if !loss.objective.sum.is_finite() {
            return Err(not_finite("loss", loss.objective.value(), &rows, number));
        }
        // Backward; gradients add up over the micro-batches.
        grads = tape.backward()?;
        figures.add(&loss, batch.n_tokens());
    }
    // Divide once, clip, update; nothing is updated if the norm is not finite.
    let report = optimizer.step(params, &grads, figures.objective.weight, lr);
    if !report.grad_norm.is_finite() {
        return Err(not_finite("gradient norm", report.grad_norm, &rows, number));
    }
    Ok(Step { figures, grad_norm: report.grad_norm })
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
        let loss = method.loss(&Tape::inference(params), &batch)?;
        figures.add(&loss, batch.n_tokens());
    }
    Ok(figures)
}
