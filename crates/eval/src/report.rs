//! What an evaluation found, as JSON for scripts and as one table for people.

use serde::Serialize;

use crate::{Generated, Options, Stop};

/// How the draft proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// One token after the other.
    Chain,
    /// Several tokens after each.
    Tree,
}

/// The outcome of an evaluation. Speed figures are absent where prompts were decoded side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// How the draft proposed.
    pub mode: Mode,
    /// Depth of the proposals.
    pub steps: usize,
    /// Nodes expanded per level and children of each.
    pub topk: usize,
    /// Tokens checked per verify call, the root included.
    pub n_nodes: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// 1 keeps all tokens.
    pub top_p: f64,
    /// Prompts decoded.
    pub prompts: usize,
    /// Tokens of all answers. The first of each comes from the prompt's own forward pass, without a draft.
    pub tokens: usize,
    /// Forward passes of the target that verified proposals; those over the prompts are not counted.
    pub target_forwards: usize,
    /// Tokens per verify call: the accepted drafts and the bonus token, without those cut at the answer's end and
    /// without the first token of each answer, so `(tokens - prompts) / target_forwards`. 1 means that the draft is
    /// of no use; 0 that no call was made.
    pub acceptance_length: f64,
    /// For each draft position, the share of verify calls in which it was accepted (and is part of the answer).
    pub acceptance_per_position: Vec<f64>,
    /// Greedy: whether every answer is token for token the target's own. Absent when sampled, or when not compared.
    pub lossless: Option<bool>,
    /// The first token that is not the target's own.
    pub first_difference: Option<Difference>,
    /// Tokens per second with the draft, the time for the prompts included.
    pub tokens_per_second: Option<f64>,
    /// The same without the draft.
    pub plain_tokens_per_second: Option<f64>,
    /// The first divided by the second.
    pub speedup: Option<f64>,
    /// Wall-clock time of the whole evaluation.
    pub seconds: f64,
    /// Each prompt's outcome, in the order of the prompts.
    pub results: Vec<PromptResult>,
}

/// One prompt's outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PromptResult {
    /// The prompt's number, from 0.
    pub prompt: usize,
    /// Its length.
    pub prompt_tokens: usize,
    /// The answer's token ids.
    pub output_ids: Vec<u32>,
    /// Why the answer ended.
    pub stop: Stop,
    /// Verify calls.
    pub target_forwards: usize,
    /// Tokens per verify call.
    pub acceptance_length: f64,
    /// Proposed tokens that became part of the answer, for each verify call.
    pub accepted: Vec<usize>,
    /// Whether the answer is the target's own; absent when sampled, or when not compared.
    pub lossless: Option<bool>,
    /// Time with the draft.
    pub seconds: f64,
    /// Time without the draft, and tokens decoded in it.
    pub plain_seconds: Option<f64>,
    /// Tokens decoded without the draft: the same as with it when lossless.
    pub plain_tokens: Option<usize>,
}

/// Where an answer stops being the target's own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// The prompt's number, from 0.
    pub prompt: usize,
    /// The token's place in the answer, from 0.
    pub index: usize,
    /// The token decoded with the draft.
    pub token: u32,
    /// The token decoded without it.
    pub plain_token: u32,
    /// How far the target's logit of `token` is below that of `plain_token` when decoding without the draft. Within
    /// float rounding (about 1e-5 of the logits' size) the two are tied, and another order of summation over more rows
    /// at once can turn them; it still counts as a loss.
    pub logit_gap: f64,
}

impl PromptResult {
    /// From the answer with the draft and, where it was asked for, the one without.
    pub(crate) fn new(
        (prompt, prompt_tokens): (usize, usize),
        generated: Generated,
        plain: Option<&Generated>,
        greedy: bool,
    ) -> Self {
        let rounds = generated.accepted.len();
        Self {
            prompt,
            prompt_tokens,
            stop: generated.stop,
            target_forwards: rounds,
            acceptance_length: ratio(generated.tokens.len() - 1, rounds),
            accepted: generated.accepted,
            lossless: plain.filter(|_| greedy).map(|plain| plain.tokens == generated.tokens),
            output_ids: generated.tokens,
            seconds: generated.seconds,
            plain_seconds: plain.map(|p| p.seconds),
            plain_tokens: plain.map(|p| p.tokens.len()),
        }
    }
}

impl Report {
    /// Sums up.
    pub(crate) fn new(
        options: &Options,
        results: Vec<PromptResult>,
        first_difference: Option<Difference>,
        seconds: f64,
    ) -> Self {
        let shape = options.speculation;
        let tokens: usize = results.iter().map(|r| r.output_ids.len()).sum();
        let target_forwards = results.iter().map(|r| r.target_forwards).sum();
        let (speed, plain_speed) = if options.parallel { (None, None) } else { speeds(&results) };
        Self {
            mode: if shape.is_chain() { Mode::Chain } else { Mode::Tree },
            steps: shape.steps,
            topk: shape.topk,
            n_nodes: shape.n_nodes,
            temperature: options.sampling.temperature,
            top_p: options.sampling.top_p,
            prompts: results.len(),
            tokens,
            target_forwards,
            acceptance_length: ratio(tokens - results.len(), target_forwards),
            acceptance_per_position: per_position(&results, shape.steps, target_forwards),
            lossless: results.iter().map(|r| r.lossless).try_fold(true, |all, one| Some(all && one?)),
            first_difference,
            tokens_per_second: speed,
            plain_tokens_per_second: plain_speed,
            speedup: speed.zip(plain_speed).map(|(with, without)| with / without),
            seconds,
            results,
        }
    }
}

fn per_position(results: &[PromptResult], steps: usize, target_forwards: usize) -> Vec<f64> {
    let accepted_at = |i: usize| results.iter().flat_map(|r| &r.accepted).filter(|&&n| n > i).count();
    (0..steps).map(|i| ratio(accepted_at(i), target_forwards)).collect()
}

/// Tokens per second with the draft and without.
fn speeds(results: &[PromptResult]) -> (Option<f64>, Option<f64>) {
    let tokens: usize = results.iter().map(|r| r.output_ids.len()).sum();
    let seconds: f64 = results.iter().map(|r| r.seconds).sum();
    let plain_seconds: Option<f64> = results.iter().map(|r| r.plain_seconds).sum();
    let plain_tokens: Option<usize> = results.iter().map(|r| r.plain_tokens).sum();
    let plain = plain_tokens.zip(plain_seconds).map(|(tokens, seconds)| tokens as f64 / seconds);
    (Some(tokens as f64 / seconds), plain)
}

/// `a / b`, and 0 where there is nothing to divide by.
fn ratio(a: usize, b: usize) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}
