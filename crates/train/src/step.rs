//! One optimizer step, top to bottom: forward and backward of every micro-batch, then the update.

use specforge_methods::{Batch, DraftMethod, Loss};
use specforge_nn::optimizer::StepReport;
use specforge_tensor::{Grads, Later, Params, Tape};

use crate::log::Figures;
use crate::{Error, Optimizer, Result};

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
    /// Tokens of this rank's rows.
    pub tokens: u64,
}

/// Trains on the micro-batches of one step. Sums and weights are added over all of them and divided once.
///
/// Nothing waits for a device; [`PendingStep::wait`] does. A step whose loss or gradient is not finite applies nothing.
/// With `shrink`, a step that does not fit into device memory is taken again with its micro-batches halved: as much of
/// it as was not sent to other ranks. A rank may be without rows; it takes part in everything else.
pub(crate) fn step(
    method: &dyn DraftMethod,
    (params, optimizer): (&mut Params, &mut Optimizer),
    batches: impl Iterator<Item = Result<Option<Batch>>>,
    (lr, shrink): (f64, bool),
) -> Result<PendingStep> {
    let number = optimizer.steps() + 1;
    optimizer.gather(params)?;
    let (mut sent, mut sums) = (Sums::default(), Sums::default());
    let mut kept = Vec::new();
    for batch in batches {
        if let Some(batch) = batch? {
            micro_batch(method, params, (batch, number), (&mut kept, &mut sums), shrink)?;
        }
        if optimizer.sends_every_micro_batch() {
            optimizer.send(params, &mut sums.grads)?;
            sent.take_in(std::mem::take(&mut sums));
            kept.clear();
        }
    }
    sent.take_in(sums);
    let Sums { grads, weight, losses, rows, tokens } = sent;
    // Divide once, clip, update; nothing is updated if the norm is not finite.
    let report = optimizer.step(params, grads, (weight, lr))?;
    Ok(PendingStep { number, rows, losses, report, tokens })
}

/// One micro-batch on top of `sums`; `kept` are those that they are made of.
fn micro_batch(
    method: &dyn DraftMethod,
    params: &Params,
    (batch, number): (Batch, u64),
    (kept, sums): (&mut Vec<Batch>, &mut Sums),
    shrink: bool,
) -> Result<()> {
    let tokens = batch.n_tokens();
    match sums.add(method, params, &batch, number) {
        Err(error) if shrink && error.is_out_of_memory() => {
            kept.push(batch);
            (*kept, *sums) = again(method, params, std::mem::take(kept), number)?;
        }
        Err(error) => return Err(error.of_batch(tokens)),
        Ok(()) if shrink => kept.push(batch),
        Ok(()) => {}
    }
    Ok(())
}

/// What the micro-batches of a step add up to.
#[derive(Debug, Default)]
struct Sums {
    grads: Grads,
    weight: f64,
    losses: Vec<(Later<Loss>, usize)>,
    rows: Vec<u64>,
    tokens: u64,
}

impl Sums {
    /// Adds later micro-batches, whose gradients stand for all.
    fn take_in(&mut self, more: Self) {
        self.grads = more.grads;
        self.weight += more.weight;
        self.tokens += more.tokens;
        self.losses.extend(more.losses);
        self.rows.extend(more.rows);
    }

    /// One micro-batch. After an error the sums are of no use.
    fn add(&mut self, method: &dyn DraftMethod, params: &Params, batch: &Batch, number: u64) -> Result<()> {
        self.rows.extend(&batch.rows);
        self.tokens += batch.n_tokens() as u64;
        // Forward; the loss leaves its gradients on the tape.
        let tape = Tape::accumulating(params, std::mem::take(&mut self.grads));
        let pending = method.loss(&tape, batch)?;
        self.weight += pending.weight;
        if let Some(loss) = pending.loss.peek() {
            expect_finite("loss", loss.objective.value(), &self.rows, number)?;
        }
        self.losses.push((pending.loss, batch.n_tokens()));
        // Backward; gradients add up over the micro-batches.
        self.grads = tape.backward()?;
        Ok(())
    }
}

/// The step so far, from the start, with its micro-batches halved until they fit.
fn again(
    method: &dyn DraftMethod,
    params: &Params,
    mut batches: Vec<Batch>,
    number: u64,
) -> Result<(Vec<Batch>, Sums)> {
    loop {
        let mut halves = Vec::new();
        for batch in &batches {
            match batch.halves()? {
                Some(two) => halves.extend(two),
                None => halves.push(batch.clone()),
            }
        }
        let is_smaller = halves.len() > batches.len();
        batches = halves;
        let mut sums = Sums::default();
        match batches.iter().try_for_each(|batch| sums.add(method, params, batch, number)) {
            Err(error) if error.is_out_of_memory() && is_smaller => {}
            Err(error) => return Err(error.of_batch(batches.iter().map(Batch::n_tokens).max().unwrap_or(0))),
            Ok(()) => return Ok((batches, sums)),
        }
    }
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

/// Losses and metrics of held-out batches; nothing is trained. A batch that does not fit into device memory goes in
/// halves if it may.
pub(crate) fn evaluate(
    method: &dyn DraftMethod,
    params: &Params,
    batches: impl Iterator<Item = Result<Option<Batch>>>,
    halve: bool,
) -> Result<Figures> {
    let mut figures = Figures::default();
    for batch in batches {
        if let Some(batch) = batch? {
            evaluate_batch(method, params, &batch, (&mut figures, halve))?;
        }
    }
    Ok(figures)
}

fn evaluate_batch(
    method: &dyn DraftMethod,
    params: &Params,
    batch: &Batch,
    (figures, halve): (&mut Figures, bool),
) -> Result<()> {
    let loss = method.loss(&Tape::inference(params), batch).map_err(Error::from);
    match loss.and_then(|pending| Ok(pending.loss.wait()?)) {
        Ok(loss) => figures.add(&loss, batch.n_tokens()),
        Err(error) => {
            let halves = if halve && error.is_out_of_memory() { batch.halves()? } else { None };
            let Some(halves) = halves else { return Err(error.of_batch(batch.n_tokens())) };
            halves.iter().try_for_each(|half| evaluate_batch(method, params, half, (figures, halve)))?;
        }
    }
    Ok(())
}
