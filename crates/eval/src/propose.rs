//! What the draft proposes for one round: a chain, or the tree of EAGLE-2 (Li et al., 2024, arXiv 2406.16858) as
//! SGLang builds it: per level the `topk` likeliest nodes get `topk` children each, and of all candidates the
//! `n_nodes - 1` likeliest are checked.
//!
//! When sampling, children are drawn without replacement instead of being the likeliest, which [`crate::verify`]
//! needs. Which of them are kept must then not depend on what was drawn, or the text would no longer follow
//! the target's distribution: a child ranks by its parent's probability times what its earlier siblings left of
//! the draft's distribution, which is known before it is drawn and bounds its probability from above.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use specforge_methods::{Drafter, VocabMap};

use crate::distribution::{draw, most_probable, softmax};
use crate::{Error, Result, Sampling, Speculation};

/// One proposed token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// The target's id of the token.
    pub token: u32,
    /// The node before it; `None` for the root, the last token already chosen.
    pub parent: Option<usize>,
}

/// The proposals of one round.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Proposal {
    /// Parents come before children, siblings in the order in which they are tried.
    pub nodes: Vec<Node>,
    /// The draft's probabilities `[Vd]` for the token after each node with children. Empty when greedy.
    pub distributions: BTreeMap<Option<usize>, Vec<f64>>,
}

impl Proposal {
    /// The nodes after `parent`, in the order in which they are tried.
    pub fn children(&self, parent: Option<usize>) -> impl Iterator<Item = usize> {
        self.nodes.iter().enumerate().filter(move |(_, node)| node.parent == parent).map(|(i, _)| i)
    }
}

/// A token that may become a node.
struct Candidate {
    token: u32,
    parent: Option<usize>,
    /// The probability of the whole path down to this token by the draft.
    score: f64,
    /// What it is kept by: the score, or when sampling the bound of the score known before the draw.
    rank: f64,
}

/// The draft's random choices, if it makes any.
#[derive(Debug)]
pub struct Choice<'a> {
    /// Greedy takes the likeliest tokens, anything else draws.
    pub sampling: Sampling,
    /// Where draws come from.
    pub rng: &'a mut ChaCha8Rng,
}

/// Lets `drafter` propose: `root` are its logits `[Vd]` after the committed tokens, `vocab` its vocabulary. The depth
/// and size are those of `speculation`, less where the draft's vocabulary has too few tokens. Costs
/// `speculation.steps - 1` calls of [`Drafter::expand`].
pub fn propose(
    drafter: &mut dyn Drafter,
    root: Vec<f32>,
    vocab: &VocabMap,
    speculation: &Speculation,
    choice: &mut Choice<'_>,
) -> Result<Proposal> {
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut distributions = BTreeMap::new();
    // What the drafter calls each candidate it has expanded.
    let mut drafter_nodes = BTreeMap::new();
    let mut frontier = vec![(None, root)];
    for level in 1..=speculation.steps {
        let first = candidates.len();
        for (parent, logits) in frontier.drain(..) {
            let q = distribution(&logits, vocab, &choice.sampling)?;
            let score = parent.map_or(1.0, |p: usize| candidates[p].score);
            let children = choose_children(&q, speculation.topk, choice).into_iter();
            candidates.extend(children.map(|(id, mass)| Candidate {
                token: vocab.target_ids()[id],
                parent,
                score: score * q[id],
                rank: score * mass,
            }));
            distributions.insert(parent, q);
        }
        if level < speculation.steps {
            frontier = expand(drafter, &candidates, first, speculation.topk, &mut drafter_nodes)?;
        }
    }
    if choice.sampling.is_greedy() {
        distributions.clear();
    }
    Ok(keep_best(&candidates, speculation.n_nodes - 1, &mut distributions))
}

fn distribution(logits: &[f32], vocab: &VocabMap, sampling: &Sampling) -> Result<Vec<f64>> {
    if logits.len() != vocab.len() {
        let (expected, got) = (vocab.len(), logits.len());
        return Err(Error::Draft { what: "logits over the draft vocabulary", expected, got });
    }
    softmax(logits, sampling.draft_temperature(), "draft")
}

/// Up to `topk` tokens of the draft vocabulary, each with the mass it is ranked by: its probability, or when drawn
/// what the draws before it have left.
fn choose_children(q: &[f64], topk: usize, choice: &mut Choice<'_>) -> Vec<(usize, f64)> {
    if choice.sampling.is_greedy() {
        return most_probable(q, topk).into_iter().map(|id| (id, q[id])).collect();
    }
    let mut left = q.to_vec();
    let mut children = Vec::with_capacity(topk);
    while children.len() < topk {
        // At most 1 whatever the rounding: no child may rank above its parent.
        let mass = left.iter().sum::<f64>().min(1.0);
        let Some(id) = draw(&left, choice.rng) else { break };
        left[id] = 0.0;
        children.push((id, mass));
    }
    children
}

/// Runs the draft on the `topk` likeliest candidates from number `first` on; returns each one's logits.
fn expand(
    drafter: &mut dyn Drafter,
    candidates: &[Candidate],
    first: usize,
    topk: usize,
    drafter_nodes: &mut BTreeMap<usize, usize>,
) -> Result<Vec<(Option<usize>, Vec<f32>)>> {
    let scores: Vec<f64> = candidates[first..].iter().map(|c| c.score).collect();
    let chosen: Vec<usize> = most_probable(&scores, topk).into_iter().map(|i| first + i).collect();
    let parent = |c: &Candidate| c.parent.map(|p| drafter_nodes[&p]);
    let nodes: Vec<_> = chosen.iter().map(|&c| (candidates[c].token, parent(&candidates[c]))).collect();
    let logits = drafter.expand(&nodes)?;
    if logits.len() != nodes.len() {
        return Err(Error::Draft { what: "rows of logits", expected: nodes.len(), got: logits.len() });
    }
    for &c in &chosen {
        drafter_nodes.insert(c, drafter_nodes.len());
    }
    Ok(chosen.into_iter().map(Some).zip(logits).collect())
}

/// The `n` candidates of highest rank, earlier ones first among equals. A parent ranks no lower than its children
/// and comes earlier, so every ancestor of a kept candidate is kept.
fn keep_best(
    candidates: &[Candidate],
    n: usize,
    distributions: &mut BTreeMap<Option<usize>, Vec<f64>>,
) -> Proposal {
    let ranks: Vec<f64> = candidates.iter().map(|c| c.rank).collect();
    let mut kept = most_probable(&ranks, n);
    kept.sort_unstable();
    let node_of: BTreeMap<usize, usize> = kept.iter().enumerate().map(|(node, &c)| (c, node)).collect();
    let mut proposal = Proposal::default();
    for &c in &kept {
        let parent = candidates[c].parent.map(|p| node_of[&p]);
        if let Some(q) = distributions.remove(&candidates[c].parent) {
            proposal.distributions.insert(parent, q);
        }
        proposal.nodes.push(Node { token: candidates[c].token, parent });
    }
    proposal
}

#[cfg(test)]
mod tests;
