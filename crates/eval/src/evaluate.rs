//! A set of prompts, with the draft and without, to one report.

use std::time::Instant;

use rayon::prelude::*;
use specforge_methods::DraftMethod;
use specforge_models::Target;
use specforge_tensor::Params;

use crate::decode::check_prompt;
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
    // All of them first: a bad one must not stop the evaluation halfway.
    prompts.iter().enumerate().try_for_each(|(i, prompt)| check_prompt(target.info(), i, prompt))?;
    let started = Instant::now();
    let run = Run { target, method, params, options };
    // Side by side a few prompts for every thread at a time, so that progress is heard of from this thread.
    let at_once = if options.parallel { 4 * rayon::current_num_threads() } else { 1 };
    let mut outcomes = Vec::with_capacity(prompts.len());
    progress(0, prompts.len() as u64);
    for chunk in prompts.chunks(at_once) {
        let first = outcomes.len();
        let one = |(i, prompt): (usize, &Vec<u32>)| run.prompt(first + i, prompt);
        // Every outcome first, then the first error: which one is reported must not depend on threads.
        let done: Vec<Result<_>> = if options.parallel {
            chunk.par_iter().enumerate().map(one).collect()
        } else {
            chunk.iter().enumerate().map(one).collect()
        };
        outcomes.extend(done.into_iter().collect::<Result<Vec<_>>>()?);
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
            Some(own) if greedy => difference(self.target, (index, prompt), &generated, own, options)?,
            _ => None,
        };
        let result = PromptResult::new((index, prompt.len()), generated, own.as_ref(), greedy);
        Ok((result, difference))
    }
}

/// The first token of an answer `with` a draft that is not the target's own, and how close the two were. Decodes up to
/// there once more without the draft for the logits.
pub fn difference(
    target: &Target,
    (index, prompt): (usize, &[u32]),
    with: &Generated,
    without: &Generated,
    options: &Options,
) -> Result<Option<Difference>> {
    let mut pairs = with.tokens.iter().zip(&without.tokens);
    let Some(at) = pairs.position(|(a, b)| a != b) else { return Ok(None) };
    let (token, plain_token) = (with.tokens[at], without.tokens[at]);
    let options = Options { max_new_tokens: at + 1, ..options.clone() };
    let logits = plain(target, (index, prompt), &options)?.last_logits;
    let logit = |token: u32| f64::from(logits[token as usize]);
    let logit_gap = logit(plain_token) - logit(token);
    Ok(Some(Difference { prompt: index, index: at, token, plain_token, logit_gap }))
}
