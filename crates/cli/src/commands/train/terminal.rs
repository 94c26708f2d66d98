//! What a training run shows, and the decoding of held-out prompts beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use specforge_config::RunPlan;
use specforge_eval::{Options, Report};
use specforge_methods::DraftMethod;
use specforge_models::Target;
use specforge_tensor::Params;
use specforge_train::{Event, Held, Hooks};

use crate::commands::eval;
use crate::setup;
use crate::show::{Progress, positions, rate};

/// Decodes held-out prompts: the target is loaded at first use where training itself does not need it.
pub(super) struct Decoder {
    pub(super) target: Option<Arc<Target>>,
    pub(super) plan: RunPlan,
    pub(super) prompts: Vec<Vec<u32>>,
    /// Other ranks decode the same, which they can for one prompt at a time.
    pub(super) in_step: bool,
}

impl Decoder {
    fn target(&mut self) -> Result<Arc<Target>> {
        if let Some(target) = &self.target {
            return Ok(target.clone());
        }
        let target = setup::target(&self.plan)?;
        self.target = Some(target.clone());
        Ok(target)
    }

    /// A quick measure on a few prompts; `None` if the recipe wants none.
    pub(super) fn acceptance_length(
        &mut self,
        method: &dyn DraftMethod,
        params: &Params,
    ) -> Result<Option<f64>> {
        let n = self.plan.eval.training_prompts.min(self.prompts.len());
        if n == 0 {
            return Ok(None);
        }
        let target = self.target()?;
        let options = Options { plain: false, parallel: !self.in_step, ..eval::options(&self.plan) };
        let report =
            specforge_eval::evaluate(&target, method, params, &self.prompts[..n], &options, &|_, _| ())?;
        Ok(Some(report.acceptance_length))
    }

    /// The whole measure, with speed and the proof that nothing is lost.
    pub(super) fn measure(&mut self, method: &dyn DraftMethod, params: &Params) -> Result<Option<Report>> {
        if self.prompts.is_empty() {
            return Ok(None);
        }
        let target = self.target()?;
        let progress = Progress::new("eval", false);
        let shown = |done, total| progress.set(done, total);
        let report = specforge_eval::evaluate(
            &target,
            method,
            params,
            &self.prompts,
            &eval::options(&self.plan),
            &shown,
        );
        progress.done();
        Ok(Some(report?))
    }
}

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
        self.decoder
            .acceptance_length(method, params)
            .map_err(|e| specforge_train::Error::Hook(format!("{e:#}")))
    }
}
