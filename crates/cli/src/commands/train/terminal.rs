//! What a training run shows.

use std::sync::atomic::{AtomicBool, Ordering};

use specforge_methods::DraftMethod;
use specforge_tensor::Params;
use specforge_train::{Event, Held, Hooks};

use super::decoder::{Decoder, as_hook};
use crate::show::{Progress, positions, rate};

/// Shows the run and stops it when asked.
pub(super) struct Terminal<'a> {
    decoder: &'a mut Decoder,
    stop: &'static AtomicBool,
    pub(super) progress: Progress,
}

impl<'a> Terminal<'a> {
    pub(super) fn new(decoder: &'a mut Decoder, stop: &'static AtomicBool, total: u64) -> Self {
        let progress = Progress::new("train", false);
        progress.set(0, total);
        Self { decoder, stop, progress }
    }
}

/// A line about an evaluation.
fn evaluated(held: &Held) -> String {
    let figures = held.figures.as_ref().map_or(String::new(), |figures| {
        let (loss, accepted) = (figures.objective.value(), positions(&figures.values("acceptance")));
        format!("  loss {loss:.4}  accepted {accepted}")
    });
    let length = match (held.acceptance_length, &held.figures) {
        (Some(length), _) => format!("{length:.2}"),
        (None, Some(figures)) => {
            format!("about {:.2} (estimated, no decoding)", figures.estimated_acceptance_length())
        }
        (None, None) => "not measured".to_owned(),
    };
    format!("held out   {figures}  acceptance length {length}")
}

impl Hooks for Terminal<'_> {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Step { step, total, figures, seconds } => {
                self.progress.message(format!(
                    "loss {:.3}  accepted {}  {}",
                    figures.objective.value(),
                    positions(&figures.values("acceptance")),
                    rate(figures.tokens as f64 / seconds.max(1e-9))
                ));
                self.progress.set(step, total);
            }
            Event::Record(record) => self.progress.line(&format!(
                "step {:>6}  loss {:.4}  accepted {}  lr {:.1e}  {}",
                record.step,
                record.loss,
                positions(&record.acceptance),
                record.lr,
                rate(record.tokens_per_second)
            )),
            Event::Evaluated(held) => self.progress.line(&evaluated(held)),
            Event::Saved(folder) => self.progress.line(&format!("saved        {}", folder.display())),
        }
    }

    fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn acceptance_length(
        &mut self,
        method: &dyn DraftMethod,
        params: &Params,
    ) -> specforge_train::Result<Option<f64>> {
        self.decoder.acceptance_length(method, params).map_err(as_hook)
    }
}
