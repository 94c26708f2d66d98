//! What the loop tells its caller, and what it asks of it.

use specforge_methods::DraftMethod;
use specforge_tensor::Params;

use crate::{Figures, Record, Result};

/// Figures on held-out rows.
#[derive(Debug, Clone)]
pub struct Held {
    /// Losses and metrics; `None` where no row is held out.
    pub figures: Option<Figures>,
    /// From decoding held-out prompts, if the run can.
    pub acceptance_length: Option<f64>,
}

/// What happens in a run, for whoever shows it.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step was taken; the figures are the step's own.
    Step {
        /// Steps so far.
        step: u64,
        /// Steps of the whole run.
        total: u64,
        /// The step's figures.
        figures: &'a Figures,
        /// Seconds the step took.
        seconds: f64,
    },
    /// A record was written.
    Record(&'a Record),
    /// Held-out rows were evaluated.
    Evaluated(&'a Held),
    /// A checkpoint was saved.
    Saved(&'a std::path::Path),
}

/// What the loop asks of its caller.
pub trait Hooks {
    /// Shows an event.
    fn event(&mut self, event: Event<'_>);

    /// Whether to stop after this step, save and return.
    fn stop_requested(&self) -> bool;

    /// The acceptance length of the draft from decoding held-out prompts; `None` where no target is at hand. All ranks call
    /// this, and the first one's answer counts.
    fn acceptance_length(&mut self, method: &dyn DraftMethod, params: &Params) -> Result<Option<f64>>;
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// It was asked to stop, and saved.
    Stopped,
}
