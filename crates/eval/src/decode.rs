//! Decoding one prompt, with the draft and without.
//!
//! Tokens t_0..t_{n-1} have been run by target and draft; t_n, the root, is chosen but not run. A round proposes
//! tokens after t_n, runs the target once over t_n and all proposals, accepts some, and commits to the draft the
//! target's states of t_n and the accepted tokens, each beside the token after it: the shift, positions and fresh
//! states of a serving engine.

use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use specforge_methods::{DraftMethod, Drafter, VocabMap};
use specforge_models::{Capture, KvCache, Target, TargetInfo};
use specforge_nn::init::stream;
use specforge_tensor::{Params, Tape, Tensor};

use crate::distribution::{argmax, draw, target_distribution};
use crate::propose::{Choice, Proposal, propose};
use crate::verify::{Verified, verify_greedy, verify_sampled};
use crate::{Error, Options, Result, Sampling, Speculation};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// An end-of-sequence token, which is part of the answer.
    Eos,
    /// `max_new_tokens` reached.
    Length,
    /// Prompt and answer fill the target's context.
    Context,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The answer's tokens.
    pub tokens: Vec<u32>,
    /// For each call of the target that verified proposals, how many of them are part of the answer. Empty without a
    /// draft.
    pub accepted: Vec<usize>,
    /// Why it ended.
    pub stop: Stop,
    /// Wall-clock time, the prompt's included.
    pub seconds: f64,
    /// The target's logits `[V]` for the last token; empty with a draft.
    pub last_logits: Vec<f32>,
}

/// Answers `prompt`, number `index` of a set, by speculative decoding.
pub fn speculate(
    target: &Target,
    method: &dyn DraftMethod,
    params: &Params,
    (index, prompt): (usize, &[u32]),
    options: &Options,
) -> Result<Generated> {
    options.check()?;
    check_vocab(target.info(), method.vocab())?;
    let started = Instant::now();
    let mut answer = Answer::new(target, index, prompt, options.max_new_tokens)?;
    let mut rng = stream(options.sampling.seed, &format!("eval.speculate.{index}"));
    let capture = Capture { layers: method.capture().layers.clone(), last_hidden: true };
    let mut verifier =
        Verifier::new(target, capture, prompt.len() + answer.most + options.speculation.n_nodes)?;
    let mut drafter = method.drafter(params)?;
    // 1. The prompt: row i is the target's state of t_i beside t_{i+1}; the last one is the token just chosen.
    let (states, logits) = verifier.prefill(prompt)?;
    let mut root = choose(&logits, &options.sampling, &mut rng)?;
    let mut stop = answer.take(&[root]);
    let mut draft_logits = Vec::new();
    if stop.is_none() {
        draft_logits = drafter.commit(&states, &[&prompt[1..], &[root]].concat())?;
    }
    // 2. Rounds.
    let mut accepted = Vec::new();
    while stop.is_none() {
        let round = Round { method, options, context: answer.context };
        let (states, verified, tokens) =
            round.run(&mut verifier, &mut *drafter, (root, draft_logits), &mut rng)?;
        let before = answer.tokens.len();
        stop = answer.take(&tokens);
        accepted.push((answer.tokens.len() - before).min(verified.accepted.len()));
        root = verified.bonus;
        draft_logits = if stop.is_none() { drafter.commit(&states, &tokens)? } else { Vec::new() };
    }
    Ok(answer.finish(stop, started, accepted, Vec::new()))
}

/// Answers `prompt`, number `index` of a set, by the target alone, token after token.
pub fn plain(target: &Target, (index, prompt): (usize, &[u32]), options: &Options) -> Result<Generated> {
    options.check()?;
    let started = Instant::now();
    let mut answer = Answer::new(target, index, prompt, options.max_new_tokens)?;
    let mut rng = stream(options.sampling.seed, &format!("eval.plain.{index}"));
    let capture = Capture { layers: Vec::new(), last_hidden: true };
    let mut verifier = Verifier::new(target, capture, prompt.len() + answer.most)?;
    let (_, mut logits) = verifier.prefill(prompt)?;
    loop {
        let token = choose(&logits, &options.sampling, &mut rng)?;
        let stop = answer.take(&[token]);
        if stop.is_some() {
            return Ok(answer.finish(stop, started, Vec::new(), logits));
        }
        logits = verifier.extend(&[token], None)?.1;
    }
}

/// One round of proposing and verifying.
struct Round<'a> {
    method: &'a dyn DraftMethod,
    options: &'a Options,
    context: usize,
}

impl Round<'_> {
    /// Proposes after `root`, verifies and keeps the accepted rows. Returns the target's states of root and accepted
    /// tokens, the outcome, and the new tokens: the accepted ones and the bonus.
    fn run(
        &self,
        verifier: &mut Verifier<'_>,
        drafter: &mut dyn Drafter,
        (root, draft_logits): (u32, Vec<f32>),
        rng: &mut ChaCha8Rng,
    ) -> Result<(Tensor, Verified, Vec<u32>)> {
        // The root sits at position n, so a node of depth d at n + d, which must be inside the context.
        let room = self.context - 1 - verifier.cache.len();
        let asked = self.options.speculation;
        let speculation = Speculation { steps: asked.steps.min(room), ..asked };
        let mut choice = Choice { sampling: self.options.sampling, rng };
        let proposal = propose(drafter, draft_logits, self.method.vocab(), &speculation, &mut choice)?;
        let before = verifier.cache.len();
        let (states, logits) = verifier.run_tree(root, &proposal)?;
        let verified = self.verify(&proposal, &logits, rng)?;
        let rows: Vec<u32> = [0].into_iter().chain(verified.accepted.iter().map(|&n| n as u32 + 1)).collect();
        verifier.cache.keep(before, &rows.iter().map(|&r| r as usize).collect::<Vec<_>>())?;
        let accepted = verified.accepted.iter().map(|&n| proposal.nodes[n].token);
        let tokens = accepted.chain([verified.bonus]).collect();
        Ok((gather(&states, rows)?, verified, tokens))
    }

    /// `logits`: the target's for the root and each node.
    fn verify(&self, proposal: &Proposal, logits: &[f32], rng: &mut ChaCha8Rng) -> Result<Verified> {
        let rows: Vec<&[f32]> = logits.chunks_exact(logits.len() / (1 + proposal.nodes.len())).collect();
        if self.options.sampling.is_greedy() {
            let choices = rows.iter().map(|row| argmax(row, "target")).collect::<Result<Vec<u32>>>()?;
            return Ok(verify_greedy(proposal, &choices));
        }
        let target = |row: usize| target_distribution(rows[row], &self.options.sampling);
        verify_sampled(proposal, self.method.vocab().target_ids(), &target, rng)
    }
}

/// The target with its cache of one sequence.
struct Verifier<'a> {
    target: &'a Target,
    cache: KvCache,
    capture: Capture,
}

impl<'a> Verifier<'a> {
    fn new(target: &'a Target, capture: Capture, capacity: usize) -> Result<Self> {
        Ok(Self { target, cache: KvCache::new(target, capacity)?, capture })
    }

    /// Runs the prompt: the captured states of all its tokens, and the logits after the last.
    fn prefill(&mut self, prompt: &[u32]) -> Result<(Tensor, Vec<f32>)> {
        let captured = self.target.extend(&mut self.cache, prompt, None, &self.capture)?;
        let last = captured.last_hidden.expect("the last hidden state is always captured");
        let last = gather(&last, vec![prompt.len() as u32 - 1])?;
        Ok((captured.hidden_states, self.target.logits(&last)?.to_f32()))
    }

    /// Runs tokens on top of the cache: their captured states and logits, row by row.
    fn extend(&mut self, ids: &[u32], parents: Option<&[u32]>) -> Result<(Tensor, Vec<f32>)> {
        let captured = self.target.extend(&mut self.cache, ids, parents, &self.capture)?;
        let last = captured.last_hidden.expect("the last hidden state is always captured");
        Ok((captured.hidden_states, self.target.logits(&last)?.to_f32()))
    }

    /// Runs the root and everything proposed after it in one pass.
    fn run_tree(&mut self, root: u32, proposal: &Proposal) -> Result<(Tensor, Vec<f32>)> {
        let ids: Vec<u32> = [root].into_iter().chain(proposal.nodes.iter().map(|n| n.token)).collect();
        let parent_row = |parent: Option<usize>| parent.map_or(0, |p| p as u32 + 1);
        let parents: Vec<u32> =
            [u32::MAX].into_iter().chain(proposal.nodes.iter().map(|n| parent_row(n.parent))).collect();
        self.extend(&ids, Some(&parents))
    }
}

/// An answer while it grows.
struct Answer<'a> {
    tokens: Vec<u32>,
    eos: &'a [u32],
    /// Tokens after which it ends, by the request or by the context, and which of the two.
    most: usize,
    full: Stop,
    context: usize,
}

impl<'a> Answer<'a> {
    fn new(target: &'a Target, index: usize, prompt: &[u32], max_new_tokens: usize) -> Result<Self> {
        let info = target.info();
        check_prompt(info, index, prompt)?;
        let context = info.max_position_embeddings;
        let room = context - prompt.len();
        let (most, full) =
            if max_new_tokens <= room { (max_new_tokens, Stop::Length) } else { (room, Stop::Context) };
        Ok(Self { tokens: Vec::new(), eos: &info.eos_token_ids, most, full, context })
    }

    /// Adds tokens up to the first that ends the answer.
    fn take(&mut self, tokens: &[u32]) -> Option<Stop> {
        for &token in tokens {
            self.tokens.push(token);
            if self.eos.contains(&token) {
                return Some(Stop::Eos);
            }
            if self.tokens.len() == self.most {
                return Some(self.full);
            }
        }
        None
    }

    fn finish(
        self,
        stop: Option<Stop>,
        started: Instant,
        accepted: Vec<usize>,
        last_logits: Vec<f32>,
    ) -> Generated {
        let stop = stop.expect("decoding goes on until the answer ends");
        Generated {
            tokens: self.tokens,
            accepted,
            stop,
            seconds: started.elapsed().as_secs_f64(),
            last_logits,
        }
    }
}

/// Refuses a prompt that leaves nothing to decode.
pub(crate) fn check_prompt(target: &TargetInfo, index: usize, prompt: &[u32]) -> Result<()> {
    let (n, context, vocab_size) = (prompt.len(), target.max_position_embeddings, target.vocab_size);
    let unknown = prompt.iter().find(|&&id| id as usize >= vocab_size);
    let reason = match unknown {
        _ if n == 0 => "empty: expected at least one token".to_owned(),
        _ if n >= context => {
            format!("{n} tokens leave no room for an answer: the target's context is {context}")
        }
        Some(id) => format!("token {id}: expected ids below the target's vocabulary of {vocab_size}"),
        None => return Ok(()),
    };
    Err(Error::Prompt { prompt: index, reason })
}

/// Refuses a draft that can name tokens the target does not have.
fn check_vocab(target: &TargetInfo, vocab: &VocabMap) -> Result<()> {
    match vocab.target_ids().last() {
        Some(&token) if token as usize >= target.vocab_size => {
            Err(Error::Vocabulary { token, vocab_size: target.vocab_size })
        }
        _ => Ok(()),
    }
}

/// The token after logits `[V]`.
fn choose(logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> Result<u32> {
    if sampling.is_greedy() {
        return argmax(logits, "target");
    }
    let p = target_distribution(logits, sampling)?;
    Ok(draw(&p, rng).expect("probabilities do not sum to zero") as u32)
}

/// The rows of a matrix.
fn gather(x: &Tensor, rows: Vec<u32>) -> Result<Tensor> {
    let params = Params::new();
    let tape = Tape::inference(&params);
    let rows = Tensor::from_u32(x.device(), rows);
    Ok(tape.gather_rows(&tape.input(x.clone()), &rows)?.value().clone())
}
