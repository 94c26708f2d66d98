//! The decoding of held-out prompts beside a training run: where the target is, or on ranks of the target's own.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use specforge_config::RunPlan;
use specforge_eval::{Options, Report};
use specforge_methods::{DraftMethod, Ranks};
use specforge_models::Target;
use specforge_tensor::{Group, Params, Tensor};
use specforge_train::Line;

use crate::commands::eval;
use crate::setup;
use crate::show::Progress;

/// Decodes held-out prompts, on the first rank and those that it shares target or draft with: the target is loaded at
/// first use where training itself does not need it.
pub(super) struct Decoder {
    pub(super) target: Option<Arc<Target>>,
    /// Those that share the target.
    pub(super) sharing: Option<Arc<dyn Group>>,
    /// Whether this rank takes part.
    pub(super) decodes: bool,
    /// Whether other ranks decode the same, which they can for one prompt at a time.
    pub(super) in_step: bool,
    /// To the rank that has the target, where that is another one.
    pub(super) far: Option<Far>,
    pub(super) plan: RunPlan,
    pub(super) prompts: Vec<Vec<u32>>,
}

/// A target on ranks of its own, which decode with the weights that they are sent.
pub(super) struct Far {
    pub(super) line: Line,
    /// Those that share the draft.
    pub(super) draft: Ranks,
    /// Whether this rank asks: one of those that share the draft.
    pub(super) asks: bool,
}

/// What a run needs to know of an evaluation. Figures that were not measured are absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Measured {
    pub(super) acceptance_length: f64,
    pub(super) acceptance_per_position: Vec<f64>,
    pub(super) lossless: Option<bool>,
    pub(super) tokens_per_second: Option<f64>,
    pub(super) plain_tokens_per_second: Option<f64>,
    pub(super) speedup: Option<f64>,
}

impl Decoder {
    fn target(&mut self) -> Result<Arc<Target>> {
        if let Some(target) = &self.target {
            return Ok(target.clone());
        }
        let target = setup::target(&self.plan, self.sharing.as_ref())?;
        self.target = Some(target.clone());
        Ok(target)
    }

    /// A quick measure on a few prompts; `None` if the recipe wants none, or on a rank that has no part in it.
    pub(super) fn acceptance_length(
        &mut self,
        method: &dyn DraftMethod,
        params: &Params,
    ) -> Result<Option<f64>> {
        Ok(self.measure(method, params, false)?.map(|measured| measured.acceptance_length))
    }

    /// The `whole` measure, with speed and the proof that nothing is lost; or the quick one.
    pub(super) fn measure(
        &mut self,
        method: &dyn DraftMethod,
        params: &Params,
        whole: bool,
    ) -> Result<Option<Measured>> {
        let n =
            if whole { self.prompts.len() } else { self.plan.eval.training_prompts.min(self.prompts.len()) };
        if n == 0 || !self.decodes {
            return Ok(None);
        }
        if let Some(far) = &self.far {
            return far.measure(params, whole);
        }
        let target = self.target()?;
        let options = eval::options(&self.plan);
        let quick = Options { plain: false, parallel: !self.in_step, ..options.clone() };
        let options = if whole { options } else { quick };
        let progress = whole.then(|| Progress::new("eval", false));
        let shown = |done, total| progress.iter().for_each(|progress| progress.set(done, total));
        let report = specforge_eval::evaluate(&target, method, params, &self.prompts[..n], &options, &shown);
        progress.iter().for_each(Progress::done);
        Ok(Some(Measured::of(&report?)))
    }
}

impl Far {
    fn measure(&self, params: &Params, whole: bool) -> Result<Option<Measured>> {
        let trained = params.iter().filter(|(_, param)| param.trainable);
        let weights = trained.map(|(_, param)| Ok(self.draft.whole(param, &param.value)?));
        let weights = weights.collect::<Result<Vec<Tensor>>>()?;
        if !self.asks {
            return Ok(None);
        }
        let figures = self.line.decode(whole, &weights)?;
        Measured::of_figures(&figures).map(Some)
    }
}

impl Measured {
    fn of(report: &Report) -> Self {
        Self {
            acceptance_length: report.acceptance_length,
            acceptance_per_position: report.acceptance_per_position.clone(),
            lossless: report.lossless,
            tokens_per_second: report.tokens_per_second,
            plain_tokens_per_second: report.plain_tokens_per_second,
            speedup: report.speedup,
        }
    }

    /// As numbers, for another rank; NaN stands for what is absent.
    pub(super) fn figures(&self) -> Vec<f64> {
        let lossless = self.lossless.map(|lossless| f64::from(u8::from(lossless)));
        let maybe = [lossless, self.tokens_per_second, self.plain_tokens_per_second, self.speedup];
        let maybe = maybe.map(|figure| figure.unwrap_or(f64::NAN));
        [&[self.acceptance_length], maybe.as_slice(), &self.acceptance_per_position].concat()
    }

    fn of_figures(figures: &[f64]) -> Result<Self> {
        let [acceptance_length, lossless, with, without, speedup, positions @ ..] = figures else {
            return Err(anyhow!("the ranks that have the target decoded nothing: they have other prompts"));
        };
        let some = |figure: &f64| Some(*figure).filter(|figure| !figure.is_nan());
        Ok(Self {
            acceptance_length: *acceptance_length,
            acceptance_per_position: positions.to_vec(),
            lossless: some(lossless).map(|lossless| lossless > 0.0),
            tokens_per_second: some(with),
            plain_tokens_per_second: some(without),
            speedup: some(speedup),
        })
    }
}

/// An error of decoding as the loop takes it.
#[expect(clippy::needless_pass_by_value, reason = "given to map_err")]
pub(super) fn as_hook(error: anyhow::Error) -> specforge_train::Error {
    specforge_train::Error::Hook(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::Measured;

    #[test]
    fn parallel_what_was_measured_comes_back_from_numbers() {
        let measured = Measured {
            acceptance_length: 2.1,
            acceptance_per_position: vec![0.7, 0.1 + 0.2],
            lossless: Some(false),
            speedup: Some(1.0 / 3.0),
            ..Measured::default()
        };
        assert_eq!(Measured::of_figures(&measured.figures()).unwrap(), measured);
        let none = Measured { lossless: None, ..measured };
        assert_eq!(Measured::of_figures(&none.figures()).unwrap(), none);
        assert!(Measured::of_figures(&[]).is_err());
    }
}
