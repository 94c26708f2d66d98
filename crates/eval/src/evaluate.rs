//! A set of prompts, with the draft and without, to one report.

use std::time::Instant;

use rayon::prelude::*;
use specforge_methods::DraftMethod;
use specforge_models::Target;
use specforge_tensor::Params;

use crate::{Difference, Error, Generated, Options, PromptResult, Report, Result, plain, speculate};

/// Decodes `prompts` (token ids of the target) and reports how many proposed tokens are accepted, what that is worth,
/// and whether the text is the target's own. `progress` hears of prompts done and prompts in all.
pub fn evaluate(
    target: &Target,
    method: &dyn DraftMethod,
    params: &Params,
    prompts: &[Vec<u32>],
    options: &Options,
    progress: &dyn Fn(u64, u64),
) -> Result<Report> {
    options.check()?;
    if prompts.is_empty() {
        return Err(Error::NoPrompts);
    }
    let started = Instant::now();
    let run = Run { target, method, params, options };
    // Side by side a few prompts for every thread at a time, so that progress is heard of from this thread.
    let at_once = if options.parallel { 4 * rayon::current_num_threads() } else { 1 };
    let mut outcomes = Vec::with_capacity(prompts.len());
    progress(0, prompts.len() as u64);
    for chunk in prompts.chunks(at_once) {
        let first = outcomes.len();
        let one = |(i, prompt): (usize, &Vec<u32>)| run.prompt(first + i, prompt);
        if options.parallel {
            outcomes.extend(chunk.par_iter().enumerate().map(one).collect::<Result<Vec<_>>>()?);
        } else {
            outcomes.extend(chunk.iter().enumerate().map(one).collect::<Result<Vec<_>>>()?);
        }
        progress(outcomes.len() as u64, prompts.len() as u64);
    }
    let (results, differences): (Vec<_>, Vec<_>) = outcomes.into_iter().unzip();
    let first_difference = differences.into_iter().flatten().next();
    Ok(Report::new(options, results, first_difference, started.elapsed().as_secs_f64()))
}

/// What all prompts share.
struct Run<'a> {
    target: &'a Target,
    method: &'a dyn DraftMethod,
    params: &'a Params,
    options: &'a Options,
}

impl Run<'_> {
    fn prompt(&self, index: usize, prompt: &[u32]) -> Result<(PromptResult, Option<Difference>)> {
        let (options, greedy) = (self.options, self.options.sampling.is_greedy());
        let generated = speculate(self.target, self.method, self.params, (index, prompt), options)?;
        let own = options.plain.then(|| plain(self.target, (index, prompt), options)).transpose()?;
        let difference = match &own {
            Some(own) if greedy => self.difference(index, prompt, &generated, own)?,
            _ => None,
        };
        let result = PromptResult::new((index, prompt.len()), generated, own.as_ref(), greedy);
        Ok((result, difference))
    }

    /// The first token that is not the target's own. Decodes without the draft once more up to there for the logits.
    fn difference(
        &self,
        prompt: usize,
        ids: &[u32],
        with: &Generated,
        without: &Generated,
    ) -> Result<Option<Difference>> {
        let mut pairs = with.tokens.iter().zip(&without.tokens);
        let Some(index) = pairs.position(|(a, b)| a != b) else { return Ok(None) };
        let (token, plain_token) = (with.tokens[index], without.tokens[index]);
        let options = Options { max_new_tokens: index + 1, ..self.options.clone() };
        let logits = plain(self.target, (prompt, ids), &options)?.last_logits;
        let logit = |token: u32| f64::from(logits[token as usize]);
        let logit_gap = logit(plain_token) - logit(token);
        Ok(Some(Difference { prompt, index, token, plain_token, logit_gap }))
    }
}
